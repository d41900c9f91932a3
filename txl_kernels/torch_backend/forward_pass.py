"""The forward pass of the torch backend."""

from itertools import product

import torch
from torch import Tensor

from txl_kernels.torch_backend import tiles
from txl_kernels.torch_backend.tiles import Group, Tile, compute_dtype, plan, spans

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


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
    B, H, T, _ = q.shape
    S, P = k.shape[2], r.shape[1]
    first_row = first_distance - (S - T)
    if T == 1 and 0 <= first_row <= P - S and q.device.type == "cpu" and q.dtype == compute_dtype(q.dtype):
        return _one_query(q, k, v, r[:, first_row : first_row + S], content_bias, position_bias, scale)

    inputs = (q, k, v, r, content_bias, position_bias)
    out, lse = torch.empty_like(q), q.new_empty((B, H, T), dtype=compute_dtype(q.dtype))
    attend = _attend_fused if q.device.type == "cpu" and T < tiles.MANY_ROWS else _attend
    size = plan(B, H, T, S)
    for heads, batches in product(spans(H, size.heads), spans(B, size.batches)):
        group = Group(inputs, batches, heads, size, is_causal, scale, first_distance)
        for rows in spans(T, size.rows):
            out[batches, heads, rows], lse[batches, heads, rows] = attend(Tile(group, rows))
    return out, lse


def _attend(tile: Tile) -> tuple[Tensor, Tensor]:
    """out (b, h, t, D) and lse (b, h, t) of a tile."""
    p = tile.scores()
    row_max = p.amax(-1)
    torch.softmax(p, -1, out=p)
    shape = tile.q_content.shape
    # The largest probability is 1 / sum(exp(score - row_max)): lse without another exp.
    return torch.bmm(p, tile.v.flatten(0, 1)).view(shape), (row_max - p.amax(-1).log_()).view(shape[:3])


def _attend_fused(tile: Tile) -> tuple[Tensor, Tensor]:
    """As _attend, by PyTorch's fused CPU attention with the position term as its mask."""
    return _fused(tile.q_content, tile.k, tile.v, attn_mask=tile.position_scores(), scale=1.0)


def _one_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    content_bias: Tensor | None,
    position_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """forward for T = 1 (generation), where row j of r (H, S, D) belongs to key j and every key is visible."""
    q_content = q if content_bias is None else q + content_bias[:, None]
    q_position = q if position_bias is None else q + position_bias[:, None]
    bd = torch.bmm((q_position[:, :, 0] * scale).transpose(0, 1), r.mT)
    out, lse = _fused(q_content, k, v, attn_mask=bd.transpose(0, 1)[:, :, None], scale=scale)
    return torch.empty_like(q).copy_(out), lse.contiguous()
