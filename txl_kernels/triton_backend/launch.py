"""Launchers: the two entry points of the backend, from validated tensors to kernel arguments."""

import contextlib
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from txl_kernels.triton_backend.backward_dkv_kernel import backward_dkv_kernel
from txl_kernels.triton_backend.backward_dq_kernel import backward_dq_kernel
from txl_kernels.triton_backend.backward_dr_kernel import backward_dr_kernel
from txl_kernels.triton_backend.forward_kernel import forward_kernel
from txl_kernels.triton_backend.launch_table import generation_of, launch_for
from txl_kernels.triton_backend.vector_kernels import column_kernel, delta_kernel

_VECTOR_BLOCK = 64
# The dr kernel divides the batch where it has fewer (row block, head) pairs than this: a few for each processor.
# The number is fixed, not read off the device, so that sums have the same order everywhere.
_DR_PROGRAMS = 512


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    content_bias: Tensor | None,
    position_bias: Tensor | None,
    is_causal: bool,
    scale: float,
    first_distance: int,
) -> tuple[Tensor, Tensor]:
    """Output like q and log-sum-exp (B, H, T) in float32, of non-empty inputs with a unit last stride."""
    with _on_device_of(q):
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        call = _Call(q, k, v, r, content_bias, position_bias, is_causal, scale, first_distance, others=(out,))
        tiling = call.tiling("forward")
        forward_kernel[(triton.cdiv(call.T, tiling["BLOCK_M"]) * call.B * call.H,)](
            **call.arguments, **_strided("out", "o", "bhm", out), lse_ptr=lse, **tiling
        )
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    content_bias: Tensor | None,
    position_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    first_distance: int,
    needs_grad: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, r, content_bias and position_bias; None for those that need none."""
    needs_q, needs_k, needs_v, needs_r, needs_content, needs_position = needs_grad
    dq = dk = dv = dr = dcontent = dposition = None
    with _on_device_of(q):
        call = _Call(q, k, v, r, content_bias, position_bias, is_causal, scale, first_distance, others=(out, dout))
        delta = _delta(call, out, dout, dlse)
        shared = {**_strided("do", "do", "bhm", dout), "lse_ptr": lse, "delta_ptr": delta}
        if needs_q:
            dq = _query_gradient(call, shared, q)
        if needs_k or needs_v or needs_content:
            dk, dv, dcontent = _key_gradients(call, shared, k, v, content_bias)
        if needs_r or needs_position:
            dr, dposition = _row_gradients(call, shared, r, position_bias)
    grads = (dq, dk, dv, dr, dcontent, dposition)
    return tuple(grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True))


class _Call:
    """The sizes and kernel arguments that all passes of one call share."""

    def __init__(
        self, q, k, v, r, content_bias, position_bias, is_causal, scale, first_distance, others: tuple[Tensor, ...]
    ):
        self.B, self.H, self.T, self.D = q.shape
        self.S, self.P = k.shape[2], r.shape[1]
        self.generation, self.itemsize = generation_of(q.device), q.element_size()
        self.head = {
            "ALIGNED": all(_is_aligned(x) for x in (q, k, v, r, *others)),
            "D": self.D,
            "BLOCK_D": max(16, triton.next_power_of_2(self.D)),
        }
        self.difference = _bias_difference(content_bias, position_bias)
        self.arguments = {
            **_strided("q", "q", "bhm", q),
            **_strided("k", "k", "bhn", k),
            **_strided("v", "v", "bhn", v),
            **_strided("r", "r", "hp", r),
            "u_ptr": None if content_bias is None else content_bias.contiguous(),
            "column_ptr": None if self.difference is None else self._column(r),
            "H": self.H,
            "T": self.T,
            "S": self.S,
            "P": self.P,
            # Beyond these bounds no pair has a row of r, and int32 would overflow.
            "rel_offset": max(-self.S, min(first_distance - (self.S - self.T), self.P + self.T)),
            "reach": self.S - self.T + 1 if is_causal else self.S,
            "scale": scale,
            "PRECISION": _input_precision(q.dtype),
            **self.head,
        }

    def tiling(self, kernel: str) -> dict[str, int]:
        block_m, block_n, num_warps, num_stages = launch_for(
            kernel, self.generation, self.head["BLOCK_D"], self.itemsize
        )
        return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}

    def _column(self, r: Tensor) -> Tensor:
        """(v - u) . r[p], (H, P) in float32."""
        column = torch.empty((self.H, self.P), dtype=torch.float32, device=r.device)
        if self.P:
            column_kernel[(triton.cdiv(self.P, _VECTOR_BLOCK) * self.H,)](
                **_strided("r", "r", "hp", r),
                bias_difference_ptr=self.difference,
                column_ptr=column,
                P=self.P,
                BLOCK_P=_VECTOR_BLOCK,
                **self.head,
            )
        return column


def _delta(call: _Call, out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """out . dout - dlse of every query, (B, H, T) in float32."""
    delta = torch.empty((call.B, call.H, call.T), dtype=torch.float32, device=out.device)
    delta_kernel[(triton.cdiv(call.T, _VECTOR_BLOCK) * call.B * call.H,)](
        **_strided("out", "o", "bhm", out),
        **_strided("do", "do", "bhm", dout),
        dlse_ptr=None if dlse is None else dlse.contiguous(),
        delta_ptr=delta,
        H=call.H,
        T=call.T,
        BLOCK_M=_VECTOR_BLOCK,
        **call.head,
    )
    return delta


def _query_gradient(call: _Call, shared: dict, q: Tensor) -> Tensor:
    dq = torch.empty_like(q)
    tiling = call.tiling("dq")
    backward_dq_kernel[(triton.cdiv(call.T, tiling["BLOCK_M"]) * call.B * call.H,)](
        **call.arguments, **shared, **_strided("dq", "dq", "bhm", dq), **tiling
    )
    return dq


def _key_gradients(
    call: _Call, shared: dict, k: Tensor, v: Tensor, content_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    tiling = call.tiling("dkv")
    tiles = triton.cdiv(call.S, tiling["BLOCK_N"])
    parts = None
    if content_bias is not None:
        parts = torch.empty((call.B, call.H, tiles, call.D), dtype=torch.float32, device=k.device)
    backward_dkv_kernel[(tiles * call.B * call.H,)](
        **call.arguments,
        **shared,
        **_strided("dk", "dk", "bhn", dk),
        **_strided("dv", "dv", "bhn", dv),
        du_ptr=parts,
        **tiling,
    )
    return dk, dv, _total(parts, (0, 2), content_bias)


def _row_gradients(call: _Call, shared: dict, r: Tensor, position_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if call.P == 0:
        return torch.zeros_like(r), None if position_bias is None else torch.zeros_like(position_bias)
    tiling = call.tiling("dr")
    blocks = triton.cdiv(call.P, tiling["BLOCK_N"])
    ranges = max(1, min(call.B, _DR_PROGRAMS // (blocks * call.H)))
    dr_parts = torch.empty((ranges, *r.shape), dtype=torch.float32, device=r.device)
    bias_parts = None
    if position_bias is not None:
        bias_parts = torch.empty((ranges, blocks, call.H, call.D), dtype=torch.float32, device=r.device)
    backward_dr_kernel[(blocks * call.H, ranges)](
        **call.arguments,
        **shared,
        B=call.B,
        bias_difference_ptr=call.difference,
        **_strided("dr", "dr", "zhp", dr_parts),
        dposition_bias_ptr=bias_parts,
        **tiling,
    )
    return torch.empty_like(r).copy_(dr_parts.sum(0)), _total(bias_parts, (0, 1), position_bias)


def _total(parts: Tensor | None, dimensions: tuple[int, int], bias: Tensor | None) -> Tensor | None:
    """The gradient of a bias from its float32 parts."""
    return None if bias is None else torch.empty_like(bias).copy_(parts.sum(dimensions))


def _strided(pointer: str, stride: str, dimensions: str, x: Tensor) -> dict:
    """A tensor and its strides, but the last, under the names of the kernels' arguments."""
    strides = {f"stride_{stride}{dim}": x.stride(position) for position, dim in enumerate(dimensions)}
    return {f"{pointer}_ptr": x, **strides}


def _is_aligned(x: Tensor) -> bool:
    """Whether every row starts on 16 bytes."""
    itemsize = x.element_size()
    return x.data_ptr() % 16 == 0 and all(stride * itemsize % 16 == 0 for stride in x.stride()[:-1])


def _bias_difference(content_bias: Tensor | None, position_bias: Tensor | None) -> Tensor | None:
    """v - u in float32, (H, D): what turns the content query into the position query."""
    if position_bias is None:
        return None if content_bias is None else -content_bias.float().contiguous()
    difference = position_bias.float()
    return (difference if content_bias is None else difference - content_bias.float()).contiguous()


def _input_precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: exactly, unless the user lets PyTorch use tf32 on an NVIDIA GPU."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32" and not torch.version.hip
    return "tf32" if dtype is torch.float32 and allowed else "ieee"


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()
