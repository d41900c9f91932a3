"""NeMo's Conformer and FastConformer encoders: full, limited and chunked context, streaming, Longformer variant.

The encoder makes one mask (B, T, T) of context and padding for all layers, padded queries see nothing, and a query
that sees nothing gets zeros. Here it hands its layers a `Visible` in its place. For a streaming step it drops the rows
of that mask that stand for the cache, as it does of its own.
"""

from dataclasses import dataclass, replace

import torch
from nemo.collections.asr.parts.submodules.multi_head_attention import MultiHeadAttention
from nemo.utils import avoid_float16_autocast_context
from torch import Tensor, nn

from txl_kernels.functional import rel_attention
from txl_kernels.patching.masks import allowed
from txl_kernels.patching.padding import key_padding
from txl_kernels.patching.patch import is_patched
from txl_kernels.patching.replacement import Replacement


@dataclass(frozen=True)
class Visible:
    """Which keys the queries see, in the arguments of `rel_attention`.

    Attributes:
        window: (left, right), or None.
        attn_mask: (1|B, 1, 1|T, S) bool, True = may attend, or None.
        key_lengths: (B,), or None.
        padded: (B, T) bool, True for queries that are padding, or None.
    """

    window: tuple[int, int] | None = None
    attn_mask: Tensor | None = None
    key_lengths: Tensor | None = None
    padded: Tensor | None = None

    def __getitem__(self, index: tuple[slice, slice]) -> "Visible":
        """That of some of the queries, as the encoder takes them from its mask: [:, rows]."""
        mask = self.attn_mask
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, index[1]]
        return replace(self, attn_mask=mask, padded=None if self.padded is None else self.padded[index])


def masks(
    self: nn.Module,
    original,
    att_context_size: list[int],
    padding_length: Tensor,
    max_audio_length: int,
    offset: Tensor | None,
    device: torch.device,
) -> tuple[Tensor, Visible | Tensor | None]:
    """Of `ConformerEncoder._create_masks`: padded frames (B, T), True = padded, and what the attention sees.

    padding_length (B,) counts valid frames, and the empty ones of a cache in front, of which there are offset (B,).
    """
    attentions = [module for module in self.layers.modules() if isinstance(module, MultiHeadAttention)]
    if self.self_attention_model != "rel_pos" or not all(is_patched(module) for module in attentions):
        return original(att_context_size, padding_length, max_audio_length, offset, device)
    frames = torch.arange(max_audio_length, device=device)
    padded = frames >= padding_length[:, None]
    window, visible = _context(self.att_context_style, att_context_size, frames)
    if offset is not None:
        filled = frames >= offset[:, None]
        padded = padded | ~filled
        visible = filled[:, None, None] if visible is None else filled[:, None, None] & visible
    return padded, Visible(window, visible, padding_length.clamp(0, max_audio_length), padded)


