"""Transformer-XL attention written index by index: what the operator means, for tiny sizes."""

import math

import torch
from torch import Tensor


def rel_attention_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    content_bias: Tensor | None = None,
    position_bias: Tensor | None = None,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    first_distance: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Relative attention (Dai et al. 2019, arXiv 1901.02860) in plain loops and float64, differentiable.

    Args:
        q: queries (B, H, T, D), the last T of the S positions.
        k: keys (B, H, S, D).
        v: values (B, H, S, D).
        r: relative-position keys (H, P, D); row p holds distance first_distance - p.
        content_bias: the paper's u (H, D), or None for zero.
        position_bias: the paper's v (H, D), or None for zero.
        is_causal: hide keys at a negative distance.
        scale: factor on both score terms; 1 / sqrt(D) by default.
        first_distance: distance of row 0 of r; S - 1 by default. A pair whose row is outside r stays visible.
        return_lse: also return the natural-log row log-sum-exp.

    Returns:
        out (B, H, T, D) in float64, and with return_lse also lse (B, H, T).
    """
    q, k, v, r = q.double(), k.double(), v.double(), r.double()
    (B, H, T, D), S, P = q.shape, k.shape[2], r.shape[1]
    u = q.new_zeros(H, D) if content_bias is None else content_bias.double()
    w = q.new_zeros(H, D) if position_bias is None else position_bias.double()
    scale = 1 / math.sqrt(D) if scale is None else scale
    first_distance = S - 1 if first_distance is None else first_distance

    outs, lses = [], []
    for b, h, i in ((b, h, i) for b in range(B) for h in range(H) for i in range(T)):
        scores, values = [], []
        for j in range(S):
            distance = i + (S - T) - j
            if is_causal and distance < 0:
                continue
            score = (q[b, h, i] + u[h]) @ k[b, h, j]
            if 0 <= (p := first_distance - distance) < P:
                score = score + (q[b, h, i] + w[h]) @ r[h, p]
            scores.append(scale * score)
            values.append(v[b, h, j])
        lse = torch.logsumexp(torch.stack(scores), dim=0)
        outs.append(sum(torch.exp(score - lse) * value for score, value in zip(scores, values, strict=True)))
        lses.append(lse)
    out = torch.stack(outs).view(B, H, T, D)
    return (out, torch.stack(lses).view(B, H, T)) if return_lse else out
