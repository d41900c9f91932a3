"""Narrow windows on a CPU: blocks of a few queries, each with the keys in its reach, as the batch of one small problem.

A tile as high as products like would multiply mostly pairs that a narrow window hides. Here a lane is ROWS queries of
one head, and its keys are a view of all keys: lanes overlap. Behind the last query and beside the keys stand zeros.

Scores and weights exist by distance: a row for each query, a column for each distance of the window, as r has rows. So
the position term is one product with these rows, without a rel-shift, and nothing wider is kept for the backward.
Products with keys need a lane's scores by key, where they are a diagonal band.

In shapes, h, b and n are the heads, batches and rows of queries of a part, hk its key heads, and l its lanes; (h, b, n)
and (l, ROWS) are the same memory.
"""

from itertools import groupby

import torch
from torch import Tensor

from txl_kernels.arguments import Inputs, Options
from txl_kernels.torch_backend.kept import Kept
from txl_kernels.torch_backend.positions import aligned
from txl_kernels.torch_backend.terms import ALL
from txl_kernels.torch_backend.tiles import ceil_div, spans, sum_dtype

# Measured: the widest window, left + right, for which blocks are faster from few queries on, the queries in a block,
# and the scores by key of a part, which is more: 16 x 32 of them come with 5,000 numbers of q, k and v at head size 64.
WIDEST = 63
ROWS = 16
PART_SCORES = 1 << 17


class Window:
    """What the parts of a problem share.

    Attributes:
        inputs, options: the problem.
        dtype: of products, scores and sums.
        size: how many distances the window has.
        columns: of what is by distance; those from `size` on are hidden, but make products twice as fast.
        reach: how many keys a lane has, a multiple of ROWS, so that overlapping sums are dense.
        r: r by distance, (1|h, columns, Dr), zeros where it has no row, or None.
        r_bias: scale * r_bias likewise, (h, 1, columns), or None.
    """

    def __init__(self, inputs: Inputs, options: Options) -> None:
        self.inputs, self.options = inputs, options
        self.dtype = sum_dtype(inputs.q.dtype)
        self.size = options.left + options.right + 1
        self.columns = aligned(self.size)
        self.reach = ceil_div(ROWS + self.size - 1, ROWS) * ROWS
        row = options.first_distance - options.left  # of column 0; it need not exist
        first = max(row, 0)
        stop = max(first, min(row + self.size, inputs.rows))
        self._rows, self._columns = slice(first, stop), slice(first - row, stop - row)
        self.r = None if inputs.r is None else self._by_distance(inputs.r[0])
        self.r_bias = None
        if inputs.r_bias is not None:
            self.r_bias = self._by_distance(inputs.r_bias[..., None]).mT * options.scale

    def _by_distance(self, x: Tensor) -> Tensor:
        """x (h, P, width) by distance: (h, columns, width)."""
        result = x.new_zeros((x.shape[0], self.columns, x.shape[2]), dtype=self.dtype)
        result[:, self._columns] = x[:, self._rows]
        return result

    def add_by_distance(self, x: Tensor, total: Tensor) -> None:
        """Adds x (h, columns, width) to total (h, P, width)."""
        total[:, self._rows] += x[:, self._columns]


