"""The torch backend, called directly: values, every gradient, layouts, memory."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reference.definition import rel_attention_definition
from tests.accuracy import (
    GRADIENT_FACTOR,
    INPUTS,
    assert_all_close_to_truth,
    assert_close_to_truth,
    make_inputs,
    truth_and_reference,
)
from tests.contract import make_problem, pairs
from tests.test_dropout import keep
from txl_kernels import rel_attention
from txl_kernels.arguments import DIFFERENTIABLE, Inputs, Options
from txl_kernels.torch_backend import backward, forward, tiles

# Several tiles and several groups of lanes at sizes that an eager float64 truth does in milliseconds.
SMALL_TILES = {"TILE_SCORES": 1500, "MAX_ROWS": 16, "MANY_ROWS": 0}
SIX = INPUTS[:6]


@pytest.fixture(params=["whole", "tiled"])
def tiling(request, monkeypatch):
    """Runs a test in one tile by the fused attention, and in many tiles as other devices and long queries."""
    if request.param == "tiled":
        for name, value in SMALL_TILES.items():
            monkeypatch.setattr(tiles, name, value)


def backend_call(
    inputs, is_causal=True, window=None, scale=None, first_distance=None, softcap=None, dropout_p=0.0, **tensors
):
    """Inputs and Options of the backend with rel_attention's defaults."""
    q, k = inputs["q"], inputs["k"]
    tensors = inputs | tensors
    if "segment_ids" in tensors:
        tensors["segment_q_ids"], tensors["segment_k_ids"] = tensors.pop("segment_ids")
    for name in ("r", "attn_mask"):
        x = tensors.get(name)
        tensors[name] = None if x is None else x[(None,) * (4 - x.ndim)]
    left, right = window or (-1, -1)
    return Inputs(**tensors), Options(
        left,
        0 if is_causal else right,
        q.shape[3] ** -0.5 if scale is None else scale,
        k.shape[2] - 1 if first_distance is None else first_distance,
        softcap,
        dropout_p,
    )


def run(inputs, dout=None, dlse=None, wanted=INPUTS, **options):
    """out and lse of the backend, and with dout its gradients by the names in wanted that are inputs."""
    tensors, options = backend_call(inputs, **options)
    out, lse = forward(tensors, options)
    results = {"out": out, "lse": lse}
    if dout is not None:
        needs_grad = [name in inputs and name in wanted for name in DIFFERENTIABLE]
        grads = backward(dout, dlse, tensors, out, lse, options, needs_grad)
        assert [grad is not None for grad in grads] == needs_grad
        for name, grad in zip(DIFFERENTIABLE, grads, strict=True):
            if grad is not None:
                assert grad.shape == getattr(tensors, name).shape
                results[name] = grad.view(inputs[name].shape)
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
    if inputs["q"].dtype == torch.float64:  # truth is another order of the same sums
        assert got.keys() == truth.keys()
        for name in truth:
            torch.testing.assert_close(got[name], truth[name], rtol=1e-12, atol=1e-12)
    else:
        assert_all_close_to_truth(got, truth, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("features", [frozenset(), *pairs()], ids=lambda features: "+".join(sorted(features)))
def test_every_pair_of_features(features, dtype, tiling):
    inputs, options = make_problem(features, dtype=dtype)
    assert_right(inputs, **options)


EVERYTHING = (
    {"window", "band", "float mask", "key lengths", "position query", "row bias", "segment", "softcap", "batched r"},
    {"bidirectional", "right window", "head mask", "no r", "segment", "softcap", "grouped heads", "key lengths"},
    {"bidirectional", "key mask", "row bias", "grouped heads", "shared r", "band"},
)


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


IN_BFLOAT16 = [set(), {"bidirectional"}, {"window"}, {"key lengths"}, {"position query"}, {"grouped heads", "band"},
               {"batched r", "right window"}, {"shared r"}]  # fmt: skip


@pytest.mark.parametrize("in_hardware", [True, False])
@pytest.mark.parametrize("features", IN_BFLOAT16, ids=lambda features: "+".join(sorted(features)))
@pytest.mark.parametrize(("T", "M"), [(1, 100), (33, 60), (300, 150)])
def test_bfloat16_products(T, M, features, in_hardware, monkeypatch):
    """Whether the processor multiplies bfloat16 or not; there are tiles enough that sums over them show."""
    monkeypatch.setattr(tiles, "cpu_multiplies_bfloat16", lambda: in_hardware)
    monkeypatch.setattr(tiles, "MAX_ROWS", 32)
    used, product = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b, **out: used.append(a.dtype) or product(a, b, **out))
    inputs, options = make_problem(frozenset(features), 2 if T > 1 else 32, T=T, M=M, D=24, dtype=torch.bfloat16)
    assert_right(inputs, **options)
    assert (torch.bfloat16 in used) == in_hardware


