"""Transformer-XL: the original PyTorch code and its forks, by class name and signature.

The steps are those of `txl_kernels.layer`, which keeps the original's attributes. NVIDIA's version has the same
classes but masks (T, S) and (B, T, S) in place of (S, B) and (T, S, 1|B); the shape of a mask tells which.

Legend as in `txl_kernels.layer`.
"""

import functools

import torch
from torch import Tensor, nn

from txl_kernels.layer_mask import Visibility, visibility
from txl_kernels.layer_steps import (
    attend,
    heads,
    learned_positions,
    project_keys,
    project_queries,
    projected_positions,
)
from txl_kernels.patching.replacement import Replacement, warn_own

_ATTRIBUTES = ("n_head", "d_head", "scale", "pre_lnorm", "qkv_net", "o_net", "layer_norm", "drop", "dropatt")
_PROJECTED_ATTRIBUTES = (*_ATTRIBUTES, "r_net")


def attention(
    self: nn.Module,
    original,
    w: Tensor,
    r: Tensor,
    r_w_bias: Tensor,
    r_r_bias: Tensor,
    attn_mask: Tensor | None = None,
    mems: Tensor | None = None,
) -> Tensor:
    """Of the original's `RelPartialLearnableMultiHeadAttn`: w (T, B, C), r (S, 1, C), mems (M, B, C)."""
    visible = visibility_of(self, w, attn_mask, mems, may_be_batch_first=True)
    if visible is None:
        return original(w, r, r_w_bias, r_r_bias, attn_mask, mems)
    positions = projected_positions(self, r, r_w_bias, r_r_bias, kv_len(w, mems))
    return attend(self, w, *projections(self, w, mems), positions, visible)


def learned_attention(
    self: nn.Module,
    original,
    w: Tensor,
    r_emb: Tensor,
    r_w_bias: Tensor,
    r_bias: Tensor,
    attn_mask: Tensor | None = None,
    mems: Tensor | None = None,
) -> Tensor:
    """Of the original's `RelLearnableMultiHeadAttn`: r_emb (P, H, D), r_bias (P, H)."""
    visible = visibility_of(self, w, attn_mask, mems, may_be_batch_first=True)
    if visible is None:
        return original(w, r_emb, r_w_bias, r_bias, attn_mask, mems)
    positions = learned_positions(self, r_emb, r_w_bias, r_bias, kv_len(w, mems))
    return attend(self, w, *projections(self, w, mems), positions, visible)


def kv_len(w: Tensor, mems: Tensor | None) -> int:
    return w.shape[0] if mems is None else mems.shape[0] + w.shape[0]


def visibility_of(
    layer: nn.Module, w: Tensor, attn_mask: Tensor | None, mems: Tensor | None, may_be_batch_first: bool = False
) -> Visibility | None:
    """What a mask of theirs says, where None hides nothing; None if the layer's own forward must serve it."""
    (T, B), S = w.shape[:2], kv_len(w, mems)
    if attn_mask is None:
        visible = Visibility(future=True)
    elif attn_mask.dtype not in (torch.bool, torch.uint8):
        return warn_own(layer, "a mask that is neither bool nor uint8")
    else:
        time_major = _fits(attn_mask, (T, S, B) if attn_mask.ndim == 3 else (S, B))
        batch_first = may_be_batch_first and _fits(attn_mask, (B, T, S) if attn_mask.ndim == 3 else (T, S))
        if time_major == batch_first:
            return warn_own(layer, "a mask whose axes its shape doesn't tell")
        visible = visibility(attn_mask, T, S, B, batch_first, reader=layer)
    if visible.future and layer.d_head > 128:
        return warn_own(layer, "a head size above 128 where the future is visible")
    return visible


def _fits(mask: Tensor, shape: tuple[int, ...]) -> bool:
    return mask.ndim == len(shape) and all(n in (1, size) for n, size in zip(mask.shape, shape, strict=True))


def projections(layer: nn.Module, w: Tensor, mems: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q (T, B, H * D), k and v (B, H, S, D)."""
    if mems is None or not mems.shape[0] or _is_plain(layer.qkv_net):
        q, kv = project_queries(layer, w)
        return q, *project_keys(layer, kv, mems)
    q, kv = project_queries(layer, torch.cat([mems, w]))
    return q[-w.shape[0] :], *(heads(layer, x) for x in kv.chunk(2, dim=-1))


def _is_plain(net: nn.Module) -> bool:
    """Whether calling it does what its weight says, which spares the memory its queries: no adapter, no hook."""
    return type(net) is nn.Linear and net.bias is None and not (net._forward_hooks or net._forward_pre_hooks)


def check(layer: nn.Module, attributes: tuple[str, ...] = _PROJECTED_ATTRIBUTES) -> str | None:
    missing = [name for name in attributes if not hasattr(layer, name)]
    return f"expected the attributes of the original, got none named {', '.join(missing)}" if missing else None


REPLACEMENTS = {
    "RelPartialLearnableMultiHeadAttn": Replacement(
        "forward", attention, ("w", "r", "r_w_bias", "r_r_bias", "attn_mask", "mems"), check, head_size="d_head"
    ),
    "RelLearnableMultiHeadAttn": Replacement(
        "forward",
        learned_attention,
        ("w", "r_emb", "r_w_bias", "r_bias", "attn_mask", "mems"),
        functools.partial(check, attributes=_ATTRIBUTES),
        head_size="d_head",
    ),
}
