"""The optional arguments of rel_attention in the kernels: every one, pairs and random sets, in Triton's interpreter."""

import functools
from unittest import mock

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from reference.eager import rel_attention_eager
from tests.accuracy import assert_all_close_to_truth, outputs_and_gradients, truth_and_reference
from tests.contract import FEATURES, compatible, make_problem, pairs
from txl_kernels import dropout, rel_attention
from txl_kernels.triton_backend import call, launch_forward, ranges
from txl_kernels.triton_backend.launch_table import Launch

triton_attention = functools.partial(rel_attention, backend="triton")
SIZES = {"B": 2, "H": 2, "T": 21, "M": 9, "D": 8}
# Where few keys are visible a softmax gradient cancels, to 0 for one key; float32 kernels, which take delta from the
# output, then keep a rounding of the terms. Random problems are checked in the dtype that models use.
HALF = {"dtype": torch.float16}
# One problem for each form of the position term, everything else together.
TOGETHER = {
    "one query operand": {"window", "float mask", "key lengths", "row bias", "segment", "softcap", "grouped heads"},
    "position query": {"bidirectional", "position query", "row bias", "segment", "head mask", "shared r"},
    "no r": {"bidirectional", "no r", "right window", "key mask", "key lengths", "softcap"},
    "batched r": {"batched r", "band", "bool mask", "row bias", "grouped heads", "window"},
}


def upstream(inputs):
    generator = torch.Generator().manual_seed(1)
    shape = inputs["q"].shape
    return torch.randn(shape, generator=generator), torch.randn(shape[:3], generator=generator)


def check(features, seed=1, **sizes):
    inputs, options = make_problem(frozenset(features), seed=seed, **(SIZES | sizes))
    truth, reference = truth_and_reference(inputs, *upstream(inputs), **options)
    got = outputs_and_gradients(triton_attention, inputs, *upstream(inputs), **options)
    assert_all_close_to_truth(got, truth, reference)
    return got


@pytest.mark.parametrize("feature", FEATURES)
def test_each_argument(feature, use_tiles):
    use_tiles(16, 16)
    check({feature})


@pytest.mark.parametrize("tile", [(32, 16), (16, 32)], ids=["32x16", "16x32"])
@pytest.mark.parametrize("name", TOGETHER)
def test_many_arguments_together(name, tile, use_tiles):
    use_tiles(*tile)
    check(TOGETHER[name], T=37, M=20, **HALF)


@pytest.mark.long
@pytest.mark.parametrize("features", pairs(), ids="+".join)
def test_every_pair(features, use_tiles):
    use_tiles(16, 16)
    check(features, T=18, M=5, **HALF)


@pytest.mark.parametrize("name", TOGETHER)
def test_each_gradient_alone(name, use_tiles):
    """Bit for bit what it is when all are asked for."""
    use_tiles(16, 16)
    inputs, options = make_problem(frozenset(TOGETHER[name]), **SIZES)
    dout, _ = upstream(inputs)
    together = outputs_and_gradients(triton_attention, inputs, dout, **options)
    for wanted in inputs:
        alone = {n: x.clone().requires_grad_(n == wanted) for n, x in inputs.items()}
        given = alone | options
        if "segment_ids" in given:
            given["segment"] = (given.pop("segment_scores"), *given.pop("segment_ids"))
        (got,) = torch.autograd.grad(triton_attention(**given), [alone[wanted]], dout)
        assert torch.equal(got, together[wanted]), wanted


# (QUERIES, pairs that the workspace holds): what they divide of 2 x 2 heads of 37 queries and 57 keys
RANGES = {
    "queries": (32, 8192),
    "heads": (64, 3000),
    "batch elements": (64, 6000),
    "keys and heads": (64, 1000),
    "queries, keys and heads": (16, 600),
}


