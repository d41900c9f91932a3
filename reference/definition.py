"""Transformer-XL attention written index by index: what the operator means, for tiny sizes."""

import math

import torch
from torch import Tensor


def rel_attention_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor | None,
    content_bias: Tensor | None = None,
    position_bias: Tensor | None = None,
    *,
    is_causal: bool = True,
    window: tuple[int, int] | None = None,
    attn_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    kept: Tensor | None = None,
    scale: float | None = None,
    first_distance: int | None = None,
    q_pos: Tensor | None = None,
    r_bias: Tensor | None = None,
    segment: tuple[Tensor, Tensor, Tensor] | None = None,
    softcap: float | None = None,
    wrap_future: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Relative attention (Dai et al. 2019, arXiv 1901.02860) in plain loops and float64, differentiable.

    Args:
        q: queries (B, H, T, D), the last T of the S positions.
        k: keys (B, Hk, S, D); query head h reads key head h // (H / Hk).
        v: values, as k.
        r: relative-position keys (H, P, Dr), (1, P, Dr) or (B, H, P, Dr), or None; row p holds distance
            first_distance - p.
        content_bias: the paper's u (H, D), or None for zero.
        position_bias: the paper's v (H, D), or None for zero.
        is_causal: hide keys at a negative distance.
        window: (left, right), hide keys at a distance above left or below -right; -1 = unlimited.
        attn_mask: broadcastable to (B, H, T, S); bool, False = hidden, or float, added to the scores.
        key_lengths: (B,), hide the keys from key_lengths[b] on.
        dropout_p: probability of dropout.
        kept: (B, H, T, S) bool, the weights that survive dropout.
        scale: factor on all score terms; 1 / sqrt(D) by default.
        first_distance: distance of row 0 of r; S - 1 by default. A pair whose row is outside r stays visible.
        q_pos: (B, H, T, Dr), the position query in place of q + position_bias.
        r_bias: (H, P), added by row of r.
        segment: (scores (B, H, T, 2), q_ids (B, T), k_ids (B, S)); adds score 0 where the ids agree, else score 1.
        softcap: bound on the scaled scores.
        wrap_future: beyond distance -1, which has no position term, take that of query i + 1 with row -2 - distance.
        return_lse: also return the natural-log row log-sum-exp.

    Returns:
        out (B, H, T, D) in float64, and with return_lse also lse (B, H, T); 0 and -inf where every key is hidden.
    """
    (B, H, T, D), (Hk, S) = q.shape, k.shape[1:3]
    q, k, v = q.double(), k.double(), v.double()
    u = q.new_zeros(H, D) if content_bias is None else content_bias.double()
    w = q.new_zeros(H, D) if position_bias is None else position_bias.double()
    if r is not None:
        r = r.double().expand(B, H, *r.shape[-2:])
    P = r_bias.shape[1] if r is None else r.shape[2]
    mask = None if attn_mask is None else attn_mask.expand(B, H, T, S)
    left, right = (-1, -1) if window is None else window
    scale = 1 / math.sqrt(D) if scale is None else scale
    first_distance = S - 1 if first_distance is None else first_distance

    outs, lses = [], []
    for b, h, i in ((b, h, i) for b in range(B) for h in range(H) for i in range(T)):
        g, scores, values = h // (H // Hk), [], []
        for j in range(S):
            distance = i + (S - T) - j
            hidden = (
                (is_causal and distance < 0) or (left >= 0 and distance > left) or (right >= 0 and -distance > right)
            )
            if hidden or (key_lengths is not None and j >= key_lengths[b]):
                continue
            if mask is not None and mask[b, h, i, j] == (-math.inf if mask.is_floating_point() else 0):
                continue
            score = (q[b, h, i] + u[h]) @ k[b, g, j]
            p, asker = first_distance - distance, i
            if wrap_future and distance < -1:
                p, asker = -2 - distance, i + 1
            if 0 <= p < P:
                if r is not None:
                    query = q[b, h, asker] + w[h] if q_pos is None else q_pos[b, h, asker].double()
                    score = score + query @ r[b, h, p]
                if r_bias is not None:
                    score = score + r_bias[h, p].double()
            if segment is not None:
                segment_scores, q_ids, k_ids = segment
                score = score + segment_scores[b, h, i, int(q_ids[b, i] != k_ids[b, j])].double()
            score = scale * score
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            if mask is not None and mask.is_floating_point():
                score = score + mask[b, h, i, j].double()
            scores.append(score)
            weight = 1.0 if kept is None else float(kept[b, h, i, j]) / (1 - dropout_p)
            values.append(weight * v[b, g, j])
        lse = torch.logsumexp(torch.stack(scores), dim=0) if scores else q.new_tensor(-math.inf)
        terms = [torch.exp(score - lse) * value for score, value in zip(scores, values, strict=True)]
        outs.append(sum(terms, q.new_zeros(D)))
        lses.append(lse)
    out = torch.stack(outs).view(B, H, T, D)
    return (out, torch.stack(lses).view(B, H, T)) if return_lse else out
