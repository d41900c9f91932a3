"""The attention layers of the original Transformer-XL on `rel_attention`: same parameters, same numbers.

Deviations from the original, of both layers:

- ``attn_mask=None`` means causal, with all of the memory visible; there it means no mask at all.
- A query that a mask hides everything from attends to nothing; there its output is NaN.
- Queries are projected for the segment only: ``qkv_net`` is called on the segment, and the memory goes
  through the rows of ``qkv_net.weight`` for keys and values. Hooks on ``qkv_net`` do not see the memory.

Masks are those of the original, True or non-zero = hidden: (T, S, 1), (T, S, B), or (S, B) for all queries alike. The
causal and the ``same_length`` mask are recognised, once per mask object, and not read again. Any other is read by
every layer. One that lets a query see its future gives what the original's rel-shift gives there, at the price of
position keys of twice the width, so that D may not exceed 128. Under torch.compile and CUDA graph capture a
tensor can't be read beforehand and is treated like that: give None for causal.

The ``same_length`` of the original needs no mask: ``window=(mem_len - 1, -1)`` says the same.

Legend: B batch, H heads, T segment length, M memory length, S = M + T, P rows of r, D head size, C width.
"""

import torch
from torch import Tensor, nn

from txl_kernels.layer_mask import visibility
from txl_kernels.layer_steps import (
    Positions,
    attend,
    learned_positions,
    project_keys,
    project_queries,
    projected_positions,
)
from txl_kernels.op import autocast_enabled
from txl_kernels.validation import MAX_HEAD_SIZE, check_window


