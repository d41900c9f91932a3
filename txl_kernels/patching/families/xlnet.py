"""XLNet of Hugging Face: both streams, segments, permutation masks, memory.

The model makes masks (T, S, 1|B, 1) and one-hot segments (T, S, B, 2) for its layers. Here it hands them a `Visible`
and `Segments` in their place, which take T x S only where the caller gives a permutation mask. In both streams a query
without a visible key gets the mean of all values.

Legend as in `rel_attention`; states are time-major, (T, B, C).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.xlnet import modeling_xlnet as original_code

from txl_kernels.functional import rel_attention
from txl_kernels.patching.dead_rows import mean_of_values
from txl_kernels.patching.padding import key_padding
from txl_kernels.patching.patch import is_patched
from txl_kernels.patching.replacement import Replacement, warn_own


class Visible(NamedTuple):
    """What a query sees; takes the place of a mask (T, S, 1|B, 1), 1 = hidden.

    Attributes:
        is_causal: As in `rel_attention`, and so the next three.
        window: (left, -1), or None.
        key_lengths: (B,), or None.
        attn_mask: (B, 1, 1|T, S) bool, True = may attend, or None.
        itself: (B, T), True for a query that all this hides from itself, and that sees itself all the same; or None.
    """

    is_causal: bool = False
    window: tuple[int, int] | None = None
    key_lengths: Tensor | None = None
    attn_mask: Tensor | None = None
    itself: Tensor | None = None


class Segments(NamedTuple):
    """Token types of queries (B, T) and keys (B, S); takes the place of seg_mat (T, S, B, 2)."""

    q_ids: Tensor
    k_ids: Tensor


def attention(
    self: nn.Module,
    original,
    q_head: Tensor,
    k_head_h: Tensor,
    v_head_h: Tensor,
    k_head_r: Tensor,
    seg_mat: Segments | Tensor | None = None,
    attn_mask: Visible | Tensor | None = None,
    output_attentions: bool = False,
):
    """Of `XLNetRelativeAttention.rel_attn_core`: q (T, B, H, D), k and v (S, B, H, D), r (S + T | S + 1, 1|B, H, D)."""
    if output_attentions or isinstance(seg_mat, Tensor):
        warn_own(self, "attention weights" if output_attentions else "one-hot segments")
        return original(q_head, k_head_h, v_head_h, k_head_r, seg_mat, attn_mask, output_attentions)
    if attn_mask is None:
        visible = Visible()
    elif isinstance(attn_mask, Tensor):
        visible = Visible(attn_mask=(attn_mask <= 0).permute(2, 3, 0, 1))
    else:
        visible = attn_mask
    q, k, v, r = (x.permute(1, 2, 0, 3) for x in (q_head, k_head_h, v_head_h, k_head_r))
    S = k.shape[2]
    segments = None
    if seg_mat is not None:
        segments = torch.einsum("bnid,snd->bnis", q + self.r_s_bias[:, None], self.seg_embed)
    dropout_p = self.dropout.p if self.dropout.training else 0.0
    out, lse = rel_attention(
        *(q, k, v, r if r.shape[0] > 1 else r[0], self.r_w_bias, self.r_r_bias),
        is_causal=visible.is_causal,
        window=visible.window,
        attn_mask=visible.attn_mask,
        key_lengths=visible.key_lengths,
        dropout_p=dropout_p,
        scale=self.scale,
        first_distance=S,
        segment=None if segments is None else (segments, *seg_mat),
        return_lse=True,
    )
    if visible.itself is not None:
        of_itself = _score_of_itself(self, q, k, r[:, :, S], segments)
        weight = torch.sigmoid(of_itself - lse) * visible.itself[:, None]
        kept = nn.functional.dropout(weight, dropout_p)
        out = (out * (1 - weight)[..., None] + v[:, :, -q.shape[2] :] * kept[..., None]).to(out.dtype)
    elif visible.attn_mask is not None or visible.key_lengths is not None:
        out = mean_of_values(out, v, lse.isneginf())
    return out.permute(2, 0, 1, 3)


def _score_of_itself(layer: nn.Module, q: Tensor, k: Tensor, r: Tensor, segments: Tensor | None) -> Tensor:
    """(B, H, T): the score of each query and the key at its place; r (1|B, H, D) is that of the distance 0."""
    own = k[:, :, k.shape[2] - q.shape[2] :]
    score = ((q + layer.r_w_bias[:, None]) * own).sum(-1) + ((q + layer.r_r_bias[:, None]) * r[:, :, None]).sum(-1)
    return (score if segments is None else score + segments[..., 0]) * layer.scale


class _Model:
    """An `XLNetModel` as its own forward sees it here: without masks to make, and with layers that get these.

    Attributes:
        attn_type: Makes no causal mask; the model's positions follow its own.
        layer: The model's layers.
    """

    attn_type = "bi"

    def __init__(self, model: nn.Module, **masks: Visible | Segments | None) -> None:
        self._model = model
        self.layer = [_with(layer, masks) for layer in model.layer]

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def relative_positional_encoding(self, qlen: int, klen: int, bsz: int, device: torch.device) -> Tensor:
        """All sequences share positions, unless half of them are read backwards or dropout tells them apart."""
        dropout = self._model.dropout
        alike = not (self._model.bi_data or (dropout.training and dropout.p))
        return self._model.relative_positional_encoding(qlen, klen, 1 if alike else bsz, device)


def _with(layer: nn.Module, masks: dict):
    return lambda *args, **kwargs: layer(*args, **(kwargs | masks))


def model(
    self: nn.Module,
    original,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    mems: list[Tensor] | None = None,
    perm_mask: Tensor | None = None,
    target_mapping: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    input_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    use_mems: bool | None = None,
    output_attentions: bool | None = None,
    **kwargs,
):
    """Of `XLNetModel`: its own forward, where the layers see what the masks say and not the masks."""
    tokens = inputs_embeds if input_ids is None else input_ids
    wants_weights = self.config.output_attentions if output_attentions is None else output_attentions
    wrong = tokens is None or (input_mask is not None and attention_mask is not None)  # it says so itself
    if wrong or wants_weights or not all(map(_passes_on, self.layer)):
        return original(
            *(input_ids, attention_mask, mems, perm_mask, target_mapping, token_type_ids, input_mask, inputs_embeds),
            *(use_mems, output_attentions),
            **kwargs,
        )
    M = 0 if mems is None or mems[0] is None else mems[0].shape[0]
    valid = attention_mask >= 1 if attention_mask is not None else input_mask <= 0 if input_mask is not None else None
    B = tokens.shape[0]  # of which masks and types may be one for all
    visible = _visible(self, M, None if valid is None else valid.expand(B, -1), perm_mask)
    segments = None
    if token_type_ids is not None:
        types = _ids(token_type_ids).expand(B, -1)
        segments = Segments(types, nn.functional.pad(types, (M, 0)))  # memory has type 0
    stand_in = _Model(self, attn_mask_h=visible, attn_mask_g=visible._replace(itself=None), seg_mat=segments)
    return original.__func__(
        *(stand_in, input_ids, None, mems, None, target_mapping, None, None, inputs_embeds, use_mems),
        *(False,),
        **kwargs,
    )


def _ids(types: Tensor) -> Tensor:
    """Integers that are equal where token types of any dtype are: of floats the bits, those of 0.0 for -0.0."""
    is_integer = not types.is_floating_point() and types.dtype != torch.bool
    return types if is_integer else (types.double() + 0.0).view(torch.int64)


def _visible(model: nn.Module, M: int, valid: Tensor | None, perm_mask: Tensor | None) -> Visible:
    """What the first stream sees: valid (B, T), False for padding, and perm_mask (B, T, T), 1 = hidden."""
    key_lengths = attn_mask = itself = None
    if valid is not None:
        itself = ~valid
        key_lengths, attn_mask, _ = key_padding(nn.functional.pad(valid, (M, 0), value=True))
    if perm_mask is not None:
        seen = perm_mask <= 0
        hidden = ~seen.diagonal(dim1=1, dim2=2)
        itself = hidden if itself is None else itself | hidden
        seen = nn.functional.pad(seen, (M, 0), value=True)[:, None]
        attn_mask = seen if attn_mask is None else seen & attn_mask
    is_causal = model.attn_type == "uni"
    window = (M, -1) if is_causal and model.same_length else None
    return Visible(is_causal, window, key_lengths, attn_mask, itself)


def _passes_on(layer: nn.Module) -> bool:
    """Whether a layer hands what takes the place of masks to a patched attention, and does nothing else with it."""
    attention = layer.rel_attn
    return (
        type(layer).forward is original_code.XLNetLayer.forward
        and type(attention).forward is original_code.XLNetRelativeAttention.forward
        and is_patched(attention, "rel_attn_core")
    )


REPLACEMENTS = {
    "XLNetRelativeAttention": Replacement(
        "rel_attn_core",
        attention,
        ("q_head", "k_head_h", "v_head_h", "k_head_r", "seg_mat", "attn_mask", "output_attentions"),
        own="attention weights, one-hot segments",
        head_size="d_head",
    ),
    "XLNetModel": Replacement(
        "forward",
        model,
        (
            *("input_ids", "attention_mask", "mems", "perm_mask", "target_mapping", "token_type_ids", "input_mask"),
            *("inputs_embeds", "use_mems", "output_attentions", "output_hidden_states", "return_dict", "kwargs"),
        ),
        own="attention weights",
    ),
}
