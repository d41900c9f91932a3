"""The forward pass of the torch backend."""

from itertools import product

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
    attend = _attend_fused if q.device.type == "cpu" else _attend
    size = plan(B, H, T, k.shape[2])
    for heads, batches in product(spans(H, size.heads), spans(B, size.batches)):
        group = Group(inputs, batches, heads, size.rows, is_causal, scale, first_distance)
        for rows in spans(T, size.rows):
            tile_out, tile_lse = attend(Tile(group, rows))
            out[batches, heads, rows], lse[batches, heads, rows] = tile_out, tile_lse
    return out, lse


def _attend_fused(tile: Tile) -> tuple[Tensor, Tensor]:
    """out (b, h, t, D) and lse (b, h, t) of a tile by PyTorch's fused CPU attention, BD being its mask."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        tile.q_content, tile.k, tile.v, attn_mask=tile.position_scores(), scale=1.0
    )


def _attend(tile: Tile) -> tuple[Tensor, Tensor]:
    """As _attend_fused, on any device."""
    p = tile.scores()
    row_max = p.amax(-1)
    torch.softmax(p, -1, out=p)
    shape = tile.q_content.shape
    # The largest probability is 1 / sum(exp(score - row_max)).
    return torch.bmm(p, tile.v.flatten(0, 1)).view(shape), (row_max - p.amax(-1).log()).view(shape[:3])
