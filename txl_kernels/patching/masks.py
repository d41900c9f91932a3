"""What masks of others say: their inverses, and the window that a dense one implies."""

import torch
from torch import Tensor

from txl_kernels.per_mask import once_per_mask, readable


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
    return window(reach(valid).tolist(), valid) if readable(valid) and valid.numel() else None


def reach(valid: Tensor) -> Tensor:
    """(2,): how far back and ahead a mask (T, S), which is not empty, shows keys; integers of 64 bits."""
    T, S = valid.shape
    # argmin and argmax give the first of equal entries
    entries, here = valid.view(torch.uint8), S - T
    first_key, first_query = entries.argmax(1), entries.argmax(0)
    behind = torch.arange(here, S, device=valid.device) - first_key
    ahead = torch.arange(-here, T, device=valid.device) - first_query
    # rows and columns without a visible entry say nothing
    behind = behind.where(entries.amax(1) > 0, 0)
    ahead = ahead.where(entries.amax(0) > 0, 0)
    return torch.stack([behind.max(), ahead.max()]).clamp(min=0)


def window(reach: list[int], valid: Tensor) -> tuple[int, int] | None:
    """The `reach` of a mask (T, S) as a window, or None where it hides nothing."""
    (left, right), (T, S) = reach, valid.shape
    return None if left >= S - 1 and right >= T - 1 else (left, right)
