"""`make gpu`: the GPU tests, the benchmarks, then the tuner, in parts that can be resumed, each under nine minutes.

Uses the interpreter it runs in and installs nothing. A finished part leaves a file in the state folder and is
skipped the next time; run it again until it says that all parts are done. Once the benchmarks are done their results
are saved, merged, in benchmarks/results/<gpu>/; the tuner, which comes last, prints rows for launch_table.py.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from benchmarks import report, tune
from benchmarks.shapes import PEER_SHAPES, SHAPES

ROOT = Path(__file__).parent.parent
STATE = ROOT / ".benchmarks" / "gpu"
TESTS = ["tests/gpu", "-m", "gpu and not long"]
DTYPES = ("bf16", "fp16", "fp32")


def parts() -> Iterator[tuple[str, list[str]]]:
    """Name and pytest arguments of every part but the tuner, tests first."""
    for dtype in DTYPES:
        yield f"tests-{dtype}", [*TESTS, "-k", dtype]
    yield "tests-others", [*TESTS, "-k", f"not ({' or '.join(DTYPES)})"]
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
    for name in ("families", "longest_audio"):  # what is not installed is skipped
        yield f"benchmark-{name}", [f"benchmarks/test_{name}.py", "--benchmark-only"]


def run_part(name: str, arguments: list[str], seconds: float) -> bool | None:
    """Runs one part: whether it passed, or None when the time was up."""
    command = [sys.executable, "-m", *arguments]
    if name.startswith("benchmark"):
        command += [f"--benchmark-json={STATE / name}.json", "--device=cuda"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    print(f"== {name}", flush=True)
    try:
        status = subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return None
    if status == tune.UNFINISHED:
        return None
    if status == 0:
        (STATE / f"{name}.done").touch()
    return status == 0


def save(results: Path) -> None:
    """Merges the parts' results into one file for this GPU."""
    found = sorted(STATE.glob("benchmark-*.json"))
    device = report.load(found)[0]["extra_info"]["machine"]["device"]
    folder = results / re.sub(r"\W+", "-", device.lower()).strip("-")
    report.main([*map(str, found), "--save", str(folder / f"{date.today()}.json")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="stop before this, to be called again")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="where results are saved")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"no GPU that torch {torch.__version__} sees")
    STATE.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    failed = []

    def run(name: str, arguments: list[str]) -> None:
        if (STATE / f"{name}.done").exists():
            return
        passed = run_part(name, arguments, deadline - time.monotonic())
        if passed is None:
            print(f"time is up in {name}; failed so far: {failed or 'nothing'}; run it again for the rest")
            sys.exit(tune.UNFINISHED)
        if not passed:
            failed.append(name)

    for name, arguments in parts():
        run(name, ["pytest", *arguments])
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    save(options.results)
    minutes = (deadline - time.monotonic()) / 60 - 0.5  # compilation of the last candidate
    run("tune", ["benchmarks.tune", f"--minutes={minutes:.1f}", f"--state={STATE / 'tune.jsonl'}"])
    if failed:
        sys.exit("failed: tune")
    print("all parts are done")


if __name__ == "__main__":
    main()
