"""The public function: defaults, autocast and the choice of backend, then the registered operator."""

import importlib.util

import torch
from torch import Tensor

from txl_kernels import op
from txl_kernels.validation import check_backend, check_inputs

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def rel_attention(
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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Transformer-XL relative attention, fused: no T x S tensor is ever stored, forward or backward.

    Causal by default and aligned bottom-right, unlike ``scaled_dot_product_attention``: the queries are the
    last T of the S = M + T positions. Conformer and XLNet pass ``is_causal=False``. Extra rows of ``r`` are
    more negative distances; a table that starts farther away needs ``first_distance = P - 1``.

    With u = ``content_bias``, v' = ``position_bias``, and query i, key j::

        distance(i, j) = i + (S - T) - j
        p(i, j)        = first_distance - distance(i, j)
        score[i, j]    = scale * ((q_i + u) . k_j  +  (q_i + v') . r[p])
        out_i          = sum_j softmax_j(score[i, j]) v_j

    This is the attention of Dai et al. 2019, "Transformer-XL" (arXiv 1901.02860), section 3.3 and appendix B:
    (q + u) . k collects the terms (a) and (c), (q + v') . r the terms (b) and (d).

    Legend: B batch, H heads, T queries, M memory length, S = M + T keys, P rows of r, D head size (1 to 256).

    Args:
        q: Queries of the current segment, (B, H, T, D), float16, bfloat16, float32, or float64 (torch backend).
        k: Keys of memory and segment, (B, H, S, D) with S >= T, dtype and device of q.
        v: Values, as k.
        r: Projected relative-position keys, (H, P, D), dtype of q, in descending distance: row 0 holds
            ``first_distance``. Without an explicit ``first_distance`` it must reach all distances in use:
            P >= S rows when causal (distances S - 1 ... 0), P >= S + T - 1 when not (S - 1 ... -(T - 1)).
        content_bias: The paper's u (``r_w_bias``, ``pos_bias_u``), (H, D), or None for 0. Dtype of q or float32.
        position_bias: The paper's v (``r_r_bias``, ``pos_bias_v``), (H, D), or None for 0. Dtype of q or float32.
        is_causal: Hide keys with a negative distance (the query's future).
        scale: Multiplies both terms; default 1 / sqrt(D).
        first_distance: The distance that row 0 of r holds; default S - 1. Given explicitly, r may be a band: a
            pair whose row falls outside r gets a position term of 0 and stays visible.
        return_lse: Also return the row log-sum-exp.
        backend: None chooses "triton" for CUDA or HIP tensors of float16, bfloat16 or float32 where Triton is
            installed, else "torch", which takes any device and dtype. An explicit choice never falls back.

    Returns:
        ``out`` (B, H, T, D) in the dtype of q and dense in q's dimension order, so that a time-major caller
        reshapes it without a copy. With ``return_lse``, ``(out, lse)``: lse (B, H, T) is the natural-log
        log-sum-exp of the scores, float32 (float64 for float64 inputs), differentiable.

    All inputs have gradients, each in its own dtype. Any strides with a unit last stride (time-major views) are
    read in place; another last stride is copied. Results repeat bit for bit. Under ``torch.autocast`` q, k, v and
    r are cast to the autocast dtype, the biases are not. Second derivatives are not implemented.

    Raises:
        TypeError: A tensor, dtype, device or option is not of a kind listed above.
        ValueError: A shape does not fit, r has too few rows, or the backend cannot run these tensors.
    """
    if isinstance(q, Tensor) and op.autocast_enabled(q):
        q, k, v, r = (_autocast(x) for x in (q, k, v, r))
    check_inputs(q, k, v, r, content_bias, position_bias, is_causal, scale, first_distance)
    if backend is None:
        use_triton = _TRITON_INSTALLED and q.device.type == "cuda" and q.dtype in _TRITON_DTYPES
        backend = "triton" if use_triton else "torch"
    else:
        check_backend(backend, q, _TRITON_INSTALLED, _TRITON_DTYPES)
    out, lse = op.rel_attention(
        q,
        k,
        v,
        r,
        content_bias,
        position_bias,
        is_causal,
        q.shape[3] ** -0.5 if scale is None else float(scale),
        k.shape[2] - 1 if first_distance is None else first_distance,
        backend,
    )
    return (out, lse) if return_lse else out


def _autocast(x: Tensor) -> Tensor:
    """Casts as autocast does for PyTorch's own attention: floating point, but not float64."""
    if isinstance(x, Tensor) and x.is_floating_point() and x.dtype is not torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
