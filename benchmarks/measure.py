"""Measuring two callables against each other: time in alternation, peak memory, agreement."""

import random
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from reference.eager import rel_attention_eager
from tests.accuracy import Tensors, outputs_and_gradients

Thunk = Callable[[], object]

MIB = 1 << 20  # bytes


class Clock:
    """The timer given to pytest-benchmark: it advances by measured seconds only.

    So the saved statistics hold what the stopwatch measured (events on a GPU, without the flush before them).
    """

    def __init__(self) -> None:
        self._seconds = 0.0

    def now(self) -> float:
        return self._seconds

    def advance(self, seconds: float) -> None:
        self._seconds += seconds


CLOCK = Clock()


class Stopwatch:
    """Times one call in seconds: by events behind a flushed L2 on a GPU, by the wall clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._flush = None
        if device.type == "cuda":
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(max(4 * l2_bytes, 256 << 20), dtype=torch.int8, device=device)

    def __call__(self, function: Thunk) -> float:
        if self._flush is None:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


class Comparison:
    """Several ways to compute the same, timed in turn, so that whatever slows the machine down hits all.

    Each round has an order of its own, so that no side always follows the one that leaves the caches emptiest.

    Args:
        sides: callables by name; "ours" is compared with the others.
        stopwatch: times one call.
    """

    def __init__(self, sides: dict[str, Thunk], stopwatch: Callable[[Thunk], float]) -> None:
        self._sides, self._stopwatch = sides, stopwatch
        self._random, self._order = random.Random(0), []
        self.seconds: dict[str, list[float]] = {name: [] for name in sides}

    def run(self, benchmark, rounds: int, after_round: Thunk | None = None) -> None:
        """Fills the pytest-benchmark fixture with the times of ours; in a round the others run before or after it."""

        def before() -> None:
            self._order = self._random.sample(list(self._sides), len(self._sides))
            while (name := self._order.pop()) != "ours":
                self._time(name)

        def after() -> None:
            for name in self._order:
                self._time(name)
            if after_round is not None:
                after_round()

        benchmark.pedantic(self._time_ours, setup=before, rounds=rounds, teardown=after)

    def results(self) -> dict[str, dict[str, float]]:
        """By side: median seconds, and "ratio", how many times faster ours is (median of the paired ratios)."""
        ours = self.seconds["ours"]
        return {
            "seconds": {name: median(times) for name, times in self.seconds.items()},
            "ratio": {
                name: median(theirs / mine for theirs, mine in zip(times, ours, strict=True))
                for name, times in self.seconds.items()
                if name != "ours"
            },
        }

    def _time_ours(self) -> None:
        CLOCK.advance(self._time("ours"))

    def _time(self, name: str) -> float:
        seconds = self._stopwatch(self._sides[name])
        self.seconds[name].append(seconds)
        return seconds


def rounds_within(seconds: float, per_round: float) -> int:
    """How many rounds fit into a time budget: at least 3 for a median, at most 200."""
    return min(max(3, int(seconds / per_round)), 200)


def with_larger_weights(model: nn.Module) -> nn.Module:
    """A new model with its matrices five times larger: fresh ones attend to all keys nearly alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 5
    return model


def peak_memory(function: Thunk, device: torch.device) -> int:
    """Bytes that one call holds at its peak, beyond what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # negative where memory is freed
        peak = max(peak, held)
    return peak


def runner(function: Callable[..., Tensor], inputs: Tensors, dout: Tensor | None, which: str) -> Thunk:
    """One call of a pass of function(**inputs): a callable to be timed.

    Args:
        function: gives out; an input may be without influence on it.
        inputs: all of them require grad, except in the forward.
        dout: the upstream gradient; None in the forward.
        which: "forward" (no gradient recorded), "forward + backward", or "backward" alone, of a graph that is kept.
    """

    def forward():
        with torch.no_grad():
            function(**inputs)

    def forward_backward():
        torch.autograd.grad(function(**leaves), list(leaves.values()), dout, allow_unused=True)

    def backward():
        torch.autograd.grad(out, list(leaves.values()), dout, allow_unused=True, retain_graph=True)

    if which == "forward":
        return forward
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    if which == "forward + backward":
        return forward_backward
    out = function(**leaves)
    return backward


def longest(
    seconds_of: Callable[[int], float | None], most: int | None = None, step: int = 1024, bound: float = 30.0
) -> dict[str, int | float | str]:
    """The longest T, doubled until it no longer goes and then bisected to a sixteenth, and what stops a longer one.

    Args:
        seconds_of: the time of one call with T, or None if memory does not suffice.
        most: not to be exceeded, for a trial.
        step: lengths tried are its multiples.
        bound: seconds that one call may take.

    Returns:
        "T" and "seconds" of the longest (0 if nothing went) and "stopped_by": "memory", "time" or "limit".
    """
    found, too_long = {"T": 0, "seconds": 0.0, "stopped_by": "limit"}, None
    while too_long is None or too_long - found["T"] > max(step, found["T"] // 16):
        T = max(2 * found["T"], step) if too_long is None else (found["T"] + too_long) // (2 * step) * step
        if most is not None and most < T:
            break
        seconds = seconds_of(T)
        if seconds is not None and seconds <= bound:
            found |= {"T": T, "seconds": seconds}
        else:
            found["stopped_by"] = "memory" if seconds is None else "time"
            too_long = T
    return found


def truth_and_reference_by_head(
    inputs: Tensors, dout: Tensor | None, function: Callable[..., Tensor] = rel_attention_eager, **options
) -> tuple[Tensors, Tensors]:
    """tests.accuracy.truth_and_reference of an eager function, a head at a time: float64 scores need not fit."""

    def head(x: Tensor | None, h: int) -> Tensor | None:
        return x if x is None else x.narrow(1 if x.dim() == 4 else 0, h, 1)

    def by_head(inputs: Tensors) -> Tensors:
        parts = [
            outputs_and_gradients(function, {name: head(x, h) for name, x in inputs.items()}, head(dout, h), **options)
            for h in range(inputs["q"].shape[1])
        ]
        return {name: torch.cat([p[name] for p in parts], dim=1 if x.dim() == 4 else 0) for name, x in parts[0].items()}

    return by_head({name: x.double() for name, x in inputs.items()}), by_head(inputs)
