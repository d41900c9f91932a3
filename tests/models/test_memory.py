"""Lengths, memory and what a token sees."""

import copy

import pytest
import torch

from tests.models.tools import SIZES, Shapes, make_model, make_segments, run


@pytest.mark.parametrize("attn_type", [0, 1, 2, 3])
def test_memory_carries_no_gradient_and_is_not_written_to(attn_type):
    model, (first, second, _) = make_model(attn_type=attn_type), make_segments()
    _, *mems = model(*first)
    assert len(mems) == 3
    before = copy.deepcopy(mems)
    losses, *new = model(*second, *mems)
    for memory, kept in zip(mems, before, strict=True):
        assert torch.equal(memory, kept)
    for memory in (*mems, *new):
        assert not memory.requires_grad
        assert memory.untyped_storage().nbytes() == memory.numel() * memory.element_size()
    with_history = [m.clone().requires_grad_() for m in mems]
    _, *new = model(*second, *with_history)
    assert not any(m.requires_grad for m in new)
    assert losses.requires_grad


@pytest.mark.parametrize("ext_len", [0, 2, 9])
@pytest.mark.parametrize(("M", "T", "mem_len"), [(0, 5, 7), (3, 5, 7), (7, 5, 7), (9, 2, 7), (4, 5, 0), (1, 9, 4)])
def test_the_rows_of_the_new_memory(M, T, mem_len, ext_len):
    model = make_model(mem_len=mem_len, ext_len=ext_len)
    memory, states = torch.arange(M).float(), M + torch.arange(T).float()
    end = T + max(0, M - ext_len)
    wanted = torch.arange(max(0, end - mem_len), end).float()
    for got in model._update_mems([states[:, None, None]] * 3, [memory[:, None, None]] * 3):
        assert torch.equal(got.flatten(), wanted)


def test_no_memory_means_no_memory_is_returned():
    model, (first, *_) = make_model(mem_len=0), make_segments()
    assert model.init_mems() is None
    assert len(model(*first)) == 1
    model.reset_length(5, 0, 3)
    assert [m.shape for m in model.init_mems()] == [(0,)] * 3
    losses, *mems = model(*first)
    assert [m.shape for m in mems] == [(3, 3, 12)] * 3
    assert torch.equal(model(*first, *model.init_mems())[0], losses)


def test_reset_length_changes_window_and_memory():
    """Evaluation as the original does it: short segments, a long memory, learned elsewhere."""
    model = make_model(attn_type=0, n_layer=1)
    long = make_segments(1, T=12)[0]
    model.reset_length(12, 0, 0)
    wanted = model(*long)[0]
    model.reset_length(3, 0, 40)
    got, mems = [], []
    for i in range(0, 12, 3):
        losses, *mems = model(long[0][i : i + 3], long[1][i : i + 3], *mems)
        got.append(losses)
    torch.testing.assert_close(torch.cat(got), wanted, rtol=1e-10, atol=1e-10)
    assert mems[0].shape[0] == 12
    assert (model.tgt_len, model.ext_len, model.mem_len) == (3, 0, 40)


def test_targets_of_the_last_tokens_only():
    """With ext_len a segment repeats tokens of the one before; only its last ones have targets."""
    model, ((data, target), *_) = make_model(ext_len=2, tgt_len=3), make_segments()
    assert torch.equal(model(data, target[2:])[0], model(data, target)[0][2:])


def test_same_length_hides_what_is_farther_back():
    model, ((data, target), *_) = make_model(n_layer=1, same_length=True, mem_len=4), make_segments(1, T=9)
    other = data.clone()
    other[2] = (data[2] + 1) % SIZES["n_token"]
    a, b = (model(x, target)[0] for x in (data, other))
    assert torch.equal(a[:2], b[:2])
    assert (a[2:6] != b[2:6]).all()  # tokens 2 to 5 see token 2
    torch.testing.assert_close(a[6:], b[6:])


def test_clamp_len_beyond_all_distances_changes_nothing():
    for attn_type in (0, 2):
        plain, clamped, tight = (make_model(attn_type=attn_type, clamp_len=n) for n in (-1, 11, 10))
        a, b, c = (run(model, make_segments())["losses"] for model in (plain, clamped, tight))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


@pytest.mark.parametrize("same_length", [False, True])
@pytest.mark.parametrize("attn_type", [0, 1])
def test_no_tensor_of_queries_by_keys_on_the_causal_path(attn_type, same_length):
    model = make_model(attn_type=attn_type, mem_len=31, same_length=same_length)
    long, (data, target) = make_segments(1, T=31)[0], make_segments(1, T=11)[0]
    _, *mems = model(*long)
    with Shapes() as shapes:
        model(data, target, *mems)[0].sum().backward()
    assert (11, 3, 12) in shapes.seen
    assert not [shape for shape in shapes.seen if 11 in shape and 42 in shape]
