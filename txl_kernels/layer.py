"""The attention layer of the original Transformer-XL on `rel_attention`: same parameters, same numbers."""

import torch
from torch import Tensor, nn

from txl_kernels.causal_mask import require_causal
from txl_kernels.functional import rel_attention
from txl_kernels.op import autocast_enabled


class RelPartialLearnableMultiHeadAttn(nn.Module):
    """Transformer-XL attention with projections, residual and LayerNorm (Dai et al. 2019, arXiv 1901.02860).

    Stands in for the class of the same name in the original PyTorch code: its checkpoints load, and its
    models run with the class replaced, or only the class attribute ``forward``. Deviations:

    - ``attn_mask=None`` means causal, with all of the memory visible; there it means no mask at all.
    - A mask tensor must be the causal mask. It is verified once per object, not read again.
    - ``dropatt`` > 0 is not supported in training mode.
    - Queries are projected for the segment only: ``qkv_net`` is called on the segment, and the memory goes
      through the rows of ``qkv_net.weight`` for keys and values. Hooks on ``qkv_net`` do not see the memory.

    Legend: B batch, H heads, T segment length, M memory length, S = M + T, P rows of r, D head size, C width.

    Args:
        n_head: Number of heads H.
        d_model: Width C of the hidden states.
        d_head: Head size D, 1 to 256.
        dropout: Probability on the output of the last projection.
        dropatt: Probability on the attention probabilities.
        tgt_len: Accepted as in the original, not used.
        ext_len: Accepted as in the original, not used.
        mem_len: Accepted as in the original, not used.
        pre_lnorm: Normalise memory and segment before the projections instead of the sum after them.
    """

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
        self.n_head, self.d_model, self.d_head, self.pre_lnorm = n_head, d_model, d_head, pre_lnorm
        self.scale = d_head**-0.5
        # In the original's order: a seed gives its numbers, and its optimizer states count parameters alike.
        self.qkv_net = nn.Linear(d_model, 3 * n_head * d_head, bias=False)
        self.drop = nn.Dropout(dropout)
        self.dropatt = nn.Dropout(dropatt)
        self.o_net = nn.Linear(n_head * d_head, d_model, bias=False)
        self.layer_norm = nn.LayerNorm(d_model)
        self.r_net = nn.Linear(d_model, n_head * d_head, bias=False)

    def forward(
        self,
        w: Tensor,
        r: Tensor,
        r_w_bias: Tensor,
        r_r_bias: Tensor,
        attn_mask: Tensor | None = None,
        mems: Tensor | None = None,
    ) -> Tensor:
        """Attends from the segment to memory and segment.

        Args:
            w: Hidden states of the segment, (T, B, C).
            r: Relative-position rows before projection, (P, 1, C) or (P, C) with P >= S; row p stands for the
                distance S - 1 - p, rows from S on are not used.
            r_w_bias: The paper's u, (H, D).
            r_r_bias: The paper's v, (H, D).
            attn_mask: None (causal), or the causal mask (T, S, 1), bool or uint8, True or 1 = hidden.
            mems: Memory (M, B, C), or None or a tensor of length 0 for M = 0.

        Returns:
            Hidden states (T, B, C).

        Raises:
            ValueError: A shape does not fit, r has fewer than S rows, or attn_mask is not the causal mask.
            TypeError: A dtype does not fit.
            NotImplementedError: dropatt > 0 in training mode.
            RuntimeError: attn_mask is a tensor under torch.compile(fullgraph=True) or CUDA graph capture.
        """
        # Relies on the original's attributes only, to serve modules unpickled as the original class too.
        if self.dropatt.training and self.dropatt.p > 0:
            raise NotImplementedError(f"dropatt: expected 0 in training mode, got {self.dropatt.p}")
        M = 0 if mems is None else len(mems)
        _check_inputs(w, r, mems, M, self.qkv_net.weight)
        T, B, _ = w.shape
        if attn_mask is not None:
            require_causal(attn_mask, T, M + T)

        H, D = self.n_head, self.d_head
        segment = self.layer_norm(w) if self.pre_lnorm else w
        q, kv = self.qkv_net(segment).split([H * D, 2 * H * D], dim=-1)
        if M:
            memory = self.layer_norm(mems) if self.pre_lnorm else mems
            kv = torch.cat([nn.functional.linear(memory, self.qkv_net.weight[H * D :]), kv])
        q, k, v = (x.unflatten(-1, (H, D)).permute(1, 2, 0, 3) for x in (q, *kv.chunk(2, dim=-1)))
        r_heads = self.r_net(r).view(-1, H, D).transpose(0, 1)
        out = rel_attention(q, k, v, r_heads, r_w_bias, r_r_bias, scale=self.scale)

        out = w + self.drop(self.o_net(out.permute(2, 0, 1, 3).reshape(T, B, H * D)))
        return out if self.pre_lnorm else self.layer_norm(out)


def _check_inputs(w: Tensor, r: Tensor, mems: Tensor | None, M: int, weight: Tensor) -> None:
    C = weight.shape[1]
    if w.ndim != 3 or w.shape[2] != C:
        raise ValueError(f"w: expected (T, B, d_model) with d_model = {C}, got {tuple(w.shape)}")
    T, B, _ = w.shape
    if M and mems.shape[1:] != (B, C):
        raise ValueError(f"mems: expected (M, B, d_model) = (M, {B}, {C}) as w, got {tuple(mems.shape)}")
    if r.shape[1:] not in ((1, C), (C,)):
        raise ValueError(f"r: expected (P, 1, d_model) or (P, d_model), d_model = {C}, got {tuple(r.shape)}")
    if len(r) < M + T:
        raise ValueError(f"r: expected P >= S = M + T = {M} + {T} rows, got {len(r)}")
    if not autocast_enabled(w):
        for name, x in (("w", w), ("r", r), ("mems", mems if M else None)):
            if x is not None and x.dtype != weight.dtype:
                raise TypeError(f"{name}: expected dtype {weight.dtype} (as the parameters), got {x.dtype}")
