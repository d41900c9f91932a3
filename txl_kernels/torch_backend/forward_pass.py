"""The forward pass of the torch backend."""

import torch
from torch import Tensor

from txl_kernels.arguments import Inputs, Options
from txl_kernels.torch_backend import tiles
from txl_kernels.torch_backend.terms import needed
from txl_kernels.torch_backend.tiles import Tile, cast, groups, product_dtype, spans, sum_dtype

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """Relative attention (Dai et al. 2019, arXiv 1901.02860) by tiles of queries; arguments as validated.

    Returns:
        out (B, H, T, D), laid out as q, and lse (B, H, T) in float32 (float64 for float64 inputs).
    """
    q = inputs.q
    (B, H, T, _), Hk = q.shape, inputs.k.shape[1]
    plain = q.device.type == "cpu" and not needed(inputs, options)
    if plain and (result := _in_one_piece(inputs, options)) is not None:
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
    lse, row_max = _softmax(p)
    if tile.group.may_be_dead:
        dead = row_max == -torch.inf
        p.masked_fill_(dead[..., None], 0.0)
        lse.masked_fill_(dead, -torch.inf)
    out = torch.bmm(tile.drop(p), tile.lanes(tile.v))
    if tile.dropout_scale != 1:
        out *= tile.dropout_scale
    shape = tile.q_content.shape
    return out.view(shape), lse.view(shape[:3])


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of the last dimension, in place: the log-sum-exp and the maximum that the rows had."""
    dtype = sum_dtype(scores.dtype)
    row_max = cast(scores.amax(-1), dtype)
    torch.softmax(scores, -1, out=scores)
    # The largest probability is 1 / sum(exp(score - row_max)): lse without another exp.
    return row_max - cast(scores.amax(-1), dtype).log_(), row_max


def _attend_fused(tile: Tile) -> tuple[Tensor, Tensor]:
    """As _attend, by PyTorch's fused CPU attention with the position term as its mask; one query head per key head."""
    return _fused(tile.q_content, tile.k, tile.v, attn_mask=tile.position_scores(), scale=1.0)


def _in_one_piece(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor] | None:
    """forward of one query (generation) or of one tile, without the cost of cutting tiles, or None where it won't do.

    Only the right edge, and for one query the left, may hide keys; each key in use has a row of r, shared by the batch.
    """
    q, k, v, r = inputs[:4]
    (B, H, T, D), (Hk, S), (left, right, scale) = q.shape, k.shape[1:3], options[:3]
    in_half = q.dtype is torch.bfloat16
    if T > 1 and (in_half or 0 <= left < S - 1 or T > 2 * tiles.MAX_ROWS or B * H * T * S > tiles.TILE_SCORES):
        return None
    if inputs.r_bias is not None or inputs.key_lengths is not None or q.dtype != product_dtype(inputs, options):
        return None
    first = max(S - 1 - left, 0) if left >= 0 else 0
    n, row = S - first, options.first_distance - (S - 1) + first
    columns = n + T - 1  # raw, as in a tile; those from `end` on are hidden
    end = columns if right < 0 else min(n + right, columns)
    if r is None or r.shape[0] > 1 or not 0 <= row <= r.shape[2] - end:
        return None

    q_content = _sum(q, inputs.content_bias)
    q_position = _sum(q if inputs.q_pos is None else inputs.q_pos, inputs.position_bias) * scale
    q_position = q_position.permute(1, 2, 0, 3).reshape(r.shape[1], -1, r.shape[3])
    bd = _product(q_position, r[0] if end == r.shape[2] else r[0, :, row : row + end])
    if T == 1:
        bd = bd.view(H, B, 1, n).transpose(0, 1)
    else:
        bd = torch.constant_pad_nd(bd, (0, columns - end), -torch.inf)
        bd = bd.as_strided((B, H, T, n), (columns, T * B * columns, B * columns - 1, 1), T - 1)
    if first:
        k, v = k[:, :, first:], v[:, :, first:]
    if Hk < H:  # query heads of one key head as rows of one product
        rows = H // Hk * T
        q_content, bd = q_content.reshape(B, Hk, rows, D), bd.reshape(B, Hk, rows, n)
    if in_half:  # PyTorch's fused attention is 9 times slower here than in float32
        q_content, bd, k, v = (x.flatten(0, 1) for x in (q_content, bd, k, v))
        scores = torch.add(bd.float(), _product(q_content, k), alpha=scale)
        lse, _ = _softmax(scores)
        out = torch.bmm(scores.to(q.dtype), v)
    else:
        out, lse = _fused(q_content, k, v, attn_mask=bd, scale=scale)
    out, lse = out.view(q.shape), lse.reshape(B, H, T).contiguous()
    same_layout = out.stride() == q.stride() or (out.is_contiguous() and q.is_contiguous())
    return out if same_layout else torch.empty_like(q).copy_(out), lse


def _sum(queries: Tensor, bias: Tensor | None) -> Tensor:
    """queries + bias (H, D), in the dtype of the queries."""
    return queries if bias is None else cast(queries + bias.unsqueeze(1), queries.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b^T, few rows by many: (l, m, n). In bfloat16 with the many on the left, up to 20 times faster."""
    return torch.bmm(b, a.mT).mT if a.dtype is torch.bfloat16 else torch.bmm(a, b.mT)