@pytest.mark.parametrize(
    ("features", "batched"),
    # Products of r that is not time-major, of one head or with a width of its own, are ordinary ones.
    [((), 0), (("bidirectional",), 0), (("window",), 0), (("grouped heads",), 0), (("shared r",), 1),
     (("position query",), 1)],
)  # fmt: skip
def test_bfloat16_of_one_query_reads_time_major_keys_in_order(features, batched, monkeypatch):
    """All heads in one product, not in a batched one."""
    monkeypatch.setattr(tiles, "cpu_multiplies_bfloat16", lambda: True)
    inputs, options = make_problem(frozenset(features), 3, T=1, M=100, D=24, dtype=torch.bfloat16, layout="tbhd")
    tensors, numbers = backend_call(inputs, **options)
    with CountProducts() as seen:
        forward(tensors, numbers)
    assert seen.count == batched
    assert_right(inputs, **options)


@pytest.mark.parametrize("wanted", SIX)
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
    [(("v",), 3), (("q",), 5), (("k",), 4), (("r",), 4), (SIX[4:5], 4), (SIX[5:], 4), (SIX, 8)],
)
def test_only_wanted_gradients_are_computed(wanted, products):
    inputs = make_inputs(1, 2, 21, 13, 8)
    forward_result, dout = run(inputs), upstream(inputs)[0]
    tensors, options = backend_call(inputs)
    needs_grad = [name in wanted for name in DIFFERENTIABLE]
    with CountProducts() as seen:
        backward(dout, None, tensors, *forward_result.values(), options, needs_grad)
    assert seen.count == products


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
@pytest.mark.parametrize(
    ("kind", "B"), [("plain", 1), ("plain", 4), ("window", 1), ("mask", 4), ("dropout", 1), ("lengths", 4)]
)
def test_no_allocation_grows_with_the_number_of_pairs(B, is_causal, kind, monkeypatch):
    """Four times the pairs: the largest allocation of both passes stays, and is that of a tile."""
    monkeypatch.setattr(tiles, "TILE_SCORES", 1 << 16)
    largest = []
    for T in (512, 1024):
        inputs = make_inputs(B, 2, T, T, 2, is_causal=is_causal)
        options = {
            "plain": {},
            "window": {"window": (2 * T, 9)},
            "mask": {"attn_mask": torch.ones(B, 1, 1, 2 * T, dtype=torch.bool), "softcap": 20.0},
            "dropout": {"dropout_p": 0.1, "seed": torch.tensor(5)},
            "lengths": {"key_lengths": torch.full((B,), 2 * T - 1)},
        }[kind]
        with LargestResult() as seen:
            run(inputs, *upstream(inputs), is_causal=is_causal, **options)
        largest.append(seen.largest)
    assert largest[0] == pytest.approx(largest[1], rel=0.1), largest
    assert max(largest) < 4 * tiles.TILE_SCORES * 1.2, largest


def test_plan_bounds_a_tile():
    for B, H, T, S in itertools.product((1, 7, 300), (1, 16), (1, 150, 5000), (1, 300, 10**4, 10**6)):
        for heads_per_key, window in itertools.product((1, H), (None, 0, 1000)):
            size = tiles.plan(B, H, T, S, heads_per_key, window)
            assert min(size) >= 1
            assert size.heads % heads_per_key == 0
            scores = size.batches * size.heads * size.rows * size.keys
            assert scores <= max(tiles.TILE_SCORES, size.keys * heads_per_key)


@pytest.mark.parametrize("wanted", INPUTS)
def test_each_gradient_alone_with_features(wanted, tiling):
    problems = [make_problem(features) for features in EVERYTHING]
    problems += [make_problem({"float mask", "segment", "softcap"})]
    inputs, options = next((x, y) for x, y in problems if wanted in x)
    dout, dlse = upstream(inputs)
    alone = run(inputs, dout, dlse, wanted=(wanted,), **options)
    assert torch.equal(alone[wanted], run(inputs, dout, dlse, **options)[wanted])