class Part:
    """Queries of some batches with the same number of keys, each of which sees a key.

    Attributes:
        window: that of the problem.
        where: the slices of batches, heads and queries.
        keys: the slice of keys that a query sees.
        lanes: l.
    """

    def __init__(self, window: Window, batches: slice, queries: slice, n_keys: int) -> None:
        inputs, (left, right) = window.inputs, window.options[:2]
        _, H, T, _ = inputs.q.shape
        memory = inputs.k.shape[2] - T
        self.window, self.where = window, (batches, ALL, queries)
        first = queries.start + memory - left  # may lie in front of key 0
        self.keys = slice(max(first, 0), min(queries.stop + memory + right, n_keys))
        self._n_queries, self._n_keys = queries.stop - queries.start, self.keys.stop - self.keys.start
        self._lead = self.keys.start - first
        # As many lanes as a lane reaches beyond its own keys are left over behind the last query.
        self._beyond = window.reach // ROWS - 1
        n = (ceil_div(self._n_queries, ROWS) + self._beyond) * ROWS
        self._shape = H, batches.stop - batches.start, n
        self.lanes = H * self._shape[1] * n // ROWS

    def of_queries(self, x: Tensor) -> Tensor:
        """x (B, H, T, ...) for these queries, zeros behind them: (l, ROWS, ...)."""
        result = x.new_zeros((self.lanes, ROWS, *x.shape[3:]), dtype=self.window.dtype)
        self.queries_of(result).copy_(x[self.where])
        return result

    def queries_of(self, x: Tensor) -> Tensor:
        """The queries that there are in x (l, ROWS, ...): a view (b, h, t, ...)."""
        return x.view(*self._shape, *x.shape[2:])[:, :, : self._n_queries].transpose(0, 1)

    def of_keys(self, x: Tensor) -> Tensor:
        """x (B, Hk, S, D) for the keys of each lane: a view (l, reach, D) of a copy."""
        D = x.shape[3]
        copy = self._new_keys(D)
        self._keys_of(copy).copy_(x[self.where[0], :, self.keys].unsqueeze(2))
        return copy.as_strided((self.lanes, self.window.reach, D), (ROWS * D, D, 1))

    def add_to_keys(self, weights: Tensor, x: Tensor, total: Tensor) -> None:
        """Adds weights^T x to total (B, Hk, S, D), of weights by key and x (l, ROWS, D)."""
        sums = self._new_keys(x.shape[2])
        for i in range(self._beyond + 1):  # ROWS keys of each lane, which do not overlap
            mine = sums[i : i + self.lanes]
            torch.baddbmm(mine, weights[..., i * ROWS : (i + 1) * ROWS].mT, x, out=mine)
        by_head = self._keys_of(sums)
        total[self.where[0], :, self.keys] += by_head.sum(2) if by_head.shape[2] > 1 else by_head.squeeze(2)

    def _new_keys(self, D: int) -> Tensor:
        """Zeros in place of all lanes' keys, (l + beyond, ROWS, D)."""
        return self.window.inputs.k.new_zeros((self.lanes + self._beyond, ROWS, D), dtype=self.window.dtype)

    def _keys_of(self, x: Tensor) -> Tensor:
        """The keys that there are in x (l + beyond, ROWS, D): a view (b, hk, h / hk, keys, D)."""
        lanes = x[: self.lanes].view(*self._shape, -1)[:, :, self._lead : self._lead + self._n_keys]
        return lanes.unflatten(0, (self.window.inputs.k.shape[1], -1)).permute(2, 0, 1, 3, 4)

    def by_key(self, x: Tensor, result: Tensor | None = None) -> Tensor:
        """x (l, ROWS, columns) by key, (l, ROWS, reach), in a new tensor or in an earlier result."""
        if result is None:
            result = x.new_zeros((self.lanes, ROWS, self.window.reach))
        self._band(result).copy_(x[..., : self.window.size])
        return result

    def by_distance(self, x: Tensor) -> Tensor:
        """x (l, ROWS, reach) by distance, (l, ROWS, columns)."""
        result = x.new_zeros((self.lanes, ROWS, self.window.columns))
        result[..., : self.window.size] = self._band(x)
        return result

    def _band(self, x: Tensor) -> Tensor:
        """Of x by key, the pairs in the window by distance: a view (l, ROWS, size)."""
        reach = self.window.reach
        return x.as_strided((self.lanes, ROWS, self.window.size), (ROWS * reach, reach + 1, 1))

    def store_scores(self, scores: Tensor, tanh: Tensor | None, queries: "Queries", k: Tensor) -> None:
        """Stores the scores by distance, -inf where hidden, and the tanh of a softcap."""
        window, softcap = self.window, self.window.options.softcap
        if window.r is None:
            scores.zero_()
        else:
            torch.bmm(queries.position, window.r.mT, out=scores.view(*queries.position.shape[:2], -1))
        if window.r_bias is not None:
            scores.view(self._shape[0], -1, window.columns).add_(window.r_bias)
        scores[..., : window.size] += self._band(torch.bmm(queries.content, k.mT))
        if softcap is not None:
            torch.mul(torch.tanh(scores.div_(softcap), out=tanh), softcap, out=scores)
        scores[..., window.size :] = -torch.inf
        self._hide(scores.view(*self._shape, -1))

    def _hide(self, scores: Tensor) -> None:
        """Stores -inf in scores (h, b, n, columns) in front of the first key and behind the last.

        Column x of query i is the key in place i + x. What is no query sees zeros: softmax makes no NaN of it.
        """
        end = self._lead + self._n_keys
        in_front, behind = min(self._lead, self._n_queries), max(end - self.window.size + 1, 0)
        places = torch.arange(self._n_queries + self.window.columns, device=scores.device)
        places = places.unfold(0, self.window.columns, 1)
        if in_front:
            scores[:, :, :in_front].masked_fill_(places[:in_front] < self._lead, -torch.inf)
        if behind < self._n_queries:
            hidden = places[behind : self._n_queries] >= end
            scores[:, :, behind : self._n_queries].masked_fill_(hidden, -torch.inf)

    def places(self, kept: Kept | None) -> tuple[Tensor, Tensor | None, bool]:
        """Where weights by distance and the tanh of a softcap are stored, and whether they are kept there."""
        shape, has_tanh = (self.lanes, ROWS, self.window.columns), self.window.options.softcap is not None
        if kept is not None:
            weights, tanh = kept.take(shape, has_tanh, self.window.dtype)
            if weights is not None:
                return weights, tanh, True
        weights = self.window.inputs.q.new_empty(shape, dtype=self.window.dtype)
        return weights, torch.empty_like(weights) if has_tanh else None, False

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all queries of x, whose memory is (h, b, n, width): (h, width)."""
        return x.view(self._shape[0], -1, x.shape[-1]).sum(1)

    def scaled_sum(self, queries: Tensor, bias: Tensor | None) -> Tensor:
        """scale * (queries + bias), (l, ROWS, width)."""
        result = self.of_queries(queries)
        if bias is not None:
            result.view(*self._shape, -1).add_(bias[:, None, None])
        return result.mul_(self.window.options.scale)


class Queries:
    """The queries of a part with their biases, scaled.

    Attributes:
        content: (l, ROWS, D).
        position: (1|h, any, Dr), 1 where all heads share r, or None; where there is no difference, content's memory.
    """

    def __init__(self, part: Part) -> None:
        inputs, r = part.window.inputs, part.window.r
        self.content = queries = part.scaled_sum(inputs.q, inputs.content_bias)
        if inputs.q_pos is not None:
            queries = part.scaled_sum(inputs.q_pos, inputs.position_bias)
        elif inputs.content_bias is not None or inputs.position_bias is not None:
            queries = part.scaled_sum(inputs.q, inputs.position_bias)
        self.position = None if r is None else queries.view(r.shape[0], -1, r.shape[2])


def fits(inputs: Inputs, options: Options) -> bool:
    """Whether a problem is done in blocks; a shorter one is a tile."""
    (T, S), (left, right) = (inputs.q.shape[2], inputs.k.shape[2]), options[:2]
    if min(left, right) < 0 or left + right > WIDEST or inputs.q.device.type != "cpu":
        return False
    by_batch = inputs.r is not None and inputs.r.shape[0] > 1
    has_places = inputs.attn_mask is not None or inputs.segment_scores is not None or options.dropout_p > 0
    return 2 * (ROWS + aligned(left + right + 1)) <= T <= S and not (by_batch or has_places)


def parts(inputs: Inputs, options: Options) -> list[Part]:
    """The parts of a problem: all queries but those without a key."""
    (B, H, T, _), S = inputs.q.shape, inputs.k.shape[2]
    window, cut = Window(inputs, options), []
    most = max(PART_SCORES // (H * ROWS * window.reach), 2)  # blocks of all heads
    n_keys = [S] * B if inputs.key_lengths is None else inputs.key_lengths.clamp(0, S).tolist()
    for n, run in groupby(range(B), key=lambda b: n_keys[b]):
        run = list(run)
        seeing = min(T, n - (S - T) + options.left) if n else 0
        blocks = ceil_div(seeing, ROWS)
        if blocks < 1:
            continue
        queries = spans(seeing, ceil_div(blocks, ceil_div(blocks, most)) * ROWS)  # parts of equal size
        batches = list(spans(len(run), max(most // blocks, 1)))
        cut += [Part(window, slice(run[0] + b.start, run[0] + b.stop), rows, n) for rows in queries for b in batches]
    return cut
