"""The position term of a tile: BD by one matrix product in raw coordinates, which memory read otherwise shifts.

`Band` and `Wrapped` are the two rel-shifts, each with these members:

    r: the rows of r that the tile uses, (1|h, p, Dr), or None.
    r_rows: which rows these are.
    queries: the position queries, (1|h, any, Dr), 1 where all heads share r, or None.
    scores(): scale * (BD + r_bias), -inf where hidden, (b, h, t, n), a view that lasts until the group's next tile.
    to_raw(dscores): moves dscores (l, m, n) into raw coordinates, (h, any, p).
    of_queries(x): what belongs to position queries, (h, any, Dr), as (b, h, t or t + 1, Dr).

The shapes are those of tiles.py.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from txl_kernels.torch_backend.terms import ALL, cut

if TYPE_CHECKING:
    from txl_kernels.torch_backend.tiles import Group

# Products into rows of a multiple of this many elements are up to a third faster.
ALIGNMENT = 16


class Band:
    """The band of r that the tile's pairs have: query ii finds key jj in raw column jj - ii + t - 1.

    With rows that advance by one element less, the same memory reads as (ii, jj). A raw column is a distance, so the
    edges of a window (the causal one included) are columns: what lies beyond is one rectangular fill and is never
    computed.
    """

    @staticmethod
    def size(b: int, h: int, t: int, n: int, S: int) -> int:
        """How many raw elements a tile has."""
        return b * h * t * aligned(n + t - 1)

    def __init__(self, group: "Group", rows: slice, keys: slice) -> None:
        (left, right), (h, _, b, _) = group.options[:2], group.q_content.shape
        t, n = rows.stop - rows.start, keys.stop - keys.start
        self._shape, self._bias = (b, h, t, n), None
        pitch = aligned(n + t - 1)
        raw = group.raw[: h * t * b * pitch].view(h, t * b, pitch)

        # Raw column x holds distance `farthest - x`; from `end` on and before `start` all are hidden.
        columns = n + t - 1
        farthest = rows.stop - 1 + group.memory - keys.start
        start = min(max(farthest - left, 0), columns) if left >= 0 else 0
        end = max(min(farthest + right + 1, columns), start) if right >= 0 else columns
        # It belongs to row first_row + x of r, which need not exist.
        first_row = group.options.first_distance - farthest
        begin = min(max(-first_row, start), end)
        stop = max(min(group.inputs.rows - first_row, end), begin)
        self.r_rows = slice(first_row + begin, first_row + stop)
        # A product of all columns is faster, if need be with rows of r that no pair uses, `lead` of them in front.
        lead = max(first_row + pitch - group.inputs.rows, 0)
        is_dense = stop - begin == columns and lead <= first_row
        lead = lead if is_dense else 0
        self._raw = raw[..., lead:]
        self._shifted = raw.as_strided(self._shape, (pitch, t * b * pitch, b * pitch - 1, 1), lead + t - 1)
        self._band = self._raw[..., begin:stop]
        self._hidden = (0, start), (end, columns)
        self._without_row = (start, begin), (stop, end)
        self._beside_keys = (0, t - 1), (n, end)
        self.r = self.queries = None
        if group.r is not None:
            lanes, _, width = group.r.shape
            self.r = cut(group.r, ALL, self.r_rows)
            self.queries = cut(group.q_position, ALL, rows).reshape(lanes, -1, width)
            self._factor, product = self.r, slice(begin, stop)
            if is_dense:
                self._factor, product = cut(group.r, ALL, slice(first_row - lead, first_row - lead + pitch)), ALL
            self._product = raw.view(lanes, -1, pitch)[..., product]
        if group.r_bias is not None:
            self._bias = group.r_bias[..., self.r_rows]

    def scores(self) -> Tensor:
        self._fill(self._hidden, -torch.inf)
        if self.r is not None:
            torch.bmm(self.queries, self._factor.mT, out=self._product)
        if self._bias is not None:
            self._band.copy_(self._bias) if self.r is None else self._band.add_(self._bias)
        self._fill(self._without_row, 0.0)
        return self._shifted

    def to_raw(self, dscores: Tensor) -> Tensor:
        self._fill(self._beside_keys, 0.0)
        self._shifted.copy_(dscores.view(self._shape))
        return self._band

    def of_queries(self, x: Tensor) -> Tensor:
        b, h, t, _ = self._shape
        return x.view(h, t, b, -1).permute(2, 0, 1, 3)

    def _fill(self, ranges: tuple[tuple[int, int], ...], value: float) -> None:
        for start, stop in ranges:
            if start < stop:
                self._raw[..., start:stop].fill_(value)


class Wrapped:
    """All rows of r, read on from query to query (`wrap_future`): the tile needs the query behind its own, too.

    Raw rows are a zero and the products with all S rows of r. Read without a gap from T - i on, where i is the first
    query of the tile, they are the scores of its queries, S each.
    """

    @staticmethod
    def size(b: int, h: int, t: int, n: int, S: int) -> int:
        """As in `Band`; lengths and windows leave out none of the S rows of r."""
        return b * h * (t + 1) * (S + 1)

    def __init__(self, group: "Group", rows: slice, keys: slice) -> None:
        (h, T, b, _), S = group.q_content.shape, group.inputs.rows
        t, n = rows.stop - rows.start, keys.stop - keys.start
        needed = slice(rows.start, min(rows.stop + 1, T))
        self._shape, self._n_queries = (b, h, t, n), needed.stop - needed.start
        first, lane = T - rows.start, self._n_queries * (S + 1)
        self._raw = group.raw[: h * b * lane].view(h, -1, S + 1)
        self._shifted = self._raw.as_strided(self._shape, (lane, b * lane, S, 1), first)
        lanes = self._raw.view(h, b, lane)
        self._beside_keys = (lanes[..., :first], lanes[..., first + t * S :]) if n == S else (lanes,)
        self.r_rows, self.r, self.queries, self._bias = slice(0, S), None, None, group.r_bias
        if group.r is not None:
            n_tables, _, width = group.r.shape
            self.r, self._factor = group.r[:, 1:], group.r
            self.queries = cut(group.q_position, ALL, needed).transpose(1, 2).reshape(n_tables, -1, width)
            self._product = self._raw.view(n_tables, -1, S + 1)

    def scores(self) -> Tensor:
        if self.r is not None:
            torch.bmm(self.queries, self._factor.mT, out=self._product)
        if self._bias is not None:
            self._raw.copy_(self._bias) if self.r is None else self._raw.add_(self._bias)
        return self._shifted

    def to_raw(self, dscores: Tensor) -> Tensor:
        for part in self._beside_keys:
            part.zero_()
        self._shifted.copy_(dscores.view(self._shape))
        return self._raw[..., 1:]

    def of_queries(self, x: Tensor) -> Tensor:
        b, h = self._shape[:2]
        return x.view(h, b, self._n_queries, -1).transpose(0, 1)


def aligned(size: int) -> int:
    """How many columns a product of `size` columns gets."""
    return -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
