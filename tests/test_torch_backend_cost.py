"""What the torch backend computes and allocates: no gradient that is not wanted, no hidden tile, nothing of T x S."""

import itertools
import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.accuracy import make_inputs
from tests.contract import make_problem
from tests.torch_backend_tools import SIX, CountProducts, assert_right, backend_call, run, upstream
from txl_kernels.arguments import DIFFERENTIABLE
from txl_kernels.torch_backend import backward, forward, tiles

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
    # Products of r that is not time-major, of one head or with a width of its own, are batched.
    [((), 0), (("bidirectional",), 0), (("window",), 0), (("grouped heads",), 0), (("shared r",), 1),
     (("position query",), 1)],
)  # fmt: skip
def test_bfloat16_of_one_query_reads_time_major_tensors_in_order(features, batched, monkeypatch):
    """All heads in one product, not in a batched one."""
    monkeypatch.setattr(tiles, "cpu_multiplies_bfloat16", lambda: True)
    inputs, options = make_problem(frozenset(features), 3, T=1, M=100, D=24, dtype=torch.bfloat16, layout="tbhd")
    tensors, numbers = backend_call(inputs, **options)
    with CountProducts() as seen:
        forward(tensors, numbers)
    assert seen.count == batched
    assert_right(inputs, **options)


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


def test_short_sequences_of_a_future_that_wraps_take_no_more_than_a_tile():
    """Raw rows hold all rows of r, however few keys there are."""
    inputs, options = make_problem({"wrapped future"}, 16, 2, T=600, M=0, D=2)
    tensors, numbers = backend_call(inputs, **options, key_lengths=torch.full((16,), 3))
    with LargestResult() as seen:
        forward(tensors, numbers)
    assert seen.largest <= 4 * tiles.TILE_SCORES * 1.02  # a query and a column more


@pytest.mark.parametrize("features", [set(), {"bool mask", "softcap"}, {"wrapped future"}], ids=str)
def test_one_group_and_two_tiles_hold_memory_at_a_time(features, monkeypatch):
    """A group is gone before the next is made, in both passes; of tiles there is the next beside the last."""
    monkeypatch.setattr(tiles, "TILE_SCORES", 1 << 12)
    alive, most = {tiles.Group: weakref.WeakSet(), tiles.Tile: weakref.WeakSet()}, Counter()
    for kind, objects in alive.items():

        def made(self, *args, kind=kind, objects=objects, init=kind.__init__):
            objects.add(self)
            most[kind] = max(most[kind], len(objects))
            most[kind, "made"] += 1
            init(self, *args)

        monkeypatch.setattr(kind, "__init__", made)
    inputs, options = make_problem(frozenset(features), 2, 4, T=300, M=20, D=8)
    run(inputs, *upstream(inputs), **options)
    assert min(most[tiles.Group, "made"], most[tiles.Tile, "made"]) > 8
    assert (most[tiles.Group], most[tiles.Tile]) == (1, 2)


def test_gradients_of_the_scores_of_one_tile_at_a_time(monkeypatch):
    """Those of the last tile are gone when those of the next are made."""
    monkeypatch.setattr(tiles, "TILE_SCORES", 1 << 14)
    B, H, T, M, D = 1, 2, 300, 20, 8
    made, product = [], torch.bmm

    def bmm(a, b, **out):
        result = product(a, b, **out)
        if not out and result.shape[2] > D:
            assert all(x() is None for x in made)
            made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(torch, "bmm", bmm)
    inputs = make_inputs(B, H, T, M, D)
    run(inputs, *upstream(inputs))
    assert len(made) > 8
