"""Models of others before and after `txl_kernels.patch`: whole forward and training step, time and peak memory."""

import copy

import pytest
import torch

import txl_kernels
from benchmarks.families import PACKAGES, cases, parameters
from benchmarks.measure import CLOCK, Comparison, Stopwatch, peak_memory, rounds_within

pytestmark = pytest.mark.benchmark(timer=CLOCK.now)

SECONDS = 4.0  # of timing for each benchmark, both sides together
TOLERANCE = 2e-3  # of the largest state: float32 through every layer, with weights that prefer some keys


def _cases(file):
    return {f"{case.family}-{case.shape.split(':')[0]}": case for case in cases(file)}


@pytest.mark.parametrize("step", ["forward", "training step"])
@pytest.mark.parametrize("case", parameters(PACKAGES, _cases))
def test_families(benchmark, settings, record, case, step):
    model, run = case.build(settings.smoke)
    own, patched = model.to(settings.device), copy.deepcopy(model).to(settings.device)
    txl_kernels.patch(patched, strict=True)
    with torch.no_grad():
        wanted, got = run(own), run(patched)
    assert (got - wanted).abs().max() <= TOLERANCE * wanted.abs().max()

    def side(model):
        def forward():
            with torch.no_grad(), torch.autocast(settings.device.type, settings.dtype, settings.device.type == "cuda"):
                run(model)

        def training_step():
            model.zero_grad()
            with torch.autocast(settings.device.type, settings.dtype, settings.device.type == "cuda"):
                loss = run(model).float().square().mean()
            loss.backward()

        return forward if step == "forward" else training_step

    sides = {"ours": side(patched), "own": side(own)}
    stopwatch = Stopwatch(settings.device)
    peak = {name: peak_memory(function, settings.device) for name, function in sides.items()}  # warms up, too
    comparison = Comparison(sides, stopwatch)
    rounds = 1 if settings.smoke else rounds_within(SECONDS, sum(map(stopwatch, sides.values())))
    benchmark.group = "families"
    comparison.run(benchmark, rounds)
    record(
        comparison.results()
        | {
            "family": case.family,
            "length": case.shape,
            "step": step,
            "peak_bytes": peak,
            "dtype": str(settings.dtype).removeprefix("torch."),
        }
    )
