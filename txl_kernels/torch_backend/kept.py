"""What the forward keeps of the softmax weights for the backward, which makes the rest again: bounded memory.

A tile whose weights are kept needs no AC, no BD and no softmax in the backward.
"""

import math

import torch
from torch import Tensor

from txl_kernels.arguments import Inputs, Options
from txl_kernels.torch_backend import tiles

MOST_BYTES = 16 << 20


class Kept:
    """Places for weights in a buffer, one after another; both passes take them in the same order."""

    def __init__(self, buffer: Tensor | None = None) -> None:
        self._free = buffer

    def take(self, *shape: int) -> Tensor | None:
        """The next place, dense; None where too little is left."""
        size = math.prod(shape)
        if self._free is None or self._free.numel() < size:
            return None
        place, self._free = self._free[:size], self._free[size:]
        return place.view(shape)


def room_for_weights(inputs: Inputs, options: Options) -> Tensor:
    """A buffer for the weights of a call, of a size that follows from shapes and options alone."""
    q, dtype = inputs.q, tiles.product_dtype(inputs, options)
    (B, H, T, _), reach = q.shape, inputs.k.shape[2]
    if options.softcap is not None or T == 1:  # the slope needs the scores
        return q.new_empty(0, dtype=dtype)
    if min(options.left, options.right) >= 0:
        reach = torch.sym_min(reach, options.left + options.right + tiles.MAX_ROWS)
    return q.new_empty(torch.sym_min(B * H * T * reach, MOST_BYTES // dtype.itemsize), dtype=dtype)
