"""The steps of the attention layers, for memory that is projected again and for memory that is kept projected.

They rely on the attributes of the original's layers only. Legend as in `txl_kernels.layer`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from txl_kernels.functional import rel_attention
from txl_kernels.layer_mask import Visibility


class Positions(NamedTuple):
    """What the scores take beside queries and keys, row 0 standing for the distance S - 1, the last for 0.

    Attributes:
        r: (H, S, D).
        content_bias: The paper's u, (H, D).
        position_bias: The paper's v, (H, D), or None.
        r_bias: (H, S), or None.
    """

    r: Tensor
    content_bias: Tensor
    position_bias: Tensor | None
    r_bias: Tensor | None

    def nearest(self, n: int) -> "Positions":
        """Those of the distances n - 1 ... 0."""
        first = self.r.shape[1] - n
        return self._replace(r=self.r[:, first:], r_bias=None if self.r_bias is None else self.r_bias[:, first:])


def projected_positions(layer: nn.Module, r: Tensor, r_w_bias: Tensor, r_r_bias: Tensor, S: int) -> Positions:
    """From the arguments of `RelPartialLearnableMultiHeadAttn.forward`."""
    return Positions(heads(layer, layer.r_net(r[:S].flatten(1))), r_w_bias, r_r_bias, None)


def learned_positions(layer: nn.Module, r_emb: Tensor, r_w_bias: Tensor, r_bias: Tensor, S: int) -> Positions:
    """From the arguments of `RelLearnableMultiHeadAttn.forward`."""
    return Positions(last_rows(r_emb, S).transpose(0, 1), r_w_bias, None, last_rows(r_bias, S).t())


def project_queries(layer: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
    """q (T, B, H * D), and k and v of the same hidden states side by side (T, B, 2 * H * D)."""
    HD = layer.n_head * layer.d_head
    return layer.qkv_net(_normed(layer, states)).split([HD, 2 * HD], dim=-1)


def project_memory(layer: nn.Module, states: Tensor) -> Tensor:
    """k and v of hidden states (M, B, C), side by side: (M, B, 2 * H * D)."""
    weight = layer.qkv_net.weight[layer.n_head * layer.d_head :]
    return nn.functional.linear(_normed(layer, states), weight)


def project_keys(layer: nn.Module, kv: Tensor, mems: Tensor | None) -> tuple[Tensor, Tensor]:
    """k and v (B, H, S, D) of memory (M, B, C), or None, and of the segment, whose kv `project_queries` gave."""
    if mems is not None and mems.shape[0]:
        kv = torch.cat([project_memory(layer, mems), kv])
    k, v = (heads(layer, x) for x in kv.chunk(2, dim=-1))
    return k, v


def attend(
    layer: nn.Module, w: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Positions, visible: Visibility
) -> Tensor:
    """All that follows the projections.

    Args:
        layer: An attention layer of `txl_kernels.layer`, or its counterpart in the original.
        w: Hidden states of the segment, (T, B, C).
        q: Their queries, (T, B, H * D).
        k: Keys of memory and segment, (B, H, S, D).
        v: Values, as k.
        positions: Those of the distances S - 1 ... 0.
        visible: What each query sees.

    Returns:
        Hidden states (T, B, C).
    """
    return output(layer, w, weighted_values(layer, q, k, v, positions, visible)[0])


def weighted_values(
    layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, positions: Positions, visible: Visibility
) -> tuple[Tensor, Tensor]:
    """What `rel_attention` gives, out (B, H, T, D) and lse (B, H, T). Arguments as in `attend`."""
    return rel_attention(
        *(heads(layer, q), k, v, positions.r, positions.content_bias, positions.position_bias),
        is_causal=not visible.future,
        window=visible.window,
        attn_mask=visible.attn_mask,
        dropout_p=layer.dropatt.p if layer.dropatt.training else 0.0,
        scale=layer.scale,
        r_bias=positions.r_bias,
        wrap_future=visible.future,
        return_lse=True,
    )


def output(layer: nn.Module, w: Tensor, out: Tensor) -> Tensor:
    """Hidden states (T, B, C) of those of the segment and what its queries found, out (B, H, T, D)."""
    out = w + layer.drop(layer.o_net(out.permute(2, 0, 1, 3).flatten(2)))
    return out if layer.pre_lnorm else layer.layer_norm(out)


def _normed(layer: nn.Module, states: Tensor) -> Tensor:
    return layer.layer_norm(states) if layer.pre_lnorm else states


def heads(layer: nn.Module, x: Tensor) -> Tensor:
    """(n, B, H * D) as (B, H, n, D), and (n, H * D) as (H, n, D)."""
    return x.unflatten(-1, (layer.n_head, layer.d_head)).movedim(0, -2)


def last_rows(x: Tensor, n: int) -> Tensor:
    """The last n rows of x, the first one repeated in front where there are fewer."""
    return x[x.shape[0] - n :] if x.shape[0] >= n else torch.cat([x[:1].expand(n - x.shape[0], *x.shape[1:]), x])
