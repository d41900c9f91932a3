"""The errors of the public function: each names the argument, the wanted and the got."""

import pytest
import torch

from tests.accuracy import make_inputs
from txl_kernels import rel_attention

B, H, T, M, D = 2, 3, 7, 5, 8
S = M + T


def inputs_with(**changes):
    return make_inputs(B, H, T, M, D) | changes


def changed(name, *shape, **options):
    return {name: torch.randn(*shape, **options)}


SEGMENT = (torch.randn(B, H, T, 2), torch.zeros(B, T).int(), torch.zeros(B, S).int())

# What is wrong -> (changes, exception, parts of the message: the argument, the wanted, the got)
BAD = {
    "q is not a tensor": ({"q": [1.0]}, TypeError, ("q:", "tensor", "list")),
    "q has rank 3": (changed("q", H, T, D), ValueError, ("q:", "(B, H, T, D)", f"({H}, {T}, {D})")),
    "k has rank 5": (changed("k", 1, B, H, S, D), ValueError, ("k:", "4 dimensions")),
    "r has rank 2": (changed("r", S, D), ValueError, ("r:", "3 dimensions", "(H, P, Dr)", f"({S}, {D})")),
    "r has another batch": (
        changed("r", 1, H, S, D),
        ValueError,
        ("r:", f"({B}, {H}, {S}, {D})", f"(1, {H}, {S}, {D})"),
    ),
    "batched r shared by heads": (changed("r", B, 1, S, D), ValueError, ("r:", f"({B}, {H}, {S}, {D})")),
    "Hk does not divide H": (changed("k", B, 2, S, D), ValueError, ("k:", "Hk", "divides H = 3", "got 2")),
    "more heads of k than of q": (changed("k", B, 6, S, D), ValueError, ("k:", "divides H = 3", "got 6")),
    "no heads of k": (changed("k", B, 0, S, D), ValueError, ("k:", "divides H = 3", "got 0")),
    "v has other heads": (changed("v", B, 1, S, D), ValueError, ("v:", f"({B}, {H}, {S}, {D})", f"({B}, 1, {S}, {D})")),
    "r has other heads": (changed("r", 2, S, D), ValueError, ("r:", f"({H}, {S}, {D})", f"(2, {S}, {D})")),
    "k has another batch": (changed("k", 1, H, S, D), ValueError, ("k:", f"(1, {H}, {S}, {D})")),
    "v is shorter than k": (changed("v", B, H, S - 1, D), ValueError, ("v:", f"({B}, {H}, {S - 1}, {D})")),
    "v is wider than q": (changed("v", B, H, S, D + 1), ValueError, ("v:",)),
    "r is wider than q": (changed("r", H, S, D + 1), ValueError, ("r:",)),
    "fewer keys than queries": (changed("k", B, H, T - 1, D), ValueError, ("k:", "S >= T", f"S = {T - 1}", f"T = {T}")),
    "too few rows of r": (changed("r", H, S - 1, D), ValueError, ("r:", f"P = S = {S}", f"got {S - 1}")),
    "content_bias has rank 1": (changed("content_bias", D), ValueError, ("content_bias:", "(H, D)", f"({D},)")),
    "position_bias has other heads": (changed("position_bias", 1, D), ValueError, ("position_bias:", f"(1, {D})")),
    "k in float64": (changed("k", B, H, S, D, dtype=torch.float64), TypeError, ("k:", "float32", "float64")),
    "r in bfloat16": (changed("r", H, S, D, dtype=torch.bfloat16), TypeError, ("r:", "float32", "bfloat16")),
    "a bias in float64": (
        changed("content_bias", H, D, dtype=torch.float64),
        TypeError,
        ("content_bias:", "float32", "float64"),
    ),
    "a bias in float16 beside float32": (
        changed("position_bias", H, D, dtype=torch.float16),
        TypeError,
        ("position_bias:", "float32", "float16"),
    ),
    "integers": ({"q": torch.ones(B, H, T, D, dtype=torch.int64)}, TypeError, ("q:", "float16", "int64")),
    "v on another device": (changed("v", B, H, S, D, device="meta"), ValueError, ("v:", "cpu", "meta")),
    "a bias on another device": (changed("content_bias", H, D, device="meta"), ValueError, ("content_bias:", "meta")),
    "is_causal is not a bool": ({"is_causal": 1}, TypeError, ("is_causal:", "bool", "int")),
    "scale is a tensor": ({"scale": torch.ones(())}, TypeError, ("scale:", "float", "Tensor")),
    "first_distance is a float": ({"first_distance": 3.0}, TypeError, ("first_distance:", "int", "float")),
    "window of three": ({"window": (1, 2, 3)}, TypeError, ("window:", "(left, right)", "(1, 2, 3)")),
    "window is a number": ({"window": 4}, TypeError, ("window:", "(left, right)", "4")),
    "window of floats": ({"window": (4.0, 0)}, TypeError, ("window: left:", "int", "float")),
    "window of bools": ({"window": (4, False)}, TypeError, ("window: right:", "int", "bool")),
    "window left of -2": ({"window": (-2, 0)}, ValueError, ("window:", "left >= 0", "-1", "got -2")),
    "window right of -3": ({"window": (0, -3)}, ValueError, ("window:", "right >= 0", "-1", "got -3")),
    "attn_mask is a list": ({"attn_mask": [True]}, TypeError, ("attn_mask:", "tensor or None", "list")),
    "attn_mask of integers": (
        {"attn_mask": torch.ones(T, S, dtype=torch.uint8)},
        TypeError,
        ("attn_mask:", "bool", "float32", "uint8"),
    ),
    "attn_mask in bfloat16 beside float32": (
        changed("attn_mask", T, S, dtype=torch.bfloat16),
        TypeError,
        ("attn_mask:", "bool", "float32", "bfloat16"),
    ),
    "attn_mask in float64 beside float32": (
        changed("attn_mask", T, S, dtype=torch.float64),
        TypeError,
        ("attn_mask:", "float32", "float64"),
    ),
    "attn_mask of other lengths": (
        changed("attn_mask", S, T),
        ValueError,
        ("attn_mask:", "(B, H, T, S)", f"({B}, {H}, {T}, {S})", f"({S}, {T})"),
    ),
    "attn_mask by batch element and key": (changed("attn_mask", B, S), ValueError, ("attn_mask:", f"({B}, {S})")),
    "attn_mask by batch element, not head": (
        changed("attn_mask", B, T, S),
        ValueError,
        ("attn_mask:", f"({B}, {T}, {S})"),
    ),
    "attn_mask has rank 5": (changed("attn_mask", 1, 1, 1, 1, S), ValueError, ("attn_mask:", f"(1, 1, 1, 1, {S})")),
    "attn_mask on another device": (
        changed("attn_mask", T, S, device="meta"),
        ValueError,
        ("attn_mask:", "cpu", "meta"),
    ),
    "key_lengths is a list": ({"key_lengths": [S, S]}, TypeError, ("key_lengths:", "tensor (B,)", "list")),
    "key_lengths of floats": (changed("key_lengths", B), TypeError, ("key_lengths:", "integer", "float32")),
    "key_lengths of bools": (
        {"key_lengths": torch.ones(B, dtype=torch.bool)},
        TypeError,
        ("key_lengths:", "integer", "bool"),
    ),
    "too many key_lengths": (
        {"key_lengths": torch.ones(B + 1).int()},
        ValueError,
        ("key_lengths:", "(B,)", f"({B},)", f"({B + 1},)"),
    ),
    "key_lengths beyond S": (
        {"key_lengths": torch.tensor([0, S + 1])},
        ValueError,
        ("key_lengths:", f"0 to S = {S}", "memory included", f"0 to {S + 1}"),
    ),
    "negative key_lengths": ({"key_lengths": torch.tensor([-1, S])}, ValueError, ("key_lengths:", f"got -1 to {S}")),
    "key_lengths on another device": (
        {"key_lengths": torch.ones(B, dtype=torch.int32, device="meta")},
        ValueError,
        ("key_lengths:", "cpu", "meta"),
    ),
    "dropout_p of 1": ({"dropout_p": 1.0}, ValueError, ("dropout_p:", "[0, 1)", "got 1.0")),
    "negative dropout_p": ({"dropout_p": -0.1}, ValueError, ("dropout_p:", "[0, 1)", "got -0.1")),
    "dropout_p is NaN": ({"dropout_p": float("nan")}, ValueError, ("dropout_p:", "[0, 1)", "got nan")),
    "dropout_p is a tensor": ({"dropout_p": torch.zeros(())}, TypeError, ("dropout_p:", "float", "Tensor")),
    "r is wider than q_pos": (
        changed("q_pos", B, H, T, 5) | {"position_bias": None},
        ValueError,
        ("r:", "as in q_pos", f"({H}, {S}, 5)", f"({H}, {S}, {D})"),
    ),
    "q_pos with position_bias": (changed("q_pos", B, H, T, D), ValueError, ("position_bias:", "None", "q_pos")),
    "q_pos has other lengths": (
        changed("q_pos", B, H, S, D) | {"position_bias": None},
        ValueError,
        ("q_pos:", f"({B}, {H}, {T}, {D})", f"({B}, {H}, {S}, {D})"),
    ),
    "q_pos in float64": (
        changed("q_pos", B, H, T, D, dtype=torch.float64) | {"position_bias": None},
        TypeError,
        ("q_pos:", "float32", "float64"),
    ),
    "q_pos is too wide": (
        changed("q_pos", B, H, T, 257) | {"position_bias": None},
        ValueError,
        ("q_pos:", "1 to 256", "got 257"),
    ),
    "neither r nor r_bias": ({"r": None}, ValueError, ("r:", "r_bias", "None for both")),
    "no r, but position_bias": (
        {"r": None} | changed("r_bias", H, S),
        ValueError,
        ("position_bias:", "None without r", "tensor"),
    ),
    "no r, but q_pos": (
        {"r": None, "position_bias": None} | changed("r_bias", H, S) | changed("q_pos", B, H, T, D),
        ValueError,
        ("q_pos:", "None without r", "tensor"),
    ),
    "r is a list": ({"r": [1.0]}, TypeError, ("r:", "tensor", "list")),
    "r_bias by row and head": (
        changed("r_bias", S, H),
        ValueError,
        ("r_bias:", "(H, P)", f"({H}, {S})", f"({S}, {H})"),
    ),
    "r_bias has other rows than r": (
        changed("r_bias", H, S + 1),
        ValueError,
        ("r_bias:", f"({H}, {S})", f"({H}, {S + 1})"),
    ),
    "r_bias in float64": (
        changed("r_bias", H, S, dtype=torch.float64),
        TypeError,
        ("r_bias:", "float32", "float64"),
    ),
    "too few rows of r_bias": (
        {"r": None, "position_bias": None} | changed("r_bias", H, S - 1),
        ValueError,
        ("r_bias:", f"P = S = {S}", f"got {S - 1}"),
    ),
    "segment of two": ({"segment": SEGMENT[:2]}, TypeError, ("segment:", "(scores, q_ids, k_ids)", "tuple")),
    "segment is a tensor": ({"segment": SEGMENT[0]}, TypeError, ("segment:", "(scores, q_ids, k_ids)", "Tensor")),
    "segment scores of one": (
        {"segment": (SEGMENT[0][..., :1], *SEGMENT[1:])},
        ValueError,
        ("segment: scores:", f"({B}, {H}, {T}, 2)", f"({B}, {H}, {T}, 1)"),
    ),
    "segment scores in float64": (
        {"segment": (SEGMENT[0].double(), *SEGMENT[1:])},
        TypeError,
        ("segment: scores:", "float32", "float64"),
    ),
    "segment ids of keys for queries": (
        {"segment": (SEGMENT[0], SEGMENT[2], SEGMENT[2])},
        ValueError,
        ("segment: q_ids:", f"({B}, {T})", f"({B}, {S})"),
    ),
    "segment ids of queries for keys": (
        {"segment": (SEGMENT[0], SEGMENT[1], SEGMENT[1])},
        ValueError,
        ("segment: k_ids:", f"({B}, {S})", f"({B}, {T})"),
    ),
    "segment ids of floats": (
        {"segment": (*SEGMENT[:2], SEGMENT[2].float())},
        TypeError,
        ("segment: k_ids:", "integer", "float32"),
    ),
    "softcap of 0": ({"softcap": 0.0}, ValueError, ("softcap:", "positive", "got 0.0")),
    "softcap of -1": ({"softcap": -1}, ValueError, ("softcap:", "positive", "got -1")),
    "softcap without bound": ({"softcap": float("inf")}, ValueError, ("softcap:", "finite", "got inf")),
    "scale that is no number": ({"scale": float("nan")}, ValueError, ("scale:", "finite", "got nan")),
    "first_distance beyond int64": ({"first_distance": 2**63}, ValueError, ("first_distance:", "64 bits", str(2**63))),
    "softcap is a string": ({"softcap": "50"}, TypeError, ("softcap:", "float", "str")),
    "wrap_future is a number": ({"wrap_future": 1}, TypeError, ("wrap_future:", "bool", "int")),
    "a hidden future that wraps": ({"wrap_future": True}, ValueError, ("wrap_future:", "False", "is_causal=True")),
    "a future that wraps from elsewhere": (
        {"wrap_future": True, "is_causal": False, "first_distance": S - 1},
        ValueError,
        ("first_distance:", "None", "wrap_future"),
    ),
    "a future that wraps with other rows": (
        changed("r", H, S + T - 1, D) | {"wrap_future": True, "is_causal": False},
        ValueError,
        ("r:", f"P = S = {S}", f"got {S + T - 1}"),
    ),
    "unknown backend": ({"backend": "cuda"}, ValueError, ("backend:", "'triton'", "'torch'", "'cuda'")),
    "triton for CPU tensors": ({"backend": "triton"}, ValueError, ("backend:", "CUDA", "TRITON_INTERPRET", "cpu")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_argument_wanted_and_got(case):
    changes, exception, parts = BAD[case]
    with pytest.raises(exception) as raised:
        rel_attention(**inputs_with(**changes))
    assert str(raised.value).startswith(parts[0])
    for part in parts:
        assert part in str(raised.value)


def test_head_size_over_256():
    with pytest.raises(ValueError, match=r"^q: .*1 to 256, got 257"):
        rel_attention(**make_inputs(1, 1, 2, 0, 257))


def test_bidirectional_needs_the_negative_distances():
    with pytest.raises(ValueError, match=rf"r: .*S \+ T - 1 = {S + T - 1} rows.*got {S + T - 2}"):
        rel_attention(**make_inputs(B, H, T, M, D, P=S + T - 2), is_causal=False)
    assert rel_attention(**make_inputs(B, H, T, M, D, P=S + T - 1), is_causal=False).shape == (B, H, T, D)


def test_triton_refuses_float64():
    inputs = {name: x.double() for name, x in inputs_with().items()}
    with pytest.raises(TypeError, match=r"'triton' takes .* float32, got torch\.float64"):
        rel_attention(**inputs, backend="triton")
