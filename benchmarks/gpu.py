"""`make gpu`: the GPU tests, the benchmarks, then the tuners, in parts that can be resumed, each under nine minutes.

Uses the interpreter it runs in and installs nothing. A finished part leaves a file in the state folder and is
skipped the next time; run it again until it says that all parts are done. Tests run side by side: most of their time
is compilation. Whenever the benchmarks stop, the results so far are saved, merged, in benchmarks/results/<gpu>/. The
tuners, which come last, print rows for launch_table.py and times for the constants of ranges.py. With little time,
choose:

    python -m benchmarks.gpu --only tests benchmark-square tune
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

from benchmarks import report, tune
from benchmarks.shapes import PEER_SHAPES, SHAPES

ROOT = Path(__file__).parent.parent
STATE = ROOT / ".benchmarks" / "gpu"
SHORTLIST = 12  # candidates timed of each pass and head size
DTYPES = ("bf16", "fp16", "fp32")
# File of tests/gpu -> names to divide it by; what has none of them is a part, too.
TESTS = {"kernels_on_gpu": DTYPES, "contract": ("bf16", "fp16", "41", "128"), "layer": ()}


def test_parts() -> Iterator[tuple[str, list[str]]]:
    """Name and pytest arguments of every part with tests."""
    for file, names in TESTS.items():
        for name in (*names, "others"):
            chosen = name if name != "others" else f"not ({' or '.join(names)})" if names else ""
            # a hang shows where it hangs
            options = ["-m", "gpu and not long", "-k", chosen, "-o", "faulthandler_timeout=240"]
            yield f"tests-{file}-{name}", [f"tests/gpu/test_{file}.py", *options]


def benchmark_parts() -> Iterator[tuple[str, list[str]]]:
    """Name and pytest arguments of every part with benchmarks."""
    for shape in SHAPES:
        yield f"benchmark-{shape}", ["benchmarks/test_attention.py", "--benchmark-only", "-k", shape]
    yield "benchmark-hidden-keys", ["benchmarks/test_hidden_keys.py", "--benchmark-only"]
    for shape in PEER_SHAPES:
        yield f"benchmark-peers-{shape}", ["benchmarks/test_peers.py", "--benchmark-only", "-k", shape]
    yield "benchmark-host-time", ["benchmarks/test_host_time.py", "--benchmark-only"]
    for direction in ("causal", "bidirectional"):
        yield f"benchmark-longest-{direction}", ["benchmarks/test_longest.py", "--benchmark-only", "-k", direction]
    for name in ("kept_projections", "evaluation_speed", "memory_helps", "training_speed", "language_model"):
        yield f"benchmark-{name}", [f"benchmarks/test_{name}.py", "--benchmark-only"]
    for name in ("families", "attention_modules", "longest_audio"):  # what is not installed is skipped
        yield f"benchmark-{name}", [f"benchmarks/test_{name}.py", "--benchmark-only"]


def run_part(name: str, arguments: list[str], seconds: float, beside: bool = False) -> bool | None:
    """Runs one part: whether it passed, or None when the time was up. What runs beside others is shown at its end."""
    command = [sys.executable, "-m", *arguments]
    if name.startswith("benchmark"):
        command += [f"--benchmark-json={STATE / name}.json", "--device=cuda"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    log = STATE / f"{name}.log"
    print(f"== {name}", flush=True)
    try:
        with log.open("w") if beside else contextlib.nullcontext() as output:
            run = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=seconds, check=False, stdout=output, stderr=output
            )
    except subprocess.TimeoutExpired:
        return None
    finally:
        if beside:
            print(f"== {name}\n{log.read_text()}", flush=True)
    if run.returncode == tune.UNFINISHED:
        return None
    if run.returncode == 0:
        (STATE / f"{name}.done").touch()
    return run.returncode == 0


def save(results: Path) -> None:
    """Merges the parts' results so far, if any, into one file for this GPU."""
    found = sorted(path for path in STATE.glob("benchmark-*.json") if path.with_suffix(".done").exists())
    if not found:
        return
    device = report.load(found)[0]["extra_info"]["machine"]["device"]
    folder = results / re.sub(r"\W+", "-", device.lower()).strip("-")
    report.main([*map(str, found), "--save", str(folder / f"{date.today()}.json")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="stop before this, to be called again")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="where results are saved")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="the parts whose names begin like this")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"no GPU that torch {torch.__version__} sees")
    STATE.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    failed, unfinished = [], []

    def left(parts: Iterable[tuple[str, list[str]]]) -> dict[str, list[str]]:
        chosen = {name: arguments for name, arguments in parts if name.startswith(tuple(options.only))}
        return {name: x for name, x in chosen.items() if not (STATE / f"{name}.done").exists()}

    def note(name: str, passed: bool | None) -> None:
        if not passed:
            (unfinished if passed is None else failed).append(name)

    tests = left(test_parts())
    with ThreadPoolExecutor(max(1, len(tests))) as side_by_side:
        seconds = deadline - time.monotonic()
        runs = {n: side_by_side.submit(run_part, n, ["pytest", *x], seconds, beside=True) for n, x in tests.items()}
    for name, run in runs.items():
        note(name, run.result())
    for name, arguments in left(benchmark_parts()).items():
        if not unfinished:
            note(name, run_part(name, ["pytest", *arguments], deadline - time.monotonic()))
    save(options.results)
    minutes = (deadline - time.monotonic()) / 60 - 0.5  # compilation of the last candidate
    sizes = [f"--shortlist={SHORTLIST}", f"--processes={os.cpu_count()}"]
    tuner = ["benchmarks.tune", f"--minutes={minutes:.1f}", f"--state={STATE / 'tune.jsonl'}", *sizes]
    for name, arguments in left([("tune", tuner), ("workspace", ["benchmarks.tune_workspace"])]).items():
        if not unfinished:
            note(name, run_part(name, arguments, deadline - time.monotonic()))
    if unfinished:
        print(f"time is up in {', '.join(unfinished)}; failed so far: {failed or 'nothing'}; run it again for the rest")
        sys.exit(tune.UNFINISHED)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    print("all parts are done")


if __name__ == "__main__":
    main()
