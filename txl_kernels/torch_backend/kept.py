"""What the forward keeps for the backward, which makes the rest again: softmax weights, in memory of bounded size.

A tile whose weights are kept needs no AC, no BD and no softmax in the backward.
"""

import math

import torch
from torch import Tensor

from txl_kernels.arguments import Inputs, Options
from txl_kernels.torch_backend import tiles

# Measured: what glibc maps anew at each call, from 32 MiB on, costs more page faults than keeping it saves.
MOST_BYTES = 31 << 20


class Kept:
    """Places in a buffer, one after another: both passes take them in the same order."""

    def __init__(self, buffer: Tensor) -> None:
        self._free = buffer

    def take(
        self, shape: tuple[int, ...], with_tanh: bool = False, dtype: torch.dtype | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The next place for weights, and with_tanh one for the tanh of the softcap; None where too little is left.

        In the dtype of the buffer, or one of twice its size.
        """
        dtype = dtype or self._free.dtype
        n = 1 + with_tanh
        size = n * math.prod(shape) * dtype.itemsize // self._free.itemsize
        if self._free.numel() < size:
            return None, None
        places, self._free = self._free[:size].view(dtype).view(n, *shape), self._free[size:]
        return places[0], places[1] if with_tanh else None


def room(inputs: Inputs, options: Options) -> Tensor:
    """A buffer for one call, of a size that follows from shapes and options alone; empty for one query."""
    q, dtype = inputs.q, tiles.product_dtype(inputs, options)
    (B, H, T, _), reach, most = q.shape, inputs.k.shape[2], MOST_BYTES // dtype.itemsize
    if min(options.left, options.right) >= 0:
        window = options.left + options.right
        reach = torch.sym_min(reach, window + tiles.most_rows(window))
    places = 1 + (options.softcap is not None)
    return q.new_empty(torch.sym_min(places * B * H * T * reach, most) if T > 1 else 0, dtype=dtype)


def kept_in(buffer: Tensor | None) -> Kept | None:
    """Places in a buffer, None where it has none."""
    return Kept(buffer) if buffer is not None and buffer.numel() else None
