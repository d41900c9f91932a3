"""Tiles of relative-attention scores, shared by the forward and the backward pass of the torch backend.

A group is a set of (batch, head) lanes that go through one matrix product together; within it the queries are cut
into tiles. The scores of one tile are the largest thing that is ever allocated. A tile has only the keys that the
window and the key lengths leave to its queries.

The rel-shift costs no arithmetic (positions.py).

In shapes, b and h are the batches and heads of a group, t, n and p the queries, keys and rows of r of a tile. Query
heads that share a key head are rows of one product: there are l = b * hk lanes with m = h / hk * t rows each.
"""

import functools
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from txl_kernels.arguments import Inputs, Options
from txl_kernels.torch_backend import terms
from txl_kernels.torch_backend.positions import Band, Wrapped
from txl_kernels.torch_backend.terms import ALL, Terms, cut, part

if TYPE_CHECKING:
    from txl_kernels.torch_backend.kept import Kept

# Measured on two cores: larger tiles fall out of the cache and, at the causal edge, multiply more that is hidden;
# smaller ones starve the matrix products. bfloat16, half the size, gets tiles of twice the rows and scores.
TILE_SCORES = 1 << 19
MAX_ROWS = 128
# From this many queries on, three large products beat PyTorch's fused CPU attention and copies of k and v are
# cheap.
MANY_ROWS = 64


class Plan(NamedTuple):
    """Lanes of a group, batches x heads, query rows of its tiles, and the most keys that a tile has."""

    batches: int
    heads: int
    rows: int
    keys: int


