"""Launchers: the two entry points of the backend, from validated tensors to kernel arguments."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from txl_kernels.triton_backend.backward_dkv_kernel import backward_dkv_kernel
from txl_kernels.triton_backend.backward_dq_kernel import backward_dq_kernel
from txl_kernels.triton_backend.backward_dr_kernel import backward_dr_kernel
from txl_kernels.triton_backend.forward_kernel import forward_kernel
from txl_kernels.triton_backend.launch_table import launch_for
from txl_kernels.triton_backend.vector_kernels import column_kernel, delta_kernel

_LOG2_E = 1.4426950408889634
_VECTOR_BLOCK = 64
# Programs that the dr kernel is spread over where it has fewer (row block, head) pairs: a few for each processor.
# The count is fixed, not read off the device, so that sums have the same order everywhere.
_DR_PROGRAMS = 512


class _Problem:
    """What all kernels of one call share."""

    def __init__(self, q, k, v, r, content_bias, position_bias, is_causal, scale, first_distance, *others):
        self.B, self.H, self.T, self.D = q.shape
        self.S, self.P = k.shape[2], r.shape[1]
        self.arch = _arch(q.device)
        self.itemsize = q.element_size()
        self.block_d = max(16, triton.next_power_of_2(self.D))
        self.aligned = all(_is_aligned(x) for x in (q, k, v, r, *others))
        self.scale = scale
        self.difference = _bias_difference(content_bias, position_bias)
        self.tiling = {
            "PRECISION": _input_precision(q.dtype),
            "ALIGNED": self.aligned,
            "D": self.D,
            "BLOCK_D": self.block_d,
        }
        column = None
        if self.difference is not None:
            column = torch.empty((self.H, self.P), dtype=torch.float32, device=q.device)
            grid = (triton.cdiv(self.P, _VECTOR_BLOCK) * self.H,)
            if grid[0]:
                column_kernel[grid](
                    r, self.difference, column, r.stride(0), r.stride(1), self.P,
                    ALIGNED=self.aligned, D=self.D, BLOCK_D=self.block_d, BLOCK_P=_VECTOR_BLOCK, num_warps=4,
                )  # fmt: skip
        self.arguments = {
            **_rows("q", "m", q),
            **_rows("k", "n", k),
            **_rows("v", "n", v),
            "r_ptr": r,
            "stride_rh": r.stride(0),
            "stride_rp": r.stride(1),
            "u_ptr": None if content_bias is None else content_bias.contiguous(),
            "column_ptr": column,
            "H": self.H,
            "T": self.T,
            "S": self.S,
            "P": self.P,
            "rel_offset": first_distance - (self.S - self.T),
            "reach": self.S - self.T + 1 if is_causal else self.S,
            "scale_log2": scale * _LOG2_E,
        }

    def launch(self, kernel: str):
        return launch_for(kernel, self.arch, self.block_d, self.itemsize)

    def options(self, launch) -> dict:
        return {
            **self.tiling,
            "BLOCK_M": launch.block_m,
            "BLOCK_N": launch.block_n,
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
        }


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
    """Output like q and log-sum-exp (B, H, T) in float32, for non-empty q with a unit last stride."""
    out = torch.empty_like(q)
    problem = _Problem(q, k, v, r, content_bias, position_bias, is_causal, scale, first_distance, out)
    lse = torch.empty((problem.B, problem.H, problem.T), dtype=torch.float32, device=q.device)
    launch = problem.launch("forward")
    forward_kernel[(triton.cdiv(problem.T, launch.block_m) * problem.B * problem.H,)](
        **problem.arguments, **_rows("o", "m", out, "out_ptr"), lse_ptr=lse, **problem.options(launch)
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
    """Gradients of the six inputs, those that need none left None."""
    needs_q, needs_k, needs_v, needs_r, needs_u, needs_position = needs_grad
    problem = _Problem(q, k, v, r, content_bias, position_bias, is_causal, scale, first_distance, out, dout)
    B, H, T, S, P, D = problem.B, problem.H, problem.T, problem.S, problem.P, problem.D

    delta = torch.empty_like(lse)
    delta_kernel[(triton.cdiv(T, _VECTOR_BLOCK) * B * H,)](
        **_rows("o", "m", out, "out_ptr"),
        **_rows("do", "m", dout),
        dlse_ptr=dlse,
        **dict(zip(("stride_dlb", "stride_dlh", "stride_dlm"), (0, 0, 0) if dlse is None else dlse.stride(), strict=True)),
        delta_ptr=delta, H=H, T=T, ALIGNED=problem.aligned, D=D, BLOCK_D=problem.block_d, BLOCK_M=_VECTOR_BLOCK, num_warps=4,
    )  # fmt: skip
    arguments = {
        **problem.arguments, **_rows("do", "m", dout), "lse_ptr": lse, "delta_ptr": delta, "scale": scale,
    }  # fmt: skip

    dq = dk = dv = dr = du = dposition = None
    if needs_q:
        dq = torch.empty_like(q)
        launch = problem.launch("dq")
        backward_dq_kernel[(triton.cdiv(T, launch.block_m) * B * H,)](
            **arguments, **_rows("dq", "m", dq), **problem.options(launch)
        )
    if needs_k or needs_v or needs_u:
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        launch = problem.launch("dkv")
        tiles = triton.cdiv(S, launch.block_n)
        du_parts = None
        if content_bias is not None:
            du_parts = torch.empty((B, H, tiles, D), dtype=torch.float32, device=q.device)
        backward_dkv_kernel[(tiles * B * H,)](
            **arguments, **_rows("dk", "n", dk), **_rows("dv", "n", dv), du_ptr=du_parts, **problem.options(launch)
        )
        if needs_u:
            du = du_parts.sum((0, 2)).to(content_bias.dtype)
    if needs_r or needs_position:
        launch = problem.launch("dr")
        blocks = triton.cdiv(P, launch.block_n)
        parts = max(1, min(B, _DR_PROGRAMS // max(1, blocks * H)))
        dr_parts = torch.empty((parts, H, P, D), dtype=r.dtype if parts == 1 else torch.float32, device=q.device)
        dposition_parts = torch.empty((parts, blocks, H, D), dtype=torch.float32, device=q.device)
        if blocks:
            backward_dr_kernel[(blocks * H, parts)](
                **arguments,
                B=B,
                bias_difference_ptr=problem.difference,
                **_rows("dr", "p", dr_parts, strides="zh"),
                dposition_bias_ptr=dposition_parts,
                **problem.options(launch),
            )
        if needs_r:
            dr = dr_parts[0] if parts == 1 else dr_parts.sum(0).to(r.dtype)
        if needs_position:
            dposition = dposition_parts.sum((0, 1)).to(position_bias.dtype)
    return (
        dq,
        dk if needs_k else None,
        dv if needs_v else None,
        dr,
        du,
        dposition,
    )


def _rows(name: str, row: str, x: Tensor, pointer: str | None = None, strides: str = "bh") -> dict:
    """Pointer and strides of a four-dimensional tensor under the names of the kernels' arguments."""
    first, second, third, _ = x.stride()
    return {
        pointer or f"{name}_ptr": x,
        f"stride_{name}{strides[0]}": first,
        f"stride_{name}{strides[1]}": second,
        f"stride_{name}{row}": third,
    }


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
    """How float32 operands are multiplied: exactly, unless the user lets PyTorch use tf32."""
    return "tf32" if dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def _arch(device: torch.device) -> str:
    """The GPU generation as the launch table names it."""
    return "sm_90"
