"""The longest audio that a Parakeet encoder layer takes in a given memory, before and after `txl_kernels.patch`."""

import pytest
import torch

import txl_kernels
from benchmarks.families import FRAMES_PER_SECOND
from benchmarks.measure import MIB, Stopwatch, longest, peak_memory

SECONDS = 10.0  # that one forward may take
CPU_MEMORY = 256 * MIB  # beyond the model's and the input's; on a GPU all there is


def test_longest_audio(benchmark, settings, record):
    pytest.importorskip("transformers", reason="transformers is not installed (tests/patching/requirements.txt)")
    most = 64 if settings.smoke else None

    def search():
        return {side: longest(_seconds(side, settings), most, 32, SECONDS) for side in ("patched", "own")}

    benchmark.group = "longest audio"
    found = benchmark.pedantic(search, rounds=1)
    record(
        {
            "longest_audio": {side: x | {"minutes": x["T"] / FRAMES_PER_SECOND / 60} for side, x in found.items()},
            "memory": None if settings.device.type == "cuda" else CPU_MEMORY,
            "dtype": "float32",
        }
    )


def _seconds(side, settings):
    """A function of T: the time of one forward, or None if it does not fit."""
    from benchmarks.families import parakeet

    stopwatch = Stopwatch(settings.device)

    def seconds(T: int) -> float | None:
        model, run = parakeet.build(T, 1, 1, settings.smoke)
        model.to(settings.device)
        if side == "patched":
            txl_kernels.patch(model, strict=True)

        def forward():
            with torch.no_grad():
                run(model)

        try:
            if settings.device.type == "cpu" and peak_memory(forward, settings.device) > CPU_MEMORY:
                return None
            return stopwatch(forward)
        except torch.OutOfMemoryError:
            return None

    return seconds
