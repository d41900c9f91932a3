"""The backward pass of the torch backend."""

import torch
from torch import Tensor

from txl_kernels.arguments import DIFFERENTIABLE, Inputs, Options
from txl_kernels.torch_backend import block_passes, blocks, one_piece
from txl_kernels.torch_backend.kept import Kept
from txl_kernels.torch_backend.terms import ALL, cut, part
from txl_kernels.torch_backend.tiles import Group, cast, groups, sum_dtype

_softmax_backward = torch.ops.aten._softmax_backward_data.out


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    inputs: Inputs,
    out: Tensor | None,
    lse: Tensor,
    options: Options,
    needs_grad: list[bool],
    kept: Kept | None = None,
) -> list[Tensor | None]:
    """Gradients of forward, a tile at a time, from weights that it kept or that are made again.

    With P = softmax(scores): dS = P * (dP - rowsum(P * dP) + dlse), and dS in raw coordinates is to r what dS is
    to k. Of out and lse only the -inf of queries without a key is read: a softmax of the tile costs less than
    exp(scores - lse), and the row sum of P * dP has none of the rounding of a 16-bit out.

    Args:
        dout: (B, H, T, D), any strides.
        dlse: (B, H, T), any strides, or None for zero.
        inputs, options: as for forward.
        out, lse: what forward returned; out may be None.
        needs_grad: which of the differentiable inputs want a gradient.
        kept: what forward kept, or None.

    Returns:
        Their gradients, None where not wanted.
    """
    wanted = {name: x for name, x, needed in zip(DIFFERENTIABLE, inputs, needs_grad, strict=False) if needed}
    if (piece := one_piece.one_piece(inputs, options, for_backward=True)) is not None:
        grads = one_piece.backward(piece, dout, dlse, wanted, kept)
        return [grads.get(name) for name in DIFFERENTIABLE]
    if blocks.fits(inputs, options):
        grads = block_passes.backward(dout, dlse, inputs, options, wanted, kept)
        return [grads.get(name) for name in DIFFERENTIABLE]
    dtype, scale = sum_dtype(inputs.q.dtype), options.scale
    # q, q_pos, k and v are done with one group, queries but for the next tile's first (`wrap_future`) with one tile;
    # what several groups add to stays in the dtype of sums until the end.
    own = {name: torch.empty_like(x) for name, x in wanted.items() if name in ("q", "k", "v", "q_pos")}
    totals = {name: x.new_zeros(x.shape, dtype=dtype) for name, x in wanted.items() if name not in own}
    for group in groups(inputs, options):
        _add_group(group, kept, dout, dlse, lse, own, totals)
        del group  # before the next one takes memory

    # q_content and q_position carry the scale into dk and dr; what multiplies k and r still lacks it.
    for name in totals.keys() & {"content_bias", "position_bias", "r_bias"}:
        totals[name].mul_(scale)
    grads = own | {name: _like(total, wanted[name]) for name, total in totals.items()}
    return [grads.get(name) for name in DIFFERENTIABLE]


