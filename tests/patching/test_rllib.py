"""RLlib's attention before and after `patch`: alone, and in the units of GTrXLNet with memory over several segments.

Its files are the installed ones, imported without the rest of Ray, which GTrXLNet itself would need.
"""

import copy
import pickle

import pytest
import torch

from tests.patching.loading import skip_without
from tests.patching.tools import (
    assert_nothing_quadratic,
    assert_same_under_autocast,
    assert_same_when_patched,
    copied,
    randomized,
)

skip_without("ray")
from tests.patching import rllib_package as rllib  # noqa: E402

C, D, H = 24, 16, 2


def make_attention(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    return randomized(rllib.RelativeMultiHeadAttention(C, C, H, D, **options))


class Units(torch.nn.Module):
    """What GTrXLNet makes of the package's modules: each unit attends to the memory of its own input."""

    def __init__(self, n: int = 2):
        super().__init__()
        self.attention, self.mlp = torch.nn.ModuleList(), torch.nn.ModuleList()
        for _ in range(n):
            attention = rllib.RelativeMultiHeadAttention(
                C, C, H, D, input_layernorm=True, output_activation=torch.nn.ReLU
            )
            layers = [rllib.SlimFC(C, 32, use_bias=False, activation_fn=torch.nn.ReLU), rllib.SlimFC(32, C)]
            mlp = torch.nn.Sequential(torch.nn.LayerNorm(C), *layers)
            self.attention.append(rllib.SkipConnection(attention, fan_in_layer=rllib.GRUGate(C, 2.0)))
            self.mlp.append(rllib.SkipConnection(mlp, fan_in_layer=rllib.GRUGate(C, 2.0)))

    def forward(self, x, memories):
        seen = []
        for attention, mlp, memory in zip(self.attention, self.mlp, memories, strict=True):
            seen.append(torch.cat([memory, x], 1)[:, -memory.shape[1] :])
            x = mlp(attention(x, memory=memory))
        return x, seen


def make_units() -> torch.nn.Module:
    torch.manual_seed(0)
    return randomized(Units())


def run_segments(model, M: int = 6, **segments):
    """From a memory of zeros, which is attended to."""
    memories = [torch.zeros(2, M, C)] * 2
    outputs = []
    for x in segments.values():
        out, memories = model(x, memories)
        outputs.append(out)
    return torch.cat(outputs, 1)


def segments(*lengths: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {f"x{i}": torch.randn(2, T, C) for i, T in enumerate(lengths)}


@pytest.mark.parametrize("options", [{}, {"input_layernorm": True, "output_activation": torch.nn.ReLU}])
@pytest.mark.parametrize(("T", "M"), [(5, 6), (5, 0), (1, 6), (7, 2)])
def test_attention(options, T, M):
    torch.manual_seed(1)
    inputs = {"inputs": torch.randn(2, T, C), "memory": torch.randn(2, M, C)}
    report = assert_same_when_patched(make_attention(**options), lambda m, **x: m(**x), inputs)
    assert report.patched == ("",)


def test_memory_gets_no_gradient():
    memory = torch.randn(2, 6, C, requires_grad=True)
    copied(make_attention())(torch.randn(2, 5, C), memory).sum().backward()
    assert memory.grad is None


def test_memory_is_needed():
    """As its own: the error is its own, too."""
    model, x = make_attention(), torch.randn(2, 5, C)
    for side in (model, copied(model)):
        with pytest.raises(AttributeError, match="'NoneType' object has no attribute"):
            side(x)


@pytest.mark.parametrize("train", [False, True])
def test_units_with_memory_over_segments(train):
    report = assert_same_when_patched(make_units().train(train), run_segments, segments(5, 5, 1, 9))
    assert report.patched == ("attention.0._layer", "attention.1._layer")


def test_autocast():
    """Of the attention: the gate's own code can't run under autocast."""
    model, (x, memory) = make_attention(), segments(5, 6).values()
    assert_same_under_autocast(model, lambda model: model(x, memory))


def test_copies_and_pickles():
    model = make_attention()
    patched, x, memory = copied(model), torch.randn(2, 5, C), torch.randn(2, 6, C)
    assert patched.state_dict().keys() == model.state_dict().keys()
    for again in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        assert "RelativeMultiHeadAttention[txl_kernels]" in str(again)
        assert torch.equal(again(x, memory), patched(x, memory))


def test_nothing_quadratic_is_made():
    model = make_units()

    def step(model, T):
        inputs = segments(T)
        return lambda: run_segments(model, T, **inputs).sum().backward()

    assert_nothing_quadratic(model, step, 400)
