"""RLlib's attention before and after `patch`: alone, and in its GTrXLNet with memory over several segments.

The files are the installed ones, imported without the rest of Ray.
"""

import copy
import pickle
import types

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

C, D, H, OBS = 24, 16, 2, 8


def make_attention(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    return randomized(rllib.RelativeMultiHeadAttention(C, C, H, D, **options))


def make_model(units: int = 2, M: int = 6) -> torch.nn.Module:
    config = {"max_seq_len": 5, "_disable_preprocessor_api": True}
    torch.manual_seed(0)
    model = rllib.GTrXLNet(
        *(types.SimpleNamespace(shape=(OBS,)), None, 3, config, "model"),
        num_transformer_units=units,
        attention_dim=C,
        num_heads=H,
        head_dim=D,
        memory_inference=M,
        memory_training=M,
    )
    return randomized(model)


def run_segments(model, **segments):
    """Logits and values; from a memory of zeros, which is attended to, and then what each unit was given."""
    B, M = next(iter(segments.values())).shape[0], model.memory_training
    memories = [torch.zeros(B, M, C)] * model.num_transformer_units
    logits, values = [], []
    for x in segments.values():
        out, inputs = model({"obs": x.flatten(0, 1)}, memories, torch.full((B,), x.shape[1]))
        memories = [
            torch.cat([m, i.view(B, -1, C)], 1)[:, i.shape[0] // B :] for m, i in zip(memories, inputs, strict=True)
        ]
        logits.append(out)
        values.append(model.value_function())
    return torch.cat(logits), torch.cat(values), *memories


def segments(*lengths: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {f"x{i}": torch.randn(2, T, OBS) for i, T in enumerate(lengths)}


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
def test_the_network_with_memory_over_segments(train):
    report = assert_same_when_patched(make_model().train(train), run_segments, segments(5, 5, 1, 9))
    assert report.patched == ("attention_layers.0._layer", "attention_layers.2._layer")


def test_autocast():
    """Of the attention: the gate's own code can't run under autocast."""
    torch.manual_seed(1)
    model, x, memory = make_attention(), torch.randn(2, 5, C), torch.randn(2, 6, C)
    assert_same_under_autocast(model, lambda model: model(x, memory))


def test_copies_and_pickles():
    model = make_attention()
    patched, x, memory = copied(model), torch.randn(2, 5, C), torch.randn(2, 6, C)
    assert patched.state_dict().keys() == model.state_dict().keys()
    for again in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        assert "RelativeMultiHeadAttention[txl_kernels]" in str(again)
        assert torch.equal(again(x, memory), patched(x, memory))


def test_nothing_quadratic_is_made():

    def step(model, T):
        inputs, memory = segments(T), [torch.randn(2, T, C)]
        return lambda: model({"obs": inputs["x0"].flatten(0, 1)}, memory, torch.full((2,), T))[0].sum().backward()

    assert_nothing_quadratic(make_model(1), step, 400)
