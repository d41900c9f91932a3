"""ESPnet's attention with relative positions, the latest kind and the legacy one (still the default of its Conformers).

The legacy kind has rows for distances from 0 on only, and reads those of the next query for most of a query's future.
Encoders hand their layers a mask (B, 1, T) of keys, but cut it from a triangle of T x T, at the rate of the features.
"""

import functools
import types

import torch
from espnet.nets.pytorch_backend import nets_utils
from torch import Tensor, nn

from txl_kernels.functional import rel_attention
from txl_kernels.patching.padding import KeyPadding, key_padding, of_rows
from txl_kernels.patching.replacement import Replacement, warn_own

_PLOTS = "espnet2.main_funcs.calculate_all_attentions"  # where the trainer hooks every module, after each epoch
_OWN = "attention weights for plots"


def latest(
    self: nn.Module, original, query: Tensor, key: Tensor, value: Tensor, pos_emb: Tensor, mask: Tensor | None
) -> Tensor:
    """Of `RelPositionMultiHeadedAttention`: query (B, T, C), key (B, S, C), pos_emb (1|B, 2S - 1, C).

    mask (1|B, 1|T, S), True or non-zero = may attend.
    """
    return _attend(self, original, query, key, value, pos_emb, mask, is_legacy=False)


def legacy(
    self: nn.Module, original, query: Tensor, key: Tensor, value: Tensor, pos_emb: Tensor, mask: Tensor | None
) -> Tensor:
    """Of `LegacyRelPositionMultiHeadedAttention`: as `latest`, with pos_emb (1|B, S, C)."""
    return _attend(self, original, query, key, value, pos_emb, mask, is_legacy=True)


def _attend(
    self: nn.Module,
    original,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pos_emb: Tensor,
    mask: Tensor | None,
    *,
    is_legacy: bool,
) -> Tensor:
    if any(getattr(hook, "__module__", "") == _PLOTS for hook in self._forward_hooks.values()):
        warn_own(self, _OWN)
        return original(query, key, value, pos_emb, mask)
    q, k, v = self.forward_qkv(query, key, value)
    S = k.shape[2]
    r = self.linear_pos(pos_emb).unflatten(-1, (self.h, self.d_k)).transpose(1, 2)
    if self.zero_triu:  # no position term for the future, as for any distance outside r
        r = r[..., :S, :]
    visible = _visible(self, mask, q.shape[0])
    out = rel_attention(
        *(q, k, v, r if r.shape[0] > 1 else r[0], self.pos_bias_u, self.pos_bias_v),
        is_causal=False,
        attn_mask=visible.attn_mask,
        key_lengths=visible.key_lengths,
        dropout_p=self.dropout.p if self.dropout.training else 0.0,
        first_distance=S - 1 if self.zero_triu else None,
        wrap_future=is_legacy and not self.zero_triu,
    )
    self.attn = None  # not the weights of an earlier call
    return self.linear_out(out.transpose(1, 2).flatten(2))


def _visible(self: nn.Module, mask: Tensor | None, B: int) -> KeyPadding:
    if mask is None:
        return KeyPadding(None, None)
    mask = mask.bool()[:, None]
    keys = of_rows(mask)
    return KeyPadding(None, mask) if keys is None or keys.shape[0] < B else key_padding(keys, self)


def pad_mask(lengths: Tensor | list[int], *args, **kwargs) -> Tensor:
    """Of `make_pad_mask`: (B, T) bool, True from each of the lengths (B,) on. With a shape to match, ESPnet's own."""
    if args or kwargs or isinstance(lengths, list) or lengths.ndim != 1:
        return nets_utils.make_pad_mask(lengths, *args, **kwargs)
    return torch.arange(int(lengths.max()), device=lengths.device) >= lengths[:, None]


def encoder(self: nn.Module, original, *args, **kwargs):
    """Of the encoders: the same steps, with `pad_mask` in place of `make_pad_mask`."""
    return _with_pad_mask(original.__func__)(self, *args, **kwargs)


@functools.cache
def _with_pad_mask(forward: types.FunctionType) -> types.FunctionType:
    names = forward.__globals__ | {"make_pad_mask": pad_mask}
    return types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)


def _attends_to_positions(module: nn.Module) -> str | None:
    """Why an encoder must be left alone, or None."""
    if any(type(x).__name__ in REPLACEMENTS for x in module.modules() if x is not module):
        return None
    return "none of its layers has relative positions"


def _encoder(*parameters: str) -> Replacement:
    return Replacement("forward", encoder, parameters, _attends_to_positions)


PARAMETERS = ("query", "key", "value", "pos_emb", "mask")
INPUTS = ("xs_pad", "ilens", "prev_states")
REPLACEMENTS = {
    "RelPositionMultiHeadedAttention": Replacement("forward", latest, PARAMETERS, own=_OWN, head_size="d_k"),
    "LegacyRelPositionMultiHeadedAttention": Replacement("forward", legacy, PARAMETERS, own=_OWN, head_size="d_k"),
    "ConformerEncoder": _encoder(*INPUTS, "masks", "ctc", "return_all_hs"),
    "MultiConvConformerEncoder": _encoder(*INPUTS, "ctc"),
    "BranchformerEncoder": _encoder(*INPUTS),
    "EBranchformerEncoder": _encoder(*INPUTS, "masks", "ctc", "max_layer", "return_all_hs"),
    "EBranchformerCTCEncoder": _encoder(*INPUTS, "ctc", "max_layer", "prefix_embeds", "memory", "memory_mask"),
    "ConformerPostEncoder": _encoder("input", "input_lengths"),
}
