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


def once_per_mask(find: Callable[..., Found]) -> Callable[..., Found]:
    """find(mask, *args), called once for a mask object, its views of one kind and args, again after an edit in place.

    Inference tensors keep no version, so an edit of one of them goes unnoticed. What is not `readable` is searched
    each time. What is found must not be a view of the mask: that would keep it alive for ever.
    """
    known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # mask -> its version and view, and what was found

    @functools.wraps(find)
    def found(mask: Tensor, *args) -> Found:
        if not readable(mask):
            return find(mask, *args)
        base = mask if mask._base is None else mask._base
        version = -1 if mask.is_inference() else mask._version
        # what is made in inference mode can't be saved for a backward
        inference = torch.is_inference_mode_enabled()
        read_for = (version, tuple(mask.shape), mask.stride(), mask.storage_offset(), inference, args)
        known_for, result = known.get(base, (None, None))
        if known_for != read_for:
            result = find(mask, *args)
            known[base] = read_for, result
        return result

    return found
