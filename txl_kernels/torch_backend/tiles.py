"""Tiles of relative-attention scores, shared by the forward and the backward pass of the torch backend.

A group is a set of (batch, head) lanes that go through one matrix product together; within it the queries are cut
into tiles. The scores of one tile are the largest thing that is ever allocated.

The rel-shift costs no arithmetic. The position term of a tile with t queries and n keys is one matrix product
with the tile's band of r, in raw coordinates: query ii finds key jj in column jj - ii + t - 1. With rows that
advance by one element less, the same memory reads as (ii, jj). In raw coordinates the causal edge is a straight
line, column n: hiding the future is one rectangular fill, and no column beyond it is ever computed.

In shapes, b and h are the batches and heads of a group, t, n and p the queries, keys and rows of r of a tile.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]

# Measured on two cores: larger tiles fall out of the cache and, at the causal edge, multiply more that is hidden;
# smaller ones starve the matrix products.
TILE_SCORES = 1 << 20
MAX_ROWS = 256
# From this many queries on, three large products beat PyTorch's fused CPU attention and copies of k and v are
# cheap.
MANY_ROWS = 64
# Products into rows of a multiple of this many elements are up to a third faster.
ALIGNMENT = 16


class Plan(NamedTuple):
    """Lanes of a group, batches x heads, and query rows of its tiles."""

    batches: int
    heads: int
    rows: int


def plan(B: int, H: int, T: int, S: int) -> Plan:
    """Cuts a problem so that a tile holds about TILE_SCORES scores, but one row of one lane at least.

    Batches come first: they share r, so that the position term of all is one product.
    """
    most_rows = max(1, min(MAX_ROWS, TILE_SCORES // max(S, 1)))
    rows = _ceil_div(T, max(1, _ceil_div(T, most_rows)))  # tiles of equal height
    lanes = max(1, TILE_SCORES // max(rows * S, 1))
    batches = max(1, min(B, lanes))
    return Plan(batches, max(1, min(H, lanes // batches)), rows)


def spans(size: int, step: int) -> Iterator[slice]:
    """Slices of at most `step` elements that cover range(size)."""
    return (slice(start, min(start + step, size)) for start in range(0, size, max(step, 1)))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all arithmetic: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype is torch.float64 else torch.float32


class Group:
    """Some (batch, head) lanes: their inputs in the compute dtype, and the buffer that their tiles share.

    Attributes:
        k, v: (b, h, S, D); views where the inputs have the compute dtype.
        r: (h, P, D).
        q_content, q_position: scale * (q + bias), (h, T, b, D): any of their rows flatten to (h, rows * b, D).
    """

    def __init__(
        self,
        inputs: Inputs,
        batches: slice,
        heads: slice,
        size: Plan,
        is_causal: bool,
        scale: float,
        first_distance: int,
    ) -> None:
        q, k, v, r, content_bias, position_bias = inputs
        self.is_causal, self.first_distance = is_causal, first_distance
        self.memory = k.shape[2] - q.shape[2]
        dtype = compute_dtype(q.dtype)
        self.k, self.v, self.r = k[batches, heads].to(dtype), v[batches, heads].to(dtype), r[heads].to(dtype)
        if q.shape[2] >= MANY_ROWS:  # products want lanes at equal distances: else one copy, not one for each tile
            self.k, self.v = (x.flatten(0, 1).view(x.shape) for x in (self.k, self.v))
        queries = q[batches, heads].permute(1, 2, 0, 3).to(dtype)
        self.q_content, self.q_position = (
            _scaled_sum(queries, None if bias is None else bias[heads, None, None], scale)
            for bias in (content_bias, position_bias)
        )
        b, h, S, _ = self.k.shape
        self.raw = self.k.new_empty(b * h * size.rows * _aligned(S + size.rows - 1))


class Tile:
    """Query rows of a group, t of them, against the n keys that at least one of them sees.

    Attributes:
        n: the number of keys.
        k, v: those keys and values, (b, h, n, D).
        q_content: (b, h, t, D).
        q_position: (h, t * b, D).
        r: the rows of r that the tile uses, (h, p, D).
        r_rows: which rows these are.
    """

    def __init__(self, group: Group, rows: slice) -> None:
        h, _, b, _ = group.q_position.shape
        t = rows.stop - rows.start
        self.n = n = group.memory + rows.stop if group.is_causal else group.k.shape[2]
        self.k, self.v = group.k[:, :, :n], group.v[:, :, :n]
        self.q_content = group.q_content[:, rows].permute(2, 0, 1, 3)
        self.q_position = group.q_position[:, rows].flatten(1, 2)

        pitch = _aligned(n + t - 1)
        self._raw = group.raw[: h * t * b * pitch].view(h, t * b, pitch)
        self._shifted = self._raw.as_strided((b, h, t, n), (pitch, t * b * pitch, b * pitch - 1, 1), t - 1)

        # Raw column x belongs to row first_row + x of r, which need not exist.
        first_row = group.first_distance - group.memory - (rows.stop - 1)
        columns = n if group.is_causal else n + t - 1
        begin = min(max(-first_row, 0), columns)
        end = max(min(group.r.shape[1] - first_row, columns), begin)
        self.r_rows = slice(first_row + begin, first_row + end)
        self.r = group.r[:, self.r_rows]
        self._band = self._raw[..., begin:end]
        self._without_row = (self._raw[..., :begin], self._raw[..., end:columns])
        self._before_keys, self._beyond_keys = self._raw[..., : t - 1], self._raw[..., n:]
        self._is_causal = group.is_causal

    def position_scores(self) -> Tensor:
        """scale * BD, -inf where hidden: (b, h, t, n), a view that lasts until the group's next tile."""
        if self._is_causal:
            self._beyond_keys.fill_(-torch.inf)
        torch.bmm(self.q_position, self.r.mT, out=self._band)
        for columns in self._without_row:
            columns.zero_()
        return self._shifted

    def scores(self) -> Tensor:
        """scale * (AC + BD), -inf where hidden: (b * h, t, n)."""
        scores = self.position_scores().contiguous().flatten(0, 1)
        return torch.baddbmm(scores, self.q_content.flatten(0, 1), self.k.flatten(0, 1).mT, out=scores)

    def to_raw(self, dscores: Tensor) -> Tensor:
        """Moves dscores (b * h, t, n) into raw coordinates: (h, t * b, p), for the rows of r in the tile."""
        self._before_keys.zero_()
        if not self._is_causal:
            self._beyond_keys.zero_()
        self._shifted.copy_(dscores.view(self._shifted.shape))
        return self._band


def _scaled_sum(queries: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """scale * (queries + bias), dense, in the dtype of the queries (h, T, b, D)."""
    result = queries.new_empty(queries.shape)
    if bias is None:
        return torch.mul(queries, scale, out=result)
    return torch.add(queries, bias, out=result).mul_(scale)


def _aligned(size: int) -> int:
    return ALIGNMENT * _ceil_div(size, ALIGNMENT)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
