"""SpeechBrain's `RelPosMHAXL`, and what builds on it (Conformer, Branchformer, TransformerASR).

One projection weight has two readings: where query, key and value are one tensor, each head has its rows of q, k and v
together, else all rows of q come before those of k and v. The biases are stored as (D, H) and read as (H, D), without
a transposition. Scores are divided by sqrt(C), not sqrt(D).
"""

import torch
from torch import Tensor, nn

from txl_kernels.functional import rel_attention
from txl_kernels.patching.masks import allowed
from txl_kernels.patching.padding import window_and_key_padding
from txl_kernels.patching.replacement import Replacement, warn_own


def attention(
    self: nn.Module,
    original,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pos_embs: Tensor,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    return_attn_weights: bool | None = None,
) -> Tensor | tuple[Tensor, None]:
    """Of `RelPosMHAXL`: query (B, T, C), key and value (B, S, C), pos_embs (1, 2S - 1, C).

    key_padding_mask (B, S) is True for padding. attn_mask (T, S) or (B * H, T, S) is True where hidden, or is added.
    Weights are what the encoders get and drop, so only an explicit request for them is one.
    """
    (B, T, _), S, H = query.shape, key.shape[1], self.num_heads
    request = "attention weights" if return_attn_weights else None
    if T > S or pos_embs.shape[:2] != (1, 2 * S - 1):
        request = "positions other than 2S - 1 for S keys, T of them the queries,"
    if request is not None:
        warn_own(self, request)
        return_attn_weights = return_attn_weights is not False
        return original(query, key, value, pos_embs, key_padding_mask, attn_mask, return_attn_weights)

    if (query is key or torch.equal(query, key)) and (key is value or torch.equal(key, value)):
        qkv = nn.functional.linear(query, self.in_proj_weight).view(B, T, H, -1)
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=-1)
    else:
        weights = self.in_proj_weight.chunk(3)
        projected = (nn.functional.linear(x, w) for x, w in zip((query, key, value), weights, strict=True))
        q, k, v = (x.unflatten(-1, (H, -1)).transpose(1, 2) for x in projected)
    if self.vbias is not None:
        v = v + self.value_bias_weight.view(H, 1, -1)
    r = self.linear_pos(pos_embs).view(2 * S - 1, H, -1).transpose(0, 1)

    mask, visible = (None, None) if attn_mask is None else _dense(self, attn_mask)
    valid = None if key_padding_mask is None else allowed(key_padding_mask, reader=self)
    window, padding = window_and_key_padding(visible, valid, self)
    if mask is not None and padding.attn_mask is not None:
        mask = _both(mask, padding.attn_mask)
    out = rel_attention(
        *(q, k, v, r, self.pos_bias_u.view(H, -1), self.pos_bias_v.view(H, -1)),
        is_causal=False,
        window=window,
        attn_mask=padding.attn_mask if mask is None else mask,
        key_lengths=padding.key_lengths,
        dropout_p=self.dropout_att.p if self.training else 0.0,
        scale=self.scale,
    )
    out = self.out_proj(out.transpose(1, 2).flatten(2))
    return out if return_attn_weights is False else (out, None)


def _dense(self: nn.Module, attn_mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """attn_mask as in `rel_attention`, and what `window_and_key_padding` takes of it."""
    is_bool, is_shared = attn_mask.dtype is torch.bool, attn_mask.ndim == 2
    visible = allowed(attn_mask, reader=self) if is_bool or (is_shared and attn_mask.is_floating_point()) else None
    mask = visible if is_bool else attn_mask.float()  # integers are added, too
    return (mask[None, None], visible) if is_shared else (mask.unflatten(0, (-1, self.num_heads)), None)


def _both(mask: Tensor, padding: Tensor) -> Tensor:
    """mask with padding, (B, 1, 1, S) bool, hidden as well."""
    return mask & padding if mask.dtype is torch.bool else mask.masked_fill(~padding, -torch.inf)


def _obstacle(self: nn.Module) -> str | None:
    return None if self.vdim == self.embed_dim else "it has no forward for a vdim other than embed_dim"


REPLACEMENTS = {
    "RelPosMHAXL": Replacement(
        "forward",
        attention,
        ("query", "key", "value", "pos_embs", "key_padding_mask", "attn_mask", "return_attn_weights"),
        check=_obstacle,
        own="return_attn_weights=True where it is passed (by default None comes in place of the weights)",
        head_size="head_dim",
    ),
}
