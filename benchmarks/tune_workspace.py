"""Times the whole backward on this GPU with workspaces and ranges of several sizes, for `ranges.py`.

    python -m benchmarks.tune_workspace

Results are checked against the error policy first. Prints the milliseconds of each, the fastest marked.
"""

import argparse
import itertools
from statistics import median
from unittest import mock

import torch

from benchmarks.measure import Stopwatch
from benchmarks.tune import Pass
from txl_kernels.triton_backend import ranges
from txl_kernels.triton_backend.plans import PLANS

MEBIBYTES, QUERIES = (16, 32, 64, 128), (512, 1024, 2048)
PROBLEMS = {  # B, H, T, M, D
    "many heads": (8, 8, 1024, 1024, 64),
    "long": (2, 8, 4096, 4096, 128),
    "few heads": (1, 2, 4096, 4096, 64),
}
ROUNDS = 10


def milliseconds(work: Pass, stopwatch: Stopwatch, mebibytes: int, queries: int, rounds: int) -> float:
    """Median time of one backward with these constants of `ranges.py`."""
    constants = mock.patch.multiple(ranges, WORKSPACE=mebibytes << 20, QUERIES=queries)
    with constants, mock.patch.object(PLANS, "most_steps", 0):
        work.check(work.run())
        return 1e3 * median(stopwatch(work.run) for _ in range(rounds))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny inputs, on the CPU in Triton's interpreter too")
    smoke = parser.parse_args(arguments).smoke
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    stopwatch = Stopwatch(device)
    for name, (B, H, T, M, D) in PROBLEMS.items():
        sizes = {"B": 1, "H": 2, "T": 40, "M": 33} if smoke else {"B": B, "H": H, "T": T, "M": M}
        work = Pass("backward", 16 if smoke else D, device, dtype, sizes)
        candidates = [(64, 1024)] if smoke else list(itertools.product(MEBIBYTES, QUERIES))
        times = {x: milliseconds(work, stopwatch, *x, rounds=1 if smoke else ROUNDS) for x in candidates}
        print(f"{name}: B {B}, H {H}, {T} + {M}, head size {D}; MiB, queries: ms", flush=True)
        for (mebibytes, queries), ms in times.items():
            print(f"{'*' if ms == min(times.values()) else ' '} {mebibytes:4} {queries:5} {ms:8.3f}", flush=True)


if __name__ == "__main__":
    main()