@pytest.mark.parametrize("features", [{"bool mask"}, {"float mask"}, {"key lengths"}, {"key lengths", "window"}])
def test_dead_queries(features, tiling):
    """Exactly 0, -inf and no gradient, whatever comes down to them."""
    inputs, options = make_problem(features)
    dout, dlse = upstream(inputs)
    dead = run(inputs, **options)["lse"] == float("-inf")
    assert dead.any()
    clean = run(inputs, dout.masked_fill(dead[..., None], 0), dlse.masked_fill(dead, 0), **options)
    dout, dlse = dout.masked_fill(dead[..., None], float("nan")), dlse.masked_fill(dead, float("nan"))
    got = run(inputs, dout, dlse, **options)
    assert torch.equal(got["out"][dead], torch.zeros_like(got["out"][dead]))
    assert torch.equal(got["q"][dead], torch.zeros_like(got["q"][dead]))
    for name in got:
        assert torch.equal(got[name], clean[name]), name


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("features", [set(), {"bidirectional", "float mask"}, {"window", "softcap", "grouped heads"}])
def test_nan_beyond_the_lengths_reaches_nothing(features, on_host, tiling, monkeypatch):
    """On the host keys are cut off; on a device, whose lengths are not read, they are masked."""
    inputs, options = make_problem(features | {"key lengths"}, B=3)
    options["key_lengths"] = torch.tensor([17, 30, 0])
    dout, dlse = upstream(inputs)
    truth, reference = truth_and_reference(inputs, dout, dlse, **options)
    for name, b in itertools.product("kv", range(3)):
        inputs[name] = inputs[name].clone()
        inputs[name][b, :, options["key_lengths"][b] :] = float("nan")
    if not on_host:
        monkeypatch.setattr(tiles.terms, "lengths_on_host", lambda inputs: inputs.key_lengths is None)
    assert_all_close_to_truth(run(inputs, dout, dlse, **options), truth, reference)


@pytest.mark.parametrize(("T", "M", "window", "lengths"), [(20, 0, (2, 0), [5, 15]), (33, 16, (1, 33), [37, 27])])
def test_dead_queries_of_a_window_beyond_the_lengths(T, M, window, lengths, tiling):
    """In tiles that have keys, for other queries."""
    inputs, options = make_problem(frozenset(), H=2, T=T, M=M, D=4)
    options |= {"window": window, "key_lengths": torch.tensor(lengths)}
    assert_right(inputs, **options)
    assert (run(inputs, **options)["lse"] == -torch.inf).any()


def test_hidden_keys_are_not_multiplied():
    """The work of a window grows with the window, that of short batch elements with their lengths."""

    class Work(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
                a, b = args[-2:]
                self.total += a.numel() * b.shape[-1]
            return func(*args, **(kwargs or {}))

    def work(inputs, **options):
        with Work() as seen:
            run(inputs, *upstream(inputs), **options)
        return seen.total

    inputs = make_inputs(1, 1, 2048, 0, 4)
    assert work(inputs, window=(127, 0)) < 0.25 * work(inputs)
    inputs = make_inputs(2, 1, 512, 0, 4, is_causal=False)
    assert work(inputs, is_causal=False, key_lengths=torch.tensor([256, 256])) < 0.65 * work(inputs, is_causal=False)


# Dropout


def test_dropout_mask_of_the_operator(tiling):
    """With values that pick single keys the output is the dropped weights."""
    B, H, T, M = 2, 3, 20, 5
    inputs = make_inputs(B, H, T, M, T + M, is_causal=False)
    inputs["v"] = torch.eye(T + M).expand(B, H, -1, -1)
    got = run(inputs, is_causal=False, dropout_p=0.4, seed=torch.tensor(77))["out"]
    assert torch.equal(got != 0, keep(0.4, B, H, T, T + M, seed=77))


@pytest.mark.parametrize("features", [set(), {"grouped heads", "segment"}, {"bool mask", "window"}, {"key lengths"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dropout(features, dtype, tiling):
    inputs, options = make_problem(features, dtype=dtype)
    (B, H, T, _), S = inputs["q"].shape, inputs["k"].shape[2]
    dout, dlse = upstream(inputs)
    with_mask = {"kept": keep(0.3, B, H, T, S, seed=5), "dropout_p": 0.3}
    truth, reference = truth_and_reference(inputs, dout, dlse, **options, **with_mask)
    got = run(inputs, dout, dlse, dropout_p=0.3, seed=torch.tensor(5), **options)
    if dtype == torch.float64:
        for name in truth:
            torch.testing.assert_close(got[name], truth[name], rtol=1e-12, atol=1e-12)
    else:
        assert_all_close_to_truth(got, truth, reference)


def test_dropout_repeats_with_the_seed():
    inputs = make_inputs(2, 2, 20, 9, 8)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(rel_attention(**inputs, dropout_p=0.5, backend="torch"))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