@pytest.mark.parametrize("name", RANGES)
def test_what_small_workspaces_divide(name, use_ranges):
    use_ranges(*RANGES[name])
    parts = ranges.ranges_of(2, 2, 37, 57, None, 57, itemsize=2)
    firsts = {"batch elements": "b_first", "heads": "h_first", "queries": "i_first", "keys": "j_first"}
    divided = {what for what, field in firsts.items() if len({getattr(part, field) for part in parts}) > 1}
    assert divided - {"batch elements"} == set(name.replace(" and", ",").split(", ")) - {"batch elements"}
    assert ("batch elements" in divided) == (name != "queries")


@pytest.mark.parametrize("divided", RANGES)
@pytest.mark.parametrize("name", [*TOGETHER, "window", "right window", "nothing"])
def test_ranges_of_the_workspace(name, divided, use_tiles, use_ranges):
    """Sums over ranges of pairs, whatever these divide."""
    use_tiles(16, 16)
    use_ranges(*RANGES[divided])
    features = TOGETHER.get(name, {name} - {"nothing"})
    if name == "right window":
        features = features | {"bidirectional"}
    check(features, T=37, M=20, **HALF)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", [*TOGETHER, "window", "key lengths", "nothing"])
def test_ranges_of_keys(name, dtype, use_tiles, monkeypatch):
    """Few queries: the keys go to several programs, whose results are put together; some have no visible key."""
    use_tiles(16, 16)
    monkeypatch.setattr(launch_forward, "_RANGE_KEYS", 16)
    kernel, grids = launch_forward.combine_kernel, []
    monkeypatch.setattr(
        launch_forward,
        "combine_kernel",
        mock.MagicMock(arg_names=kernel.arg_names, __getitem__=lambda _, x: grids.append(x) or kernel[x]),
    )
    check(TOGETHER.get(name, {name} - {"nothing"}), T=5, M=85, dtype=dtype)
    assert grids == [(4, 1, 1)]


def test_float32_beside_float16(use_tiles):
    """What is added in float32 may come in float32, and gets its gradient in float32."""
    use_tiles(16, 16)
    inputs, options = make_problem(frozenset({"row bias", "float mask", "segment"}), **SIZES, **HALF)
    for name in ("content_bias", "position_bias", "r_bias", "attn_mask", "segment_scores"):
        inputs[name] = inputs[name].float()
    truth, reference = truth_and_reference(inputs, *upstream(inputs), **options)
    got = outputs_and_gradients(triton_attention, inputs, *upstream(inputs), **options)
    assert_all_close_to_truth(got, truth, reference)


@pytest.mark.parametrize("feature", ["bool mask", "float mask", "key lengths"])
def test_queries_without_a_key(feature, use_tiles):
    """Output exactly 0, log-sum-exp -inf, no gradient, whatever comes from above."""
    use_tiles(16, 16)
    got = check({feature})
    dead = got["lse"] == float("-inf")
    assert 0 < dead.sum() < dead.numel()
    assert torch.count_nonzero(got["out"][dead]) == 0
    assert torch.count_nonzero(got["q"][dead]) == 0


def test_nan_from_the_log_sum_exp_of_no_key(use_tiles):
    """logaddexp of two -inf, say, sends a NaN down; it goes no further."""
    use_tiles(16, 16)
    inputs, options = make_problem(frozenset({"bool mask"}), **SIZES)
    dout, dlse = upstream(inputs)
    clean = outputs_and_gradients(triton_attention, inputs, dout, dlse, **options)
    dlse[clean["lse"] == float("-inf")] = float("nan")
    got = outputs_and_gradients(triton_attention, inputs, dout, dlse, **options)
    assert all(torch.equal(got[name], clean[name]) for name in clean)


# Narrower than a tile, and wide enough for tiles that every query sees whole between two edges.
@pytest.mark.parametrize("window", [(0, -1), (3, -1), (80, -1), (5, 0), (0, 0), (-1, 4), (37, -1), (33, 3), (36, 36)])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_windows(window, is_causal, use_tiles):
    use_tiles(16, 16)
    features = frozenset() if is_causal else frozenset({"bidirectional"})
    inputs, options = make_problem(features, **(SIZES | {"B": 1, "T": 55, "M": 20}), **HALF)
    options["window"] = window
    truth, reference = truth_and_reference(inputs, *upstream(inputs), **options)
    got = outputs_and_gradients(triton_attention, inputs, *upstream(inputs), **options)
    assert_all_close_to_truth(got, truth, reference)


