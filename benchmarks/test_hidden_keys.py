"""What hidden keys save: rel_attention with a window or half lengths ("ours") against itself with all keys."""

import dataclasses

import pytest
import torch

from benchmarks.measure import CLOCK, Comparison, Stopwatch, rounds_within
from benchmarks.shapes import Shape
from tests.accuracy import make_inputs
from txl_kernels import rel_attention

pytestmark = pytest.mark.benchmark(timer=CLOCK.now)

SECONDS = 6.0  # of timing for each benchmark, both sides together
# name: shape, options that hide keys
CASES = {
    "half_lengths": (Shape(B=4, H=8, T=1024, M=0, D=64, is_causal=False), {"key_lengths": 1 / 2}),
    "window_256": (Shape(B=1, H=8, T=4096, M=0, D=64), {"window": (255, 0)}),
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("name", CASES)
def test_hidden_keys(benchmark, settings, record, name, backward):
    device, (shape, hiding) = settings.device, CASES[name]
    if settings.smoke:
        shape = dataclasses.replace(shape, B=1, H=2, T=33)
    inputs = make_inputs(**dataclasses.asdict(shape), dtype=settings.dtype, device=device, layout="tbhd")
    if "key_lengths" in hiding:
        length = int(hiding["key_lengths"] * shape.T)
        hiding = {"key_lengths": torch.full((shape.B,), length, device=device)}
    leaves = {key: x.requires_grad_(backward) for key, x in inputs.items()}
    dout = torch.ones_like(inputs["q"])

    def runner(options):
        def run():
            out = rel_attention(**leaves, is_causal=shape.is_causal, **options)
            if backward:
                torch.autograd.grad(out, list(leaves.values()), dout)

        return run

    sides, stopwatch = {"ours": runner(hiding), "all keys": runner({})}, Stopwatch(device)
    for side in sides.values():  # compilation
        side()
    comparison = Comparison(sides, stopwatch)
    rounds = 1 if settings.smoke else rounds_within(SECONDS, sum(map(stopwatch, sides.values())))
    benchmark.group = name
    comparison.run(benchmark, rounds)
    record(
        comparison.results()
        | {
            "hidden_keys": name,
            "pass": "forward + backward" if backward else "forward",
            "sizes": dataclasses.asdict(shape),
            "dtype": str(settings.dtype).removeprefix("torch."),
        }
    )
