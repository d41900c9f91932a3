"""Tiles of relative-attention scores, shared by the forward and the backward pass of the torch backend.

A group is the set of (batch, head) lanes that one matrix product serves: several batches of one head, or several
heads of one batch, so that q, k, v and r collapse to three dimensions without a copy. Within a group the queries
are cut into tiles, and the scores of one tile are the largest thing that is ever allocated.

The rel-shift costs no arithmetic. The position term of a tile with t queries and n keys is one matrix product
with the tile's band of r, in raw coordinates: query ii finds key jj in column jj - ii + t - 1. With rows that
advance by one element less, the same memory reads as (ii, jj). In raw coordinates the causal edge is a straight
line, column n: hiding the future is one rectangular fill, and no column beyond it is computed.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]

# Scores per tile and rows per tile, found by measurement on two cores. Larger tiles fall out of the cache and, at
# the causal edge, multiply more that is hidden; smaller ones starve the matrix products.
TILE_SCORES = 1 << 19
MAX_ROWS = 128
# Row pitch of the raw buffer is a multiple of this many elements: products into aligned rows are up to a third
# faster.
PITCH = 16


class Plan(NamedTuple):
    """Size of a group, batches x heads with one of them 1, and query rows of its tiles."""

    batches: int
    heads: int
    rows: int


def plan(B: int, H: int, T: int, S: int) -> Plan:
    """Cuts a problem so that a tile holds about TILE_SCORES scores, and one lane and row at least."""
    rows = max(1, min(T, MAX_ROWS, TILE_SCORES // max(1, S)))
    tiles = -(-T // rows)
    rows = -(-T // max(1, tiles))  # of equal height
    lanes = max(1, TILE_SCORES // max(1, rows * S))
    return Plan(min(B, lanes), 1, rows) if B > 1 else Plan(1, min(H, lanes), rows)


def spans(size: int, step: int) -> Iterator[slice]:
    """Slices of at most `step` elements that cover range(size)."""
    return (slice(start, min(start + step, size)) for start in range(0, size, max(1, step)))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which scores and gradients are computed: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype is torch.float64 else torch.float32


class Tile(NamedTuple):
    """Some query rows of a group against the n keys that they see; g lanes = b batches x h heads, one of them 1.

    Attributes:
        rows: the query rows, t of them.
        q_content: scale * (q + u), (g, t, D).
        q_position: scale * (q + v), (h, t * b, D).
        k, v: (g, n, D).
        r_rows: which rows of r the tile uses.
        r: those rows, (h, P of the tile, D).
        raw_band: the raw buffer's columns of those rows, (h, t * b, P of the tile).
        shifted: the raw buffer as (h, b, t, n).
    """


class Group:
    """Some (batch, head) lanes: their inputs in the compute dtype and the buffers that their tiles share.

    Args:
        inputs: q (B, H, T, D), k and v (B, H, S, D), r (H, P, D), content_bias and position_bias (H, D) or None.
        batches, heads: the lanes; one of the two has length 1.
        rows: of the largest tile.
        is_causal, scale, first_distance: as in rel_attention.
    """
