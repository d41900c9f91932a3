"""The public function: defaults, autocast and the choice of backend, then the registered operator."""

import importlib.util

import torch
from torch import Tensor

from txl_kernels import op
from txl_kernels.validation import check_backend, check_inputs, check_unwrapped_width
from txl_kernels.wrap_future import unwrapped

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def rel_attention(
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
    scale: float | None = None,
    first_distance: int | None = None,
    q_pos: Tensor | None = None,
    r_bias: Tensor | None = None,
    segment: tuple[Tensor, Tensor, Tensor] | None = None,
    softcap: float | None = None,
    wrap_future: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Transformer-XL relative attention, fused: nothing that grows with T x S is stored, forward or backward.

    Causal by default and aligned bottom-right, unlike ``scaled_dot_product_attention``: the queries are the
    last T of the S = M + T positions. Conformer and XLNet pass ``is_causal=False``. Extra rows of ``r`` are
    more negative distances; a table that starts farther away needs ``first_distance = P - 1``.

    With u = ``content_bias``, v' = ``position_bias``, and query i, key j::

        distance(i, j) = i + (S - T) - j
        p(i, j)        = first_distance - distance(i, j)
        score[i, j]    = scale * ((q_i + u) . k_j  +  (q_i + v') . r[p]  +  r_bias[p]  +  segment[i, j])
        score[i, j]    = softcap * tanh(score[i, j] / softcap)  +  attn_mask[i, j],  -inf where hidden
        out_i          = sum_j dropout(softmax_j(score[i, j])) v_j

    This is the attention of Dai et al. 2019, "Transformer-XL" (arXiv 1901.02860), section 3.3 and appendix B:
    (q + u) . k collects the terms (a) and (c), (q + v') . r the terms (b) and (d). The segment term is that of
    XLNet (Yang et al. 2019, arXiv 1906.08237, section 2.5); ``r_bias`` alone is the bias of T5 (Raffel et al. 2020,
    arXiv 1910.10683, section 2.1; scale = 1).

    Legend: B batch, H heads, T queries, M memory length, S = M + T keys, P rows of r, D head size (1 to 256).

    Args:
        q: Queries of the current segment, (B, H, T, D), float16, bfloat16, float32, or float64 (torch backend).
        k: Keys of memory and segment, (B, Hk, S, D) with S >= T, dtype and device of q. Hk divides H: query head h
            reads key head h // (H / Hk).
        v: Values, as k.
        r: Projected relative-position keys, (H, P, D), or (1, P, D) shared by all heads, or (B, H, P, D); dtype of
            q, in descending distance: row 0 holds ``first_distance``. Without an explicit ``first_distance`` it must
            reach all distances in use: P >= S rows when causal (distances S - 1 ... 0), P >= S + T - 1 when not
            (S - 1 ... -(T - 1)). None for no such term; then ``r_bias`` is needed.
        content_bias: The paper's u (``r_w_bias``, ``pos_bias_u``), (H, D), or None for 0. Dtype of q or float32.
        position_bias: The paper's v (``r_r_bias``, ``pos_bias_v``), (H, D), or None for 0. Dtype of q or float32.
        is_causal: Hide keys with a negative distance (the query's future). All conditions that hide are ANDed.
        window: (left, right): key j is visible only if -right <= distance <= left; -1 is unlimited. Causal attention
            bounds right at 0. The original's ``same_length`` is left = mem_len - 1. Costs in proportion to the window.
        attn_mask: Broadcastable to (B, H, T, S), read with its own strides, never expanded. Bool: True = may
            attend. Float (dtype of q or float32): added to the score; -inf hides, a finite value does not.
        key_lengths: (B,) integers: keys from key_lengths[b] on are hidden, counted from key 0, memory included. They
            are not read, and tiles of them are skipped. Left padding needs attn_mask (B, 1, 1, S). Values must be in
            [0, S]: checked on a CPU, clamped on a GPU.
        dropout_p: Probability in [0, 1) with which a normalised weight is dropped; the others are divided by
            1 - dropout_p. The mask follows from a seed drawn from PyTorch's generator of the device of q, and is
            made again in the backward.
        scale: Multiplies all terms; default 1 / sqrt(D).
        first_distance: The distance that row 0 of r (and r_bias) holds; default S - 1. Given explicitly, r may be a
            band: a pair whose row falls outside r gets a position term of 0 and stays visible.
        q_pos: (B, H, T, Dr): the position query in place of q + position_bias, with a width of its own, that of r.
        r_bias: (H, P), added to the position term by row of r. Dtype of q or float32.
        segment: (scores (B, H, T, 2), q_ids (B, T), k_ids (B, S)): adds scores[..., 0] where the integer ids of
            query and key agree, else scores[..., 1]. Scores in the dtype of q or float32.
        softcap: Bounds the scores to (-softcap, softcap), before masks.
        wrap_future: The rel-shift of the original code and of ESPnet's legacy attention, which pads a column of zeros
            and reads on from row to row. With ``is_causal=False`` and P = S rows of r, the next key (distance -1) has
            no position term and one farther ahead that of the next query, (q_{i+1} + v') . r[-2 - distance], with
            r_bias likewise. Not with first_distance. On Triton and with a window r gets twice the width (Dr at most
            128), and what is not finite in a query reaches the one before it.
        return_lse: Also return the row log-sum-exp.
        backend: None chooses "triton" for CUDA or HIP tensors of float16, bfloat16 or float32 where Triton is
            installed, else "torch", which takes any device and dtype. An explicit choice never falls back.

    Returns:
        ``out`` (B, H, T, D) in the dtype of q and dense in q's dimension order, so that a time-major caller
        reshapes it without a copy. With ``return_lse``, ``(out, lse)``: lse (B, H, T) is the natural-log
        log-sum-exp of the scores, masks applied, before dropout; float32 (float64 for float64 inputs),
        differentiable. A query without a visible key gets out 0, lse -inf and no gradient.

    All inputs but ids and lengths have gradients, each in its own dtype, summed over what it is broadcast along. Any
    strides with a unit last stride (time-major views) are read in place; another last stride is copied. Nothing that
    grows with T x S or T x P is stored, unless the caller passes a mask of that size. Of bounded size are the workspace
    of the Triton backward, 64 MiB while it runs, and the softmax weights that the torch backend keeps for the backward
    where gradients are recorded, at most 31 MiB a call. Results repeat bit for bit. Under ``torch.autocast`` q, k, v,
    r, q_pos are cast to the autocast dtype; biases, masks and segment scores stay in float32 where they have it.
    Second derivatives are not implemented.

    Raises:
        TypeError: A tensor, dtype, device or option is not of a kind listed above.
        ValueError: A shape does not fit, r has too few rows, arguments exclude each other, or the backend cannot
            run these tensors.
    """
    if isinstance(q, Tensor) and op.autocast_enabled(q):
        q, k, v, r, q_pos = map(_autocast, (q, k, v, r, q_pos))
        content_bias, position_bias, r_bias, attn_mask = map(
            _autocast_half, (content_bias, position_bias, r_bias, attn_mask)
        )
        if isinstance(segment, (tuple, list)):
            segment = (*map(_autocast_half, segment),)
    check_inputs(
        q, k, v, r, content_bias, position_bias, is_causal, window, attn_mask, key_lengths, dropout_p, scale,
        first_distance, q_pos, r_bias, segment, softcap, wrap_future,
    )  # fmt: skip
    if backend is None:
        use_triton = _TRITON_INSTALLED and q.device.type == "cuda" and q.dtype in _TRITON_DTYPES
        backend = "triton" if use_triton else "torch"
    else:
        check_backend(backend, q, _TRITON_INSTALLED, _TRITON_DTYPES)
    left, right = (-1, -1) if window is None else window
    if wrap_future and (backend != "torch" or max(left, right) >= 0):
        check_unwrapped_width(r)
        q_pos, r, r_bias = unwrapped(q, r, position_bias, q_pos, r_bias)
        position_bias, wrap_future = None, False
    # Drawn on the device and never read on the host, which would keep a GPU waiting and break graph capture.
    seed = torch.randint(2**62, (), device=q.device) if dropout_p else None
    out, lse = op.rel_attention(
        *(q, k, v, r, content_bias, position_bias, q_pos, r_bias, attn_mask),
        *((None, None, None) if segment is None else segment),
        key_lengths,
        seed,
        left,
        0 if is_causal else right,
        q.shape[3] ** -0.5 if scale is None else float(scale),
        k.shape[2] - 1 if first_distance is None else first_distance,
        None if softcap is None else float(softcap),
        float(dropout_p),
        wrap_future,
        backend,
    )
    return (out, lse if q.dtype is torch.float64 else lse.float()) if return_lse else out


def _autocast(x: Tensor | None) -> Tensor | None:
    """Casts as autocast does for PyTorch's own attention: floating point, but not float64."""
    if isinstance(x, Tensor) and x.is_floating_point() and x.dtype is not torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def _autocast_half(x: Tensor | None) -> Tensor | None:
    """As _autocast, for what may stay in float32."""
    return x if isinstance(x, Tensor) and x.dtype is torch.float32 else _autocast(x)
