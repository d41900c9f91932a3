"""The attention of ESPnet's transducer encoders (espnet2.asr_transducer), with its chunks and left context."""

from torch import Tensor, nn

from txl_kernels.functional import rel_attention
from txl_kernels.patching.masks import allowed
from txl_kernels.patching.padding import key_padding
from txl_kernels.patching.replacement import Replacement, warn_own


def attention(
    self: nn.Module,
    original,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pos_enc: Tensor,
    mask: Tensor,
    chunk_mask: Tensor | None = None,
    left_context: int = 0,
) -> Tensor:
    """Of `RelPositionMultiHeadedAttention`: query (B, T, C), key (B, S, C), pos_enc (1|B, S + T - 1, C).

    mask (B, S) and chunk_mask (T, S), bool, True = hidden; left_context is S - T. Simplified scores have a bias for
    each distance and head in place of the position term.
    """
    is_simplified = not hasattr(self, "pos_bias_u")
    if is_simplified and pos_enc.shape[0] > 1:
        warn_own(self, "a bias that differs between sequences")
        return original(query, key, value, pos_enc, mask, chunk_mask, left_context)
    q, k, v = self.forward_qkv(query, key, value)
    positions = self.linear_pos(pos_enc)
    if is_simplified:
        r = u = w = None
        r_bias = positions[0].t()
    else:
        r = positions.unflatten(-1, (self.num_heads, self.d_k)).transpose(1, 2)
        r, u, w, r_bias = (r if r.shape[0] > 1 else r[0]), self.pos_bias_u, self.pos_bias_v, None
    keys = key_padding(allowed(mask, reader=self), self)
    visible = keys.attn_mask
    if chunk_mask is not None:
        chunks = allowed(chunk_mask, reader=self)[None, None]
        visible = chunks if visible is None else chunks & visible
    out = rel_attention(
        *(q, k, v, r, u, w),
        is_causal=False,
        attn_mask=visible,
        key_lengths=keys.key_lengths,
        dropout_p=self.dropout.p if self.dropout.training else 0.0,
        r_bias=r_bias,
    )
    self.attn = None  # the weights of an earlier call, which ESPnet plots
    return self.linear_out(out.transpose(1, 2).flatten(2))


REPLACEMENTS = {
    "RelPositionMultiHeadedAttention": Replacement(
        "forward",
        attention,
        ("query", "key", "value", "pos_enc", "mask", "chunk_mask", "left_context"),
        head_size="d_k",
    ),
}
