"""Wav2Vec2-Conformer of Hugging Face, and what has its attention: Wav2Vec2-BERT and the speech encoder of SeamlessM4T.

With position_embeddings_type "relative" they compute the same. Their encoders hide padded keys with a mask
(B, 1, T, T); here they hand their layers the lengths in its place. In a sequence that is nothing but padding every
query gets the mean of all values.
"""

import types

import torch
from torch import Tensor, nn

from txl_kernels.functional import rel_attention
from txl_kernels.patching.dead_rows import mean_of_values
from txl_kernels.patching.huggingface import wants_weights
from txl_kernels.patching.padding import KeyPadding, key_padding
from txl_kernels.patching.patch import is_patched
from txl_kernels.patching.replacement import Replacement, warn_own


def attention(
    self: nn.Module,
    original,
    hidden_states: Tensor,
    attention_mask: Tensor | KeyPadding | None = None,
    relative_position_embeddings: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Of `Wav2Vec2ConformerSelfAttention`: hidden_states (B, T, C), relative_position_embeddings (1|B, 2T - 1, C).

    attention_mask is (B, 1, T, T), bool, True = may attend, or float, added; from `encoder` it is a `KeyPadding`.
    """
    request = None
    if wants_weights(self, kwargs):
        request = "attention weights"
    elif attention_mask is not None and not isinstance(attention_mask, (Tensor, KeyPadding)):
        request = f"an attention_mask that is a {type(attention_mask).__name__}"
    if request is not None:
        warn_own(self, request)
    if request is not None or self.position_embeddings_type != "relative" or relative_position_embeddings is None:
        return original(hidden_states, attention_mask, relative_position_embeddings, **kwargs)
    q, k, v, r = (
        linear(x).unflatten(-1, (self.num_heads, self.head_size)).transpose(1, 2)
        for linear, x in (
            (self.linear_q, hidden_states),
            (self.linear_k, hidden_states),
            (self.linear_v, hidden_states),
            (self.linear_pos, relative_position_embeddings),
        )
    )
    visible = attention_mask.visible() if isinstance(attention_mask, KeyPadding) else {"attn_mask": attention_mask}
    out, lse = rel_attention(
        *(q, k, v, r if r.shape[0] > 1 else r[0], self.pos_bias_u, self.pos_bias_v),
        is_causal=False,
        dropout_p=self.dropout.p if self.training else 0.0,
        scale=self.scaling,
        return_lse=True,
        **visible,
    )
    if attention_mask is not None and not (isinstance(attention_mask, KeyPadding) and attention_mask.shortest):
        out = mean_of_values(out, v, lse.isneginf())
    return self.linear_out(out.transpose(1, 2).flatten(2)), None


def encoder(self: nn.Module, original, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs):
    """Of `Wav2Vec2ConformerEncoder`: its own steps without the mask of T x T; attention_mask (B, T), True = a frame."""
    served = (
        attention_mask is not None
        and self.config.position_embeddings_type == "relative"
        and not wants_weights(self, kwargs)
        and all(is_patched(layer.self_attn) for layer in self.layers)
    )
    forward = _with_key_padding(original.__func__) if served else None
    if forward is None:
        return original(hidden_states, attention_mask, **kwargs)
    return forward(self, hidden_states, attention_mask, **kwargs)


# forward of an encoder -> the same, with another create_bidirectional_mask
_forwards: dict[types.FunctionType, types.FunctionType] = {}


def _with_key_padding(forward: types.FunctionType) -> types.FunctionType | None:
    """The forward of an encoder that makes a `KeyPadding` where it made a mask of T x T.

    None where it was not made before torch.compile, which can't trace the making of functions, asks for it.
    """
    if forward not in _forwards and not torch.compiler.is_compiling():
        names = forward.__globals__ | {"create_bidirectional_mask": _key_padding}
        copy = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
        _forwards[forward] = copy
    return _forwards.get(forward)


def _key_padding(config, inputs_embeds: Tensor, attention_mask: Tensor) -> KeyPadding:
    """In place of `transformers.masking_utils.create_bidirectional_mask`."""
    return key_padding(attention_mask.to(inputs_embeds.device).bool().expand(inputs_embeds.shape[0], -1))


def _positions(module: nn.Module) -> str | None:
    # the attention of an adapter has none, whatever the configuration says
    return getattr(module, "position_embeddings_type", module.config.position_embeddings_type)


def _applies(module: nn.Module) -> bool:
    return _positions(module) is not None


def _check(module: nn.Module) -> str | None:
    if _positions(module) != "relative":
        return f'position_embeddings_type: expected "relative", got "{_positions(module)}"'
    return None


def _check_encoder(module: nn.Module) -> str | None:
    if "create_bidirectional_mask" not in type(module).forward.__code__.co_names:
        return "forward: expected a call of create_bidirectional_mask, found none"
    _with_key_padding(type(module).forward)
    return _check(module)


_ATTENTION = Replacement(
    "forward",
    attention,
    ("hidden_states", "attention_mask", "relative_position_embeddings", "kwargs"),
    check=_check,
    applies=_applies,
    own="attention weights",
    head_size="head_size",
)
_ENCODER = Replacement(
    "forward", encoder, ("hidden_states", "attention_mask", "kwargs"), check=_check_encoder, applies=_applies
)
REPLACEMENTS = {
    "Wav2Vec2ConformerSelfAttention": _ATTENTION,
    "Wav2Vec2ConformerEncoder": _ENCODER,
    "Wav2Vec2BertSelfAttention": _ATTENTION,
    "Wav2Vec2BertEncoder": _ENCODER,
    "SeamlessM4TConformerSelfAttention": _ATTENTION,
    "SeamlessM4TConformerEncoder": _ENCODER,
}
