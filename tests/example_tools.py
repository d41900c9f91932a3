"""What the tests of examples/language_model.py share: a run that takes a second, in this process or another."""

import atexit
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import language_model
import torch

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "examples" / "language_model.py"
SLOW_PROGRAM = ROOT / "tests" / "slow_language_model.py"
TEXT = "\n".join(f"{n} times {n} is {n * n}, and {n} and {n} are {2 * n}." for n in range(400))
SIZES = "--n-layer 2 --n-head 2 --d-model 12 --d-head 5 --d-inner 17 --tgt-len 8 --mem-len 9 --batch 4"
SCHEDULE = "--steps 24 --lr 0.01 --warmup 3 --log-every 5 --valid-every 8 --save-every 6"
EVALUATION = "--eval-tgt-len 16 --eval-mem-len 11 --eval-clamp-len 13"
TINY = shlex.split(f"{SIZES} {SCHEDULE} {EVALUATION} --device cpu")


def program(*arguments):
    """The exit status of the program, run here with one thread, as `start` does: others add in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return language_model.main([str(argument) for argument in arguments])
    finally:
        torch.set_num_threads(threads)


def start(*arguments, launcher=(), file=PROGRAM, **options):
    """The program in a process of its own, with one thread."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    command = [sys.executable, *launcher, file, *map(str, arguments)]
    process = subprocess.Popen(command, env=environment, text=True, start_new_session=True, **options)
    atexit.register(_end, process)
    return process


def _end(process):
    """Leaves nothing running behind a failed test."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
