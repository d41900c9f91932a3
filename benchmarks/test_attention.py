"""rel_attention against the reference: time, peak memory and useful TFLOP/s, by shape.

The reference is measured twice: "original", in the original's layout of scores, which is what a Transformer-XL
runs, and "batch-major", the same algorithm rearranged, which is faster. All get the same time-major tensors.
Forward is what evaluation does (no gradient recorded); forward + backward has all six inputs requiring grad.
"""

import dataclasses

import pytest
import torch

from benchmarks.measure import (
    CLOCK,
    Comparison,
    Stopwatch,
    peak_memory,
    rounds_within,
    runner,
    truth_and_reference_by_head,
)
from benchmarks.shapes import SHAPES, TRAINED, shape_for
from reference.eager import rel_attention_eager, rel_attention_original
from tests.accuracy import assert_all_close_to_truth, make_inputs, outputs_and_gradients
from txl_kernels import rel_attention

pytestmark = pytest.mark.benchmark(timer=CLOCK.now)

SECONDS = 6.0  # of timing for each benchmark, all sides together


@pytest.mark.parametrize("name", SHAPES)
def test_forward(benchmark, settings, record, name):
    record(compare(benchmark, settings, name, backward=False))


@pytest.mark.parametrize("name", TRAINED)
def test_forward_backward(benchmark, settings, record, name):
    record(compare(benchmark, settings, name, backward=True))


def compare(benchmark, settings, name, backward):
    """Checks ours by the error policy, then measures all sides: what was found."""
    device, shape = settings.device, shape_for(name, settings.device, settings.smoke)
    inputs = make_inputs(**dataclasses.asdict(shape), dtype=settings.dtype, device=device, layout="tbhd")
    torch.manual_seed(0)
    dout = torch.randn_like(inputs["q"]) if backward else None
    assert_all_close_to_truth(
        outputs_and_gradients(rel_attention, inputs, dout), *truth_and_reference_by_head(inputs, dout)
    )

    stopwatch = Stopwatch(device)
    functions = {"ours": rel_attention, "original": rel_attention_original, "batch-major": rel_attention_eager}
    which = "forward + backward" if backward else "forward"
    sides = fitting({key: runner(function, inputs, dout, which) for key, function in functions.items()}, stopwatch)
    comparison = Comparison(sides, stopwatch)
    rounds = 1 if settings.smoke else rounds_within(SECONDS, sum(stopwatch(side) for side in sides.values()))
    benchmark.group = name
    comparison.run(benchmark, rounds)

    results = comparison.results()
    flop = shape.flop(backward)
    return results | {
        "shape": name,
        "pass": which,
        "sizes": dataclasses.asdict(shape),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "tflop_per_second": {key: flop / seconds / 1e12 for key, seconds in results["seconds"].items()},
        "peak_bytes": {key: peak_memory(side, device) for key, side in sides.items()},
        "out_of_memory": [key for key in functions if key not in sides],
    }


def fitting(sides, stopwatch):
    """The sides after a first call, which pays for compilation; without a reference too large for the GPU."""
    fit = {}
    for name, side in sides.items():
        try:
            stopwatch(side)
        except torch.OutOfMemoryError:
            if name == "ours":
                raise
        else:
            fit[name] = side
    return fit
