"""Audio encoders of Gemma 3n and Gemma 4 of Hugging Face: a window of keys, a band of distances, capped scores.

Their own code cuts queries into blocks and gives each the keys around it, its context. A query whose window holds
padding only gets the mean of the values in the context of its block, zeros outside the sequence included.

Legend as in `rel_attention`; L and R are the largest distances back and ahead.
"""

import torch
from torch import Tensor, nn
from transformers.models.gemma4 import modeling_gemma4 as gemma4

from txl_kernels.functional import rel_attention
from txl_kernels.patching.huggingface import wants_weights
from txl_kernels.patching.masks import allowed
from txl_kernels.patching.padding import KeyPadding, key_padding
from txl_kernels.patching.patch import is_patched
from txl_kernels.patching.replacement import Replacement, warn_own


def gemma3n_attention(self: nn.Module, original, hidden_states: Tensor, mask: Tensor) -> Tensor:
    """Of `Gemma3nAudioAttention`: hidden_states (B, T, C), mask (B, T), True = padding; gives (B, T, H, D)."""
    if mask.dtype is not torch.bool:
        warn_own(self, "a mask that is not bool")
        return original(hidden_states, mask)
    q, k, v = _heads(self, hidden_states)
    q = q * (self.q_scale * nn.functional.softplus(self.per_dim_scale))
    L, R = self.max_past_horizon, self.max_future_horizon
    positions = self.relative_position_embedding
    distances = torch.arange(L, -R - 1, -1, device=q.device)[None]
    r = positions.pos_proj(positions._get_timing_signal_1d_pos(distances, q.dtype))
    return _attend(self, q, k, v, r, (L, R), key_padding(allowed(mask, reader=self), self))


def gemma4_attention(
    self: nn.Module,
    original,
    hidden_states: Tensor,
    position_embeddings: Tensor,
    attention_mask: KeyPadding | Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Of `Gemma4AudioAttention`: hidden_states (B, T, C), position_embeddings (1, P, C).

    attention_mask comes from `gemma4_encoder`; one in blocks, (B, 1, blocks, block, context), is for its own method.
    """
    if not isinstance(attention_mask, KeyPadding):
        warn_own(self, "a mask in blocks")
        return original(hidden_states, position_embeddings, attention_mask)
    q, k, v = (x.float() for x in _heads(self, hidden_states))
    q = q * (self.q_scale * nn.functional.softplus(self.per_dim_scale))
    r = self.relative_k_proj(position_embeddings).to(q.dtype)
    # its mask leaves out the farthest distance on each side
    window = (self.max_past_horizon - 1, max(self.max_future_horizon - 1, 0))
    out = _attend(self, q, k * self.k_scale, v, r, window, attention_mask)
    return self.post(out.flatten(2).to(hidden_states.dtype)), None


def _heads(layer: nn.Module, states: Tensor) -> tuple[Tensor, ...]:
    """q, k and v (B, T, H, D)."""
    return tuple(x(states).unflatten(-1, (layer.num_heads, -1)) for x in (layer.q_proj, layer.k_proj, layer.v_proj))


def _attend(
    layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, r: Tensor, window: tuple[int, int], padding: KeyPadding
) -> Tensor:
    """(B, T, H, D); r (1, P, H * D), whose first row holds the distance L."""
    out, lse = rel_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        r[0].unflatten(-1, (layer.num_heads, -1)).transpose(0, 1),
        is_causal=False,
        window=window,
        **padding.visible(),
        scale=1.0,
        first_distance=layer.max_past_horizon,
        softcap=layer.attention_logits_soft_cap,
        return_lse=True,
    )
    if padding.key_lengths is None and padding.attn_mask is None:
        return out.transpose(1, 2)
    seeing = padding.shortest + window[0] if padding.shortest else 0  # so many queries see a key
    if seeing >= v.shape[1]:
        return out.transpose(1, 2)
    return out.transpose(1, 2) + _means(layer, v, lse.isneginf()[..., None].transpose(1, 2), seeing)


def _means(layer: nn.Module, v: Tensor, dead: Tensor, seeing: int) -> Tensor:
    """For dead queries, whose output is 0, the mean of v in the context of their block, else 0: (B, T, H, D), as v.

    The first `seeing` queries are not dead.
    """
    T, chunk = v.shape[1], layer.chunk_size
    first = seeing // chunk * chunk
    before = min(-(-layer.max_past_horizon // chunk) * chunk, first)
    context = layer._extract_block_context(v[:, first - before :]).mean(2)[:, before // chunk :]  # (B, blocks, H, D)
    context = context.repeat_interleave(chunk, 1)[:, : T - first]
    return nn.functional.pad(context.masked_fill(~dead[:, first:], 0.0), (0, 0, 0, 0, first, 0))


@gemma4.merge_with_config_defaults
@gemma4.capture_outputs
def _encode(self: nn.Module, input_features: Tensor, attention_mask: Tensor | None = None, **kwargs):
    states, valid = self.subsample_conv_projection(input_features, attention_mask)
    positions = self.rel_pos_enc(states)
    padding = KeyPadding(None, None) if valid is None else key_padding(valid.bool())
    for layer in self.layers[: self.config.num_hidden_layers]:
        states = layer(states, attention_mask=padding, position_embeddings=positions, **kwargs)
    return gemma4.Gemma4AudioModelOutput(last_hidden_state=self.output_proj(states), attention_mask=valid)


def gemma4_encoder(self: nn.Module, original, *args, **kwargs):
    """Of `Gemma4AudioModel`: the same steps, without the mask of T x T."""
    if wants_weights(self, kwargs) or not all(is_patched(layer.self_attn) for layer in self.layers):
        return original(*args, **kwargs)
    return _encode(self, *args, **kwargs)


def _check(layer: nn.Module) -> str | None:
    """A window of one key at least, and hidden scores of which nothing is left beside any other."""
    if layer.max_past_horizon < 1:
        return f"attention_context_left: expected at least 2, got {layer.max_past_horizon + 1}"
    value = layer.config.attention_invalid_logits_value
    return None if value <= -200 else f"attention_invalid_logits_value: expected at most -200, got {value}"


REPLACEMENTS = {
    "Gemma3nAudioAttention": Replacement(
        "forward", gemma3n_attention, ("hidden_states", "mask"), own="masks that are not bool", head_size="head_dim"
    ),
    "Gemma4AudioAttention": Replacement(
        "forward",
        gemma4_attention,
        ("hidden_states", "position_embeddings", "attention_mask"),
        _check,
        own="attention weights, masks in blocks",
        head_size="head_dim",
    ),
    "Gemma4AudioModel": Replacement("forward", gemma4_encoder, ("input_features", "attention_mask", "kwargs")),
}
