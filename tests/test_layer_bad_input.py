"""Bad input of the layers is named."""

import pytest
import torch

from tests.layer_tools import C, D, H, make_inputs, make_layer, original_mask, same_length_mask
from txl_kernels import RelLearnableMultiHeadAttn, RelPartialLearnableMultiHeadAttn


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"w": torch.ones(4, C)}, ValueError, r"w: expected \(T, B, d_model\) .* = 12, got \(4, 12\)"),
        ({"w": torch.ones(4, 3, C + 1)}, ValueError, r"w: .* d_model = 12, got \(4, 3, 13\)"),
        ({"w": torch.ones(4, 3, C).half()}, TypeError, r"w: expected dtype torch\.float32 .*float16"),
        ({"mems": torch.ones(3, 2, C)}, ValueError, r"mems: .*= \(M, 3, 12\) as w, got \(3, 2, 12\)"),
        ({"mems": torch.ones(3, 3, C - 1)}, ValueError, r"mems: .*= \(M, 3, 12\) as w, got \(3, 3, 11\)"),
        ({"mems": torch.ones(3)}, ValueError, r"mems: .* got \(3,\)"),
        ({"mems": torch.ones(3, 3, C).double()}, TypeError, r"mems: expected dtype torch\.float32 .*float64"),
        ({"r": torch.ones(6, 1, C)}, ValueError, r"r: expected P >= S = M \+ T = 3 \+ 4 rows, got 6"),
        ({"r": torch.ones(7, 3, C)}, ValueError, r"r: expected \(P, 1, d_model\) .* got \(7, 3, 12\)"),
        ({"r": torch.ones(7, 1, C + 1)}, ValueError, r"r: .* d_model = 12, got \(7, 1, 13\)"),
        ({"r": torch.ones(7)}, ValueError, r"r: .* got \(7,\)"),
        ({"r": torch.ones(7, 1, C).bfloat16()}, TypeError, r"r: expected dtype torch\.float32 .*bfloat16"),
        ({"w": None}, TypeError, "w: expected a tensor, got NoneType"),
        ({"r_w_bias": None}, TypeError, "r_w_bias: expected a tensor, got NoneType"),
        ({"mems": [torch.ones(3, 3, C)]}, TypeError, "mems: expected a tensor, got list"),
        ({"w": torch.tensor(1.0)}, ValueError, r"w: expected \(T, B, d_model\) .* got \(\)"),
        ({"mems": torch.tensor(1.0)}, ValueError, r"mems: .*= \(M, 3, 12\) as w, got \(\)"),
        ({"r_w_bias": torch.ones(D, H)}, ValueError, r"r_w_bias: expected \(H, D\) = \(2, 5\), got \(5, 2\)"),
        ({"r_r_bias": torch.ones(D)}, ValueError, r"r_r_bias: expected \(H, D\) = \(2, 5\), got \(5,\)"),
        ({"r_r_bias": torch.ones(H, D).double()}, TypeError, r"r_r_bias: expected dtype torch\.float32 .*float64"),
        ({"r_w_bias": torch.ones(H, D, device="meta")}, ValueError, r"r_w_bias: expected device cpu .* got meta"),
        ({"attn_mask": torch.ones(4, 7, 2).bool()}, ValueError, r"attn_mask: .* got shape \(4, 7, 2\)"),
        ({"attn_mask": torch.ones(4, 7).bool()}, ValueError, r"attn_mask: .* got shape \(4, 7\)"),
        ({"attn_mask": original_mask(4, 0)}, ValueError, r"\(4, 7, 1\).* got shape \(4, 4, 1\)"),
        ({"attn_mask": original_mask(4, 3).float()}, TypeError, r"attn_mask: .*bool or uint8.* got torch\.float32"),
    ],
)
def test_bad_input_is_named(wrong, error, message):
    with pytest.raises(error, match=message):
        make_layer()(**(make_inputs(4, 3) | wrong))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"w": torch.ones(4, 3, C + 1)}, ValueError, r"w: .* d_model = 12, got \(4, 3, 13\)"),
        ({"r_emb": torch.ones(7, D, H)}, ValueError, r"r_emb: expected \(P, H, D\) = \(P, 2, 5\).* got \(7, 5, 2\)"),
        ({"r_emb": torch.ones(0, H, D)}, ValueError, r"r_emb: .* P >= 1, got \(0, 2, 5\)"),
        ({"r_emb": torch.ones(7, H, D).double()}, TypeError, r"r_emb: expected dtype torch\.float32 .*float64"),
        ({"r_emb": None}, TypeError, "r_emb: expected a tensor, got NoneType"),
        ({"r_bias": torch.ones(6, H)}, ValueError, r"r_bias: expected \(P, H\) = \(7, 2\) as r_emb, got \(6, 2\)"),
        ({"r_bias": torch.ones(7, H).double()}, TypeError, r"r_bias: .* got torch\.float64"),
        ({"r_emb": torch.ones(7, H, D, device="meta")}, ValueError, r"r_emb: expected device cpu .* got meta"),
        ({"r_w_bias": torch.ones(D, H)}, ValueError, r"r_w_bias: expected \(H, D\) = \(2, 5\), got \(5, 2\)"),
    ],
)
def test_bad_input_of_the_learned_layer_is_named(wrong, error, message):
    with pytest.raises(error, match=message):
        make_layer(RelLearnableMultiHeadAttn)(**(make_inputs(4, 3, learned=7) | wrong))


@pytest.mark.parametrize("attn_mask", [None, same_length_mask(5, 6, 7)])
def test_bad_windows_are_named(attn_mask):
    """Also where the mask is a window itself, and the narrower of the two serves."""
    for window, error, message in (
        (5, TypeError, r"window: expected \(left, right\) or None, got 5"),
        (("3", 0), TypeError, "window: left: expected an int, got str"),
        ((-2, 0), ValueError, "window: expected left >= 0, or -1 for unlimited, got -2"),
    ):
        with pytest.raises(error, match=message):
            make_layer()(**make_inputs(5, 6), attn_mask=attn_mask, window=window)


@pytest.mark.parametrize("cls", [RelPartialLearnableMultiHeadAttn, RelLearnableMultiHeadAttn])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"d_head": 257}, "d_head: expected 1 to 256, got 257"),
        ({"d_head": 0}, "d_head: expected 1 to 256, got 0"),
        ({"dropatt": 1.0}, "dropatt: expected a probability below 1, got 1.0"),
        ({"dropatt": -0.1}, "dropatt: expected a probability below 1, got -0.1"),
    ],
)
def test_bad_sizes_are_named_when_the_layer_is_made(cls, wrong, message):
    with pytest.raises(ValueError, match=message):
        cls(**({"n_head": H, "d_model": C, "d_head": D, "dropout": 0.0} | wrong))
