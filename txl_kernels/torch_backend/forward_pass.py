"""The forward pass of the torch backend."""

import torch
from torch import Tensor

from txl_kernels.arguments import Inputs, Options
from txl_kernels.torch_backend import block_passes, blocks, one_piece, tiles
from txl_kernels.torch_backend.kept import Kept
from txl_kernels.torch_backend.terms import needed
from txl_kernels.torch_backend.tiles import Tile, groups, product_dtype, softmax, sum_dtype

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def forward(inputs: Inputs, options: Options, kept: Kept | None = None) -> tuple[Tensor, Tensor]:
    """Relative attention (Dai et al. 2019, arXiv 1901.02860) by tiles of queries; arguments as validated.

    Args:
        inputs, options: the problem.
        kept: where to leave weights for the backward, or None where there is none.

    Returns:
        out (B, H, T, D), laid out as q, and lse (B, H, T) in float32 (float64 for float64 inputs).
    """
    q = inputs.q
    (B, H, T, _), Hk = q.shape, inputs.k.shape[1]
    if (piece := one_piece.one_piece(inputs, options, for_backward=kept is not None)) is not None:
        return one_piece.forward(piece, q, kept)
    if blocks.fits(inputs, options):
        return block_passes.forward(inputs, options, kept)

    out, lse = torch.empty_like(q), q.new_empty((B, H, T), dtype=sum_dtype(q.dtype))
    may_be_dead = inputs.key_lengths is not None and options.left >= 0
    in_half = product_dtype(inputs, options) is torch.bfloat16
    plain = q.device.type == "cpu" and not needed(inputs, options)
    fits = plain and Hk == H and T < tiles.MANY_ROWS and not (may_be_dead or in_half)
    for group in groups(inputs, options):
        for tile in group.tiles(kept):
            attend = _attend_fused if fits and tile.weights is None else _attend
            out[tile.where], lse[tile.where] = attend(tile) if tile.n else (0.0, -torch.inf)
        del group, tile  # before the next one takes memory
    return out, lse


def _attend(tile: Tile) -> tuple[Tensor, Tensor]:
    """out (b, h, t, D) and lse (b, h, t) of a tile, whose weights stay where they have a place."""
    p = tile.scores()
    lse, row_max = softmax(p)
    if tile.group.may_be_dead:
        dead = row_max == -torch.inf
        p.masked_fill_(dead[..., None], 0.0)
        lse.masked_fill_(dead, -torch.inf)
    if tile.weights is not None and tile.group.options.dropout_p:
        p = p.clone()
    out = torch.bmm(tile.drop(p), tile.lanes(tile.v))
    if tile.dropout_scale != 1:
        out *= tile.dropout_scale
    shape = tile.q_content.shape
    return out.view(shape), lse.view(shape[:3])


def _attend_fused(tile: Tile) -> tuple[Tensor, Tensor]:
    """As _attend, by PyTorch's fused CPU attention with the position term as its mask; one query head per key head."""
    return _fused(tile.q_content, tile.k, tile.v, attn_mask=tile.position.scores(), scale=1.0)
