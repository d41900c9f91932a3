"""The relative attention of fairseq's Conformer (speech-to-text, wav2vec 2.0), time first."""

from torch import Tensor, nn

from txl_kernels.functional import rel_attention
from txl_kernels.patching.masks import allowed
from txl_kernels.patching.padding import KeyPadding, key_padding
from txl_kernels.patching.replacement import Replacement, warn_own


def attention(
    self: nn.Module,
    original,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pos_emb: Tensor,
    key_padding_mask: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Of `RelPositionMultiHeadedAttention`: query (T, B, C), key and value (S, B, C), pos_emb (2S - 1, 1|B, C).

    key_padding_mask (B, S) is True for padding. The attribute attn, where the class keeps weights, is None.
    """
    T, S = query.shape[0], key.shape[0]
    if T > S or pos_emb.shape[0] != 2 * S - 1:
        warn_own(self, "positions other than 2S - 1 for S keys, T of them the queries,")
        return original(query, key, value, pos_emb, key_padding_mask, **kwargs)
    q, k, v = (
        _heads(self, linear(x)) for linear, x in ((self.linear_q, query), (self.linear_k, key), (self.linear_v, value))
    )
    # zero_triu zeroes the position terms of the future, as rows that are not there do
    r = _heads(self, self.linear_pos(pos_emb[:S] if self.zero_triu else pos_emb))
    padding = KeyPadding(None, None)
    if key_padding_mask is not None:
        padding = key_padding(allowed(key_padding_mask.bool(), reader=self), self)
    out = rel_attention(
        *(q, k, v, r if r.shape[0] > 1 else r[0], self.pos_bias_u, self.pos_bias_v),
        is_causal=False,
        dropout_p=self.dropout.p if self.training else 0.0,
        first_distance=S - 1,
        **padding.visible(),
    )
    self.attn = None
    return self.linear_out(out.permute(2, 0, 1, 3).flatten(2)), None


def _heads(self: nn.Module, x: Tensor) -> Tensor:
    """(n, B, H * D) as (B, H, n, D)."""
    return x.unflatten(-1, (self.h, self.d_k)).permute(1, 2, 0, 3)


REPLACEMENTS = {
    "RelPositionMultiHeadedAttention": Replacement(
        "forward", attention, ("query", "key", "value", "pos_emb", "key_padding_mask", "kwargs"), head_size="d_k"
    ),
}
