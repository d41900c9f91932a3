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
    """Relative attention as the original computes it, in the dtype of the inputs, with every optional term.

    Args: as in `rel_attention_definition`, where each is explained; kept (B, H, T, S) is the dropout mask.

    Returns:
        out (B, H, T, D), and with return_lse also lse (B, H, T) in float32 (float64 for float64 inputs).
    """
    (H, T, D), S = q.shape[1:], k.shape[2]
    scale = 1 / math.sqrt(D) if scale is None else scale
    first_distance = S - 1 if first_distance is None else first_distance
    only_past = is_causal or wrap_future  # of distances that have a row
    if k.shape[1] != H:
        k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))

    q_content = q if content_bias is None else q + content_bias[:, None].to(q.dtype)
    score = torch.einsum("bhid,bhjd->bhij", q_content, k)
    if r is not None:
        r = _rows_for_shift(r, T, S, only_past, first_distance)
        q_position = q if position_bias is None else q + position_bias[:, None].to(q.dtype)
        bd = torch.einsum(
            "bhid,hpd->bhip" if r.ndim == 3 else "bhid,bhpd->bhip", q_position if q_pos is None else q_pos, r
        )
        score = score + rel_shift(bd)[..., :S]
    if r_bias is not None:
        rows = _rows_for_shift(r_bias[..., None].to(score.dtype), T, S, only_past, first_distance)[..., 0]
        score = score + rel_shift(rows[None, :, None].expand(1, H, T, -1))[..., :S]
    if segment is not None:
        scores, q_ids, k_ids = segment
        agree = (q_ids[:, :, None] == k_ids[:, None]).unsqueeze(1)
        score = score + torch.where(agree, *scores.to(score.dtype).split(1, dim=-1))
    score.mul_(scale)
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    if is_causal:
        score = score.masked_fill(future_keys(T, S, q.device), float("-inf"))
    if window is not None:
        score = score.masked_fill(_outside_window(T, S, window, q.device), float("-inf"))
    if key_lengths is not None:
        beyond = torch.arange(S, device=q.device) >= key_lengths[:, None]
        score = score.masked_fill(beyond[:, None, None], float("-inf"))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            score = score.masked_fill(~attn_mask, float("-inf"))
        else:
            score = score + attn_mask.to(score.dtype)
    dead = None
    if window is not None or key_lengths is not None or attn_mask is not None:  # queries without a visible key
        dead = (score == float("-inf")).all(-1, keepdim=True)
        score = score.masked_fill(dead, 0.0)
    p = torch.softmax(score, dim=-1)
    if dead is not None:
        p = p.masked_fill(dead, 0.0)
    if kept is not None:
        p = p * kept / (1 - dropout_p)
    out = torch.einsum("bhij,bhjd->bhid", p, v)
    if not return_lse:
        return out
    lse = torch.logsumexp(score if score.dtype == torch.float64 else score.float(), dim=-1)
    return out, lse if dead is None else lse.masked_fill(dead[..., 0], float("-inf"))


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
    ac = torch.einsum("ibnd,jbnd->ijbn", q + content_bias, k)
    bd = torch.einsum("ibnd,jnd->ijbn", q + position_bias, r)
    score = (ac + rel_shift_original(bd)).mul_(1 / math.sqrt(q.shape[3]))
    score = score.masked_fill(future_keys(len(q), len(k), q.device)[:, :, None, None], float("-inf"))
    return torch.einsum("ijbn,jbnd->ibnd", torch.softmax(score, dim=1), v).permute(1, 2, 0, 3)


def rel_shift_original(x: Tensor) -> Tensor:
    """The original's rel-shift of x (T, S, B, H); what comes to stand at a key of the future is of the next query."""
    T, S, *rest = x.shape
    padded = torch.cat([x.new_zeros(T, 1, *rest), x], dim=1)
    return padded.view(S + 1, T, *rest)[1:].view_as(x)


def rel_shift(x: Tensor) -> Tensor:
    """Moves row i of x (B, H, T, N) left by T - 1 - i: pad a zero column, view, drop the first row.

    What moves in from the right is a zero and then the next row, which `wrap_future` shows.
    """
    B, H, T, N = x.shape
    padded = torch.cat([x.new_zeros(B, H, T, 1), x], dim=-1)
    return padded.view(B, H, N + 1, T)[:, :, 1:].view(B, H, T, N)


def _rows_for_shift(r: Tensor, T: int, S: int, only_past: bool, first_distance: int) -> Tensor:
    """The rows of r (..., P, D) for distances S-1 ... 0 (only past) or S-1 ... -(T-1), zero where r has none."""
    rows = S if only_past else S + T - 1
    missing = S - 1 - first_distance  # rows that r lacks in front; negative: rows to skip
    if missing == 0 and r.shape[-2] == rows:
        return r
    front = min(max(missing, 0), rows)
    kept = r[..., max(-missing, 0) : max(rows - missing, 0), :]
    return torch.nn.functional.pad(kept, (0, 0, front, rows - front - kept.shape[-2]))


@functools.lru_cache(maxsize=4)
def future_keys(T: int, S: int, device: torch.device) -> Tensor:
    """The mask (T, S), True = hidden; kept between calls, as the original shares one among its layers."""
    return torch.ones(T, S, dtype=torch.bool, device=device).triu(1 + S - T)


def _outside_window(T: int, S: int, window: tuple[int, int], device: torch.device) -> Tensor:
    """The mask (T, S) of (left, right), True = hidden."""
    left, right = window
    distance = torch.arange(T, device=device)[:, None] + (S - T) - torch.arange(S, device=device)
    hidden = torch.zeros(T, S, dtype=torch.bool, device=device)
    if left >= 0:
        hidden |= distance > left
    if right >= 0:
        hidden |= -distance > right
    return hidden
