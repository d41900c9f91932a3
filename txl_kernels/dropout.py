"""The dropout mask as a hash of seed, lane, query and key: every tiling and every backend makes the same one.

Arithmetic is on 32-bit integers that wrap around. A lane (batch element and head) gets a key, its queries and its
keys get a hash each, and a pair mixes the sum of its two once more:

    mix(x):     x = (x ^ (x >> 16)) * MIX_1;  x = (x ^ (x >> 15)) * MIX_2;  return x ^ (x >> 16)
    key(b, h)    = mix(low ^ mix(high ^ mix(b * H + h)))       low, high: the halves of the seed
    row(i)       = mix(key + i * ROW)
    column(j)    = mix((key ^ COLUMN_KEY) + j * COLUMN)
    pair(i, j):  x = (row(i) + column(j)) * MIX_1;  x = (x ^ (x >> 15)) * MIX_2;  kept iff x < threshold

The shifts are logical, the comparison is signed. `mix` is Chris Wellons' lowbias32.
"""

import torch
from torch import Tensor

MIX_1, MIX_2 = 0x7FEB352D, 0x846CA68B
ROW, COLUMN_KEY, COLUMN = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35


def threshold(dropout_p: float) -> int:
    """What the signed hash of a kept pair stays below."""
    return min(round((1 - dropout_p) * 2**32) - 2**31, 2**31 - 1)


def kept(seed: Tensor, batches: slice, heads: slice, rows: slice, keys: slice, H: int, dropout_p: float) -> Tensor:
    """Which weights of a tile survive: (b, h, t, n), bool.

    Args:
        seed: A scalar of int64, never read on the host.
        batches, heads, rows, keys: The tile, as slices with start and stop.
        H: Number of heads of the whole problem.
        dropout_p: Probability to drop.
    """
    b, h, i, j = (
        torch.arange(x.start, x.stop, dtype=torch.int32, device=seed.device) for x in (batches, heads, rows, keys)
    )
    low, high = seed.to(torch.int32), (seed >> 32).to(torch.int32)
    key = _mix(low ^ _mix(high ^ _mix(b[:, None] * H + h)))[..., None]
    row = _mix(key + i * _signed(ROW))
    column = _mix((key ^ _signed(COLUMN_KEY)) + j * _signed(COLUMN))
    x = (row[..., None] + column[:, :, None]).mul_(MIX_1)
    return x.bitwise_xor_(_shifted(x, 15)).mul_(_signed(MIX_2)) < threshold(dropout_p)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 16)) * MIX_1
    x = (x ^ _shifted(x, 15)) * _signed(MIX_2)
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits without copies of the sign."""
    return (x >> bits).bitwise_and_((1 << 32 - bits) - 1)


def _signed(constant: int) -> int:
    """The int32 of the same bits."""
    return constant - (constant >> 31 << 32)
