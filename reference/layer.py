"""The attention layers of the original Transformer-XL in eager PyTorch, time-major as the original.

Parameter names and numbers are those of the original classes, so its checkpoints load. Scores keep the original's
(T, S, B, H) order; unlike there, masked 16-bit scores do not pass through float32.
"""

import math

import torch
from torch import Tensor, nn

from reference.eager import rel_shift_original


class _RelMultiHeadAttn(nn.Module):
    """What both layers share (Dai et al. 2019, arXiv 1901.02860).

    Args:
        n_head: number of heads H.
        d_model: width C of the hidden states.
        d_head: head size D.
        dropout: probability on the output of the last projection.
        dropatt: probability on the attention probabilities.
        tgt_len: accepted as in the original, not used.
        ext_len: accepted as in the original, not used.
        mem_len: accepted as in the original, not used.
        pre_lnorm: normalise memory and input before the projections instead of the sum after them.
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
        self.scale = 1 / math.sqrt(d_head)
        # In the original's order, so that a seed and an optimizer state mean the same here.
        self.qkv_net = nn.Linear(d_model, 3 * n_head * d_head, bias=False)
        self.drop = nn.Dropout(dropout)
        self.dropatt = nn.Dropout(dropatt)
        self.o_net = nn.Linear(n_head * d_head, d_model, bias=False)
        self.layer_norm = nn.LayerNorm(d_model)

    def _heads(self, w: Tensor, mems: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q (T, B, H, D), k and v (S, B, H, D) of hidden states w (T, B, C) and memory (M, B, C)."""
        T, B, _ = w.shape
        states = w if mems is None else torch.cat([mems, w])
        heads = self.qkv_net(self.layer_norm(states) if self.pre_lnorm else states)
        q, k, v = heads.view(len(states), B, 3, self.n_head, self.d_head).unbind(2)
        return q[-T:], k, v

    def _output(self, w: Tensor, score: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
        """Hidden states (T, B, C) of unscaled scores (T, S, B, H)."""
        score = score.mul_(self.scale)
        if attn_mask is not None:
            hidden = attn_mask.bool()[None] if attn_mask.dim() == 2 else attn_mask.bool()
            score = score.masked_fill(hidden[..., None], float("-inf"))
        prob = self.dropatt(torch.softmax(score, dim=1))
        heads_out = torch.einsum("ijbn,jbnd->ibnd", prob, v).reshape(*w.shape[:2], self.n_head * self.d_head)
        out = w + self.drop(self.o_net(heads_out))
        return out if self.pre_lnorm else self.layer_norm(out)


class RelPartialLearnableMultiHeadAttn(_RelMultiHeadAttn):
    """Attention with sinusoid rows, projected (the original's attn_type 0)."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.r_net = nn.Linear(self.d_model, self.n_head * self.d_head, bias=False)

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
            w: hidden states of the segment (T, B, C).
            r: sinusoid rows (S, 1, C), for distances S-1 ... 0.
            r_w_bias: the paper's u (H, D).
            r_r_bias: the paper's v (H, D).
            attn_mask: True or 1 = hidden; (T, S, 1), (T, S, B) or, for all queries alike, (S, B). None hides
                nothing: the causal mask is the caller's.
            mems: memory (M, B, C), or None for M = 0.

        Returns:
            Hidden states (T, B, C).
        """
        q, k, v = self._heads(w, mems)
        r_heads = self.r_net(r).view(len(r), self.n_head, self.d_head)
        ac = torch.einsum("ibnd,jbnd->ijbn", q + r_w_bias, k)
        bd = torch.einsum("ibnd,jnd->ijbn", q + r_r_bias, r_heads)
        return self._output(w, ac + rel_shift_original(bd), v, attn_mask)


class RelLearnableMultiHeadAttn(_RelMultiHeadAttn):
    """Attention with a learned vector and bias for each distance (the original's attn_type 1)."""

    def forward(
        self,
        w: Tensor,
        r_emb: Tensor,
        r_w_bias: Tensor,
        r_bias: Tensor,
        attn_mask: Tensor | None = None,
        mems: Tensor | None = None,
    ) -> Tensor:
        """Attends from the segment to memory and segment.

        Args:
            w: hidden states of the segment (T, B, C).
            r_emb: vectors (R, H, D) for distances R-1 ... 0; row 0 serves farther ones too.
            r_w_bias: the paper's u (H, D).
            r_bias: biases (R, H), as r_emb.
            attn_mask: as in RelPartialLearnableMultiHeadAttn.
            mems: memory (M, B, C), or None for M = 0.

        Returns:
            Hidden states (T, B, C).
        """
        q, k, v = self._heads(w, mems)
        S = len(k)
        if len(r_emb) < S:
            r_emb = torch.cat([r_emb[:1].expand(S - len(r_emb), -1, -1), r_emb])
            r_bias = torch.cat([r_bias[:1].expand(S - len(r_bias), -1), r_bias])
        else:
            r_emb, r_bias = r_emb[-S:], r_bias[-S:]
        ac = torch.einsum("ibnd,jbnd->ijbn", q + r_w_bias, k)
        bd = torch.einsum("ibnd,jnd->ijbn", q, r_emb) + r_bias[None, :, None]
        return self._output(w, ac + rel_shift_original(bd), v, attn_mask)