# Of dkv, dq and dr: smaller or larger than those of the pass before, and of another shape.
TILES = [((16, 16), (32, 32), (32, 32)), ((32, 32), (16, 16), (16, 16)), ((16, 32), (32, 16), (32, 16))]


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("window", [(-1, 0), (32, 0), (32, 15)], ids=["causal", "causal window", "window"])
def test_every_pass_with_a_tile_of_its_own(window, tiles, descriptors, monkeypatch):
    """What a pass leaves in the workspace, and where it leaves nothing, does not follow the tiles of the next.

    Both edges of what a query sees meet corners of tiles, behind which dkv stores nothing.
    """
    rows = {name: Launch(*tile, 4, 1, 1, descriptors) for name, tile in zip(("dkv", "dq", "dr"), tiles, strict=True)}
    monkeypatch.setattr(call, "launch_for", lambda name, *_: rows.get(name, Launch(32, 16, 4, 1)))
    inputs, options = make_problem(frozenset({"bidirectional"}), **(SIZES | {"T": 77, "M": 32}), **HALF)
    options["window"] = window
    truth, reference = truth_and_reference(inputs, *upstream(inputs), **options)
    got = outputs_and_gradients(triton_attention, inputs, *upstream(inputs), **options)
    assert_all_close_to_truth(got, truth, reference)


def test_tiles_outside_the_window_are_skipped(use_tiles):
    """A masked tile would multiply its NaN with 0, and show it."""
    use_tiles(16, 16)
    inputs, options = make_problem(frozenset(), **(SIZES | {"T": 32, "M": 64}))
    options["window"] = (7, -1)
    dout, _ = upstream(inputs)
    clean = outputs_and_gradients(triton_attention, inputs, dout, **options)
    for name in ("k", "v"):
        inputs[name][:, :, :48] = float("nan")  # query 0 sees keys from 57 on: the tiles from 48 on
    got = outputs_and_gradients(triton_attention, inputs, dout, **options)
    assert all(torch.equal(got[name], clean[name]) for name in clean)
    assert torch.count_nonzero(got["k"][:, :, :57]) == 0


def test_nan_in_rows_of_r_that_only_keys_before_the_window_use(use_tiles):
    use_tiles(16, 16)
    inputs, options = make_problem(frozenset(), **(SIZES | {"T": 32, "M": 64}))
    options["window"] = (7, -1)
    clean = outputs_and_gradients(triton_attention, inputs, *upstream(inputs), **options)
    inputs["r"][..., : 96 - 8, :] = float("nan")  # distances 95 ... 8
    got = outputs_and_gradients(triton_attention, inputs, *upstream(inputs), **options)
    assert all(torch.equal(got[name], clean[name]) for name in clean)


def test_keys_beyond_the_lengths_are_not_read(use_tiles):
    """A length inside a tile that every query sees whole: what lies beyond has no gradient, and may be NaN."""
    use_tiles(16, 16)
    inputs, options = make_problem(frozenset({"bidirectional"}), **SIZES)
    options["key_lengths"] = torch.tensor([11, 30])
    clean = outputs_and_gradients(triton_attention, inputs, *upstream(inputs), **options)
    assert_all_close_to_truth(clean, *truth_and_reference(inputs, *upstream(inputs), **options))
    for name in ("k", "v"):
        assert torch.count_nonzero(clean[name][0, :, 11:]) == 0
        inputs[name][0, :, 11:] = float("nan")
    got = outputs_and_gradients(triton_attention, inputs, *upstream(inputs), **options)
    assert all(torch.equal(got[name], clean[name]) for name in clean)


MASKS = [(1, 1, 1, 1), (1, 2, 1, 30), (2, 1, 21, 1), (2, 2, 1, 1), (1, 1, 21, 30), (2, 2, 21, 30)]


