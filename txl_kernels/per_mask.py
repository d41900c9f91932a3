"""What is found out about a mask once, for all the layers that are handed it."""

import functools
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdRef, WeakTensorKeyDictionary

from txl_kernels.validation import has_values

Found = TypeVar("Found")


def readable(mask: Tensor) -> bool:
    """Whether its entries may be read: not under torch.compile, CUDA graph capture or on the meta device."""
    if not has_values(mask) or mask.is_meta:
        return False
    return not (mask.is_cuda and torch.cuda.is_current_stream_capturing())


def once_per_mask(find: Callable[..., Found]) -> Callable[..., Found]:
    """find(mask, *args), called once for a mask object, its views of one kind and args, again after an edit in place.

    Some args may be masks, too. Unless all masks are `readable`, they are searched each time. What is found must not be
    a view of the mask: that would keep it alive for ever.

    Inference tensors keep no version, so that an edit would go unnoticed. What is found out about one serves each
    layer once (`reader=layer`): one that asks again is in another forward, which may have edited it.
    """
    # mask -> the state of all masks, what was found, and by which layers, where that matters
    known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    @functools.wraps(find)
    def found(mask: Tensor, *args, reader: nn.Module | None = None) -> Found:
        masks = [x for x in (mask, *args) if isinstance(x, Tensor)]
        if not all(readable(x) for x in masks):
            return find(mask, *args)
        may_be_edited = any(x.is_inference() for x in masks)
        # what is made in inference mode can't be saved for a backward
        read_for = [_state(x) if isinstance(x, Tensor) else x for x in (mask, *args, torch.is_inference_mode_enabled())]
        base = _base(mask)
        known_for, result, readers = known.get(base, (None, None, None))
        if known_for != read_for or (may_be_edited and (reader is None or reader in readers)):
            result, readers = find(mask, *args), WeakSet()
            known[base] = read_for, result, readers
        if may_be_edited and reader is not None:
            readers.add(reader)
        return result

    return found


def _base(mask: Tensor) -> Tensor:
    return mask if mask._base is None else mask._base


def _state(mask: Tensor) -> tuple:
    """Differs from that of another mask, after an edit, and of another view; keeps no mask alive."""
    version = -1 if mask.is_inference() else mask._version
    return WeakIdRef(_base(mask)), version, tuple(mask.shape), mask.stride(), mask.storage_offset()
