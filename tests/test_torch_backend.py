"""The torch backend, called directly: values, every gradient, layouts, memory."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reference.definition import rel_attention_definition
from tests.accuracy import (
    GRADIENT_FACTOR,
    INPUTS,
    OUTPUT_FACTOR,
    assert_close_to_truth,
    make_inputs,
    truth_and_reference,
)
from txl_kernels.torch_backend import backward, forward, tiles

# Several tiles and several groups of lanes at sizes that an eager float64 truth does in milliseconds.
SMALL_TILES = {"TILE_SCORES": 1500, "MAX_ROWS": 16, "MANY_ROWS": 0}


@pytest.fixture(params=["whole", "tiled"])
def tiling(request, monkeypatch):
    """Runs a test in one tile by the fused attention, and in many tiles as other devices and long queries."""
    if request.param == "tiled":
        for name, value in SMALL_TILES.items():
            monkeypatch.setattr(tiles, name, value)


def options_of(inputs, is_causal=True, scale=None, first_distance=None):
    """The backend's positional options with rel_attention's defaults."""
    q, k = inputs["q"], inputs["k"]
    return (
        is_causal,
        q.shape[3] ** -0.5 if scale is None else scale,
        k.shape[2] - 1 if first_distance is None else first_distance,
    )


def run(inputs, dout=None, dlse=None, wanted=INPUTS, **options):
    """out and lse of the backend, and with dout its gradients by the names in wanted that are inputs."""
    tensors = [inputs.get(name) for name in INPUTS]
    options = options_of(inputs, **options)
    out, lse = forward(*tensors, *options)
    results = {"out": out, "lse": lse}
    if dout is not None:
        needs_grad = [name in inputs and name in wanted for name in INPUTS]
        grads = backward(dout, dlse, *tensors, out, lse, *options, needs_grad)
        assert [grad is not None for grad in grads] == needs_grad
        results |= {name: grad for name, grad in zip(INPUTS, grads, strict=True) if grad is not None}
    return results


def upstream(inputs, seed=7):
    """Random dout and dlse."""
    generator = torch.Generator().manual_seed(seed)
    q = inputs["q"]
    dout = torch.randn(q.shape, generator=generator).to(q.dtype)
    dlse = torch.randn(q.shape[:3], generator=generator)
    return dout, dlse.double() if q.dtype == torch.float64 else dlse


def assert_right(inputs, **options):
    """Output, log-sum-exp and all gradients against the reference, by the error policy."""
    dout, dlse = upstream(inputs)
    truth, reference = truth_and_reference(inputs, dout, dlse, **options)
    got = run(inputs, dout, dlse, **options)
    assert got.keys() == truth.keys()
    for name in truth:
        if inputs["q"].dtype == torch.float64:  # truth is another order of the same sums
            torch.testing.assert_close(got[name], truth[name], rtol=1e-12, atol=1e-12)
            continue
        factor = GRADIENT_FACTOR if name in INPUTS else OUTPUT_FACTOR
        assert_close_to_truth(name, got[name], truth[name], reference[name], factor)


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
    assert_right({name: x for name, x in inputs.items() if name not in INPUTS[4:] or name in biases})


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


@pytest.mark.parametrize("wanted", INPUTS)
def test_each_gradient_alone(wanted, tiling):
    inputs = make_inputs(2, 2, 21, 13, 8)
    dout, dlse = upstream(inputs)
    alone = run(inputs, dout, dlse, wanted=(wanted,))
    assert torch.equal(alone[wanted], run(inputs, dout, dlse)[wanted])


class CountProducts(TorchDispatchMode):
    """Counts batched matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("wanted", "products"),
    # AC and BD for every tile; then dV alone, or dP and: dQ in two terms, dK, dR, one term of dQ for a bias.
    [(("v",), 3), (("q",), 5), (("k",), 4), (("r",), 4), (INPUTS[4:5], 4), (INPUTS[5:], 4), (INPUTS, 8)],
)
def test_only_wanted_gradients_are_computed(wanted, products):
    inputs = make_inputs(1, 2, 21, 13, 8)
    forward_result, dout = run(inputs), upstream(inputs)[0]
    tensors = [inputs[name] for name in INPUTS]
    needs_grad = [name in wanted for name in INPUTS]
    with CountProducts() as seen:
        backward(dout, None, *tensors, *forward_result.values(), *options_of(inputs), needs_grad)
    assert seen.count == products


def test_no_gradient_of_lse(tiling):
    inputs = make_inputs(2, 2, 21, 13, 8)
    dout, dlse = upstream(inputs)
    without, zero = run(inputs, dout), run(inputs, dout, torch.zeros_like(dlse))
    for name in INPUTS:
        torch.testing.assert_close(without[name], zero[name], rtol=0, atol=0)


def test_expanded_upstream_gradients(tiling):
    inputs = make_inputs(2, 3, 21, 13, 8)
    dout, dlse = torch.ones(()).expand(inputs["q"].shape), torch.ones(()).expand(inputs["q"].shape[:3])
    expanded, dense = run(inputs, dout, dlse), run(inputs, dout.contiguous(), dlse.contiguous())
    for name in INPUTS:
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


@pytest.mark.parametrize(("B", "T", "M"), [(0, 5, 3), (2, 0, 3), (2, 0, 0)])
def test_empty(B, T, M):
    inputs = make_inputs(B, 2, T, M, 8)
    got = run(inputs, *upstream(inputs))
    assert got["out"].shape == inputs["q"].shape
    assert got["lse"].shape == inputs["q"].shape[:3]
    for name in INPUTS:
        assert torch.equal(got[name], torch.zeros_like(inputs[name])), name


class LargestResult(TorchDispatchMode):
    """Records the largest tensor storage, in bytes, that any operation makes or writes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("B", [1, 4])
def test_no_allocation_grows_with_the_number_of_pairs(B, is_causal, monkeypatch):
    """Four times the pairs: the largest allocation of both passes stays, and is that of a tile."""
    monkeypatch.setattr(tiles, "TILE_SCORES", 1 << 16)
    largest = []
    for T in (512, 1024):
        inputs = make_inputs(B, 2, T, T, 2, is_causal=is_causal)
        with LargestResult() as seen:
            run(inputs, *upstream(inputs))
        largest.append(seen.largest)
    assert largest[0] == pytest.approx(largest[1], rel=0.1), largest
    assert max(largest) < 4 * tiles.TILE_SCORES * 1.2, largest


def test_plan_bounds_a_tile():
    for B, H, T, S in itertools.product((1, 7, 300), (1, 16), (1, 150, 5000), (1, 300, 10**4, 10**6)):
        size = tiles.plan(B, H, T, S)
        assert min(size) >= 1
        assert size.batches * size.heads * size.rows * S <= max(tiles.TILE_SCORES, S)