def _context(style: str, sizes: list[int], frames: Tensor) -> tuple[tuple[int, int] | None, Tensor | None]:
    """The window of a context, and where that is not all of it the mask (1, 1, T, T) of its chunks."""
    if style == "regular" or (style == "chunked_limited" and sizes[1] == -1):
        return (max(sizes[0], -1), max(sizes[1], -1)), None
    if style == "chunked_limited":
        chunk = sizes[1] + 1
        left, right = (sizes[0] // chunk if sizes[0] >= 0 else 10000) * chunk, 0
    elif sum(sizes) == -3:
        return None, None
    else:  # "chunked_limited_with_rc"
        left, chunk, right = sizes
    start = (frames // chunk * chunk)[:, None]
    mask = (frames >= start - left) & (frames < start + chunk + right)
    return (left + chunk - 1, right + chunk - 1), mask[None, None]


def attention(
    self: nn.Module,
    original,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Visible | Tensor | None,
    pos_emb: Tensor,
    cache: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Of `RelPositionMultiHeadAttention`: query (B, T, C), pos_emb (1|B, 2S - 1, C).

    mask from `masks`, or (B, 1|T, S) bool, True = hidden; cache (B, S - T, C) of earlier inputs.
    """
    key, value, query, cache = self.update_cache(key=key, value=value, query=query, cache=cache)
    if isinstance(mask, Tensor):
        one_row = mask.shape[1] > 1 and mask.stride(1) == 0  # all are the same memory
        mask = Visible(attn_mask=allowed(mask[:, :1] if one_row else mask, reader=self)[:, None])
    with avoid_float16_autocast_context():
        out = self.linear_out(_attend(self, query, key, value, pos_emb, mask or Visible()))
    return out if cache is None else (out, cache)


def local_attention(
    self: nn.Module,
    original,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pad_mask: Tensor,
    pos_emb: Tensor,
    cache: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Of `RelPositionMultiHeadAttentionLongformer`: query (B, T, C), pad_mask (B, T), True = padded.

    pos_emb (1|B, L + R + 1, C) holds the distances L ... -R of the window.
    """
    if cache is not None or _not_local(self):
        return original(query, key, value, pad_mask, pos_emb, cache)
    left, right = self.att_context_size
    keys = key_padding(allowed(pad_mask, reader=self), self)
    visible = Visible((left, right), keys.attn_mask, keys.key_lengths, pad_mask)
    with avoid_float16_autocast_context():
        out = _attend(self, query, key, value, pos_emb, visible, first_distance=left)
    return self.linear_out(out)


def adapter(
    self: nn.Module,
    original,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Visible | Tensor | None,
    pos_emb: Tensor,
    cache: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Of `RelPositionMultiHeadAttentionAdapter`: as `attention`, after a norm."""
    query, key, value = (self.pre_norm(x) for x in (query, key, value))
    return attention(self, original, query, key, value, mask, pos_emb, cache)


def _attend(
    self: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pos_emb: Tensor,
    visible: Visible,
    first_distance: int | None = None,
) -> Tensor:
    """What `linear_out` takes, (B, T, H * D)."""
    if torch.is_autocast_enabled():
        query, key, value = query.float(), key.float(), value.float()
    q, k, v = self.forward_qkv(query, key, value)
    r = self.linear_pos(pos_emb).unflatten(-1, (self.h, self.d_k)).transpose(1, 2)
    out = rel_attention(
        *(q, k, v, r if r.shape[0] > 1 else r[0], self.pos_bias_u, self.pos_bias_v),
        is_causal=False,
        window=visible.window,
        attn_mask=visible.attn_mask,
        key_lengths=visible.key_lengths,
        dropout_p=self.dropout.p if self.dropout.training else 0.0,
        first_distance=first_distance,
    )
    out = out.transpose(1, 2).flatten(2)
    return out if visible.padded is None else out.masked_fill(visible.padded[..., None], 0.0)


def _not_local(module: nn.Module) -> str | None:
    """Why an instance of the Longformer variant must be left alone, or None."""
    left, right = module.att_context_size
    if left != right:
        return f"att_context_size: expected left and right alike, got [{left}, {right}], whose positions NeMo mixes up"
    if module.global_tokens > 0:
        return f"global_tokens: expected 0, got {module.global_tokens}"
    return None


def _not_relative(module: nn.Module) -> str | None:
    """Why an encoder must be left alone, or None."""
    absolute = module.self_attention_model == "abs_pos"
    return "self_attention_model: expected relative positions, got 'abs_pos'" if absolute else None


PARAMETERS = ("query", "key", "value", "mask", "pos_emb", "cache")
REPLACEMENTS = {
    "RelPositionMultiHeadAttention": Replacement("forward", attention, PARAMETERS, head_size="d_k"),
    "RelPositionMultiHeadAttentionLongformer": Replacement(
        "forward",
        local_attention,
        ("query", "key", "value", "pad_mask", "pos_emb", "cache"),
        _not_local,
        head_size="d_k",
    ),
    "RelPositionMultiHeadAttentionAdapter": Replacement("forward", adapter, PARAMETERS, head_size="d_k"),
    "ConformerEncoder": Replacement(
        "_create_masks",
        masks,
        ("att_context_size", "padding_length", "max_audio_length", "offset", "device"),
        _not_relative,
    ),
}