def _add_group(
    group: Group,
    kept: Kept | None,
    dout: Tensor,
    dlse: Tensor | None,
    lse: Tensor,
    own: dict[str, Tensor],
    totals: dict[str, Tensor],
) -> None:
    """Stores what a group has in own, and adds to totals."""
    inputs, options = group.inputs, group.options
    T, S = inputs.q.shape[2], inputs.k.shape[2]
    dtype, scale = sum_dtype(inputs.q.dtype), options.scale
    only_v = own.keys() | totals.keys() == {"v"}
    from_position = {"q" if inputs.q_pos is None else "q_pos", "position_bias"} & (own.keys() | totals.keys())
    if inputs.r is None:
        from_position = set()
    batches, heads, kv_heads = group.batches, group.heads, group.kv_heads
    dkv: dict[str, Tensor] = {}
    for tile in group.tiles(kept):
        rows = tile.where[2]
        b, h, t, D = tile.q_content.shape
        # The last queries see every key, unless some are hidden: their products initialise dk and dv.
        first = rows.stop == T and tile.n == S
        if rows.stop == T:
            new = torch.empty if first else torch.zeros
            shape = tile.n_lanes, S, D
            dkv = {name: new(shape, dtype=dtype, device=dout.device) for name in "kv" if name in own}
        if not tile.n:
            for name in own.keys() & {"q", "q_pos"}:
                cut(own[name], *tile.where).zero_()
            continue
        if tile.weights is None:
            p = tile.scores(for_backward=True)
            torch.softmax(p, -1, out=p)
        else:
            p = tile.lanes(tile.weights)
        dout_lanes = cast(cut(dout, *tile.where), group.dtype)
        dlse_lanes = None if dlse is None else dlse[tile.where]
        if group.may_be_dead:
            dead = lse[tile.where] == -torch.inf
            if tile.weights is None:
                p.masked_fill_(dead.reshape(*p.shape[:2], 1), 0.0)
            dout_lanes = dout_lanes.masked_fill(dead[..., None], 0.0)
            dlse_lanes = None if dlse is None else dlse_lanes.masked_fill(dead, 0.0)
        dout_lanes = tile.lanes(dout_lanes).contiguous()
        if tile.dropout_scale != 1:
            dout_lanes = dout_lanes * tile.dropout_scale
        if "v" in own:
            weights = tile.drop(p.clone()) if options.dropout_p else p
            _add_product(cut(dkv["v"], ALL, tile.keys), weights.mT, dout_lanes, first)
        if only_v:
            continue

        ds = tile.drop(torch.bmm(dout_lanes, tile.lanes(tile.v).mT))
        _softmax_backward(ds, p, -1, p.dtype, grad_input=ds)
        if dlse is not None:
            ds.addcmul_(p, dlse_lanes.reshape(*p.shape[:2], 1).to(p.dtype))
        tile.through_terms(ds, totals)

        if "k" in own:
            _add_product(cut(dkv["k"], ALL, tile.keys), ds.mT, tile.lanes(tile.q_content), first)
        if "q" in own or "content_bias" in totals:
            dq = torch.bmm(ds, tile.lanes(tile.k)).view(b, h, t, -1)
        if "content_bias" in totals:
            cut(totals["content_bias"], heads).add_(dq.sum((0, 2), dtype=dtype))

        if from_position or "r" in totals or "r_bias" in totals:
            position = tile.position
            ds_raw = position.to_raw(ds)
        del ds  # before the next tile takes memory
        if "r" in totals:
            total = cut(part(totals["r"], batches, heads)[0], ALL, position.r_rows)
            _add_product(total, ds_raw.reshape(*position.queries.shape[:2], -1).mT, position.queries)
        if "r_bias" in totals:
            totals["r_bias"][heads, position.r_rows].add_(ds_raw.sum(1))
        if from_position:
            dq_position = position.of_queries(torch.bmm(ds_raw, position.r.expand(h, -1, -1)))
        if "position_bias" in totals:
            cut(totals["position_bias"], heads).add_(dq_position.sum((0, 2), dtype=dtype))
        if from_position and dq_position.shape[2] > t:  # the next query's, whose tile is done
            for name in from_position & own.keys():
                cut(own[name], batches, heads, slice(rows.stop, rows.stop + 1)).add_(dq_position[:, :, t:], alpha=scale)
            dq_position = dq_position[:, :, :t]

        if "q" in own:
            cut(own["q"], *tile.where).copy_((dq.add_(dq_position) if "q" in from_position else dq).mul_(scale))
        if "q_pos" in own:
            cut(own["q_pos"], *tile.where).copy_(dq_position.mul_(scale))
    for name, lanes in dkv.items():
        cut(own[name], batches, kv_heads).copy_(lanes.view(b, -1, S, D))


def _like(total: Tensor, x: Tensor) -> Tensor:
    """total in the dtype and layout of x."""
    return total if total.dtype is x.dtype and x.is_contiguous() else torch.empty_like(x).copy_(total)


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool = False) -> None:
    """total += a @ b, in place; total = a @ b for the first."""
    if total.dtype != a.dtype:
        product = torch.bmm(a, b)
        total.copy_(product) if first else total.add_(product)
    elif first:
        torch.bmm(a, b, out=total)
    else:
        torch.baddbmm(total, a, b, out=total)
