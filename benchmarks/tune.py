"""Finds rows for launch_table.py: times every candidate tile on this GPU, or compiles it for GPUs that are not there.

    python -m benchmarks.tune --shortlist 12 --processes 16 --state build/tune.jsonl  # on a GPU; again to go on
    python -m benchmarks.tune --static sm_80 sm_90                                    # without one

On a GPU a candidate counts only if its results are within the error policy of the tests. Without one, candidates are
ranked by what fits into shared memory, then whether products run one by one, then spilled bytes, then
thread-instructions of the main loop a score: none of these is a speed. Compiled kernels stay in Triton's cache, so a
second static sweep takes a fraction of the time.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest import mock

import torch
import triton

from benchmarks.measure import Stopwatch, truth_and_reference_by_head
from tests.accuracy import GRADIENT_FACTOR, OUTPUT_FACTOR, assert_close_to_truth, make_inputs
from tests.compile.ahead_of_time import SHARED_MEMORY_LIMIT, TARGETS, compile_launch
from tests.compile.recorded import launches
from txl_kernels import triton_backend
from txl_kernels.arguments import DIFFERENTIABLE, Inputs, Options
from txl_kernels.triton_backend import call
from txl_kernels.triton_backend.launch_table import Launch, generation_of, is_fenced, launch_for
from txl_kernels.triton_backend.plans import PLANS

KERNELS = {
    "forward": "forward_kernel",
    "dq": "backward_dq_kernel",
    "dkv": "backward_dkv_kernel",
    "dr": "backward_dr_kernel",
}
# Gradients for which a pass runs. dkv runs before dq and dr, with the row of the table: their times have it on top.
NEEDED = {"dq": ("q", "position_bias"), "dkv": ("k", "v", "content_bias"), "dr": ("r",)}
NEEDED["backward"] = tuple(name for names in NEEDED.values() for name in names)
HEAD_SIZES = (64, 128, 256)
ROUNDS = 20
UNFINISHED = 75  # exit status: call again


class Job(NamedTuple):
    """One candidate row."""

    name: str
    D: int
    row: Launch


def candidates(name: str, D: int, generation: str, stages: tuple[int, ...]) -> Iterator[Launch]:
    """The current row, then every other one worth a look; 16 queries or keys only at the largest head size."""
    current = launch_for(name, generation, D, 2)
    yield current
    sizes = (16, 32, 64) if D == 256 else (32, 64, 128)
    descriptors = (False, True) if generation in ("sm_90", "sm_100") else (False,)
    for row in itertools.starmap(Launch, itertools.product(sizes, sizes, (4, 8), stages, (1, 2), descriptors)):
        # More than 32 float32 scores a thread spill in every kernel; fewer than 4 leave warps without work.
        sized = 4 <= row.block_m * row.block_n / (32 * row.num_warps) <= 32
        if sized and row != current and is_fenced(row, name, generation, 2):
            yield row


def jobs(names: list[str], head_sizes: list[int], generation: str, stages: tuple[int, ...]) -> list[Job]:
    """All candidates, the smallest head size first."""
    return [Job(n, D, row) for D in head_sizes for n in names for row in candidates(n, D, generation, stages)]


def compiled(target: str, job: Job, dtype: torch.dtype = torch.bfloat16) -> dict:
    """What the compiler reports of a candidate, by name; "error" alone where it does not compile."""
    started = time.monotonic()
    try:
        recorded = launches(target, job.D, dtype, row=job.row)[KERNELS[job.name]]
        resources = compile_launch(recorded, target)
    except Exception as error:  # whatever the compiler raises: the sweep goes on
        return {"error": _reason(error)}
    return {
        "fits": resources.shared_memory <= SHARED_MEMORY_LIMIT[target],
        "spill": resources.spill_bytes,
        "serialized": resources.serialized,
        "score": resources.instructions_per_score or 0.0,
        "registers": resources.registers,
        "shared": resources.shared_memory,
        "matrix": resources.matrix_instructions,
        "seconds": time.monotonic() - started,
    }


def compilers(processes: int) -> ProcessPoolExecutor:
    """Processes that compile; spawned, since CUDA does not survive a fork."""
    return ProcessPoolExecutor(processes, get_context("spawn"), initializer=os.nice, initargs=(10,))


def ranked(pool: ProcessPoolExecutor, target: str, group: list[Job]) -> list[tuple[Launch, dict]]:
    """The candidates that compile and fit with what the compiler reports of them, best first."""
    reports = zip(group, pool.map(compiled, itertools.repeat(target), group), strict=True)
    good = [(job.row, x) for job, x in reports if x.get("fits")]
    return sorted(good, key=lambda x: (x[1]["serialized"], x[1]["spill"], x[1]["score"]))


def static_sweep(target: str, todo: list[Job], processes: int, shown: int) -> None:
    """Prints the candidates of every pass and head size, best first."""
    with compilers(processes) as pool:
        for (D, name), group in itertools.groupby(todo, key=lambda job: (job.D, job.name)):
            print(
                f"\n{target} {name} {D} (spilled bytes, instructions a score, registers, shared, matrix instructions)"
            )
            group = list(group)
            good = ranked(pool, target, group)
            for place, (row, x) in enumerate(good):
                if place < shown or row == group[0].row:
                    print(
                        f"{'*' if row == group[0].row else ' '} {tuple(row)!s:>24} {x['spill']:5} {x['score']:6.1f} "
                        f"{x['registers']:4} {x['shared']:7} {x['matrix']:4}{' serialized' if x['serialized'] else ''}"
                    )
            print(f"  {len(group) - len(good)} of {len(group)} do not compile or do not fit", flush=True)


class Pass:
    """One pass at one head size on this GPU, with its inputs, the truth and the eager reference."""

    def __init__(self, name: str, D: int, device: torch.device, dtype: torch.dtype, sizes: dict[str, int]) -> None:
        self.name = name
        tensors = make_inputs(**sizes, D=D, dtype=dtype, device=device)
        dout = torch.randn(tensors["q"].shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        self._truth, self._reference = truth_and_reference_by_head(tensors, dout)
        r = tensors["r"].unsqueeze(0)  # (1, H, P, D), as the operator hands it on
        self._inputs, self._dout = Inputs(**tensors | {"r": r}), dout
        self._options = Options(-1, 0, D**-0.5, sizes["T"] + sizes["M"] - 1, None, 0.0)
        self._out, self._lse = triton_backend.forward(self._inputs, self._options)

    def run(self) -> dict[str, torch.Tensor]:
        """Results by name."""
        if self.name == "forward":
            return {"out": triton_backend.forward(self._inputs, self._options)[0]}
        needs = [x in NEEDED[self.name] for x in DIFFERENTIABLE]
        gradients = triton_backend.backward(self._dout, None, self._inputs, self._out, self._lse, self._options, needs)
        return {x: g for x, g in zip(DIFFERENTIABLE, gradients, strict=True) if g is not None}

    def check(self, results: dict[str, torch.Tensor]) -> None:
        """Raises AssertionError where a result is outside the error policy."""
        factor = OUTPUT_FACTOR if self.name == "forward" else GRADIENT_FACTOR
        for name, x in results.items():
            x = x.squeeze(0) if name == "r" else x
            assert_close_to_truth(name, x, self._truth[name], self._reference[name], factor)


def measured(work: Pass, row: Launch, stopwatch: Callable, device: torch.device) -> dict:
    """Median milliseconds of a candidate, captured in a graph so that the host takes no part; or its error."""

    def row_for(name: str, *others: object) -> Launch:
        return row if name == work.name else launch_for(name, *others)

    try:
        with mock.patch.object(call, "launch_for", row_for), mock.patch.object(PLANS, "most_steps", 0):
            work.check(work.run())
            function = work.run
            if device.type == "cuda":
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    work.run()
                function = graph.replay
            stopwatch(function)
            return {"ms": 1e3 * median(stopwatch(function) for _ in range(ROUNDS if device.type == "cuda" else 1))}
    except Exception as error:  # out of shared memory, or wrong results: the sweep goes on
        return {"error": _reason(error)}


def _reason(error: Exception) -> str:
    first, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first[:80]}"


def _faulted(device: torch.device) -> bool:
    """Whether the GPU answers nothing more in this process, as after an illegal access."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def measured_sweep(
    device: torch.device,
    todo: list[Job],
    minutes: float,
    state: Path | None,
    smoke: bool,
    shortlist: Callable[[list[Job]], list[Job]] = list,
) -> bool:
    """Times what the state file does not hold yet, then prints the fastest rows; False when time ran out before.

    shortlist says which of the candidates of a pass and head size are worth the time.
    """
    deadline = time.monotonic() + 60 * minutes
    stopwatch = Stopwatch(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    versions = f"{gpu}, torch {torch.__version__}, triton {triton.__version__}"
    lines = state.read_text().splitlines() if state and state.exists() else []
    known = {tuple(x["job"]): x["result"] for x in map(json.loads, lines) if x["on"] == versions}

    def key(job: Job) -> tuple:
        return (job.name, job.D, *job.row)

    def keep(job: Job, result: dict) -> None:
        if state:
            state.parent.mkdir(parents=True, exist_ok=True)
            with state.open("a") as file:
                file.write(json.dumps({"on": versions, "job": key(job), "result": result}) + "\n")

    finished = True
    for (name, D), group in itertools.groupby(todo, key=lambda job: (job.name, job.D)):
        if time.monotonic() > deadline:
            finished = False
            break
        left = [job for job in shortlist(list(group)) if key(job) not in known]
        if not left:
            continue
        B, T, M = (1, 40, 33) if smoke else (8, 1024, 1024)
        work = Pass(name, D, device, dtype, {"B": B, "H": B, "T": T, "M": M})
        for job in left:
            if time.monotonic() > deadline:
                finished = False
                break
            keep(job, {"error": "did not end"})  # stands where it hangs or takes this process with it
            result = known[key(job)] = measured(work, job.row, stopwatch, device)
            print(name, D, tuple(job.row), result, flush=True)
            keep(job, result)
            if device.type == "cuda" and "error" in result and _faulted(device):
                print("the GPU has faulted: call again for the rest")
                return False
    print(f"\n# {versions}, {date.today()}{'' if finished else ', unfinished'}")
    for name in KERNELS:
        best = {}
        for D in HEAD_SIZES:
            times = {
                tuple(row): x["ms"]
                for (known_name, known_D, *row), x in known.items()
                if (known_name, known_D) == (name, D) and "ms" in x
            }
            if times:
                best[D] = Launch(*min(times, key=times.get))
        if best:
            print(f'"{name}": {{{", ".join(f"{D}: Launch{tuple(row)}" for D, row in best.items())}}},')
    return finished


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--static", nargs="+", choices=TARGETS, metavar="TARGET", help="compile only, for these GPUs")
    parser.add_argument("--passes", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--head-sizes", nargs="+", type=int, choices=HEAD_SIZES, default=list(HEAD_SIZES))
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--processes", type=int, default=2, help="that compile")
    parser.add_argument("--shortlist", type=int, help="time so many of each pass and head size, best by --static, only")
    parser.add_argument("--shown", type=int, default=6, help="candidates printed by the static sweep")
    parser.add_argument("--minutes", type=float, default=9, help="time budget on a GPU")
    parser.add_argument("--state", type=Path, help="keeps the measurements, to go on from")
    parser.add_argument("--smoke", action="store_true", help="tiny inputs, on the CPU in Triton's interpreter too")
    options = parser.parse_args(arguments)
    stages = tuple(options.stages)
    for target in options.static or ():
        static_sweep(target, jobs(options.passes, options.head_sizes, target, stages), options.processes, options.shown)
    if options.static:
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generation = generation_of(device)
    todo = jobs(options.passes, options.head_sizes, generation, stages)
    limits = options.minutes, options.state, options.smoke
    if options.shortlist is None:
        return 0 if measured_sweep(device, todo, *limits) else UNFINISHED
    with compilers(options.processes) as pool:

        def shortlist(group: list[Job]) -> list[Job]:
            best = [group[0]._replace(row=row) for row, _ in ranked(pool, generation, group)[: options.shortlist]]
            return [group[0], *(job for job in best if job != group[0])]

        return 0 if measured_sweep(device, todo, *limits, shortlist) else UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
