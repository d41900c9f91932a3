"""What layers learn of a mask that they share, and how often it is read."""

import gc
import weakref

import pytest
import torch

from txl_kernels.patching.masks import allowed, window_of
from txl_kernels.patching.padding import key_padding
from txl_kernels.per_mask import once_per_mask


def hidden_pairs(T: int, S: int, left: int, right: int) -> torch.Tensor:
    """(T, S), True outside a window; by the definition."""
    distance = torch.arange(T)[:, None] + S - T - torch.arange(S)
    return (distance > left) | (distance < -right)


@pytest.mark.parametrize(("T", "S"), [(1, 1), (5, 5), (4, 9)])
@pytest.mark.parametrize("left", [0, 2, 20])
@pytest.mark.parametrize("right", [0, 1, 20])
def test_window_of_a_band(T, S, left, right):
    got = window_of(~hidden_pairs(T, S, left, right))
    wanted = (min(left, S - 1), min(right, T - 1))
    assert got == (None if wanted == (S - 1, T - 1) else wanted)


def test_window_of_any_mask():
    """Rows and columns without a visible key do not widen it."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        T, more = torch.randint(1, 6, (2,), generator=generator).tolist()
        S = T + more - 1
        valid = torch.rand(T, S, generator=generator) < 0.2
        seen = (torch.arange(T)[:, None] + S - T - torch.arange(S))[valid].tolist()
        wanted = max([0, *seen]), max([0, *(-d for d in seen)])
        assert window_of(valid) == (None if wanted == (S - 1, T - 1) else wanted)


def test_read_once_for_a_mask_and_again_after_an_edit():
    reads = []
    read = once_per_mask(lambda mask: reads.append(mask.sum().item()) or reads[-1])
    mask = torch.ones(2, 3)
    assert [read(mask), read(mask), read(mask[:]), read(mask[:1])] == [6, 6, 6, 3]
    assert reads == [6, 3]
    assert read(mask) == 6
    mask[0] = 5
    assert read(mask) == 18
    with torch.inference_mode():
        read(mask)
    assert len(reads) == 5


def test_allowed_of_every_kind_of_mask():
    hidden = torch.tensor([[True, False], [False, True]])
    for mask in (hidden, hidden.to(torch.uint8) * 3, torch.zeros(2, 2).masked_fill(hidden, -torch.inf)):
        assert torch.equal(allowed(mask), ~hidden)
        assert allowed(mask) is allowed(mask)
    assert allowed(torch.full((1, 1), -1e4)).all()


@pytest.mark.parametrize("row", [[True, True, False], [False, True, True]])
def test_masks_are_freed(row):
    padded = ~torch.tensor([row])
    key_padding(allowed(padded))
    gone = weakref.ref(padded), weakref.ref(allowed(padded))
    del padded
    gc.collect()
    assert [x() for x in gone] == [None, None]
