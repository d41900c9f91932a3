"""Padding masks as key lengths, so that padded keys are neither read nor computed and no mask of T x S is needed."""

from typing import NamedTuple

import torch
from torch import Tensor

from txl_kernels.per_mask import once_per_mask, readable


class KeyPadding(NamedTuple):
    """Which keys are padding, for `rel_attention`: one of the two is None.

    Attributes:
        key_lengths: (B,) integers, where every padded key comes after all others.
        attn_mask: (B, 1, 1, S) bool, True = may attend.
    """

    key_lengths: Tensor | None
    attn_mask: Tensor | None


def key_padding(valid: Tensor) -> KeyPadding:
    """Reads a mask of keys; layers that are handed the same tensor, or views of it, read it once between them.

    Synchronises once for a mask object, and again after an edit in place. Under torch.compile and CUDA graph capture,
    where entries can't be read, the mask serves as a mask.

    Args:
        valid: (B, S) bool, True = may attend; of a mask that has it the other way round, `masks.allowed` of it.
    """
    lengths = _lengths(valid) if readable(valid) and valid.numel() else None
    return KeyPadding(None, valid[:, None, None]) if lengths is None else KeyPadding(lengths, None)


@once_per_mask
def _lengths(valid: Tensor) -> Tensor | None:
    """(B,), or None in case of padding in front, or within."""
    lengths = valid.view(torch.uint8).argmin(1)  # the first padded key, 0 where there is none
    lengths = torch.where(valid[:, -1], valid.shape[1], lengths)
    behind = torch.arange(valid.shape[1], device=valid.device) < lengths[:, None]
    return lengths if torch.equal(behind, valid) else None


def of_rows(mask: Tensor) -> Tensor | None:
    """(B, S) of a mask (B, 1, 1|T, S) whose rows are one and the same memory, else None."""
    if mask.ndim == 4 and mask.shape[1] == 1 and (mask.shape[2] == 1 or mask.stride(2) == 0):
        return mask[:, 0, 0]
    return None
