"""Narrow windows: blocks of a few queries, each with the keys in its reach, as the batch of one small problem.

A tile as high as products like would multiply mostly pairs that a narrow window hides. A block of t queries has
left + t + right keys. The first queries, whose windows reach before the first key and which make up for the size of
blocks, and the last, whose windows reach beyond the last key, are problems of their own. Every distance between a query
and a key stays what it is.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from txl_kernels.arguments import DIFFERENTIABLE, Inputs, Options
from txl_kernels.torch_backend.kept import Kept
from txl_kernels.torch_backend.tiles import cast, ceil_div, sum_dtype

# Measured on two cores: the widest window, left + right, for which blocks are faster, the queries in a block, and the
# scores of a part, which is more than scores: 16 x 28 of them come with 5,600 numbers of q, k and v at head size 64.
WIDEST = 32
ROWS = 16
PART_SCORES = 1 << 17


class Part(NamedTuple):
    """Some queries of a problem as a problem of their own: `blocks` times as many lanes where there is more than one.

    Attributes:
        rows, keys: which queries and keys of the problem.
        blocks: how many blocks of equal size the queries are.
        reach: how many keys a block has.
    """

    rows: slice
    keys: slice
    blocks: int
    reach: int

    def of_queries(self, x: Tensor) -> Tensor:
        """x (B, H, T, ...) for these queries: (B * blocks, H, t, ...)."""
        x = x[:, :, self.rows]
        if self.blocks == 1:
            return x
        return x.unflatten(2, (self.blocks, -1)).transpose(1, 2).flatten(0, 1)

    def to_queries(self, x: Tensor, total: Tensor) -> None:
        """Stores x, as of_queries gives it, in these queries of total (B, H, T, ...)."""
        total = total[:, :, self.rows]
        if self.blocks > 1:
            total, x = total.unflatten(2, (self.blocks, -1)), x.unflatten(0, (-1, self.blocks)).transpose(1, 2)
        total.copy_(x)

    def of_keys(self, x: Tensor) -> Tensor:
        """x (B, Hk, S, D) for the keys of each block: (B * blocks, Hk, reach, D)."""
        x = x[:, :, self.keys]
        if self.blocks == 1:
            return x
        return x.unfold(2, self.reach, ROWS).permute(0, 2, 1, 4, 3).flatten(0, 1)

    def add_to_keys(self, x: Tensor, total: Tensor) -> None:
        """Adds x, as of_keys gives it, to these keys of total (B, Hk, S, D)."""
        total = total[:, :, self.keys]
        x = x.unflatten(0, (-1, self.blocks)).permute(0, 2, 1, 4, 3)
        for start in range(0, self.reach, ROWS):  # keys of neighbours overlap, those of one pass do not
            width = min(ROWS, self.reach - start)
            stop = start + (self.blocks - 1) * ROWS + width
            total[:, :, start:stop].unfold(2, width, ROWS).add_(x[..., start : start + width])

    def problem(self, inputs: Inputs, options: Options) -> tuple[Inputs, Options]:
        """The problem of these queries."""
        lengths = inputs.key_lengths
        if lengths is not None:
            starts = torch.arange(self.blocks) * ROWS + self.keys.start
            lengths = (lengths[:, None] - starts).flatten()
        mine = inputs._replace(
            q=self.of_queries(inputs.q),
            k=self.of_keys(inputs.k),
            v=self.of_keys(inputs.v),
            q_pos=None if inputs.q_pos is None else self.of_queries(inputs.q_pos),
            key_lengths=lengths,
        )
        # The last query of a problem stands at its last key; here keys may go on.
        ahead = self.keys.stop - self.rows.stop - (inputs.k.shape[2] - inputs.q.shape[2])
        left, right, first_distance = options.left + ahead, options.right - ahead, options.first_distance + ahead
        return mine, options._replace(left=left, right=right, first_distance=first_distance)


def parts(inputs: Inputs, options: Options) -> list[Part]:
    """The parts that a problem with a narrow window is cut into; none where tiles do."""
    (B, H, T, _), S, (left, right) = inputs.q.shape, inputs.k.shape[2], options[:2]
    memory, window = S - T, left + right
    if min(left, right) < 0 or window > WIDEST or memory < 0 or inputs.q.device.type != "cpu":
        return []
    by_batch = inputs.r is not None and inputs.r.shape[0] > 1
    has_places = inputs.attn_mask is not None or inputs.segment_scores is not None or options.dropout_p > 0
    if by_batch or has_places:
        return []
    last = T - right  # the first query whose window reaches beyond the last key
    # The windows of the first left - memory queries reach further than key 0.
    blocks = max(last - max(left - memory, 0), 0) // ROWS
    if blocks < 2:
        return []
    first = last - blocks * ROWS

    def part(start: int, stop: int, blocks: int = 1) -> Part:
        keys = slice(max(start + memory - left, 0), min(stop + memory + right, S))
        return Part(slice(start, stop), keys, blocks, keys.stop - keys.start - (blocks - 1) * ROWS)

    most = max(2, PART_SCORES // (B * H * ROWS * (ROWS + window)))
    most = ceil_div(blocks, ceil_div(blocks, most))  # parts of equal size
    starts = range(first, last, most * ROWS)
    middle = [part(start, min(start + most * ROWS, last), min(most, (last - start) // ROWS)) for start in starts]
    return [part(0, first)] * (first > 0) + middle + [part(last, T)] * (last < T)


def forward(
    run: Callable, cut: list[Part], inputs: Inputs, options: Options, kept: Kept | None
) -> tuple[Tensor, Tensor]:
    """out and lse, those of each part by run(inputs, options, kept)."""
    q = inputs.q
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=sum_dtype(q.dtype))
    for part in cut:
        part_out, part_lse = run(*part.problem(inputs, options), kept)
        part.to_queries(part_out, out)
        part.to_queries(part_lse, lse)
    return out, lse


def backward(
    run: Callable,
    cut: list[Part],
    dout: Tensor,
    dlse: Tensor | None,
    inputs: Inputs,
    lse: Tensor,
    options: Options,
    wanted: dict[str, Tensor],
    kept: Kept | None,
) -> dict[str, Tensor]:
    """Gradients of the wanted inputs, those of each part by run; what several parts add to in the dtype of sums."""
    dtype = sum_dtype(inputs.q.dtype)
    added = {name: x for name in _ADDED_TO if (x := getattr(inputs, name)) is not None}
    inputs = inputs._replace(**{name: cast(x, dtype) for name, x in added.items()})
    grads = {
        name: torch.zeros_like(x, dtype=dtype) if name in added else torch.empty_like(x) for name, x in wanted.items()
    }
    needs_grad = [name in wanted for name in DIFFERENTIABLE]
    for part in cut:
        problem, part_options = part.problem(inputs, options)
        part_dlse = None if dlse is None else part.of_queries(dlse)
        part_grads = run(
            part.of_queries(dout), part_dlse, problem, None, part.of_queries(lse), part_options, needs_grad, kept
        )
        for name, grad in zip(DIFFERENTIABLE, part_grads, strict=True):
            if name in ("k", "v") and grad is not None:
                part.add_to_keys(grad, grads[name])
            elif name in added and grad is not None:
                grads[name] += grad
            elif grad is not None:
                part.to_queries(grad, grads[name])
    return {name: cast(grad, wanted[name].dtype) for name, grad in grads.items()}


_ADDED_TO = ("k", "v", "r", "content_bias", "position_bias", "r_bias")
