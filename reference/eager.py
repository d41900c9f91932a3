"""The original Transformer-XL attention algorithm in eager PyTorch: the yardstick of speed and accuracy.

It is the algorithm of the paper's code (Dai et al. 2019, arXiv 1901.02860), neither slowed down nor improved:
AC and BD as einsums over every key and every row of r, the pad-and-view rel-shift, a triangle mask made
beforehand, softmax, and an einsum with the values. `rel_attention_original` lays scores out as the original,
(T, S, B, H). `rel_attention_eager` lays them out (B, H, T, S), as NVIDIA's version, which is faster, and takes
every form of r. In both, 16-bit scores are masked without a detour through float32, in favour of the reference.
"""

import functools
import math

import torch
from torch import Tensor


def rel_attention_eager(
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
    """Relative attention as the original computes it, in the dtype of the inputs.

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
        out (B, H, T, D), and with return_lse also lse (B, H, T) in float32 (float64 for float64 inputs).
    """
    (T, D), S = q.shape[2:], k.shape[2]
    scale = 1 / math.sqrt(D) if scale is None else scale
    r = _rows_for_shift(r, T, S, is_causal, S - 1 if first_distance is None else first_distance)

    q_content = q if content_bias is None else q + content_bias[:, None].to(q.dtype)
    q_position = q if position_bias is None else q + position_bias[:, None].to(q.dtype)
    ac = torch.einsum("bhid,bhjd->bhij", q_content, k)
    bd = _rel_shift(torch.einsum("bhid,hpd->bhip", q_position, r))
    score = ac + bd[..., :S]
    score.mul_(scale)
    if is_causal:
        score = score.masked_fill(_future_keys(T, S, q.device), float("-inf"))
    out = torch.einsum("bhij,bhjd->bhid", torch.softmax(score, dim=-1), v)
    if not return_lse:
        return out
    return out, torch.logsumexp(score if score.dtype == torch.float64 else score.float(), dim=-1)


def rel_attention_original(
    q: Tensor, k: Tensor, v: Tensor, r: Tensor, content_bias: Tensor, position_bias: Tensor
) -> Tensor:
    """Causal relative attention with scores (T, S, B, H): what the original model runs, on time-major tensors.

    Args:
        q: queries (B, H, T, D), views of (T, B, H, D).
        k: keys (B, H, S, D), views of (S, B, H, D).
        v: values, as k.
        r: relative-position keys (H, S, D) for distances S-1 ... 0, a view of (S, H, D).
        content_bias: the paper's u (H, D).
        position_bias: the paper's v (H, D).

    Returns:
        out (B, H, T, D), a view of (T, B, H, D).
    """
    q, k, v, r = (*(x.permute(2, 0, 1, 3) for x in (q, k, v)), r.transpose(0, 1))
    score = relative_scores(q, k, r, content_bias, position_bias, 1 / math.sqrt(q.shape[3]))
    score = score.masked_fill(_future_keys(len(q), len(k), q.device)[:, :, None, None], float("-inf"))
    return torch.einsum("ijbn,jbnd->ibnd", torch.softmax(score, dim=1), v).permute(1, 2, 0, 3)


def relative_scores(q: Tensor, k: Tensor, r: Tensor, u: Tensor, w: Tensor, scale: float) -> Tensor:
    """The original's scores (T, S, B, H) before masking, of q (T, B, H, D), k (S, B, H, D) and r (S, H, D)."""
    ac = torch.einsum("ibnd,jbnd->ijbn", q + u, k)
    bd = torch.einsum("ibnd,jnd->ijbn", q + w, r)
    T, S, *rest = bd.shape
    padded = torch.cat([bd.new_zeros(T, 1, *rest), bd], dim=1)
    score = ac + padded.view(S + 1, T, *rest)[1:].view_as(bd)
    return score.mul_(scale)


def _rel_shift(x: Tensor) -> Tensor:
    """Moves row i of x (B, H, T, N) left by T - 1 - i: pad a zero column, view, drop the first row."""
    B, H, T, N = x.shape
    padded = torch.cat([x.new_zeros(B, H, T, 1), x], dim=-1)
    return padded.view(B, H, N + 1, T)[:, :, 1:].view(B, H, T, N)


def _rows_for_shift(r: Tensor, T: int, S: int, is_causal: bool, first_distance: int) -> Tensor:
    """The rows of r for distances S-1 ... 0 (causal) or S-1 ... -(T-1), zero where r (H, P, D) has none."""
    rows = S if is_causal else S + T - 1
    missing = S - 1 - first_distance  # rows that r lacks in front; negative: rows to skip
    if missing == 0 and r.shape[1] == rows:
        return r
    front = min(max(missing, 0), rows)
    kept = r[:, max(-missing, 0) : max(rows - missing, 0)]
    return torch.nn.functional.pad(kept, (0, 0, front, rows - front - kept.shape[1]))


@functools.lru_cache(maxsize=4)
def _future_keys(T: int, S: int, device: torch.device) -> Tensor:
    """The mask (T, S), True = hidden; kept between calls, as the original shares one among its layers."""
    return torch.ones(T, S, dtype=torch.bool, device=device).triu(1 + S - T)
