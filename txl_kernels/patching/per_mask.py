"""What is found out about a mask once, for all the layers that are handed it."""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from txl_kernels.validation import has_values

Found = TypeVar("Found")


def readable(mask: Tensor) -> bool:
    """Whether its entries may be read: not under torch.compile, CUDA graph capture or on the meta device."""
    if not has_values(mask) or mask.is_meta:
        return False
    return not (mask.is_cuda and torch.cuda.is_current_stream_capturing())


def once_per_mask(find: Callable[[Tensor], Found]) -> Callable[[Tensor], Found]:
    """find, called once for a mask object and its views of one kind, and again after an edit in place.

    Inference tensors keep no version, so an edit of one of them goes unnoticed. What is not `readable` is searched
    each time. What is found must not be a view of the mask: that would keep it alive for ever.
    """
    known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # mask -> its version and view, and what was found

    @functools.wraps(find)
    def found(mask: Tensor) -> Found:
        if not readable(mask):
            return find(mask)
        base = mask if mask._base is None else mask._base
        version = -1 if mask.is_inference() else mask._version
        # what is made in inference mode can't be saved for a backward
        inference = torch.is_inference_mode_enabled()
        read_for = (version, tuple(mask.shape), mask.stride(), mask.storage_offset(), inference)
        known_for, result = known.get(base, (None, None))
        if known_for != read_for:
            result = find(mask)
            known[base] = read_for, result
        return result

    return found


@once_per_mask
def allowed(mask: Tensor) -> Tensor:
    """True = may attend: of a mask that has True or non-zero for what is hidden, or of one that adds -inf there."""
    return mask > -torch.inf if mask.is_floating_point() else mask.logical_not()


@once_per_mask
def window_of(valid: Tensor) -> tuple[int, int] | None:
    """The narrowest window, as in `rel_attention`, that hides nothing a mask shows; None where none hides anything.

    Synchronises; None for what is not `readable`.

    Args:
        valid: (T, S) bool, True = may attend.
    """
    T, S = valid.shape
    if not readable(valid) or not T * S:
        return None
    # argmin and argmax give the first of equal entries
    entries, here = valid.view(torch.uint8), S - T
    first_key, first_query = entries.argmax(1), entries.argmax(0)
    behind = torch.arange(here, S, device=valid.device) - first_key
    ahead = torch.arange(-here, T, device=valid.device) - first_query
    # rows and columns without a visible entry say nothing
    behind = behind.where(entries.amax(1) > 0, 0)
    ahead = ahead.where(entries.amax(0) > 0, 0)
    left, right = torch.stack([behind.max(), ahead.max()]).clamp(min=0).tolist()
    return None if left >= S - 1 and right >= T - 1 else (left, right)
