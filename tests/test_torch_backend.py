"""The torch backend, called directly: values, every gradient, layouts."""

import itertools

import pytest
import torch

from reference.definition import rel_attention_definition
from tests.accuracy import GRADIENT_FACTOR, assert_close_to_truth, make_inputs, truth_and_reference
from tests.contract import make_problem, pairs
from tests.torch_backend_tools import EVERYTHING, SIX, assert_right, run, upstream


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "features",
    # Windows of a future that wraps are the public function's.
    [x for x in (frozenset(), *pairs()) if not ("wrapped future" in x and x & {"window", "right window"})],
    ids=lambda features: "+".join(sorted(features)),
)
def test_every_pair_of_features(features, dtype, tiling):
    inputs, options = make_problem(features, dtype=dtype)
    assert_right(inputs, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", EVERYTHING)
@pytest.mark.parametrize("layout", ["bhtd", "tbhd"])
def test_many_features(features, dtype, layout, tiling):
    inputs, options = make_problem(features, dtype=dtype, layout=layout)
    assert_right(inputs, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "features", [{x} for x in ("window", "grouped heads", "batched r", "shared r", "position query", "band")]
)
def test_one_query_with_features(features, dtype, tiling):
    inputs, options = make_problem(features, T=1, M=29, dtype=dtype)
    assert_right(inputs, **options)


@pytest.mark.parametrize("left", [9, 10, 11])  # of distances up to 10: the farthest pair hidden, and none
def test_window_as_long_as_the_keys(left, tiling):
    assert_right(make_inputs(2, 2, 4, 7, 8), window=(left, -1))


@pytest.mark.parametrize("right", [38, 39, 40])  # of distances from -39
def test_right_window_as_long_as_the_keys(right, tiling):
    assert_right(make_inputs(2, 2, 40, 7, 8, is_causal=False), is_causal=False, window=(-1, right))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("key_heads", [1, 4])
@pytest.mark.parametrize("T", [1, 5])
def test_output_is_laid_out_as_the_queries(T, key_heads, order, tiling):
    inputs = make_inputs(2, 4, T, 4, 8)
    inverse = sorted(range(3), key=order.__getitem__)
    q = inputs["q"] = inputs["q"].permute(*order, 3).contiguous().permute(*inverse, 3)
    inputs |= {name: inputs[name][:, :key_heads] for name in "kv"}
    out = run(inputs)["out"]
    strides = ([step for step, size in zip(x.stride(), q.shape, strict=True) if size > 1] for x in (out, q))
    assert next(strides) == next(strides)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_causal", [True, False])
def test_every_dtype(dtype, is_causal, tiling):
    assert_right(make_inputs(3, 2, 37, 21, 16, dtype=dtype, is_causal=is_causal), is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("B", "H", "T", "M", "D"),
    [
        (2, 3, 17, 0, 41),  # no memory, the head size of wt103 base
        (1, 5, 33, 7, 64),  # one batch: lanes are heads
        (3, 2, 1, 40, 16),  # one query: no rel-shift
        (1, 1, 1, 0, 1),  # the smallest problem
        (2, 2, 5, 50, 1),
        (1, 2, 150, 10, 3),  # more than one tile of the default height
        (1, 2, 300, 10, 3),  # too many queries for one piece
    ],
)
def test_sizes(B, H, T, M, D, is_causal, tiling):
    assert_right(make_inputs(B, H, T, M, D, is_causal=is_causal), is_causal=is_causal)


def test_against_the_definition(tiling):
    inputs = make_inputs(2, 2, 9, 5, 4, dtype=torch.float64)
    out, lse = rel_attention_definition(**inputs, return_lse=True)
    got = run(inputs)
    torch.testing.assert_close(got["out"], out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got["lse"], lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("P", "first_distance"),
    [
        (10, 12),  # a band: some pairs are farther, some nearer
        (80, 60),  # starts beyond the farthest key
        (6, 5),  # only the nearest keys
        (4, 200),  # no pair in reach
        (4, -100),  # nor here
    ],
)
@pytest.mark.parametrize("T", [1, 20])
def test_banded_rows(P, first_distance, is_causal, T, tiling):
    inputs = make_inputs(2, 2, T, 35 - T, 8, P=P, is_causal=is_causal)
    assert_right(inputs, is_causal=is_causal, first_distance=first_distance)


def test_unused_rows_get_zero_gradient(tiling):
    T, M, extra = 19, 8, 6
    inputs = make_inputs(2, 2, T, M, 8, P=T + M + extra)
    grad = run(inputs, *upstream(inputs))["r"]
    assert grad[:, : T + M].abs().amax(-1).min() > 0
    assert torch.equal(grad[:, T + M :], torch.zeros_like(grad[:, T + M :]))


@pytest.mark.parametrize("biases", [("content_bias",), ("position_bias",), ()])
def test_missing_biases(biases, tiling):
    inputs = make_inputs(2, 2, 20, 9, 8)
    assert_right({name: x for name, x in inputs.items() if name not in SIX[4:] or name in biases})


def test_scale(tiling):
    assert_right(make_inputs(2, 2, 20, 9, 8), scale=0.71)


@pytest.mark.parametrize("B", [1, 3])
def test_time_major_views(B, tiling):
    inputs = make_inputs(B, 2, 21, 13, 10, layout="tbhd")
    assert not inputs["k"].is_contiguous()
    assert_right(inputs)
    assert run(inputs)["out"].permute(2, 0, 1, 3).is_contiguous()


def test_views_of_one_projection(tiling):
    """q, k and v as slices of one tensor (T, B, 3, H, D), as the original layer makes them."""
    heads = torch.randn(30, 2, 3, 2, 10, generator=torch.Generator().manual_seed(0))
    inputs = make_inputs(2, 2, 18, 12, 10)
    inputs |= {name: x.permute(1, 2, 0, 3) for name, x in zip("qkv", heads.unbind(2), strict=True)}
    inputs["q"] = inputs["q"][:, :, 12:]
    assert_right(inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_biases_beside_half_inputs(dtype, tiling):
    inputs = make_inputs(2, 2, 20, 9, 8, dtype=dtype)
    rounded = inputs | {name: x.float() for name, x in inputs.items() if name.endswith("bias")}
    dout, dlse = upstream(inputs)
    truth, reference = truth_and_reference(inputs, dout, dlse)
    for name, x in run(rounded, dout, dlse).items():
        wanted = reference[name].to(x.dtype) if name.endswith("bias") else reference[name]
        assert_close_to_truth(name, x, truth[name], wanted, GRADIENT_FACTOR)


@pytest.mark.parametrize("wanted", SIX)
def test_each_gradient_alone(wanted, tiling):
    inputs = make_inputs(2, 2, 21, 13, 8)
    dout, dlse = upstream(inputs)
    alone = run(inputs, dout, dlse, wanted=(wanted,))
    assert torch.equal(alone[wanted], run(inputs, dout, dlse)[wanted])


def test_no_gradient_of_lse(tiling):
    inputs = make_inputs(2, 2, 21, 13, 8)
    dout, dlse = upstream(inputs)
    without, zero = run(inputs, dout), run(inputs, dout, torch.zeros_like(dlse))
    for name in SIX:
        torch.testing.assert_close(without[name], zero[name], rtol=0, atol=0)


def test_expanded_upstream_gradients(tiling):
    inputs = make_inputs(2, 3, 21, 13, 8)
    dout, dlse = torch.ones(()).expand(inputs["q"].shape), torch.ones(()).expand(inputs["q"].shape[:3])
    expanded, dense = run(inputs, dout, dlse), run(inputs, dout.contiguous(), dlse.contiguous())
    for name in SIX:
        assert torch.equal(expanded[name], dense[name]), name


@pytest.mark.parametrize(("B", "T", "M"), [(4, 150, 150), (1, 300, 20), (2, 1, 500)])
def test_bitwise_repeatable(B, T, M):
    inputs = make_inputs(B, 3, T, M, 20)
    first, second = (run(inputs, *upstream(inputs)) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_future_changes_nothing(tiling):
    inputs = make_inputs(2, 2, 20, 9, 8)
    changed = {name: x.clone() for name, x in inputs.items()}
    changed["k"][:, :, 22:] = 1e4  # visible to queries 13 and later only
    changed["v"][:, :, 22:] = -1e4
    got, other = run(inputs), run(changed)
    for name in ("out", "lse"):
        assert torch.equal(got[name][:, :, :13], other[name][:, :, :13]), name
        assert not torch.equal(got[name][:, :, 13:], other[name][:, :, 13:]), name


@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_nan_stays_in_its_batch_element(name, tiling):
    inputs = make_inputs(3, 2, 20, 9, 8)
    dout, dlse = upstream(inputs)
    clean = run(inputs, dout, dlse)
    poisoned = inputs | {"dout": dout}
    poisoned[name] = poisoned[name].clone()
    poisoned[name][1] = float("nan")
    got = run(poisoned, poisoned.pop("dout"), dlse)
    for result in ("out", "lse", "q", "k", "v"):
        for b in (0, 2):
            assert torch.equal(got[result][b], clean[result][b]), (result, b)
    assert got["q"][1].isnan().all()
    assert got["r"].isnan().any()