def plan(
    B: int, H: int, T: int, S: int, heads_per_key: int = 1, window: int | None = None, in_half: bool = False
) -> Plan:
    """Cuts a problem so that a tile holds about TILE_SCORES scores, but one row of one key head at least.

    Batches come first: they share r, so that the position term of all is one product.

    Args:
        B: most batches in a group.
        H, T, S: query heads, queries and keys of the problem.
        heads_per_key: query heads for each key head; a group has all of them.
        window: left + right, or None where one of them is unlimited.
        in_half: whether scores are bfloat16.
    """
    highest, most_scores, widest = MAX_ROWS << in_half, TILE_SCORES << in_half, S
    if window is not None:
        highest = most_rows(window, in_half)
        widest = min(S, window + highest)
    highest = max(1, min(highest, most_scores // max(widest * heads_per_key, 1)))
    rows = ceil_div(T, max(1, ceil_div(T, highest)))  # tiles of equal height
    keys = S if window is None else min(S, window + rows)
    lanes = max(1, most_scores // max(rows * keys * heads_per_key, 1))
    batches = max(1, min(B, lanes))
    return Plan(batches, heads_per_key * max(1, min(H // heads_per_key, lanes // batches)), rows, keys)


def most_rows(window: int, in_half: bool = False) -> int:
    """The most rows of a tile, whose height is multiplied and hidden beside the window; in_half as for plan."""
    return torch.sym_min(MAX_ROWS << in_half, torch.sym_max(MANY_ROWS, 4 * window))


def groups(inputs: Inputs, options: Options) -> Iterator["Group"]:
    """The groups of a problem."""
    (B, H, T, _), (Hk, S) = inputs.q.shape, inputs.k.shape[1:3]
    # Lanes of a group share r and the number of keys.
    alone = inputs.r is not None and inputs.r.shape[0] > 1
    n_keys = [S] * B
    if inputs.key_lengths is not None and terms.lengths_on_host(inputs):
        n_keys = inputs.key_lengths.clamp(0, S).tolist()
    window = options.left + options.right if min(options.left, options.right) >= 0 else None
    for (n, _), run in groupby(range(B), key=lambda b: (n_keys[b], alone and b)):
        run = list(run)
        n_columns = S if options.wrap_future else n  # a shift that wraps multiplies with all rows of r
        size = plan(len(run), H, T, n_columns, H // Hk, window, product_dtype(inputs, options) is torch.bfloat16)
        for heads in spans(H, size.heads):
            for part_of_run in spans(len(run), size.batches):
                batches = slice(run[0] + part_of_run.start, run[0] + part_of_run.stop)
                yield Group(inputs, options, batches, heads, size, n)


def spans(size: int, step: int) -> Iterator[slice]:
    """Slices of at most `step` elements that cover range(size)."""
    return (slice(start, min(start + step, size)) for start in range(0, size, max(step, 1)))


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a dtype; a call of `to` that changes nothing takes 2 us."""
    return x if x.dtype is dtype else x.to(dtype)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over tiles and the log-sum-exp are kept in: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def product_dtype(inputs: Inputs, options: Options) -> torch.dtype:
    """The dtype of products and scores: that of sums, but bfloat16 where a CPU multiplies it and no term adds to it."""
    dtype = inputs.q.dtype
    in_half = dtype is torch.bfloat16 and inputs.q.device.type == "cpu" and cpu_multiplies_bfloat16()
    return dtype if in_half and inputs.r_bias is None and not terms.needed(inputs, options) else sum_dtype(dtype)


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Group:
    """Some (batch, head) lanes: their inputs in the dtype of products, and the buffer that their tiles share.

    Attributes:
        batches, heads, kv_heads: which lanes these are.
        dtype: of products and scores.
        n_keys: the number of keys that some lane has.
        k, v: (b, hk, n_keys, D); views where the inputs have that dtype and few queries use them.
        r: (1|h, P, Dr), or None.
        r_bias: scale * r_bias, (h, 1, P), or None. Both have a zero in front, P + 1 rows, where the shift wraps.
        shift: the rel-shift of its tiles.
        q_content, q_position: scale * (q + bias), (h, T, b, D): any of their rows flatten to (h, rows * b, D).
        may_be_dead: whether a query may see no key of a tile that has some.
    """

    def __init__(self, inputs: Inputs, options: Options, batches: slice, heads: slice, size: Plan, n_keys: int) -> None:
        q, scale = inputs.q, options.scale
        self.inputs, self.options, self.size = inputs, options, size
        self.batches, self.heads = batches, heads
        T, S = q.shape[2], inputs.k.shape[2]
        self.heads_per_key = q.shape[1] // inputs.k.shape[1]
        self.kv_heads = slice(heads.start // self.heads_per_key, heads.stop // self.heads_per_key)
        self.memory, self.n_keys = S - T, n_keys
        self.dtype = dtype = product_dtype(inputs, options)
        in_half = dtype is torch.bfloat16

        lengths, on_host = inputs.key_lengths, terms.lengths_on_host(inputs)
        self.k, self.v = (cast(cut(x, batches, self.kv_heads, slice(n_keys)), dtype) for x in (inputs.k, inputs.v))
        if not on_host:  # what lies beyond may be NaN, which a weight of zero does not remove
            beyond = terms.beyond_lengths(inputs, batches, heads, slice(0, T), slice(0, S))[:, None, :, None]
            self.k, self.v = self.k.masked_fill(beyond, 0.0), self.v.masked_fill(beyond, 0.0)
        # Products want lanes at equal distances, those of bfloat16 dense rows: else one copy, not one for each tile.
        if in_half:
            self.k, self.v = self.k.contiguous(), self.v.contiguous()
        elif T >= MANY_ROWS:
            self.k, self.v = (x.flatten(0, 1).view(x.shape) for x in (self.k, self.v))
        self.has_terms = terms.needed(inputs, options)
        self.may_be_dead = inputs.attn_mask is not None or (lengths is not None and (options.left >= 0 or not on_host))

        def scaled_sum(queries: Tensor, bias: Tensor | None) -> Tensor:
            queries = cast(cut(queries, batches, heads).permute(1, 2, 0, 3), sum_dtype(dtype))
            bias = None if bias is None else cut(bias, heads).unsqueeze(1).unsqueeze(1)
            return cast(_scaled_sum(queries, bias, scale), dtype)

        self.q_content, self.q_position, self.r = scaled_sum(q, inputs.content_bias), None, None
        if inputs.r is not None:
            self.q_position = scaled_sum(q if inputs.q_pos is None else inputs.q_pos, inputs.position_bias)
            self.r = cast(part(inputs.r, batches, heads)[0], dtype)
            self.r = self.r.contiguous() if in_half else self.r
        self.r_bias = None if inputs.r_bias is None else inputs.r_bias[heads, None].to(dtype) * scale
        b, h = batches.stop - batches.start, heads.stop - heads.start
        self.shift = Band
        if options.wrap_future:  # a column of zeros in front of BD
            self.shift = Wrapped
            self.r = None if self.r is None else pad(self.r, (0, 0, 1, 0))
            self.r_bias = None if self.r_bias is None else pad(self.r_bias, (1, 0))
        self.raw = self.k.new_empty(self.shift.size(b, h, size.rows, size.keys, S))

    def tiles(self, kept: "Kept | None") -> Iterator["Tile"]:
        """Its tiles, the last queries first, with their places in what is kept."""
        rows = spans(self.inputs.q.shape[2], self.size.rows)
        return (Tile(self, part, kept) for part in reversed(list(rows)))


class Tile:
    """Query rows of a group, t of them, against the n keys that at least one of them sees.

    Attributes:
        group: whose tile this is.
        where: the slices of batches, heads and queries.
        keys: the slice of keys, n of them.
        shape: (b, h, t, n).
        k, v: those keys and values, (b, hk, n, D).
        q_content: (b, h, t, D).
        position: its position term.
        n_lanes: l.
        weights: the place of its softmax weights (b, h, t, n), or None where they are not kept.
    """

    def __init__(self, group: Group, rows: slice, kept: "Kept | None") -> None:
        left, right = group.options.left, group.options.right
        h, _, b, _ = group.q_content.shape
        first = rows.start + group.memory - left if left >= 0 else 0
        stop = min(group.n_keys, rows.stop + group.memory + right) if right >= 0 else group.n_keys
        self.group, self.where = group, (group.batches, group.heads, rows)
        self.keys = keys = slice(min(max(first, 0), stop), stop)
        self.n = n = keys.stop - keys.start
        self.shape = b, h, rows.stop - rows.start, n
        self.n_lanes = b * h // group.heads_per_key
        self.k, self.v = cut(group.k, ALL, ALL, keys), cut(group.v, ALL, ALL, keys)
        self.q_content = cut(group.q_content, ALL, rows).permute(2, 0, 1, 3)

        self.position = group.shift(group, rows, keys)
        self.weights = tanh = None
        if kept is not None:
            self.weights, tanh = kept.take(self.shape, with_tanh=group.options.softcap is not None)
        self._terms = Terms(group.inputs, group.options, *self.where, keys, tanh) if group.has_terms else None

    @property
    def dropout_scale(self) -> float:
        """What the weights that survive dropout are multiplied by."""
        return 1.0 if self._terms is None else self._terms.dropout_scale

    def scores(self, for_backward: bool = False) -> Tensor:
        """The scores with every term, -inf where hidden: (l, m, n), in the place of the weights if there is one."""
        scores = self.position.scores()
        scores = scores.contiguous() if self.weights is None else self.weights.copy_(scores)
        lanes = self.lanes(scores)
        torch.baddbmm(lanes, self.lanes(self.q_content), self.lanes(self.k).mT, out=lanes)
        if self._terms is not None:
            self._terms.finish(scores, for_backward)
        return lanes

    def lanes(self, x: Tensor) -> Tensor:
        """x (b, h, t, any) as (l, m, any), or (b, hk, n, any) as (l, n, any)."""
        b, h, n, width = x.shape
        return x.flatten(0, 1) if b * h == self.n_lanes else x.reshape(self.n_lanes, b * h * n // self.n_lanes, width)

    def drop(self, x: Tensor) -> Tensor:
        """x (l, m, n) with zeros where dropout strikes, in place."""
        if self.group.options.dropout_p:
            self._terms.drop(x.view(self.shape))
        return x

    def through_terms(self, dscores: Tensor, totals: dict[str, Tensor]) -> None:
        """Terms.backward of dscores (l, m, n)."""
        if self._terms is not None:
            self._terms.backward(dscores.view(self.shape), totals)


def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of the last dimension, in place: the log-sum-exp and the maximum that the rows had."""
    dtype = sum_dtype(scores.dtype)
    row_max = cast(scores.amax(-1), dtype)
    torch.softmax(scores, -1, out=scores)
    # The largest probability is 1 / sum(exp(score - row_max)): lse without another exp.
    return row_max - cast(scores.amax(-1), dtype).log_(), row_max


def _scaled_sum(queries: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """scale * (queries + bias), dense, in the dtype of the queries (h, T, b, D)."""
    result = queries.new_empty(queries.shape)
    if bias is None:
        return torch.mul(queries, scale, out=result)
    return torch.add(queries, bias, out=result).mul_(scale)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
