"""The forward pass of the torch backend."""

import torch
from torch import Tensor

from txl_kernels.torch_backend.tiles import Group, Tile, compute_dtype, plan, spans


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    content_bias: Tensor | None,
    position_bias: Tensor | None,
    is_causal: bool,
    scale: float,
    first_distance: int,
) -> tuple[Tensor, Tensor]:
    """Relative attention (Dai et al. 2019, arXiv 1901.02860) by tiles of queries; arguments as validated.

    Args:
        q: (B, H, T, D).
        k, v: (B, H, S, D).
        r: (H, P, D).
        content_bias, position_bias: (H, D) or None.
        is_causal, scale, first_distance: as in rel_attention.

    Returns:
        out (B, H, T, D), laid out as q, and lse (B, H, T) in float32 (float64 for float64 inputs).
    """
    inputs = (q, k, v, r, content_bias, position_bias)
    B, H, T, _ = q.shape
    out, lse = torch.empty_like(q), q.new_empty((B, H, T), dtype=compute_dtype(q.dtype))
    size = plan(B, H, T, k.shape[2])
    for heads in spans(H, size.heads):
        for batches in spans(B, size.batches):
            group = Group(inputs, batches, heads, size.rows, is_causal, scale, first_distance)
            for rows in spans(T, size.rows):
                tile = Tile(group, rows)
                p = tile.scores()
                row_max = p.amax(-1)
                torch.softmax(p, -1, out=p)
                out[batches, heads, rows] = torch.bmm(p, tile.v).view_as(out[batches, heads, rows])
                # The largest probability is 1 / sum(exp(score - row_max)): no pass of its own for the sum.
                lse[batches, heads, rows] = (row_max - p.amax(-1).log_()).view_as(lse[batches, heads, rows])
    return out, lse