@pytest.mark.parametrize("sizes", MASKS)
@pytest.mark.parametrize("expanded", [True, False], ids=["expanded", "broadcast"])
def test_float_masks_of_every_shape(sizes, expanded, use_tiles):
    """The gradient is summed over what the mask is broadcast along; an expanded mask is not copied."""
    use_tiles(16, 16)
    inputs, options = make_problem(frozenset(), **SIZES)
    small = torch.randn(sizes, generator=torch.Generator().manual_seed(2))
    inputs["attn_mask"] = small.expand(2, 2, 21, 30) if expanded else small
    truth, reference = truth_and_reference(inputs, *upstream(inputs), **options)
    got = outputs_and_gradients(triton_attention, inputs, *upstream(inputs), **options)
    assert_all_close_to_truth(got, truth, reference)


def test_offsets_beyond_two_to_the_31(use_tiles):
    """Keys so far apart that the last of 18 lies beyond 2^31 elements; of the 4 GiB only their rows are touched."""
    use_tiles(16, 16)
    inputs, options = make_problem(frozenset(), **(SIZES | {"B": 1, "H": 1, "T": 5, "M": 13}), **HALF)
    wanted = outputs_and_gradients(triton_attention, inputs, *upstream(inputs), **options)
    stride = 2**27
    far = torch.zeros(17 * stride + 8, dtype=torch.float16).as_strided((1, 1, 18, 8), (1, 1, stride, 1))
    inputs["k"] = far.copy_(inputs["k"])
    got = outputs_and_gradients(triton_attention, inputs, *upstream(inputs), **options)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("low", [-1e4, -1e6, -1e9, torch.finfo(torch.float32).min])
def test_low_finite_masks_hide_nothing(low, dtype, use_tiles):
    """A row of one low number has the weights of a row of zeros, as far as float32 adds them, forward and backward."""
    use_tiles(16, 16)
    inputs, options = make_problem(frozenset(), **SIZES, dtype=dtype)
    inputs["attn_mask"] = torch.zeros(21, 1)
    inputs["attn_mask"][::2] = low
    dout, _ = upstream(inputs)
    truth, reference = (
        outputs_and_gradients(rel_attention_eager, {n: x.to(to) for n, x in inputs.items()}, dout, **options)
        for to in (torch.float64, torch.float32)
    )
    got = outputs_and_gradients(triton_attention, inputs, dout, **options)
    assert all(x.isfinite().all() for x in got.values())
    for name in ("out", "v", "q"):
        # Where float32 has lost digits of the scores, so has the reference.
        lost = (reference[name] - truth[name]).abs().max()
        assert (got[name] - truth[name]).abs().max() <= 2 * lost + 2e-3 * truth[name].abs().max(), name


def draw_seed(seed):
    """The seed that rel_attention draws."""
    torch.manual_seed(seed)
    value = torch.randint(2**62, ())
    torch.manual_seed(seed)
    return value


def kept_of(seed, inputs, dropout_p):
    (B, H, T, _), S = inputs["q"].shape, inputs["k"].shape[2]
    return dropout.kept(seed, slice(0, B), slice(0, H), slice(0, T), slice(0, S), H, dropout_p)


@pytest.mark.parametrize("features", [set(), {"float mask"}, {"bidirectional", "grouped heads", "segment"}])
def test_dropout(features, use_tiles):
    """Against the reference with the same mask: the hash of dropout.py, written a second time."""
    use_tiles(16, 16)
    inputs, options = make_problem(frozenset(features), seed=1, **SIZES)
    kept = kept_of(draw_seed(5), inputs, 0.4)
    assert 0.5 < kept.float().mean() < 0.7
    dropping = options | {"dropout_p": 0.4}
    truth, reference = truth_and_reference(inputs, *upstream(inputs), **dropping, kept=kept)
    torch.manual_seed(5)
    got = outputs_and_gradients(triton_attention, inputs, *upstream(inputs), **dropping)
    assert_all_close_to_truth(got, truth, reference)


