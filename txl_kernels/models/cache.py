"""Memory that is not projected again: what evaluation and generation keep from segment to segment.

`MemTransformerLM.forward` keeps hidden states, and every layer projects those of the whole memory to keys and values
in every segment, because the projections need their gradients. Without gradients the projections themselves can be
kept (as in Dai et al. 2019, section 3.2, whose evaluation reuses what was computed before): keys hold no position,
so they stay what they were while their distance grows. The projected rows of r depend on the distance only.

Legend: B batch, H heads, T segment length, M memory length, S = M + T, D head size, C width (d_model).
"""

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from txl_kernels.layer import check_dtype
from txl_kernels.layer_mask import Visibility
from txl_kernels.layer_steps import (
    Positions,
    attend,
    learned_positions,
    project_memory,
    project_queries,
    projected_positions,
)
from txl_kernels.op import autocast_enabled

if TYPE_CHECKING:
    from txl_kernels.models.language_model import MemTransformerLM


class Cache:
    """Keys and values of the memory, and projected r, of every layer of a `MemTransformerLM`; see its `init_cache`.

    A buffer has room for twice the memory and a segment. Segments are written one behind the other, the memory is
    what lies before the next one, and when the end is reached it moves to the front, once in mem_len tokens at most.
    So keys and values are views, in order, and a copy of a cache (``copy.deepcopy``) goes on by itself.

    The weights must stay what they are. A return to training mode, ``load_state_dict``, a move to another device or
    dtype and whatever else PyTorch counts is noticed and refused; writing through ``.data`` is not. Hooks on the
    layers and their attention are not called.

    Attributes:
        batch_size: B.
        length: M, the number of tokens that the next segment finds in memory.
    """

    def __init__(self, model: "MemTransformerLM", batch_size: int, mems: Sequence[Tensor] = ()) -> None:
        if model.attn_type not in (0, 1):
            raise ValueError(
                f"attn_type: expected 0 or 1 for a cache, got {model.attn_type}, which adds positions before keys are "
                "projected, so that they change from segment to segment"
            )
        if model.ext_len:
            raise ValueError(f"ext_len: expected 0 for a cache, where segments follow each other, got {model.ext_len}")
        _check_mode(model)
        self.batch_size, self.length = batch_size, 0
        self._model, self._lengths = weakref.ref(model), _lengths(model)
        self._weights = [(weakref.ref(p), *_state(p)) for p in model.parameters()]
        self._trainings = model._trainings
        self._dtype = _kept_dtype(model)
        self._longest = 0  # segment that there is room for
        self._end = 0  # of the memory in the buffer
        self._buffer: Tensor | None = None  # (n_layer, 2, B, H, room, D)
        self._positions: list[Positions] = []  # for mem_len and the longest segment
        if mems and mems[0].shape[0]:
            self.make_room(model, 1)
            for i, (layer, states) in enumerate(zip(model.layers, mems[:-1], strict=True)):
                check_dtype(layer.dec_attn, "mems", states)
                self._append(i, project_memory(layer.dec_attn, states))
            self.advance(model, mems[0].shape[0])

    @torch.no_grad()
    def extend(self, model: "MemTransformerLM", data: Tensor) -> Tensor:
        """Hidden states (T, B, C) of the tokens (T, B) that follow those seen so far; they become memory.

        Nothing changes if this fails.

        Raises:
            ValueError: The cache is not that of the model as it is now, or of another batch size.
        """
        T, B = data.shape
        self._check(model, B)
        self.make_room(model, T)
        h = model.word_emb(data)
        for i, layer in enumerate(model.layers):
            h = layer.pos_ff(self.attend(model, i, h))
        self.advance(model, T)
        return h

    def make_room(self, model: "MemTransformerLM", T: int) -> None:
        """Sees to it that a segment fits behind the memory, and that there are rows of r for all of its distances."""
        buffer, memory = self._buffer, slice(self._end - self.length, self._end)
        if self._longest < T:
            positions = _positions(model, model.mem_len + T)
            attention = model.layers[0].dec_attn
            heads = model.n_layer, 2, self.batch_size, attention.n_head
            with torch.inference_mode(False):  # else it could not be written to outside of inference mode
                room = torch.empty(
                    *heads, 2 * model.mem_len + T, attention.d_head, dtype=self._dtype, device=_weight(model).device
                )
            self._buffer, self._positions, self._longest = room, positions, T
        elif self._end + T <= buffer.shape[4]:
            return
        if self.length:  # the two places never overlap: what is full holds twice the memory
            self._buffer[..., : self.length, :] = buffer[..., memory, :]
        self._end = self.length

    def attend(self, model: "MemTransformerLM", i: int, h: Tensor) -> Tensor:
        """The attention of layer i from the segment (T, B, C) to memory and segment, whose keys and values it writes.

        `make_room` goes before the first layer, `advance` behind the last.
        """
        attention, S = model.layers[i].dec_attn, self.length + h.shape[0]
        q, kv = project_queries(attention, h)
        k, v = self._append(i, kv)
        return attend(attention, h, q, k, v, self._positions[i].nearest(S), Visibility(model.window))

    def advance(self, model: "MemTransformerLM", T: int) -> None:
        """Makes the T tokens behind the memory part of it."""
        self._end += T
        self.length = min(self.length + T, model.mem_len)

    def _append(self, layer: int, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k and v of a segment (T, B, 2 * H * D) behind the memory; those of both, (B, H, S, D) each."""
        buffer, end = self._buffer[layer], self._end + kv.shape[0]
        by_head = kv.unflatten(-1, (2, buffer.shape[2], buffer.shape[4])).permute(2, 1, 3, 0, 4)
        buffer[:, :, :, self._end : end] = by_head
        k, v = buffer[:, :, :, self._end - self.length : end]
        return k, v

    def _check(self, model: "MemTransformerLM", B: int) -> None:
        _check_mode(model)
        if self.batch_size != B:
            raise ValueError(f"cache: expected one for batch size {B} as data, got {self.batch_size}")
        if self._model() is not model:
            raise ValueError("cache: expected one made by init_cache of this model, got that of another")
        if _lengths(model) != self._lengths:
            names = "(mem_len, ext_len, clamp_len)"
            raise ValueError(f"cache: expected one made for {names} = {_lengths(model)}, got {self._lengths}")
        if _kept_dtype(model) != self._dtype:
            raise ValueError(f"cache: expected one made for {_kept_dtype(model)} as computed here, got {self._dtype}")
        now = [*model.parameters()]
        same = len(now) == len(self._weights) and all(
            known() is p and tuple(state) == _state(p) for p, (known, *state) in zip(now, self._weights, strict=True)
        )
        if not same or model._trainings != self._trainings:
            raise ValueError("cache: expected one made by init_cache after the weights last changed, got older keys")


def _check_mode(model: "MemTransformerLM") -> None:
    if model.training:
        raise ValueError("cache: expected a model in eval mode, as what is kept has no dropout, got training mode")


def _lengths(model: "MemTransformerLM") -> tuple[int, int, int]:
    return model.mem_len, model.ext_len, model.clamp_len


def _weight(model: "MemTransformerLM") -> Tensor:
    return model.layers[0].dec_attn.qkv_net.weight


def _kept_dtype(model: "MemTransformerLM") -> torch.dtype:
    """Of keys and values: that of products, which autocast leaves alone in float64."""
    weight = _weight(model)
    if weight.dtype is torch.float64 or not autocast_enabled(weight):
        return weight.dtype
    return torch.get_autocast_dtype(weight.device.type)


def _positions(model: "MemTransformerLM", S: int) -> list[Positions]:
    """What the scores of each layer take beside queries and keys, for the distances S - 1 ... 0."""
    project = (projected_positions, learned_positions)[model.attn_type]
    arguments = model._positions(S, _weight(model).device)
    positions = [project(layer.dec_attn, *x, S) for layer, x in zip(model.layers, arguments, strict=True)]
    # Rows of a head side by side, as in the buffer: time-major, a single query takes 1.7 times as long on a CPU core
    # (1600 keys, 16 heads x 64, float32), with only r time-major 1.4 times.
    return [x._replace(r=x.r.contiguous()) for x in positions]


def _state(parameter: Tensor) -> tuple[int, int]:
    """What changes where the parameter does: its storage, and how often PyTorch wrote to it."""
    return parameter.data_ptr(), -1 if parameter.is_inference() else parameter._version
