"""Padding masks as key lengths, so that padded keys are neither read nor computed and no mask of T x S is needed."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from txl_kernels.validation import has_values


class KeyPadding(NamedTuple):
    """Which keys are padding, for `rel_attention`: one of the two is None.

    Attributes:
        key_lengths: (B,) integers, where every padded key comes after all others.
        attn_mask: (B, 1, 1, S) bool, True = may attend.
    """

    key_lengths: Tensor | None
    attn_mask: Tensor | None


# mask -> its version, and its lengths, if these say all of it; not a view of the mask, which would keep it alive
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def key_padding(mask: Tensor, hidden: bool = False) -> KeyPadding:
    """Reads a mask of keys; layers that are handed the same tensor, or views of it, read it once between them.

    Synchronises once for a mask object, and again after an edit in place. Under torch.compile and CUDA graph capture,
    where entries can't be read, the mask serves as a mask.

    Args:
        mask: (B, S) bool, True = may attend.
        hidden: Whether True = hidden instead.
    """
    if not has_values(mask) or (mask.is_cuda and torch.cuda.is_current_stream_capturing()) or not mask.numel():
        return _as_mask(mask, hidden)
    base = mask if mask._base is None else mask._base
    view = (tuple(mask.shape), mask.stride(), mask.storage_offset())
    version = -1 if mask.is_inference() else mask._version
    read_for = (version, view, hidden, torch.is_inference_mode_enabled())
    known_for, lengths = _known.get(base, (None, None))
    if known_for != read_for:
        valid = ~mask if hidden else mask
        lengths = valid.view(torch.uint8).argmin(1)  # the first padded key, 0 where there is none
        lengths = torch.where(valid[:, -1], valid.shape[1], lengths)
        behind = torch.arange(valid.shape[1], device=valid.device) < lengths[:, None]
        if not torch.equal(behind, valid):  # padding in front, or within
            lengths = None
        _known[base] = read_for, lengths
    return _as_mask(mask, hidden) if lengths is None else KeyPadding(lengths, None)


def _as_mask(mask: Tensor, hidden: bool) -> KeyPadding:
    return KeyPadding(None, (~mask if hidden else mask)[:, None, None])


def of_rows(mask: Tensor) -> Tensor | None:
    """(B, S) of a mask (B, 1, 1|T, S) whose rows are one and the same memory, else None."""
    if mask.ndim == 4 and mask.shape[1] == 1 and (mask.shape[2] == 1 or mask.stride(2) == 0):
        return mask[:, 0, 0]
    return None
