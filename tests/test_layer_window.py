"""The window of the layers: what a same_length mask says, also where the mask would not be recognised."""

import pytest
import torch

from tests.layer_tools import make_inputs, make_layer, original_mask, run, same_length_mask
from txl_kernels import RelLearnableMultiHeadAttn, RelPartialLearnableMultiHeadAttn
from txl_kernels.layer_mask import Visibility

LAYERS = {"partial": RelPartialLearnableMultiHeadAttn, "learned": RelLearnableMultiHeadAttn}


@pytest.mark.parametrize("mem_len", [1, 3, 8, 11, 40])
@pytest.mark.parametrize(("T", "M"), [(5, 6), (1, 9), (5, 0)])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_window_says_what_the_mask_says(kind, T, M, mem_len):
    layer = make_layer(LAYERS[kind], torch.float64)
    inputs = make_inputs(T, M, dtype=torch.float64, learned=M + T if kind == "learned" else None)
    gout = torch.randn(T, 3, 12, generator=torch.Generator().manual_seed(2)).double()
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = layer(**leaves, window=(mem_len - 1, -1))
    leaves |= dict(layer.named_parameters())
    got = dict(zip(leaves, torch.autograd.grad(out, leaves.values(), gout, materialize_grads=True), strict=True))
    wanted = run(layer, inputs, gout, same_length_mask(T, M, mem_len))
    torch.testing.assert_close({"out": out.detach()} | got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["causal", "same_length", "padded", "keys"])
def test_a_mask_and_a_window_both_hide(kind):
    T, M = 5, 6
    layer, inputs = make_layer(dtype=torch.float64), make_inputs(T, M, dtype=torch.float64)
    padded = original_mask(T, M) | (torch.arange(M + T)[:, None] < torch.tensor([0, 1, 8]))
    keys = torch.zeros(M + T, 3, dtype=torch.bool)
    keys[7, 1] = True
    mask = {
        "causal": original_mask(T, M),
        "same_length": same_length_mask(T, M, 6),
        "padded": padded,
        "keys": keys,
    }[kind]
    for mem_len in (4, 7):
        far = same_length_mask(T, M, mem_len).bool() & ~original_mask(T, M)
        wanted = layer(**inputs, attn_mask=mask | far)
        torch.testing.assert_close(layer(**inputs, attn_mask=mask, window=(mem_len - 1, -1)), wanted)
    assert torch.equal(layer(**inputs, attn_mask=mask, window=(-1, -1)), layer(**inputs, attn_mask=mask))


def test_what_a_window_leaves_of_another():
    for first, second, both in (
        (None, None, None),
        (None, (3, -1), (3, -1)),
        ((5, -1), None, (5, -1)),
        ((5, -1), (3, -1), (3, -1)),
        ((5, -1), (7, 0), (5, 0)),
        ((5, -1), (-1, -1), (5, -1)),
        ((5, -1), (0, -1), (0, -1)),
    ):
        assert Visibility(first).within(second) == Visibility(both)
