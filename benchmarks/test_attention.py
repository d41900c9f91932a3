"""rel_attention against the eager reference: time, peak memory and useful TFLOP/s, by shape.

Forward is what evaluation does (no gradient recorded); forward + backward has all six inputs requiring grad.
"""

import dataclasses

import pytest
import torch

from benchmarks.measure import CLOCK, Pair, Stopwatch, peak_memory, rounds_within, truth_and_reference_by_head
from benchmarks.shapes import SHAPES, TRAINED, shape_for
from reference.eager import rel_attention_eager
from tests.accuracy import assert_all_close_to_truth, make_inputs, outputs_and_gradients
from txl_kernels import rel_attention

pytestmark = pytest.mark.benchmark(timer=CLOCK.now)

SECONDS = 5.0  # of timing for each benchmark, both sides together


@pytest.mark.parametrize("name", SHAPES)
def test_forward(benchmark, settings, record, name):
    record(compare(benchmark, settings, name, backward=False))


@pytest.mark.parametrize("name", TRAINED)
def test_forward_backward(benchmark, settings, record, name):
    record(compare(benchmark, settings, name, backward=True))


def compare(benchmark, settings, name, backward):
    """Checks that both sides agree by the error policy, then measures them: what was found."""
    device, shape = settings.device, shape_for(name, settings.device, settings.smoke)
    inputs = make_inputs(**dataclasses.asdict(shape), dtype=settings.dtype, device=device)
    torch.manual_seed(0)
    dout = torch.randn_like(inputs["q"]) if backward else None
    assert_all_close_to_truth(
        outputs_and_gradients(rel_attention, inputs, dout), *truth_and_reference_by_head(inputs, dout)
    )

    def runner(function):
        def forward():
            with torch.no_grad():
                function(**inputs)

        def forward_backward():
            torch.autograd.grad(function(**leaves), list(leaves.values()), dout)

        leaves = {key: x.detach().requires_grad_() for key, x in inputs.items()}
        return forward_backward if backward else forward

    ours, reference = runner(rel_attention), runner(rel_attention_eager)
    stopwatch = Stopwatch(device)
    stopwatch(ours)  # the first call of a size pays for compilation and allocation
    reference = fitting(reference, stopwatch)
    pair = Pair(ours, reference, stopwatch)
    sides = [side for side in (ours, reference) if side is not None]
    rounds = 1 if settings.smoke else rounds_within(SECONDS, sum(stopwatch(side) for side in sides))
    benchmark.group = name
    pair.run(benchmark, rounds)

    results = pair.results()
    tflop = shape.flop(backward) / 1e12
    reference_seconds = results["reference_seconds"]
    return results | {
        "shape": name,
        "pass": "forward + backward" if backward else "forward",
        "sizes": dataclasses.asdict(shape),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "rounds": rounds,
        "tflop_per_second": tflop / results["seconds"],
        "reference_tflop_per_second": tflop / reference_seconds if reference_seconds else None,
        "peak_bytes": peak_memory(ours, device),
        "reference_peak_bytes": peak_memory(reference, device) if reference else None,
        "reference": "eager" if reference else "out of memory",
    }


def fitting(reference, stopwatch):
    """The reference after a first call, or None when the GPU has too little memory for it."""
    try:
        stopwatch(reference)
    except torch.OutOfMemoryError:
        return None
    return reference
