"""The forward pass of the torch backend."""

import torch
from torch import Tensor

from txl_kernels.arguments import Inputs, Options
from txl_kernels.torch_backend import tiles
from txl_kernels.torch_backend.terms import needed
from txl_kernels.torch_backend.tiles import Tile, groups, product_dtype, spans, sum_dtype

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """Relative attention (Dai et al. 2019, arXiv 1901.02860) by tiles of queries; arguments as validated.

    Returns:
        out (B, H, T, D), laid out as q, and lse (B, H, T) in float32 (float64 for float64 inputs).
    """
    q = inputs.q
    (B, H, T, _), Hk = q.shape, inputs.k.shape[1]
    plain = q.device.type == "cpu" and not needed(inputs, options)
    if T == 1 and plain and (result := _one_query(inputs, options)) is not None:
        return result

    out, lse = torch.empty_like(q), q.new_empty((B, H, T), dtype=sum_dtype(q.dtype))
    may_be_dead = inputs.key_lengths is not None and options.left >= 0
    in_half = product_dtype(inputs, options) is torch.bfloat16
    fits = plain and Hk == H and T < tiles.MANY_ROWS and not (may_be_dead or in_half)
    attend = _attend_fused if fits else _attend
    for group in groups(inputs, options):
        for rows in spans(T, group.size.rows):
            tile = Tile(group, rows)
            out[tile.where], lse[tile.where] = attend(tile) if tile.n else (0.0, -torch.inf)
    return out, lse


def _attend(tile: Tile) -> tuple[Tensor, Tensor]:
    """out (b, h, t, D) and lse (b, h, t) of a tile."""
    p = tile.scores()
    dtype = sum_dtype(p.dtype)
    row_max = p.amax(-1).to(dtype)
    torch.softmax(p, -1, out=p)
    # The largest probability is 1 / sum(exp(score - row_max)): lse without another exp.
    lse = row_max - p.amax(-1).to(dtype).log_()
    if tile.group.may_be_dead:
        dead = row_max == -torch.inf
        p.masked_fill_(dead[..., None], 0.0)
        lse.masked_fill_(dead, -torch.inf)
    out = torch.bmm(tile.drop(p), tile.lanes(tile.v))
    if tile.dropout_scale != 1:
        out *= tile.dropout_scale
    shape = tile.q_content.shape
    return out.view(shape), lse.view(shape[:3])


def _attend_fused(tile: Tile) -> tuple[Tensor, Tensor]:
    """As _attend, by PyTorch's fused CPU attention with the position term as its mask; one query head per key head."""
    return _fused(tile.q_content, tile.k, tile.v, attn_mask=tile.position_scores(), scale=1.0)


def _one_query(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor] | None:
    """forward for T = 1 (generation) without tiles, or None where it would not do.

    The visible keys need one row of r each, shared by the batch, and nothing but a window may hide keys.
    """
    q, k, v, r = inputs[:4]
    (B, H, _, D), (Hk, S), P = q.shape, k.shape[1:3], inputs.rows
    first = max(S - 1 - options.left, 0) if options.left >= 0 else 0
    row, n = options.first_distance - (S - 1) + first, S - first
    shared_by_batch = r is not None and r.shape[0] == 1
    if not (shared_by_batch and 0 <= row <= P - n and q.dtype == product_dtype(inputs, options)):
        return None
    if inputs.r_bias is not None or inputs.key_lengths is not None:
        return None

    def plus(queries: Tensor, bias: Tensor | None) -> Tensor:
        return (queries if bias is None else queries + bias[:, None]).to(q.dtype)

    grouped = B, Hk, H // Hk, D  # query heads of one key head as the queries of one head
    q_content = plus(q, inputs.content_bias).view(grouped)
    q_position = plus(q if inputs.q_pos is None else inputs.q_pos, inputs.position_bias)
    rows = r[0, :, row : row + n].expand(H, -1, -1)
    bd = _product((q_position[:, :, 0] * options.scale).transpose(0, 1), rows)
    bd = bd.transpose(0, 1).reshape(B, Hk, -1, n)
    k, v = k[:, :, first:], v[:, :, first:]
    if q.dtype is torch.bfloat16:  # PyTorch's fused attention is 9 times slower here than in float32
        ac = _product(q_content.flatten(0, 1), k.flatten(0, 1)).view(bd.shape)
        scores = torch.add(bd.float(), ac, alpha=options.scale)
        lse = scores.logsumexp(-1)
        out = torch.bmm(scores.softmax(-1).to(q.dtype).flatten(0, 1), v.flatten(0, 1))
    else:
        out, lse = _fused(q_content, k, v, attn_mask=bd, scale=options.scale)
    return torch.empty_like(q).copy_(out.view(q.shape)), lse.reshape(B, H, 1).contiguous()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b^T, few rows by many: (l, m, n). In bfloat16 with the many on the left, up to 20 times faster."""
    return torch.bmm(b, a.mT).mT if a.dtype is torch.bfloat16 else torch.bmm(a, b.mT)
