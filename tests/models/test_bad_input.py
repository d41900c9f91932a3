"""Bad input is named."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.layer_tools import original_mask
from tests.models.tools import LENGTHS, SIZES, make_model
from txl_kernels.models import MemTransformerLM, MultiHeadAttn, ProjectedAdaptiveLogSoftmax


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"attn_type": 4}, ValueError, r"attn_type: expected 0, 1, 2 or 3, got 4"),
        (
            {"attn_type": 3, "d_head": 5},
            ValueError,
            r"attn_type 3: expected n_head \* d_head = d_model, got 2 \* 5 and 12",
        ),
        ({"cutoffs": [9, 9]}, ValueError, r"cutoffs: expected 0 < c1 < .* n_token = 29, got \[9, 9\]"),
        ({"cutoffs": [0]}, ValueError, r"cutoffs: .* got \[0\]"),
        ({"cutoffs": [29]}, ValueError, r"cutoffs: .* got \[29\]"),
        ({"cutoffs": [8, 19], "div_val": 4}, ValueError, r"div_val: expected 1 <= div_val\*\*2 <= d_embed = 12, got 4"),
        ({"div_val": 0}, ValueError, r"div_val: .* got 0"),
        ({"tie_projs": [False, True]}, ValueError, r"tie_projs: expected at most 1, .*got \[False, True\]"),
        ({"d_model": 11}, ValueError, r"demb: expected an even width .*, got 11"),
        ({"n_layer": 0}, ValueError, r"n_layer: expected an int >= 1, got 0"),
        ({"d_inner": 2.0}, ValueError, r"d_inner: expected an int >= 1, got 2\.0"),
        ({"n_head": "4"}, ValueError, r"n_head: expected an int >= 1, got '4'"),
        ({"tgt_len": None}, ValueError, r"tgt_len: expected an int >= 1, got None"),
        ({"mem_len": -1}, ValueError, r"mem_len: expected an int >= 0, got -1"),
        ({"same_length": "false"}, ValueError, r"same_length: expected a bool, got 'false'"),
        ({"clamp_len": None}, ValueError, r"clamp_len: expected an int, got None"),
        ({"div_val": 2.0}, ValueError, r"div_val: expected an int, got 2\.0"),
        ({"cutoffs": None}, ValueError, r"cutoffs: expected a sequence, got None"),
        ({"cutoffs": [1.5]}, ValueError, r"cutoffs: each: expected an int, got 1\.5"),
        ({"dropout": float("nan")}, ValueError, r"dropout: expected a probability, got nan"),
        ({"dropatt": 1.0}, ValueError, r"dropatt: expected a probability, below 1, got 1\.0"),
        ({"untie_r": True, "attn_type": 2}, ValueError, r"untie_r: expected attn_type 0, .* got attn_type 2"),
        ({"sample_softmax": 10}, NotImplementedError, r"sample_softmax: expected <= 0 .* got 10"),
    ],
)
def test_bad_arguments_are_named(wrong, error, message):
    with pytest.raises(error, match=message):
        MemTransformerLM(**(SIZES | LENGTHS | {"dropout": 0.0, "dropatt": 0.0} | wrong))


TOKENS = torch.zeros(5, 3, dtype=torch.int64)
MEMS = [torch.zeros(4, 3, 12).double()] * 3


@pytest.mark.parametrize(
    ("data", "target", "mems", "error", "message"),
    [
        ([[1, 2]], TOKENS, [], TypeError, "data: expected a tensor of tokens, got list"),
        (TOKENS.float(), TOKENS, [], TypeError, r"data: expected dtype torch\.int64, got torch\.float32"),
        (TOKENS, TOKENS.int(), [], TypeError, r"target: expected dtype torch\.int64, got torch\.int32"),
        (TOKENS[0], TOKENS, [], ValueError, r"data: expected \(T, B\) with T >= 1, got \(3,\)"),
        (TOKENS[:0], TOKENS, [], ValueError, r"data: .* got \(0, 3\)"),
        (TOKENS, TOKENS[:, :2], [], ValueError, r"target: expected \(1 to 5, 3\) as data, got \(5, 2\)"),
        (TOKENS[1:], TOKENS, [], ValueError, r"target: expected \(1 to 4, 3\) as data, got \(5, 3\)"),
        (TOKENS, TOKENS[:0], [], ValueError, r"target: .* got \(0, 3\)"),
        (TOKENS, TOKENS[0], [], ValueError, r"target: .* got \(3,\)"),
        (TOKENS + 29, TOKENS, [], ValueError, r"data: expected tokens in 0 \.\.\. 28, got 29 \.\.\. 29"),
        (TOKENS, TOKENS - 1, [], ValueError, r"target: expected tokens in 0 \.\.\. 28, got -1 \.\.\. -1"),
        (TOKENS, TOKENS, MEMS[:2], ValueError, r"mems: expected n_layer \+ 1 = 3 tensors or none, got 2"),
        (TOKENS, TOKENS, [*MEMS[:2], MEMS[0][:3]], ValueError, r"mems: .* = \(M, 3, 12\) .* \(3, 3, 12\)\]"),
        (TOKENS[:, :2], TOKENS[:, :2], MEMS, ValueError, r"mems: .* = \(M, 2, 12\) for each, got \[\(4, 3, 12\)"),
    ],
)
@pytest.mark.parametrize("attn_type", [0, 2])
def test_bad_input_is_named(attn_type, data, target, mems, error, message):
    with pytest.raises(error, match=message):
        make_model(attn_type=attn_type)(data, target, *mems)


def test_bad_lengths_are_named():
    model = make_model(same_length=True)
    with pytest.raises(ValueError, match=r"ext_len: expected an int >= 0, got -2"):
        model.reset_length(5, -2, 7)
    model.reset_length(5, 0, 0)
    with pytest.raises(ValueError, match=r"mem_len: expected >= 1 with same_length, .* got 0"):
        model(TOKENS, TOKENS)


def test_losses_want_a_target_for_each_state():
    with pytest.raises(ValueError, match=r"target: expected \(4,\) as hidden, got \(5,\)"):
        ProjectedAdaptiveLogSoftmax(29, 12, 12, [])(torch.zeros(4, 12), torch.zeros(5, dtype=torch.int64))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"h": torch.zeros(4, 3, 11)}, r"h: expected \(T, B, d_model\) with d_model = 12, got \(4, 3, 11\)"),
        ({"h": torch.zeros(4, 12)}, r"h: .* got \(4, 12\)"),
        ({"mems": torch.zeros(2, 1, 12)}, r"mems: expected .* = \(M, 3, 12\) as h, got \(2, 1, 12\)"),
        ({"attn_mask": original_mask(4, 0)}, r"attn_mask: expected \(4, 6, 1\), .* got \(4, 4, 1\)"),
        ({"attn_mask": original_mask(4, 2), "window": (2, -1)}, r"window: expected None with attn_mask, got \(2, -1\)"),
    ],
)
def test_bad_input_of_multi_head_attention_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadAttn(2, 12, 5, 0.0)(**({"h": torch.zeros(4, 3, 12), "mems": torch.zeros(2, 3, 12)} | wrong))


@pytest.mark.parametrize("attn_type", [0, 2])
def test_shapes_without_values(attn_type):
    """As memory estimators and tracers ask for them; nothing is read."""
    with FakeTensorMode():
        tokens = torch.zeros(5, 3, dtype=torch.int64)
        model = MemTransformerLM(**(SIZES | LENGTHS), dropout=0.0, dropatt=0.0, attn_type=attn_type)
        losses, *mems = model(tokens, tokens)
    assert losses.shape == (5, 3)
    assert mems[0].shape == (5, 3, SIZES["d_model"])
