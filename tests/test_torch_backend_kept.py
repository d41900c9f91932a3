"""What the forward of the torch backend keeps for its backward: the same bits with less work, and how much it keeps."""

import weakref

import pytest
import torch

from tests.accuracy import make_inputs
from tests.contract import FEATURES, make_problem
from tests.torch_backend_tools import EVERYTHING, CountProducts, backend_call, run, upstream
from txl_kernels import op, rel_attention, torch_backend
from txl_kernels.arguments import DIFFERENTIABLE
from txl_kernels.torch_backend import backward, blocks, forward, kept, kept_in, room, tiles

ONE_BY_ONE = [{x} for x in FEATURES]


def fresh(inputs, options, share=1.0):
    """A share of the buffer that a call gets, filled with NaN."""
    buffer = room(*backend_call(inputs, **options))
    return buffer[: int(share * buffer.numel())].fill_(torch.nan)


def assert_same_bits(inputs, options, shares=(0.3, 1.0)):
    """However much is kept, gradients are those of a backward that makes all weights again."""
    dout, dlse = upstream(inputs)
    wanted = run(inputs, dout, dlse, **options)
    for share in shares:
        weights = fresh(inputs, options, share)
        got = run(inputs, dout, dlse, weights=weights, **options)
        assert not weights[:1].isnan().any()  # something was kept
        for name in ("out", "lse"):  # without a place for weights they may be PyTorch's fused attention
            torch.testing.assert_close(got[name], wanted[name])
        for name in wanted.keys() - {"out", "lse"}:
            assert torch.equal(got[name], wanted[name]), (name, share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [set(), *ONE_BY_ONE, *EVERYTHING], ids=lambda x: "+".join(sorted(x)))
def test_gradients_do_not_depend_on_what_is_kept(features, dtype, monkeypatch):
    """In many tiles, with dropout."""
    for name, value in {"TILE_SCORES": 1500, "MAX_ROWS": 16, "MANY_ROWS": 0}.items():
        monkeypatch.setattr(tiles, name, value)
    inputs, options = make_problem(features, T=37, dtype=dtype)
    assert_same_bits(inputs, options)
    assert_same_bits(inputs, options | {"dropout_p": 0.3, "seed": torch.tensor(5)})


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [(12, 0), (5, 7)])
def test_gradients_of_blocks_do_not_depend_on_what_is_kept(window, softcap, monkeypatch):
    monkeypatch.setattr(blocks, "PART_SCORES", 3 * 2 * blocks.ROWS * 2 * blocks.ROWS)
    inputs, options = make_problem({"bidirectional"}, 1, 2, T=150, M=9, D=8)
    assert_same_bits(inputs, options | {"window": window, "softcap": softcap})


@pytest.mark.parametrize("features", [set(), {"bidirectional"}, {"position query"}, {"grouped heads"}])
def test_gradients_of_small_problems_do_not_depend_on_what_is_kept(features):
    assert_same_bits(*make_problem(features), shares=(1.0,))


@pytest.mark.parametrize(
    ("features", "sizes", "changed", "parts", "products"),
    # dV, dP, dQ in two terms, dK and dR are left; in blocks, sums of dV and dK over neighbours take one more each.
    [({}, {}, {}, 1, 6), ({"bidirectional"}, {}, {}, 1, 6), ({"softcap"}, {}, {}, 1, 6), ({"key mask"}, {}, {}, 1, 6),
     ({"window"}, {"T": 150}, {}, 2, 6), ({"bidirectional"}, {"T": 165, "M": 0}, {"window": (0, 5)}, 1, 8)],
)  # fmt: skip
def test_kept_weights_take_no_products(features, sizes, changed, parts, products):
    """AC and BD are not made again: in one piece, in tiles, in blocks."""
    inputs, options = make_problem(frozenset(features), **sizes)
    options |= changed
    dout, dlse = upstream(inputs)
    tensors, numbers = backend_call(inputs, **options)
    weights = fresh(inputs, options)
    results = forward(tensors, numbers, kept_in(weights))
    needs_grad = [name in inputs for name in DIFFERENTIABLE]
    for buffer, again in ((weights, 0), (None, 2)):
        with CountProducts() as seen:
            backward(dout, dlse, tensors, *results, numbers, needs_grad, kept_in(buffer))
        assert seen.count == (products + again) * parts


