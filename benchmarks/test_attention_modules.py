"""Attention modules of others alone, with their projections, before and after `txl_kernels.patch`: time, peak memory.

They get what their encoder hands them, which is not the same after `patch`: masks have become lengths.
"""

import contextlib
import copy

import pytest
import torch
from torch import Tensor

import txl_kernels
from benchmarks.families import ENCODERS, encoders, parameters
from benchmarks.measure import CLOCK, Comparison, Stopwatch, peak_memory, rounds_within

pytestmark = pytest.mark.benchmark(timer=CLOCK.now)

SECONDS = 1.0  # of timing for each benchmark, both sides together
TOLERANCE = 2e-3  # of the largest entry, as in test_families.py
LENGTHS, B = (750, 1500), 2


def _cases(file):
    return {f"{encoder.family}-{T}": (encoder, T) for encoder in encoders(file) for T in LENGTHS}


@pytest.fixture(scope="module")
def sides(case, settings):
    """The attention of the encoder's only layer, "ours" and "own", which agree."""
    encoder, T = case
    model, run = encoder.build(T, B, 1, settings.smoke)
    own, patched = model.to(settings.device), copy.deepcopy(model).to(settings.device)
    report = txl_kernels.patch(patched, strict=True)
    name = next(entry.name for entry in report.entries if entry.class_name == encoder.attention)
    sides = {"ours": Attention(patched, run, name), "own": Attention(own, run, name)}
    for got, wanted in zip(sides["ours"].results(), sides["own"].results(), strict=True):
        assert (got - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
    return sides


@pytest.mark.parametrize("step", ["forward", "training step"])
@pytest.mark.parametrize("case", parameters(ENCODERS, _cases), scope="module")
def test_attention_modules(benchmark, settings, record, sides, case, step):
    encoder, T = case
    autocast = torch.autocast(settings.device.type, settings.dtype, settings.device.type == "cuda")
    functions = {name: side.steps(autocast)[step] for name, side in sides.items()}
    stopwatch = Stopwatch(settings.device)
    peak = {name: peak_memory(function, settings.device) for name, function in functions.items()}  # warms up, too
    comparison = Comparison(functions, stopwatch)
    rounds = 1 if settings.smoke else rounds_within(SECONDS, sum(map(stopwatch, functions.values())))
    benchmark.group = "attention modules"
    comparison.run(benchmark, rounds)
    record(
        comparison.results()
        | {
            "attention_of": encoder.family,
            "length": f"T = {T}, B = {B}, {encoder.heads}",
            "step": step,
            "peak_bytes": peak,
            "dtype": str(settings.dtype).removeprefix("torch."),
        }
    )


class Attention:
    """A module of a model with the arguments that a run of the model hands it."""

    def __init__(self, model, run, name) -> None:
        self._module, self._args, self._kwargs, self._leaves = model.get_submodule(name), (), {}, {}
        with self._module.register_forward_pre_hook(self._keep, with_kwargs=True):
            run(model)
        self._wanted = [x for x in self._leaves.values() if x.requires_grad]

    def steps(self, autocast):
        """Forward without gradient, and the gradients of arguments that have one in the model and of parameters."""

        def forward():
            with torch.no_grad(), autocast:
                return self._output()

        torch.manual_seed(0)
        out = forward()
        upstream = torch.randn(out.shape).to(out)
        inputs = [*self._wanted, *self._module.parameters()]

        def training_step():
            with autocast:
                out = self._output()
            return torch.autograd.grad(out, inputs, upstream, allow_unused=True)

        return {"forward": forward, "training step": training_step}

    def results(self):
        """What must agree in float32: the output, and gradients of arguments from the recording without padding.

        In padding, queries that see no key send other gradients (README).
        """
        forward, training_step = self.steps(contextlib.nullcontext()).values()
        gradients = training_step()[: len(self._wanted)]
        return [forward(), *(x.select(x.shape.index(B), 0) for x in gradients)]

    def _keep(self, _, args, kwargs):
        self._args, self._kwargs = [self._leaf(x) for x in args], {name: self._leaf(x) for name, x in kwargs.items()}

    def _leaf(self, x):
        """x without its graph; the same for the same, as query may be key."""
        if not isinstance(x, Tensor):
            return x
        return self._leaves.setdefault(id(x), x.detach().requires_grad_(x.requires_grad))

    def _output(self):
        out = self._module(*self._args, **self._kwargs)
        return out if isinstance(out, Tensor) else out[0]
