"""Checks of the public arguments. Every message names the argument, what was wanted and what came."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_HEAD_SIZE = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor | None,
    content_bias: Tensor | None,
    position_bias: Tensor | None,
    is_causal: bool,
    window: tuple[int, int] | None,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    dropout_p: float,
    scale: float | None,
    first_distance: int | None,
    q_pos: Tensor | None,
    r_bias: Tensor | None,
    segment: tuple[Tensor, Tensor, Tensor] | None,
    softcap: float | None,
    wrap_future: bool,
) -> None:
    """Raises TypeError or ValueError unless the arguments fit the contract of `rel_attention`."""
    _check_tensor("q", q, 4, "(B, H, T, D)")
    if q.dtype not in _DTYPES:
        raise TypeError(f"q: expected dtype float16, bfloat16, float32 or float64, got {q.dtype}")
    batch, heads, q_len, head_size = q.shape
    if not 1 <= head_size <= MAX_HEAD_SIZE:
        raise ValueError(f"q: expected a head size D from 1 to {MAX_HEAD_SIZE}, got {head_size}")

    _check_like_q("k", k, q, 4, "(B, Hk, S, D)")
    kv_heads, kv_len = k.shape[1:3]
    if kv_len < q_len:
        raise ValueError(f"k: expected S >= T keys (memory and segment), got S = {kv_len} for T = {q_len} queries")
    if kv_heads != heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"k: expected a number of heads Hk that divides H = {heads}, got {kv_heads}")
    _check_shape("k", k, (batch, kv_heads, kv_len, head_size), "(B, Hk, S, D)")
    _check_like_q("v", v, q, 4, "(B, Hk, S, D)")
    _check_shape("v", v, (batch, kv_heads, kv_len, head_size), "(B, Hk, S, D)")

    for name, bias in (("content_bias", content_bias), ("position_bias", position_bias)):
        if bias is not None:
            _check_small(name, bias, q, (heads, head_size), "(H, D)")
    _check_positions(q, r, position_bias, q_pos, r_bias)
    _check_visibility(q, kv_len, is_causal, window, attn_mask, key_lengths)
    if segment is not None:
        _check_segment(segment, q, kv_len)
    _check_number("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")
    if scale is not None:
        _check_finite("scale", scale)
    if softcap is not None:
        _check_finite("softcap", softcap)
        if not softcap > 0:
            raise ValueError(f"softcap: expected a positive number or None, got {softcap}")
    _check_bool("wrap_future", wrap_future)
    table, name = (r, "r") if r is not None else (r_bias, "r_bias")
    rows = table.shape[-1] if r is None else table.shape[-2]
    if wrap_future:
        if is_causal:
            raise ValueError("wrap_future: expected False with is_causal=True, which hides the future, got True")
        if first_distance is not None:
            raise ValueError(f"first_distance: expected None with wrap_future, got {first_distance}")
        if rows != kv_len:
            raise ValueError(f"{name}: expected P = S = {kv_len} rows with wrap_future, got {rows}")
    elif first_distance is None:
        wanted = kv_len if is_causal else kv_len + q_len - 1
        if q_len and rows < wanted:
            form = "S" if is_causal else "S + T - 1"
            raise ValueError(
                f"{name}: expected at least P = {form} = {wanted} rows for T = {q_len}, S = {kv_len}, "
                f"is_causal={is_causal}, got {rows}; a band of distances needs first_distance"
            )
    else:
        _check_int("first_distance", first_distance)


def check_window(window: tuple[int, int] | None) -> None:
    """Raises TypeError or ValueError unless it is (left, right) as in `rel_attention`, or None."""
    if window is None:
        return
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window: expected (left, right) or None, got {window!r}")
    for side, size in zip(("left", "right"), window, strict=True):
        _check_int(f"window: {side}", size)
        if size < -1:
            raise ValueError(f"window: expected {side} >= 0, or -1 for unlimited, got {size}")


def check_unwrapped_width(r: Tensor | None) -> None:
    """Raises where `wrap_future` cannot be had by an r of twice the width."""
    if r is not None and r.shape[-1] > MAX_HEAD_SIZE // 2:
        raise ValueError(
            f"wrap_future: on Triton or with a window, expected r of a width of at most {MAX_HEAD_SIZE // 2}, "
            f"got {r.shape[-1]}"
        )


def _check_positions(
    q: Tensor, r: Tensor | None, position_bias: Tensor | None, q_pos: Tensor | None, r_bias: Tensor | None
) -> None:
    batch, heads, q_len, head_size = q.shape
    if q_pos is not None:
        if position_bias is not None:
            raise ValueError("position_bias: expected None with q_pos, which replaces q + position_bias")
        _check_like_q("q_pos", q_pos, q, 4, "(B, H, T, Dr)")
        _check_shape("q_pos", q_pos, (batch, heads, q_len, q_pos.shape[3]), "(B, H, T, Dr)")
        if not 1 <= q_pos.shape[3] <= MAX_HEAD_SIZE:
            raise ValueError(f"q_pos: expected a width Dr from 1 to {MAX_HEAD_SIZE}, got {q_pos.shape[3]}")
    if r is None:
        if r_bias is None:
            raise ValueError("r: expected a tensor, or r_bias in its place, got None for both")
        for name, x in (("position_bias", position_bias), ("q_pos", q_pos)):
            if x is not None:
                raise ValueError(f"{name}: expected None without r, got a tensor")
    else:
        if isinstance(r, Tensor) and r.ndim == 4:
            legend, lead = "(B, H, P, Dr)", (batch, heads)
        else:
            legend, lead = "(H, P, Dr) or (1, P, Dr)", (heads,)
        _check_like_q("r", r, q, len(lead) + 1 + 1, legend)
        width = head_size if q_pos is None else q_pos.shape[3]
        if r.ndim == 3 and r.shape[0] == 1:
            lead = (1,)
        wanted_by = " with Dr as in q_pos" if q_pos is not None else ""
        _check_shape("r", r, (*lead, r.shape[-2], width), legend + wanted_by)
    if r_bias is not None:
        _check_tensor("r_bias", r_bias, 2, "(H, P)")
        rows = r_bias.shape[1] if r is None else r.shape[-2]
        _check_small("r_bias", r_bias, q, (heads, rows), "(H, P)")


def _check_visibility(
    q: Tensor,
    kv_len: int,
    is_causal: bool,
    window: tuple[int, int] | None,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
) -> None:
    batch, heads, q_len, _ = q.shape
    _check_bool("is_causal", is_causal)
    check_window(window)
    if attn_mask is not None:
        if not isinstance(attn_mask, Tensor):
            raise TypeError(f"attn_mask: expected a tensor or None, got {type(attn_mask).__name__}")
        if attn_mask.dtype not in (torch.bool, torch.float32, q.dtype):
            raise TypeError(f"attn_mask: expected dtype bool, {q.dtype} (as q) or float32, got {attn_mask.dtype}")
        _check_device("attn_mask", attn_mask, q)
        shape, full = tuple(attn_mask.shape), (batch, heads, q_len, kv_len)
        if len(shape) > 4 or any(a not in (1, b) for a, b in zip(shape[::-1], full[::-1], strict=False)):
            raise ValueError(f"attn_mask: expected a shape that broadcasts to (B, H, T, S) = {full}, got {shape}")
    if key_lengths is not None:
        _check_integers("key_lengths", key_lengths, q, (batch,), "(B,)")
        if key_lengths.device.type == "cpu" and batch and has_values(key_lengths):
            low, high = key_lengths.aminmax()
            if low < 0 or high > kv_len:
                raise ValueError(
                    f"key_lengths: expected values from 0 to S = {kv_len} (memory included), "
                    f"got {int(low)} to {int(high)}"
                )


def _check_segment(segment: tuple[Tensor, Tensor, Tensor], q: Tensor, kv_len: int) -> None:
    if not isinstance(segment, (tuple, list)) or len(segment) != 3:
        raise TypeError(f"segment: expected (scores, q_ids, k_ids) or None, got {type(segment).__name__}")
    batch, heads, q_len, _ = q.shape
    scores, q_ids, k_ids = segment
    _check_tensor("segment: scores", scores, 4, "(B, H, T, 2)")
    _check_small("segment: scores", scores, q, (batch, heads, q_len, 2), "(B, H, T, 2)")
    _check_integers("segment: q_ids", q_ids, q, (batch, q_len), "(B, T)")
    _check_integers("segment: k_ids", k_ids, q, (batch, kv_len), "(B, S)")


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


def _check_like_q(name: str, x: Tensor, q: Tensor, ndim: int, legend: str) -> None:
    _check_tensor(name, x, ndim, legend)
    if x.dtype != q.dtype:
        raise TypeError(f"{name}: expected dtype {q.dtype} (as q), got {x.dtype}")
    _check_device(name, x, q)


def _check_small(name: str, x: Tensor, q: Tensor, shape: tuple[int, ...], legend: str) -> None:
    """What is added in float32 may also come in float32."""
    _check_tensor(name, x, len(shape), legend)
    if x.dtype != q.dtype and x.dtype != torch.float32:
        raise TypeError(f"{name}: expected dtype {q.dtype} (as q) or torch.float32, got {x.dtype}")
    _check_device(name, x, q)
    _check_shape(name, x, shape, legend)


def _check_integers(name: str, x: Tensor, q: Tensor, shape: tuple[int, ...], legend: str) -> None:
    _check_tensor(name, x, len(shape), legend)
    if x.dtype not in _INTEGERS:
        raise TypeError(f"{name}: expected an integer dtype, got {x.dtype}")
    _check_device(name, x, q)
    _check_shape(name, x, shape, legend)


def _check_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name}: expected device {q.device} (as q), got {x.device}")


def _check_shape(name: str, x: Tensor, wanted: tuple[int, ...], legend: str) -> None:
    if tuple(x.shape) != wanted:
        raise ValueError(f"{name}: expected shape {legend} = {wanted}, got {tuple(x.shape)}")


def has_values(x: Tensor) -> bool:
    """Whether values can be read: not while a graph is traced, nor of fake tensors or those of functorch."""
    if torch.compiler.is_compiling():
        return False
    return type(x) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _check_bool(name: str, x: bool) -> None:
    if not isinstance(x, bool):
        raise TypeError(f"{name}: expected a bool, got {type(x).__name__}")


def _check_number(name: str, x: float) -> None:
    if isinstance(x, bool) or not isinstance(x, (int, float, torch.SymFloat)):
        raise TypeError(f"{name}: expected a float, got {type(x).__name__}")


def _check_finite(name: str, x: float) -> None:
    _check_number(name, x)
    # a number that a graph is traced for has no value yet, and need not show as a SymFloat
    if not isinstance(x, torch.SymFloat) and not torch.compiler.is_compiling() and not math.isfinite(x):
        raise ValueError(f"{name}: expected a finite number, got {x}")


def _check_int(name: str, x: int) -> None:
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(x).__name__}")
    if isinstance(x, int) and not -(2**63) <= x < 2**63:
        raise ValueError(f"{name}: expected an int of 64 bits, got {x}")
