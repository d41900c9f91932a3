"""FastSpeech2-Conformer of Hugging Face: the attention of its encoder and of its decoder, which is an encoder, too.

They take the padded keys as (B, 1, T), which is made into a mask of T x T in every layer; here the encoder hands its
layers the lengths in its place. A query without a visible key gets zeros.
"""

from torch import Tensor, nn

from txl_kernels.functional import rel_attention
from txl_kernels.patching.padding import KeyPadding, key_padding
from txl_kernels.patching.patch import is_patched
from txl_kernels.patching.replacement import Replacement, warn_own


def attention(
    self: nn.Module,
    original,
    hidden_states: Tensor,
    attention_mask: Tensor | KeyPadding | None = None,
    pos_emb: Tensor | None = None,
    output_attentions: bool | None = False,
) -> tuple[Tensor, None]:
    """Of `FastSpeech2ConformerAttention`: hidden_states (B, T, C), pos_emb (1|B, 2T - 1, C).

    attention_mask is (B, 1, T), 0 = padding; from `encoder` it is a `KeyPadding`.
    """
    if output_attentions:
        warn_own(self, "attention weights")
    taken = attention_mask is None or isinstance(attention_mask, KeyPadding) or _fits(attention_mask, hidden_states)
    if output_attentions or pos_emb is None or not taken:
        return original(hidden_states, attention_mask, pos_emb, output_attentions)
    if isinstance(attention_mask, Tensor):
        attention_mask = KeyPadding(None, attention_mask[:, None] != 0)
    q, k, v, r = (
        linear(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        for linear, x in (
            (self.linear_q, hidden_states),
            (self.linear_k, hidden_states),
            (self.linear_v, hidden_states),
            (self.linear_pos, pos_emb),
        )
    )
    out = rel_attention(
        *(q, k, v, r if r.shape[0] > 1 else r[0], self.pos_bias_u, self.pos_bias_v),
        is_causal=False,
        dropout_p=self.dropout.p if self.training else 0.0,
        **({} if attention_mask is None else attention_mask.visible()),
    )
    return self.linear_out(out.transpose(1, 2).flatten(2)), None


def encoder(
    self: nn.Module,
    original,
    input_tensor: Tensor,
    attention_mask: Tensor | None = None,
    output_hidden_states: bool | None = None,
    output_attentions: bool | None = False,
    return_dict: bool | None = None,
):
    """Of `FastSpeech2ConformerEncoder`: its own, which reads the mask (B, 1, T) once for all layers."""
    if (
        attention_mask is not None
        and not output_attentions
        and _fits(attention_mask, input_tensor)
        and all(is_patched(layer.self_attn) for layer in self.conformer_layers)
    ):
        attention_mask = key_padding(attention_mask[:, 0] != 0)
    return original(input_tensor, attention_mask, output_hidden_states, output_attentions, return_dict)


def _fits(mask: Tensor, x: Tensor) -> bool:
    """Whether a mask is (B, 1, T); its own method refuses all others."""
    return mask.shape == (x.shape[0], 1, x.shape[1])


REPLACEMENTS = {
    "FastSpeech2ConformerAttention": Replacement(
        "forward",
        attention,
        ("hidden_states", "attention_mask", "pos_emb", "output_attentions"),
        own="attention weights",
        head_size="head_dim",
    ),
    "FastSpeech2ConformerEncoder": Replacement(
        "forward",
        encoder,
        ("input_tensor", "attention_mask", "output_hidden_states", "output_attentions", "return_dict"),
    ),
}
