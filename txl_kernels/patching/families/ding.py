"""`AttentionXL` of DI-engine, the attention of its GTrXL.

GTrXL keeps one causal mask for each segment length, and hands it to every layer of every forward.
"""

from torch import Tensor, nn

from txl_kernels.functional import rel_attention
from txl_kernels.layer_mask import Visibility, visibility
from txl_kernels.patching.replacement import Replacement, warn_own


def attention(
    self: nn.Module,
    original,
    inputs: Tensor,
    pos_embedding: Tensor,
    full_input: Tensor,
    u: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Of `AttentionXL`: inputs (T, B, C), full_input (S, B, C) with the memory in front, pos_embedding (S, 1, C).

    u and v are the content and position bias, (H, D); mask (T, S, 1|B) is True where hidden.
    """
    (T, B, _), S = inputs.shape, full_input.shape[0]
    visible = Visibility(future=T > 1) if mask is None else visibility(mask, T, S, B, reader=self)
    if visible.future and self.head_dim > 128:
        warn_own(self, "a head size above 128 where the future is visible")
        return original(inputs, pos_embedding, full_input, u, v, mask)
    q = _heads(self, self.attention_q(inputs))
    key, value = (_heads(self, x) for x in self.attention_kv(full_input).chunk(2, dim=-1))
    r = self.project_pos(pos_embedding).view(S, self.head_num, self.head_dim).transpose(0, 1)
    out = rel_attention(
        *(q, key, value, r, u, v),
        is_causal=not visible.future,
        window=visible.window,
        attn_mask=visible.attn_mask,
        dropout_p=self.dropout.p if isinstance(self.dropout, nn.Dropout) and self.dropout.training else 0.0,
        scale=self.scale,
        wrap_future=visible.future,
    )
    return self.dropout(self.project(out.permute(2, 0, 1, 3).flatten(2)))


def _heads(self: nn.Module, x: Tensor) -> Tensor:
    """(n, B, H * D) as (B, H, n, D)."""
    return x.unflatten(-1, (self.head_num, self.head_dim)).permute(1, 2, 0, 3)


def _obstacle(self: nn.Module) -> str | None:
    if type(self.dropout) in (nn.Dropout, nn.Identity):
        return None
    return f"dropout: expected Dropout or Identity, got {type(self.dropout).__name__}"


REPLACEMENTS = {
    "AttentionXL": Replacement(
        "forward",
        attention,
        ("inputs", "pos_embedding", "full_input", "u", "v", "mask"),
        check=_obstacle,
        own="a visible future with heads above 128",
        head_size="head_dim",
    ),
}
