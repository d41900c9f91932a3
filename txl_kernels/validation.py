"""Checks of the public arguments. Every message names the argument, what was wanted and what came."""

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_HEAD_SIZE = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    content_bias: Tensor | None,
    position_bias: Tensor | None,
    is_causal: bool,
    scale: float | None,
    first_distance: int | None,
) -> None:
    """Raises TypeError or ValueError unless the arguments fit the contract of `rel_attention`."""
    _check_tensor("q", q, 4, "(B, H, T, D)")
    if q.dtype not in _DTYPES:
        raise TypeError(f"q: expected dtype float16, bfloat16, float32 or float64, got {q.dtype}")
    batch, heads, q_len, head_size = q.shape
    if not 1 <= head_size <= MAX_HEAD_SIZE:
        raise ValueError(f"q: expected a head size D from 1 to {MAX_HEAD_SIZE}, got {head_size}")

    _check_tensor("k", k, 4, "(B, H, S, D)")
    _check_like_q("k", k, q)
    kv_len = k.shape[2]
    if kv_len < q_len:
        raise ValueError(f"k: expected S >= T keys (memory and segment), got S = {kv_len} for T = {q_len} queries")
    _check_shape("k", k, (batch, heads, kv_len, head_size), "(B, H, S, D)")
    _check_tensor("v", v, 4, "(B, H, S, D)")
    _check_like_q("v", v, q)
    _check_shape("v", v, (batch, heads, kv_len, head_size), "(B, H, S, D)")

    _check_tensor("r", r, 3, "(H, P, D)")
    _check_like_q("r", r, q)
    rows = r.shape[1]
    _check_shape("r", r, (heads, rows, head_size), "(H, P, D)")

    for name, bias in (("content_bias", content_bias), ("position_bias", position_bias)):
        if bias is not None:
            _check_tensor(name, bias, 2, "(H, D)")
            if bias.dtype != q.dtype and bias.dtype != torch.float32:
                raise TypeError(f"{name}: expected dtype {q.dtype} (as q) or torch.float32, got {bias.dtype}")
            if bias.device != q.device:
                raise ValueError(f"{name}: expected device {q.device} (as q), got {bias.device}")
            _check_shape(name, bias, (heads, head_size), "(H, D)")

    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal: expected a bool, got {type(is_causal).__name__}")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat))):
        raise TypeError(f"scale: expected a float or None, got {type(scale).__name__}")
    if first_distance is None:
        wanted = kv_len if is_causal else kv_len + q_len - 1
        if q_len and rows < wanted:
            form = "S" if is_causal else "S + T - 1"
            raise ValueError(
                f"r: expected at least P = {form} = {wanted} rows for T = {q_len}, S = {kv_len}, "
                f"is_causal={is_causal}, got {rows}; a band of distances needs first_distance"
            )
    elif isinstance(first_distance, bool) or not isinstance(first_distance, (int, torch.SymInt)):
        raise TypeError(f"first_distance: expected an int or None, got {type(first_distance).__name__}")


def check_backend(backend: str, q: Tensor, triton_installed: bool, triton_dtypes: Sequence[torch.dtype]) -> None:
    """Raises unless the explicitly chosen backend can run tensors like q: a choice never falls back."""
    if backend not in ("triton", "torch"):
        raise ValueError(f"backend: expected None, 'triton' or 'torch', got {backend!r}")
    if backend == "torch":
        return
    if not triton_installed:
        raise ValueError("backend: 'triton' was asked for, but the triton package is not installed")
    if q.dtype not in triton_dtypes:
        raise TypeError(f"backend: 'triton' takes float16, bfloat16 and float32, got {q.dtype}; use backend='torch'")
    if q.device.type != "cuda":
        from txl_kernels.triton_backend import INTERPRETED

        if not (INTERPRETED and q.device.type == "cpu"):
            raise ValueError(
                f"backend: 'triton' takes CUDA or HIP tensors (CPU tensors only with TRITON_INTERPRET=1), "
                f"got device {q.device}"
            )


def _check_tensor(name: str, x: Tensor, ndim: int, legend: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor {legend}, got {type(x).__name__}")
    if x.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions {legend}, got shape {tuple(x.shape)}")


def _check_like_q(name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype != q.dtype:
        raise TypeError(f"{name}: expected dtype {q.dtype} (as q), got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name}: expected device {q.device} (as q), got {x.device}")


def _check_shape(name: str, x: Tensor, wanted: tuple[int, ...], legend: str) -> None:
    if tuple(x.shape) != wanted:
        raise ValueError(f"{name}: expected shape {legend} = {wanted}, got {tuple(x.shape)}")