class _RelMultiHeadAttn(nn.Module):
    """The parameters of both layers.

    Args:
        n_head: Number of heads H.
        d_model: Width C of the hidden states.
        d_head: Head size D, 1 to 256.
        dropout: Probability on the output of the last projection.
        dropatt: Probability on the attention probabilities, below 1.
        tgt_len: Accepted as in the original, not used.
        ext_len: Accepted as in the original, not used.
        mem_len: Accepted as in the original, not used.
        pre_lnorm: Normalise memory and segment before the projections instead of the sum after them.

    Raises:
        ValueError: d_head or dropatt is out of its range.
    """

    _projects_r = False

    def __init__(
        self,
        n_head: int,
        d_model: int,
        d_head: int,
        dropout: float,
        dropatt: float = 0.0,
        tgt_len: int | None = None,
        ext_len: int | None = None,
        mem_len: int | None = None,
        pre_lnorm: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= d_head <= MAX_HEAD_SIZE:
            raise ValueError(f"d_head: expected 1 to {MAX_HEAD_SIZE}, got {d_head}")
        if not 0 <= dropatt < 1:
            raise ValueError(f"dropatt: expected a probability below 1, got {dropatt}")
        self.n_head, self.d_model, self.d_head, self.pre_lnorm = n_head, d_model, d_head, pre_lnorm
        self.scale = d_head**-0.5
        # In the original's order: a seed gives its numbers, and its optimizer states count parameters alike.
        self.qkv_net = nn.Linear(d_model, 3 * n_head * d_head, bias=False)
        self.drop = nn.Dropout(dropout)
        self.dropatt = nn.Dropout(dropatt)
        self.o_net = nn.Linear(n_head * d_head, d_model, bias=False)
        self.layer_norm = nn.LayerNorm(d_model)
        if self._projects_r:
            self.r_net = nn.Linear(d_model, n_head * d_head, bias=False)


class RelPartialLearnableMultiHeadAttn(_RelMultiHeadAttn):
    """Transformer-XL attention with projections, residual and LayerNorm (Dai et al. 2019, arXiv 1901.02860).

    Stands in for the class of the same name in the original PyTorch code (``attn_type`` 0): its checkpoints load, and
    its models run with the class replaced, or only the class attribute ``forward``. The top of this module says
    what differs.
    """

    _projects_r = True

    def forward(
        self,
        w: Tensor,
        r: Tensor,
        r_w_bias: Tensor,
        r_r_bias: Tensor,
        attn_mask: Tensor | None = None,
        mems: Tensor | None = None,
        *,
        window: tuple[int, int] | None = None,
    ) -> Tensor:
        """Attends from the segment to memory and segment.

        Args:
            w: Hidden states of the segment, (T, B, C).
            r: Relative-position rows before projection, (P, 1, C) or (P, C) with P >= S; row p stands for the
                distance S - 1 - p, rows from S on are not used.
            r_w_bias: The paper's u, (H, D).
            r_r_bias: The paper's v, (H, D).
            attn_mask: None (causal), or (T, S, 1), (T, S, B) or (S, B), bool or uint8, True or 1 = hidden.
            mems: Memory (M, B, C), or None or a tensor of length 0 for M = 0.
            window: As in `rel_attention`; with the mask, both hide.

        Returns:
            Hidden states (T, B, C).

        Raises:
            ValueError: A shape does not fit, or r has fewer than S rows.
            TypeError: A dtype does not fit.
        """
        _check_tensors(w=w, r=r, r_w_bias=r_w_bias, r_r_bias=r_r_bias)
        _check_states(self, w, mems)
        C, S = w.shape[2], _kv_len(w, mems)
        if r.shape[1:] not in ((1, C), (C,)):
            raise ValueError(f"r: expected (P, 1, d_model) or (P, d_model), d_model = {C}, got {tuple(r.shape)}")
        if r.shape[0] < S:
            raise ValueError(f"r: expected P >= S = M + T = {S - w.shape[0]} + {w.shape[0]} rows, got {r.shape[0]}")
        check_dtype(self, "r", r)
        _check_bias(self, "r_w_bias", r_w_bias, w)
        _check_bias(self, "r_r_bias", r_r_bias, w)
        return _attend(self, w, mems, projected_positions(self, r, r_w_bias, r_r_bias, S), attn_mask, window)


class RelLearnableMultiHeadAttn(_RelMultiHeadAttn):
    """The same with a learned vector and a learned bias for every distance, in place of projected sinusoids.

    Stands in for the class of the same name in the original PyTorch code (``attn_type`` 1), as
    `RelPartialLearnableMultiHeadAttn` does for its own.
    """

    def forward(
        self,
        w: Tensor,
        r_emb: Tensor,
        r_w_bias: Tensor,
        r_bias: Tensor,
        attn_mask: Tensor | None = None,
        mems: Tensor | None = None,
        *,
        window: tuple[int, int] | None = None,
    ) -> Tensor:
        """Attends from the segment to memory and segment.

        Args:
            w: Hidden states of the segment, (T, B, C).
            r_emb: A vector for each distance, (P, H, D); the last row stands for distance 0, the one before for 1.
                Distances beyond the first row get that row.
            r_w_bias: The paper's u, (H, D).
            r_bias: A number for each distance, (P, H), as r_emb.
            attn_mask: None (causal), or (T, S, 1), (T, S, B) or (S, B), bool or uint8, True or 1 = hidden.
            mems: Memory (M, B, C), or None or a tensor of length 0 for M = 0.
            window: As in `rel_attention`; with the mask, both hide.

        Returns:
            Hidden states (T, B, C).

        Raises:
            ValueError: A shape does not fit.
            TypeError: A dtype does not fit.
        """
        _check_tensors(w=w, r_emb=r_emb, r_w_bias=r_w_bias, r_bias=r_bias)
        _check_states(self, w, mems)
        H, D, S = self.n_head, self.d_head, _kv_len(w, mems)
        if r_emb.shape[1:] != (H, D) or not r_emb.shape[0]:
            raise ValueError(f"r_emb: expected (P, H, D) = (P, {H}, {D}) with P >= 1, got {tuple(r_emb.shape)}")
        if r_bias.shape != (r_emb.shape[0], H):
            raise ValueError(f"r_bias: expected (P, H) = ({r_emb.shape[0]}, {H}) as r_emb, got {tuple(r_bias.shape)}")
        check_dtype(self, "r_emb", r_emb)
        _check_device("r_emb", r_emb, w)
        _check_bias(self, "r_w_bias", r_w_bias, w)
        return _attend(self, w, mems, learned_positions(self, r_emb, r_w_bias, r_bias, S), attn_mask, window)


# What follows, and layer_steps, are functions, not methods, and rely on the original's attributes only: each forward
# also serves as that of the original class.


def _attend(
    layer: nn.Module,
    w: Tensor,
    mems: Tensor | None,
    positions: Positions,
    attn_mask: Tensor | None,
    window: tuple[int, int] | None,
) -> Tensor:
    """From hidden states (T, B, C) to hidden states, projecting the memory."""
    check_window(window)
    (T, B, _), S = w.shape, _kv_len(w, mems)
    visible = visibility(attn_mask, T, S, B, reader=layer).within(window)
    q, kv = project_queries(layer, w)
    k, v = project_keys(layer, kv, mems)
    return attend(layer, w, q, k, v, positions, visible)


def _kv_len(w: Tensor, mems: Tensor | None) -> int:
    return w.shape[0] if mems is None else mems.shape[0] + w.shape[0]


def _check_tensors(**arguments: Tensor) -> None:
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")


def _check_states(layer: nn.Module, w: Tensor, mems: Tensor | None) -> None:
    C = layer.qkv_net.weight.shape[1]
    if w.ndim != 3 or w.shape[2] != C:
        raise ValueError(f"w: expected (T, B, d_model) with d_model = {C}, got {tuple(w.shape)}")
    check_dtype(layer, "w", w)
    if mems is None:
        return
    _check_tensors(mems=mems)
    if mems.shape[:1] != (0,):
        if mems.shape[1:] != w.shape[1:]:
            raise ValueError(f"mems: expected (M, B, d_model) = (M, {w.shape[1]}, {C}) as w, got {tuple(mems.shape)}")
        check_dtype(layer, "mems", mems)


def _check_bias(layer: nn.Module, name: str, bias: Tensor, w: Tensor) -> None:
    wanted = (layer.n_head, layer.d_head)
    if bias.shape != wanted:
        raise ValueError(f"{name}: expected (H, D) = {wanted}, got {tuple(bias.shape)}")
    if bias.dtype != torch.float32:  # which is added in float32 to whatever the parameters are
        check_dtype(layer, name, bias)
    _check_device(name, bias, w)


def _check_device(name: str, x: Tensor, w: Tensor) -> None:
    if x.device != w.device:
        raise ValueError(f"{name}: expected device {w.device} (as w), got {x.device}")


def check_dtype(layer: nn.Module, name: str, x: Tensor) -> None:
    """Raises TypeError unless x has the dtype of the parameters, or autocast will give it one."""
    dtype = layer.qkv_net.weight.dtype
    if x.dtype != dtype and not autocast_enabled(x):
        raise TypeError(f"{name}: expected dtype {dtype} (as the parameters), got {x.dtype}")