def test_the_function_hands_on_what_is_kept(monkeypatch):
    handed = []
    monkeypatch.setattr(torch_backend, "backward", lambda *args: handed.append(args[-1]) or backward(*args))
    inputs = {name: x.requires_grad_() for name, x in make_inputs(1, 2, 5, 3, 4).items()}
    rel_attention(**inputs).sum().backward()
    (places,) = handed
    assert places.take((2, 5, 8))[0] is None  # all are taken


class SavedBeyond:
    """Bytes of the tensors that graphs save beyond given ones and what each call returns."""

    def __init__(self, *known):
        self.known, self.largest, self.storages = {x.untyped_storage().data_ptr() for x in known}, 0, []

    def __call__(self, x):
        if x.untyped_storage().data_ptr() not in self.known:
            self.largest = max(self.largest, x.untyped_storage().nbytes())
            self.storages.append(weakref.ref(x.untyped_storage()))
        return x


@pytest.mark.parametrize("options", [{}, {"softcap": 9.0}, {"window": (40, 0)}, {"dropout_p": 0.1}], ids=str)
def test_what_a_graph_keeps_is_bounded_and_goes_with_it(options, monkeypatch):
    """Problems with 16 and 64 times as many pairs as the bound keep as much as the bound and no more."""
    monkeypatch.setattr(kept, "MOST_BYTES", 1 << 16)
    for T in (512, 1024):
        inputs = {name: x.requires_grad_() for name, x in make_inputs(1, 1, T, 0, 4).items()}
        saved = SavedBeyond(*inputs.values())
        with torch.autograd.graph.saved_tensors_hooks(saved, lambda x: x):
            out = rel_attention(**inputs, **options)
        assert saved.largest == 1 << 16
        assert any(storage() is not None for storage in saved.storages)
        out.sum().backward()
        del out
        assert all(storage() is None for storage in saved.storages)


def test_the_bound_is_some_tens_of_megabytes():
    """Of address space too: also of a problem whose tensors would take a terabyte."""
    assert kept.MOST_BYTES < 32 << 20
    inputs = {
        name: x.to("meta").expand(64, 64, -1, -1) for name, x in make_inputs(1, 1, 8, 0, 4).items() if x.ndim == 4
    }
    inputs = {name: x[:, :, :1].expand(-1, -1, 10**5, -1) for name, x in inputs.items()}
    tensors, numbers = backend_call(inputs)
    assert room(tensors, numbers).nbytes <= kept.MOST_BYTES
    assert room(tensors._replace(q=tensors.q.double()), numbers).nbytes <= kept.MOST_BYTES


def test_small_problems_keep_no_more_than_their_pairs():
    tensors, numbers = backend_call(make_inputs(2, 3, 5, 7, 4))
    assert room(tensors, numbers).shape == (2 * 3 * 5 * 12,)
    assert room(tensors, numbers._replace(softcap=9.0)).shape == (2 * 2 * 3 * 5 * 12,)
    assert not room(*backend_call(make_inputs(2, 3, 1, 7, 4))).numel()  # a query at a time gains nothing


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_gradients(mode, monkeypatch):
    def fail(*args):
        raise AssertionError("weights are kept")

    monkeypatch.setattr(op, "rel_attention_with_weights", fail)
    inputs = {name: x.requires_grad_() for name, x in make_inputs(1, 1, 5, 0, 4).items()}
    with mode():
        rel_attention(**inputs)
    with pytest.raises(AssertionError, match="weights are kept"):
        rel_attention(**inputs)


@pytest.mark.parametrize("features", [set(), *EVERYTHING], ids=lambda x: "+".join(sorted(x)))
def test_a_graph_that_is_retained_gives_the_same_gradients_again(features):
    inputs, options = make_problem(features)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    call = leaves | options
    if "segment_ids" in call:
        call["segment"] = (call.pop("segment_scores"), *call.pop("segment_ids"))
    out = rel_attention(**call, dropout_p=0.3)
    first, second = (torch.autograd.grad(out.sum(), list(leaves.values()), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
