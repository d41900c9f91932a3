"""Launcher of the forward pass: from normalised inputs to the arguments of its kernels."""

import torch
from torch import Tensor

from txl_kernels.arguments import Inputs, Options
from txl_kernels.triton_backend.call import Call, cdiv, on_device_of, padded, strided
from txl_kernels.triton_backend.forward_kernel import forward_kernel
from txl_kernels.triton_backend.launch_table import FEW_QUERIES
from txl_kernels.triton_backend.vector_kernels import combine_kernel

# One tile of queries, as in generation, leaves most of a GPU idle where there are few (batch, head) pairs: the keys
# are divided into ranges of a multiple of _RANGE_KEYS, up to so many programs. The numbers are fixed, not read
# off the device, so that sums have the same order everywhere.
_RANGE_PROGRAMS, _RANGE_KEYS, _RANGE_ROWS = 512, 128, 16


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """Output like q and log-sum-exp (B, H, T), of non-empty inputs as the operator normalises them."""
    q = inputs.q
    with on_device_of(q):
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=inputs.kernel_lse_dtype, device=q.device)
        kernel = "few" if q.shape[2] <= FEW_QUERIES else "forward"
        call = Call(inputs, options, out, copy_rows=kernel == "forward")
        tiling = call.tiling(kernel)
        tiles, ranges, range_keys = cdiv(call.T, tiling["BLOCK_M"]), 1, None
        if tiles == 1:
            ranges = max(1, min(_RANGE_PROGRAMS // (call.B * call.H), call.S // _RANGE_KEYS))
        if ranges > 1:
            range_keys = _RANGE_KEYS * cdiv(call.S, _RANGE_KEYS * ranges)
            ranges = cdiv(call.S, range_keys)
            parts = torch.empty((ranges * call.B, *q.shape[1:]), dtype=torch.float32, device=q.device)
            lse_parts = lse.new_empty(len(parts), *lse.shape[1:])
        else:
            parts, lse_parts = out, lse
        forward_kernel[(tiles * call.B * call.H, ranges)](
            **call.operands(kernel),
            **strided("out", "o", "bhm", parts),
            lse_ptr=lse_parts,
            range_keys=range_keys,
            **tiling,
        )
        if ranges > 1:
            combine_kernel[(cdiv(call.T, _RANGE_ROWS) * call.B * call.H,)](
                out_parts_ptr=parts,
                lse_parts_ptr=lse_parts,
                **strided("out", "o", "bhm", out),
                lse_ptr=lse,
                ranges=ranges,
                H=call.H,
                T=call.T,
                ALIGNED=call.aligned,
                D=call.D,
                BLOCK_D=padded(call.D),
                BLOCK_M=_RANGE_ROWS,
            )
    return out, lse
