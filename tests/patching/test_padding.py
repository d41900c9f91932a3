"""Masks of padding as key lengths: what is recognised, and how often entries are read."""

import pytest
import torch

from tests.patching.tools import reads
from txl_kernels.patching.masks import allowed, window_of
from txl_kernels.patching.padding import key_padding, of_rows, window_and_key_padding

B, S = 4, 6
LENGTHS = torch.tensor([6, 4, 1, 0])


def mask() -> torch.Tensor:
    return torch.arange(S) < LENGTHS[:, None]


def test_lengths():
    key_lengths, attn_mask, shortest = key_padding(mask())
    assert torch.equal(key_lengths, LENGTHS)
    assert attn_mask is None
    assert shortest == 0
    assert key_padding(mask()[:3]).shortest == 1


@pytest.mark.parametrize("row", [[0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]])
def test_padding_in_front_or_within_stays_a_mask(row):
    valid = mask()
    valid[2] = torch.tensor(row, dtype=torch.bool)
    key_lengths, attn_mask, shortest = key_padding(valid)
    assert (key_lengths, shortest) == (None, 0)
    assert attn_mask.shape == (B, 1, 1, S)
    assert attn_mask.data_ptr() == valid.data_ptr()


@pytest.mark.parametrize("shape", [(0, S), (B, 0)])
def test_nothing_to_read(shape):
    assert key_padding(torch.ones(shape, dtype=torch.bool)).key_lengths is None


def test_layers_read_a_mask_once():
    valid = mask()
    assert reads(lambda: key_padding(valid)) == 1
    assert reads(lambda: key_padding(valid)) == 0
    # a new view for every layer, as in valid[:, None] of the model and [:, 0] of the layer
    assert reads(lambda: key_padding(valid[:, None][:, 0])) == 0
    assert torch.equal(key_padding(valid[:, None][:, 0]).key_lengths, LENGTHS)
    assert reads(lambda: key_padding(mask())) == 1


def test_layers_read_an_inference_tensor_once_a_forward():
    """An edit of it does not show."""
    layers = [torch.nn.Identity() for _ in range(3)]

    def forward(hidden):
        return [key_padding(allowed(hidden, reader=layer), layer).key_lengths for layer in layers]

    with torch.inference_mode():
        hidden = ~mask()
        for _ in range(2):
            assert reads(lambda: forward(hidden)) == 1
        hidden[0, 3:] = True
        assert [lengths.tolist() for lengths in forward(hidden)] == [[3, 4, 1, 0]] * 3


def test_an_edit_is_seen():
    valid = mask()
    key_padding(valid)
    valid[0, 3:] = False
    assert reads(lambda: key_padding(valid)) == 1
    assert key_padding(valid).key_lengths.tolist() == [3, 4, 1, 0]
    valid[:, 0] = False
    assert key_padding(valid).key_lengths is None


@pytest.mark.parametrize("padded", ["behind", "in front"])
def test_a_window_and_padding_are_read_at_once(padded):
    """And again where one of the two is another one, or was edited."""
    causal, valid = torch.ones(S, S).tril().bool(), mask() if padded == "behind" else mask().flip(1)

    def assert_read(times: int) -> None:
        assert reads(lambda: window_and_key_padding(causal, valid)) == times
        window, found = window_and_key_padding(causal, valid)
        wanted = window_of(causal.clone()), key_padding(valid.clone())
        assert window == wanted[0]
        assert found.shortest == wanted[1].shortest
        for got, x in zip(found[:2], wanted[1][:2], strict=True):
            assert got is None if x is None else torch.equal(got, x)

    assert_read(1)
    assert_read(0)
    valid = valid.clone()
    assert_read(1)
    valid[0] = False
    assert_read(1)
    causal[5, 0] = False
    assert_read(1)
    assert reads(lambda: window_and_key_padding(causal, None)) == 1
    assert reads(lambda: window_and_key_padding(None, valid)) == 1


def test_nothing_to_read_of_two():
    for visible, valid in [(torch.ones(S, S), torch.ones(0, S)), (torch.ones(0, S), mask())]:
        window, found = window_and_key_padding(visible.bool(), valid.bool())
        assert window is None
        assert found.attn_mask.shape == (valid.shape[0], 1, 1, S)


def test_another_view_of_the_same_memory_is_another_mask():
    valid = mask()
    key_padding(valid)
    assert key_padding(valid[:3]).key_lengths.tolist() == [6, 4, 1]
    assert key_padding(valid[1:]).key_lengths.tolist() == [4, 1, 0]
    assert key_padding(valid[:, 1:]).key_lengths.tolist() == [5, 3, 0, 0]


def test_in_inference_mode_and_after_it():
    valid = mask()
    with torch.inference_mode():
        assert torch.equal(key_padding(valid).key_lengths, LENGTHS)
        assert torch.equal(key_padding(mask()).key_lengths, LENGTHS)
    assert not key_padding(valid).key_lengths.is_inference()


def test_in_a_graph_it_stays_a_mask():
    def visible(valid):
        key_lengths, attn_mask, _ = key_padding(valid)
        assert key_lengths is None
        return attn_mask.sum()

    assert torch.compile(visible, fullgraph=True, backend="eager")(mask()) == LENGTHS.sum()


def test_rows_that_are_one():
    valid, T = mask(), 5
    assert torch.equal(of_rows(valid[:, None, None]), valid)
    assert torch.equal(of_rows(valid[:, None, None].expand(B, 1, T, S)), valid)
    assert of_rows(valid[:, None, None].repeat(1, 1, T, 1)) is None  # not to be told without reading it all
    assert of_rows(valid[:, None, None].expand(B, 2, 1, S)) is None
    assert of_rows(valid) is None
