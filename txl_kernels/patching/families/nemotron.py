"""Nemotron ASR streaming of Hugging Face: Parakeet's encoder with chunks, and with a cache of keys and values.

A frame sees the frames of its own chunk and those of some chunks before it. The encoder says so with one mask
(B, 1, T, S) that hides padded keys, too. Without a cache the encoder here hands its layers the lengths, a window that
holds whatever the chunks show, and the chunks as a mask that is no larger than the window. With a cache the queries
are few, and its own mask serves. A query without a visible key gets zeros.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.nemotron_asr_streaming import modeling_nemotron_asr_streaming as original_code

from txl_kernels.functional import rel_attention
from txl_kernels.patching.families.parakeet_steps import projected_positions, projections, subsampled, through_layers
from txl_kernels.patching.huggingface import wants_weights
from txl_kernels.patching.patch import is_patched
from txl_kernels.patching.replacement import Replacement, warn_own


class Visible(NamedTuple):
    """What each frame sees, in the arguments of `rel_attention`.

    Attributes:
        attn_mask: (1, 1, T, T) bool, True = may attend; to be looked at within the window only.
        window: Left and right.
        key_lengths: (B,), or None.
    """

    attn_mask: Tensor
    window: tuple[int, int]
    key_lengths: Tensor | None


def attention(
    self: nn.Module,
    original,
    hidden_states: Tensor,
    position_embeddings: Tensor | None,
    attention_mask: Tensor | None = None,
    past_key_values=None,
    visible: Visible | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Of `NemotronAsrStreamingEncoderAttention`: hidden_states (B, T, C), position_embeddings (1|B, 2S - 1, C).

    visible, from `encoder`, takes the place of attention_mask (B, 1, T, S), bool, True = may attend.
    """
    request = None
    if wants_weights(self, kwargs):
        request = "attention weights"
    elif attention_mask is not None and attention_mask.dtype is not torch.bool:
        request = "an attention_mask that is not bool"
    if request is not None:
        warn_own(self, request)
        return original(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
    q, k, v = projections(self, hidden_states)
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, self.layer_idx)
    # of the distances S - 1 ... -(S - 1), those that T queries have
    r = projected_positions(self, position_embeddings[:, : k.shape[2] + q.shape[2] - 1])
    out = rel_attention(
        *(q, k, v, r, self.bias_u, self.bias_v),
        is_causal=False,
        dropout_p=self.attention_dropout if self.training else 0.0,
        scale=self.scaling,
        **({"attn_mask": attention_mask} if visible is None else visible._asdict()),
    )
    return self.o_proj(out.transpose(1, 2).flatten(2)), None


@original_code.merge_with_config_defaults
@original_code.capture_outputs
def _encode(
    self: nn.Module,
    input_features: Tensor,
    attention_mask: Tensor | None,
    output_attention_mask: bool,
    num_lookahead_tokens: int | None,
    **kwargs,
):
    states, valid = subsampled(self, input_features, attention_mask)
    visible, unseeing = _visible(states, valid, *self._resolve_attn_context(num_lookahead_tokens))
    states = through_layers(self, states, all_masked_rows=unseeing, visible=visible, **kwargs)
    return original_code.NemotronAsrStreamingEncoderModelOutput(
        last_hidden_state=states, attention_mask=valid.int() if valid is not None and output_attention_mask else None
    )


def _visible(states: Tensor, valid: Tensor | None, left: int, right: int) -> tuple[Visible, Tensor | None]:
    """For a lookahead of `right` frames, hence chunks of right + 1, and `left` frames before a chunk, -1 for all.

    The mask is a band, a row as wide as the window for each frame, seen askew: row i begins with key i - window[0].
    What is beyond a row is of its neighbours, and hidden by the window.

    Returns:
        What each frame sees, and the frames (B, 1, T) that see nothing, or None where there are none.
    """
    T, size = states.shape[1], right + 1
    frame = torch.arange(T, device=states.device)
    before = (T - 1) // size if left < 0 else min(left, T - 1) // size  # chunks that a frame sees before its own
    window = ((before + 1) * size - 1, right)
    width = sum(window) + 1
    # from the start of the frame's own chunk to the key
    ahead = torch.arange(-window[0], right + 1, device=states.device) + (frame % size)[:, None]
    band = (ahead >= -before * size) & (ahead <= right)
    mask = band.as_strided((1, 1, T, T), (0, 0, width - 1, 1), window[0])
    if valid is None:
        return Visible(mask, window, None), None
    lengths = valid.sum(1)
    first = (frame // size - before).clamp(min=0) * size
    return Visible(mask, window, lengths), (lengths[:, None] <= first)[:, None]


def _check(module: nn.Module) -> str | None:
    implementation = module.config._attn_implementation
    if implementation != "sdpa":
        return f'_attn_implementation: expected "sdpa", got "{implementation}", which reads masks the wrong way round'
    return None


def encoder(
    self: nn.Module,
    original,
    input_features: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values=None,
    output_attention_mask: bool = True,
    use_cache: bool | None = None,
    padding_cache=None,
    num_lookahead_tokens: int | None = None,
    **kwargs,
):
    """Of `NemotronAsrStreamingEncoder`: the same steps, without the mask of T x T, where nothing is cached."""
    if (
        _check(self) is None
        and past_key_values is None
        and padding_cache is None
        and not (getattr(self.config, "use_cache", False) if use_cache is None else use_cache)
        and not wants_weights(self, kwargs)
        and all(is_patched(layer.self_attn) for layer in self.layers)
    ):
        return _encode(self, input_features, attention_mask, output_attention_mask, num_lookahead_tokens, **kwargs)
    return original(
        input_features,
        attention_mask,
        position_ids,
        past_key_values,
        output_attention_mask,
        use_cache,
        padding_cache,
        num_lookahead_tokens,
        **kwargs,
    )


REPLACEMENTS = {
    "NemotronAsrStreamingEncoderAttention": Replacement(
        "forward",
        attention,
        ("hidden_states", "position_embeddings", "attention_mask", "past_key_values", "kwargs"),
        check=_check,
        own="attention weights",
        head_size="head_dim",
    ),
    "NemotronAsrStreamingEncoder": Replacement(
        "forward",
        encoder,
        (
            "input_features",
            "attention_mask",
            "position_ids",
            "past_key_values",
            "output_attention_mask",
            "use_cache",
            "padding_cache",
            "num_lookahead_tokens",
            "kwargs",
        ),
        check=_check,
    ),
}
