"""Forward and backward of narrow windows, whose problems `blocks.py` cuts into parts."""

import torch
from torch import Tensor

from txl_kernels.arguments import Inputs, Options
from txl_kernels.torch_backend.blocks import ROWS, Part, Queries, parts
from txl_kernels.torch_backend.kept import Kept
from txl_kernels.torch_backend.tiles import cast, softmax, sum_dtype

_softmax_backward = torch.ops.aten._softmax_backward_data.out
_tanh_backward = torch.ops.aten.tanh_backward.grad_input


def forward(inputs: Inputs, options: Options, kept: Kept | None) -> tuple[Tensor, Tensor]:
    """out and lse, as in forward_pass.py."""
    q = inputs.q
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=sum_dtype(q.dtype))
    if inputs.key_lengths is not None:
        out.zero_()
        lse.fill_(-torch.inf)
    for part in parts(inputs, options):
        p, tanh, _ = part.places(kept)
        part.store_scores(p, tanh, Queries(part), part.of_keys(inputs.k))
        part_lse, _ = softmax(p)
        part_out = torch.bmm(part.by_key(p), part.of_keys(inputs.v))
        out[part.where] = part.queries_of(part_out)
        lse[part.where] = part.queries_of(part_lse)
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, inputs: Inputs, options: Options, wanted: dict[str, Tensor], kept: Kept | None
) -> dict[str, Tensor]:
    """The gradients of what is wanted, as in backward_pass.py."""
    # Queries are in one part at most; what several parts add to stays in the dtype of sums until the end.
    own = torch.empty_like if inputs.key_lengths is None else torch.zeros_like
    dtype = sum_dtype(inputs.q.dtype)
    grads = {name: own(x) if name in ("q", "q_pos") else torch.zeros_like(x, dtype=dtype) for name, x in wanted.items()}
    for part in parts(inputs, options):
        _add_part(part, kept, dout, dlse, grads)
    # Queries carry the scale into dk and dr; what multiplies k and r still lacks it.
    for name in grads.keys() & {"content_bias", "position_bias", "r_bias"}:
        grads[name] *= options.scale
    return {name: cast(grad, wanted[name].dtype) for name, grad in grads.items()}


def _add_part(part: Part, kept: Kept | None, dout: Tensor, dlse: Tensor | None, grads: dict[str, Tensor]) -> None:
    """Stores or adds what a part has."""
    window, inputs, scale = part.window, part.window.inputs, part.window.options.scale
    queries, k = Queries(part), part.of_keys(inputs.k)
    p, tanh, are_kept = part.places(kept)
    if not are_kept:
        part.store_scores(p, tanh, queries, k)
        torch.softmax(p, -1, out=p)
    dout = part.of_queries(dout)
    by_key = part.by_key(p)
    if "v" in grads:
        part.add_to_keys(by_key, dout, grads["v"])
    if grads.keys() == {"v"}:
        return

    ds = part.by_distance(torch.bmm(dout, part.of_keys(inputs.v).mT))
    _softmax_backward(ds, p, -1, p.dtype, grad_input=ds)
    if dlse is not None:
        ds.addcmul_(p, part.of_queries(dlse)[..., None])
    if tanh is not None:
        _tanh_backward(ds, tanh, grad_input=ds)
    part.by_key(ds, by_key)
    if "k" in grads:
        part.add_to_keys(by_key, queries.content, grads["k"])
    if "q" in grads or "content_bias" in grads:
        dq = torch.bmm(by_key, k)
    if "content_bias" in grads:
        grads["content_bias"] += part.sum(dq)

    if "r_bias" in grads:
        window.add_by_distance(part.sum(ds)[..., None], grads["r_bias"][..., None])
    from_position = {"q" if inputs.q_pos is None else "q_pos", "position_bias"} & grads.keys()
    if window.r is None:
        from_position = set()
    else:
        ds = ds.view(*queries.position.shape[:2], -1)
    if "r" in grads:
        window.add_by_distance(torch.bmm(ds.mT, queries.position), grads["r"][0])
    if from_position == {"q"}:
        total = dq.view(queries.position.shape)
        torch.baddbmm(total, ds, window.r, out=total)
    elif from_position:
        dq_position = torch.bmm(ds, window.r).view(part.lanes, ROWS, -1)
        if "position_bias" in grads:
            grads["position_bias"] += part.sum(dq_position)
        if "q_pos" in grads:
            torch.mul(part.queries_of(dq_position), scale, out=grads["q_pos"][part.where])
        elif "q" in grads:
            dq += dq_position
    if "q" in grads:
        torch.mul(part.queries_of(dq), scale, out=grads["q"][part.where])