@pytest.mark.parametrize("tile", [(16, 16), (32, 16), (16, 32), (64, 64)])
def test_dropout_mask_does_not_depend_on_the_tiles(tile, use_tiles):
    """Recovered with v = identity, it is the same for any tiles."""
    use_tiles(*tile)
    inputs, options = make_problem(frozenset({"bidirectional"}), **(SIZES | {"D": 30}))
    inputs["v"] = torch.eye(30).expand(2, 2, 30, 30)
    kept = kept_of(draw_seed(6), inputs, 0.3)
    weights = triton_attention(**inputs, **options)
    torch.manual_seed(6)
    dropped = triton_attention(**inputs, **options, dropout_p=0.3)
    assert torch.equal(dropped != 0, kept)
    torch.testing.assert_close(dropped, weights * kept / 0.7)


@pytest.mark.parametrize("name", TOGETHER)
def test_operators_pass_opcheck(name, use_tiles):
    """Among others: real and fake kernels agree on shapes, dtypes and strides, forward and backward."""
    use_tiles(16, 16)
    inputs, options = make_problem(frozenset(TOGETHER[name]), layout="tbhd", **(SIZES | {"T": 5, "M": 3}))
    # opcheck compares gradients of a sum, which a log-sum-exp of -inf makes NaN: every query sees key 0.
    if "key_lengths" in options:
        options["key_lengths"].clamp_(min=1)
    for mask in (inputs.get("attn_mask"), options.get("attn_mask")):
        if mask is not None:
            mask[..., 0] = 1
    ids = options.get("segment_ids", (None, None))
    leaves = [None if inputs.get(n) is None else inputs[n].clone().requires_grad_() for n in INPUT_NAMES]
    if "attn_mask" in options:
        leaves[8] = options["attn_mask"]
    numbers = (-1, 0, 0.25, 7, options.get("softcap"), 0.2, False)
    call = (*leaves, *ids, options.get("key_lengths"), torch.tensor(3), *numbers, "triton")
    operator = torch.ops.txl_kernels.rel_attention.default
    assert set(torch.library.opcheck(operator, call).values()) == {"SUCCESS"}
    out, lse = operator(*call)
    backward = torch.ops.txl_kernels.rel_attention_backward.default
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in call]
    needs_grad = [n in inputs for n in INPUT_NAMES]
    saved = (torch.ones_like(out), lse.detach(), *detached[:14], out.detach(), lse.detach(), *detached[14:], needs_grad)
    assert set(torch.library.opcheck(backward, saved).values()) == {"SUCCESS"}


INPUT_NAMES = (
    *("q", "k", "v", "r", "content_bias", "position_bias"),
    *("q_pos", "r_bias", "attn_mask", "segment_scores"),
)


def random_problem(data):
    features = data.draw(st.sets(st.sampled_from(FEATURES), max_size=6).filter(compatible))
    T, M = data.draw(st.integers(1, 36)), data.draw(st.integers(0, 36))
    B, H, D = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, 20))
    # The largest error of the reference is a yardstick only where results have a few numbers.
    assume(B * H * T >= 8 and H * min(D, M + T) >= 8)
    sizes = {"B": B, "H": H, "T": T, "M": M, "D": D, "layout": data.draw(st.sampled_from(["bhtd", "tbhd"]))}
    tile = data.draw(st.sampled_from([(16, 16), (32, 16), (16, 32)]))
    workspace = data.draw(st.sampled_from([(64, 2**20), *RANGES.values()]))
    return features, sizes, tile, workspace


def check_random_problem(data):
    features, sizes, tile, (queries, pairs) = random_problem(data)
    row = Launch(*tile, num_warps=4, num_stages=1)
    with (
        mock.patch.object(call, "launch_for", return_value=row),
        mock.patch.multiple(ranges, ALIGNMENT=32, QUERIES=queries, WORKSPACE=2 * pairs),
    ):
        check(features, seed=data.draw(st.integers(0, 99)), **sizes, **HALF)


@given(st.data())
@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])
def test_random_problems(data):
    check_random_problem(data)


@pytest.mark.long
@given(st.data())
@settings(max_examples=400, deadline=None, phases=[Phase.generate])
def test_many_random_problems(data):
    check_random_problem(data)
