"""Parakeet of Hugging Face, and what builds on its encoder (Canary, Cohere ASR, the CTC, RNN-T and TDT models).

The encoder hides padded keys, and every key from padded queries, with one mask (B, 1, T, T); those queries get the
mean of all values. Here the encoder hands its layers the lengths in its place.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.parakeet import modeling_parakeet as original_code

from txl_kernels.functional import rel_attention
from txl_kernels.patching.dead_rows import mean_of_values
from txl_kernels.patching.families.parakeet_steps import projected_positions, projections, subsampled, through_layers
from txl_kernels.patching.huggingface import wants_weights
from txl_kernels.patching.patch import is_patched
from txl_kernels.patching.replacement import Replacement, warn_own


class Padding(NamedTuple):
    """The frames of each sequence: lengths (B,), and valid (1|B, T), True for a frame."""

    lengths: Tensor
    valid: Tensor


def attention(
    self: nn.Module,
    original,
    hidden_states: Tensor,
    position_embeddings: Tensor,
    attention_mask: Tensor | None = None,
    padding: Padding | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Of `ParakeetEncoderAttention`: hidden_states (B, T, C), position_embeddings (1|B, 2T - 1, C).

    padding, from `encoder`, takes the place of attention_mask (B, 1, T, T), bool, True = may attend.
    """
    if padding is None and attention_mask is not None and attention_mask.dtype is not torch.bool:
        warn_own(self, "an attention_mask that is not bool")
        return original(hidden_states, position_embeddings, attention_mask, **kwargs)
    if wants_weights(self, kwargs):
        warn_own(self, "attention weights")
        return original(hidden_states, position_embeddings, attention_mask, **kwargs)
    q, k, v = projections(self, hidden_states)
    visible = {"attn_mask": attention_mask} if padding is None else {"key_lengths": padding.lengths}
    out, lse = rel_attention(
        *(q, k, v, projected_positions(self, position_embeddings), self.bias_u, self.bias_v),
        is_causal=False,
        dropout_p=self.attention_dropout if self.training else 0.0,
        scale=self.scaling,
        return_lse=True,
        **visible,
    )
    if padding is not None:
        out = mean_of_values(out, v, ~padding.valid)
    elif attention_mask is not None:
        out = mean_of_values(out, v, lse.isneginf())
    return self.o_proj(out.transpose(1, 2).flatten(2)), None


@original_code.merge_with_config_defaults
@original_code.capture_outputs
def _encode(
    self: nn.Module,
    input_features: Tensor,
    attention_mask: Tensor | None = None,
    output_attention_mask: bool = True,
    **kwargs,
):
    states, valid = subsampled(self, input_features, attention_mask)
    padding = None
    if valid is not None:
        padding = Padding(valid.sum(1).expand(states.shape[0]), valid)  # one mask may serve all sequences
        attention_mask = valid[:, None, None]  # for the convolutions, which look for padded keys alone
    states = through_layers(self, states, attention_mask=attention_mask, padding=padding, **kwargs)
    return original_code.ParakeetEncoderModelOutput(
        last_hidden_state=states, attention_mask=valid.int() if valid is not None and output_attention_mask else None
    )


def encoder(self: nn.Module, original, *args, **kwargs):
    """Of `ParakeetEncoder`: the same steps, without the mask of T x T."""
    if wants_weights(self, kwargs) or not all(is_patched(layer.self_attn) for layer in self.layers):
        return original(*args, **kwargs)
    return _encode(self, *args, **kwargs)


REPLACEMENTS = {
    "ParakeetEncoderAttention": Replacement(
        "forward",
        attention,
        ("hidden_states", "position_embeddings", "attention_mask", "kwargs"),
        own="attention weights",
        head_size="head_dim",
    ),
    "ParakeetEncoder": Replacement(
        "forward", encoder, ("input_features", "attention_mask", "output_attention_mask", "kwargs")
    ),
}
