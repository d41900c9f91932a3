"""Masks of padding as key lengths: what is recognised, and how often entries are read."""

import pytest
import torch

from txl_kernels.patching import padding
from txl_kernels.patching.padding import key_padding, of_rows

B, S = 4, 6
LENGTHS = torch.tensor([6, 4, 1, 0])


def mask() -> torch.Tensor:
    return torch.arange(S) < LENGTHS[:, None]


@pytest.fixture
def reads(monkeypatch) -> list:
    """A list that grows with each reading of entries."""
    seen, equal = [], torch.equal
    monkeypatch.setattr(padding.torch, "equal", lambda *x: seen.append(0) or equal(*x))
    return seen


def test_lengths():
    key_lengths, attn_mask = key_padding(mask())
    assert torch.equal(key_lengths, LENGTHS)
    assert attn_mask is None


@pytest.mark.parametrize("row", [[0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]])
def test_padding_in_front_or_within_stays_a_mask(row):
    valid = mask()
    valid[2] = torch.tensor(row, dtype=torch.bool)
    key_lengths, attn_mask = key_padding(valid)
    assert key_lengths is None
    assert attn_mask.shape == (B, 1, 1, S)
    assert attn_mask.data_ptr() == valid.data_ptr()


@pytest.mark.parametrize("shape", [(0, S), (B, 0)])
def test_nothing_to_read(shape):
    assert key_padding(torch.ones(shape, dtype=torch.bool)).key_lengths is None


def test_layers_read_a_mask_once(reads):
    valid = mask()
    for _ in range(3):
        assert key_padding(valid).key_lengths.tolist() == LENGTHS.tolist()
    assert len(reads) == 1
    for _ in range(3):  # a new view for every layer, as in valid[:, None] of the model and [:, 0] of the layer
        assert key_padding(valid[:, None][:, 0]).key_lengths.tolist() == LENGTHS.tolist()
    assert len(reads) == 1
    key_padding(mask())
    assert len(reads) == 2


def test_an_edit_is_seen(reads):
    valid = mask()
    key_padding(valid)
    valid[0, 3:] = False
    assert key_padding(valid).key_lengths.tolist() == [3, 4, 1, 0]
    valid[:, 0] = False
    assert key_padding(valid).key_lengths is None
    assert len(reads) == 3


def test_another_view_of_the_same_memory_is_another_mask():
    valid = mask()
    key_padding(valid)
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
        key_lengths, attn_mask = key_padding(valid)
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
