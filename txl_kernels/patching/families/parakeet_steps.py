"""Steps that Hugging Face's Parakeet and Nemotron share, as their own code takes them."""

import torch
from torch import Tensor, nn


def subsampled(
    encoder: nn.Module, input_features: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """States (B, T, C) for the layers, and which of the frames are valid, (B, T) bool, or None."""
    states = encoder.subsampling(input_features, attention_mask) * encoder.input_scale
    if attention_mask is None:
        return states, None
    return states, encoder._get_output_attention_mask(attention_mask, target_length=states.shape[1])


def through_layers(encoder: nn.Module, states: Tensor, **options) -> Tensor:
    """States after all layers that are not left out; options are handed to each."""
    # all sequences share positions, unless dropout tells them apart
    alike = not (encoder.training and encoder.dropout_positions)
    positions = encoder.encode_positions(states[:1] if alike else states)
    states = nn.functional.dropout(states, p=encoder.dropout, training=encoder.training)
    positions = nn.functional.dropout(positions, p=encoder.dropout_positions, training=encoder.training)
    for layer in encoder.layers:
        if encoder.training and encoder.layerdrop > 0.0 and torch.rand([]) < encoder.layerdrop:
            continue
        states = layer(states, position_embeddings=positions, **options)
    return states


def projections(attention: nn.Module, states: Tensor) -> tuple[Tensor, ...]:
    """q, k and v (B, H, T, D)."""
    return tuple(_heads(attention, x(states)) for x in (attention.q_proj, attention.k_proj, attention.v_proj))


def projected_positions(attention: nn.Module, embeddings: Tensor) -> Tensor:
    """r (H, P, D), or (B, H, P, D) where the batches differ: dropout makes a mask for each."""
    r = _heads(attention, attention.relative_k_proj(embeddings))
    return r if r.shape[0] > 1 else r[0]


def _heads(attention: nn.Module, x: Tensor) -> Tensor:
    """(B, T, H * D) as (B, H, T, D)."""
    return x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
