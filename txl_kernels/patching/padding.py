"""Padding masks as key lengths, so that padded keys are neither read nor computed and no mask of T x S is needed."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from txl_kernels.patching import masks
from txl_kernels.per_mask import once_per_mask, readable


class KeyPadding(NamedTuple):
    """Which keys are padding, for `rel_attention`: one of the two tensors is None.

    Attributes:
        key_lengths: (B,) integers, where every padded key comes after all others.
        attn_mask: (B, 1, 1, S) bool, True = may attend.
        shortest: the least of key_lengths; 0 where there are none.
    """

    key_lengths: Tensor | None
    attn_mask: Tensor | None
    shortest: int = 0

    def visible(self) -> dict[str, Tensor | None]:
        """The two as arguments of `rel_attention`."""
        return {"key_lengths": self.key_lengths, "attn_mask": self.attn_mask}


def key_padding(valid: Tensor, reader: nn.Module | None = None) -> KeyPadding:
    """Reads a mask of keys; layers that are handed the same tensor, or views of it, read it once between them.

    Synchronises once for a mask object, and again after an edit in place; for an inference tensor once a forward, if
    the layers that share it name themselves. Under torch.compile and CUDA graph capture,
    where entries can't be read, the mask serves as a mask.

    Args:
        valid: (B, S) bool, True = may attend; of a mask that has it the other way round, `masks.allowed` of it.
        reader: The layer that asks.
    """
    return _as_padding(_read(valid, reader=reader) if _has_entries(valid) else None, valid)


def window_and_key_padding(
    visible: Tensor | None, valid: Tensor | None, reader: nn.Module | None = None
) -> tuple[tuple[int, int] | None, KeyPadding]:
    """`masks.window_of` one mask and `key_padding` of another, in one synchronisation.

    Args:
        visible: (T, S) bool, True = may attend, or None.
        valid: (B, S), as in `key_padding`, or None.
        reader: The layer that asks.
    """
    if valid is None:
        return None if visible is None else masks.window_of(visible, reader=reader), KeyPadding(None, None)
    if visible is None:
        return None, key_padding(valid, reader)
    if not (_has_entries(visible) and _has_entries(valid)):
        return None, _as_padding(None, valid)
    window, lengths = _read_both(visible, valid, reader=reader)
    return window, _as_padding(lengths, valid)


def _has_entries(mask: Tensor) -> bool:
    return readable(mask) and mask.numel() > 0


def _as_padding(lengths: tuple[Tensor, int] | None, valid: Tensor) -> KeyPadding:
    return KeyPadding(None, valid[:, None, None]) if lengths is None else KeyPadding(lengths[0], None, lengths[1])


@once_per_mask
def _read(valid: Tensor) -> tuple[Tensor, int] | None:
    """The lengths and the shortest, or None where they do not say all that the mask does."""
    lengths, facts = _lengths(valid)
    shortest, say_all = facts.tolist()
    return (lengths, shortest) if say_all else None


@once_per_mask
def _read_both(visible: Tensor, valid: Tensor) -> tuple[tuple[int, int] | None, tuple[Tensor, int] | None]:
    lengths, facts = _lengths(valid)
    *reach, shortest, say_all = torch.cat([masks.reach(visible), facts]).tolist()
    return masks.window(reach, visible), (lengths, shortest) if say_all else None


def _lengths(valid: Tensor) -> tuple[Tensor, Tensor]:
    """(B,), and two numbers: the shortest, and whether they say all: not in case of padding in front, or within."""
    lengths = valid.view(torch.uint8).argmin(1)  # the first padded key, 0 where there is none
    lengths = torch.where(valid[:, -1], valid.shape[1], lengths)
    behind = torch.arange(valid.shape[1], device=valid.device) < lengths[:, None]
    return lengths, torch.stack([lengths.min(), (behind == valid).all()])


def of_rows(mask: Tensor) -> Tensor | None:
    """(B, S) of a mask (B, 1, 1|T, S) whose rows are one and the same memory, else None."""
    if mask.ndim == 4 and mask.shape[1] == 1 and (mask.shape[2] == 1 or mask.stride(2) == 0):
        return mask[:, 0, 0]
    return None
