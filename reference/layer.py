"""The attention layer of the original Transformer-XL in eager PyTorch, time-major as the original."""

import math

import torch
from torch import Tensor, nn

from reference.eager import relative_scores


class RelPartialLearnableMultiHeadAttn(nn.Module):
    """Transformer-XL attention with projections, residual and LayerNorm (Dai et al. 2019, arXiv 1901.02860).

    Parameter names and numbers are those of the original class, so its checkpoints load. Scores keep the
    original's (T, S, B, H) order; unlike there, masked 16-bit scores do not pass through float32.

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
        self.n_head, self.d_head, self.pre_lnorm = n_head, d_head, pre_lnorm
        self.scale = 1 / math.sqrt(d_head)
        # In the original's order, so that a seed and an optimizer state mean the same here.
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
        T, B, _ = w.shape
        states = w if mems is None else torch.cat([mems, w])
        heads = self.qkv_net(self.layer_norm(states) if self.pre_lnorm else states)
        q, k, v = heads.view(len(states), B, 3, self.n_head, self.d_head).unbind(2)
        q = q[-T:]
        r_heads = self.r_net(r).view(len(r), self.n_head, self.d_head)

        score = relative_scores(q, k, r_heads, r_w_bias, r_r_bias, self.scale)
        if attn_mask is not None:
            hidden = attn_mask.bool()[None] if attn_mask.dim() == 2 else attn_mask.bool()
            score = score.masked_fill(hidden[..., None], float("-inf"))
        prob = self.dropatt(torch.softmax(score, dim=1))
        heads_out = torch.einsum("ijbn,jbnd->ibnd", prob, v).reshape(T, B, self.n_head * self.d_head)
        out = w + self.drop(self.o_net(heads_out))
        return out if self.pre_lnorm else self.layer_norm(out)
