"""The backward pass of the torch backend."""

from itertools import product

import torch
from torch import Tensor

from txl_kernels.torch_backend.tiles import Group, Tile, compute_dtype, plan, spans


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    content_bias: Tensor | None,
    position_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    first_distance: int,
    needs_grad: list[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of forward by recomputation, a tile at a time.

    With P = softmax(scores): dS = P * (dP - rowsum(P * dP) + dlse), and dS in raw coordinates is to r what dS is
    to k. Neither out nor lse is read: a softmax of the tile costs less than exp(scores - lse), and the row sum of
    P * dP has none of the rounding of a 16-bit out.

    Args:
        dout: (B, H, T, D), any strides.
        dlse: (B, H, T), any strides, or None for zero.
        q, k, v, r, content_bias, position_bias, is_causal, scale, first_distance: as for forward.
        out, lse: what forward returned.
        needs_grad: which of the six inputs want a gradient.

    Returns:
        Six gradients in the order of needs_grad, None where not wanted.
    """
    inputs = (q, k, v, r, content_bias, position_bias)
    needs_q, needs_k, needs_v, needs_r, needs_content, needs_position = needs_grad
    only_v = needs_v and sum(needs_grad) == 1
    dq, dk, dv, *_ = grads = [
        torch.empty_like(x) if needed else None for x, needed in zip(inputs, needs_grad, strict=True)
    ]
    B, H, T, D = q.shape
    size = plan(B, H, T, k.shape[2])
    # What every batch adds to stays in the compute dtype until the end.
    dr, dcontent, dposition = sums = [
        x.new_zeros(x.shape, dtype=compute_dtype(q.dtype)) if needed else None
        for x, needed in zip(inputs[3:], needs_grad[3:], strict=True)
    ]
    for heads, batches in product(spans(H, size.heads), spans(B, size.batches)):
        group = Group(inputs, batches, heads, size, is_causal, scale, first_distance)
        b, h, S, _ = group.k.shape
        # The last queries see every key: their products initialise dk and dv.
        new = group.k.new_empty if T else group.k.new_zeros
        dk_lanes, dv_lanes = (new((b * h, S, D)) if needed else None for needed in needs_grad[1:3])
        for rows in reversed(list(spans(T, size.rows))):
            tile = Tile(group, rows)
            p = tile.scores()
            torch.softmax(p, -1, out=p)
            dout_lanes = dout[batches, heads, rows].to(p.dtype).flatten(0, 1).contiguous()
            if needs_v:
                _add_product(dv_lanes[:, : tile.n], p.mT, dout_lanes, first=rows.stop == T)
            if only_v:
                continue

            ds = torch.bmm(dout_lanes, tile.v.flatten(0, 1).mT)
            torch.ops.aten._softmax_backward_data(ds, p, -1, p.dtype, grad_input=ds)
            if dlse is not None:
                ds.addcmul_(p, dlse[batches, heads, rows].flatten(0, 1)[..., None])

            if needs_k:
                _add_product(dk_lanes[:, : tile.n], ds.mT, tile.q_content.flatten(0, 1), first=rows.stop == T)
            if needs_q or needs_content:
                dq_content = torch.bmm(ds, tile.k.flatten(0, 1)).view(b, h, -1, D)
            if needs_content:
                dcontent[heads] += dq_content.sum((0, 2))

            if needs_q or needs_r or needs_position:
                ds_raw = tile.to_raw(ds)
            if needs_r:
                _add_product(dr[heads, tile.r_rows], ds_raw.mT, tile.q_position)
            if needs_q or needs_position:
                dq_position = torch.bmm(ds_raw, tile.r).view(h, -1, b, D).permute(2, 0, 1, 3)
            if needs_position:
                dposition[heads] += dq_position.sum((0, 2))

            if needs_q:
                dq[batches, heads, rows] = (dq_content + dq_position).mul_(scale)
        for grad, lanes in ((dk, dk_lanes), (dv, dv_lanes)):
            if grad is not None:
                grad[batches, heads] = lanes.view(group.k.shape)

    # q_content and q_position carry the scale into dk and dr; what multiplies k and r still lacks it.
    for grad, total, factor in zip(grads[3:], sums, (1.0, scale, scale), strict=True):
        if grad is not None:
            grad.copy_(total.mul_(factor))
    return tuple(grads)


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """total += a @ b, in place; total = a @ b for the first."""
    if first:
        torch.bmm(a, b, out=total)
    else:
        torch.baddbmm(total, a, b, out=total)
