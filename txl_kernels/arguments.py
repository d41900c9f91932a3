"""The operator's arguments in two groups, as every backend receives them."""

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """The tensors of one call; the first ten, up to segment_scores, have gradients.

    Legend as in `rel_attention`: B batch, H heads (Hk of keys), T queries, S keys, P rows of r, D head size. In a
    shape, 1|B stands for a dimension of size 1 that serves all.

    Attributes:
        q: (B, H, T, D).
        k, v: (B, Hk, S, D).
        r: (1|B, 1|H, P, Dr) or None; Dr = D unless there is a q_pos.
        content_bias, position_bias: (H, D) or None.
        q_pos: (B, H, T, Dr) or None.
        r_bias: (H, P) or None.
        attn_mask: (1|B, 1|H, 1|T, 1|S), bool or float, or None.
        segment_scores: (B, H, T, 2) or None.
        segment_q_ids, segment_k_ids: (B, T) and (B, S), integers, or None.
        key_lengths: (B,), integers, or None.
        seed: of the dropout mask, a scalar of int64, or None for no dropout.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    r: Tensor | None = None
    content_bias: Tensor | None = None
    position_bias: Tensor | None = None
    q_pos: Tensor | None = None
    r_bias: Tensor | None = None
    attn_mask: Tensor | None = None
    segment_scores: Tensor | None = None
    segment_q_ids: Tensor | None = None
    segment_k_ids: Tensor | None = None
    key_lengths: Tensor | None = None
    seed: Tensor | None = None

    @property
    def rows(self) -> int:
        """P, the number of relative positions, 0 where nothing depends on them."""
        table = self.r_bias if self.r is None else self.r[..., 0]
        return 0 if table is None else table.shape[-1]

    @property
    def kernel_lse_dtype(self) -> torch.dtype:
        """What the Triton kernels keep the log-sum-exp in: an error of it scales a whole row of the backward's weights.

        float32 inputs deserve more than float32 has, and a row of low mask values (-1e9) would leave it no digits.
        """
        large = self.attn_mask is not None and self.attn_mask.is_floating_point()
        return torch.float64 if large or self.q.dtype is torch.float32 else torch.float32


DIFFERENTIABLE = Inputs._fields[:10]


class Options(NamedTuple):
    """The numbers of one call.

    Attributes:
        left, right: key j is visible to query i only if -right <= distance <= left; -1 = unlimited.
        scale: factor on the sum of all score terms.
        first_distance: the distance of row 0 of r and r_bias.
        softcap: bound on the scaled scores, or None.
        dropout_p: probability with which a normalised attention weight is dropped.
        wrap_future: as in `rel_attention`, which sets it for the torch backend alone, with S rows of r and no window.
    """

    left: int
    right: int
    scale: float
    first_distance: int
    softcap: float | None = None
    dropout_p: float = 0.0
    wrap_future: bool = False
