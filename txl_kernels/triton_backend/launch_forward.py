"""Launcher of the forward pass: from normalised inputs to the arguments of its kernels."""

import torch
from torch import Tensor

from txl_kernels.arguments import Inputs, Options
from txl_kernels.triton_backend.call import Call, input_precision, on_device_of
from txl_kernels.triton_backend.forward_kernel import forward_kernel
from txl_kernels.triton_backend.launch_table import FEW_QUERIES
from txl_kernels.triton_backend.plans import PLANS, Buffer, Step, layout_of
from txl_kernels.triton_backend.sizes import cdiv, padded, strides
from txl_kernels.triton_backend.vector_kernels import combine_kernel

# One tile of queries, as in generation, leaves most of a GPU idle where there are few (batch, head) pairs: the keys
# are divided into ranges of a multiple of _RANGE_KEYS, up to so many programs. The numbers are fixed, not read
# off the device, so that sums have the same order everywhere.
_RANGE_PROGRAMS, _RANGE_KEYS, _RANGE_ROWS = 512, 128, 16
_WIDEST_UNBIASED = 64


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """Output like q and log-sum-exp (B, H, T), of non-empty inputs as the operator normalises them."""
    q = inputs.q
    with on_device_of(q):
        key = q.device, input_precision(q.dtype), options, layout_of(inputs)
        return PLANS.find(_Forward, key, inputs, options).run(inputs)


class _Forward:
    """The plan of a forward pass."""

    n_steps = 3

    def __init__(self, inputs: Inputs, options: Options) -> None:
        q = inputs.q
        out = torch.empty_like(q, device="meta")
        lse = torch.empty(q.shape[:3], dtype=inputs.kernel_lse_dtype, device="meta")
        kernel = "few" if q.shape[2] <= FEW_QUERIES else "forward"
        # Biases that the kernel adds cost registers in its main loop: with many rows or columns, spills.
        biased = kernel == "forward" or padded(q.shape[3]) > _WIDEST_UNBIASED
        call = Call(inputs, options, out, biased=biased, copy_rows=kernel == "forward")
        tiling = call.tiling(kernel)
        tiles, ranges, range_keys = cdiv(call.T, tiling["BLOCK_M"]), 1, None
        if tiles == 1:
            ranges = max(1, min(_RANGE_PROGRAMS // (call.B * call.H), call.S // _RANGE_KEYS))
        self._parts = self._combine = None
        out_part, lse_part = out, lse
        if ranges > 1:
            range_keys = _RANGE_KEYS * cdiv(call.S, _RANGE_KEYS * ranges)
            ranges = cdiv(call.S, range_keys)
            out_part = torch.empty((ranges * call.B, *q.shape[1:]), dtype=torch.float32, device="meta")
            lse_part = lse.new_empty(len(out_part), *lse.shape[1:])
            self._parts = Buffer(out_part), Buffer(lse_part)
            self._combine = Step(
                combine_kernel,
                (cdiv(call.T, _RANGE_ROWS) * call.B * call.H,),
                {
                    "out_parts_ptr": out_part,
                    "lse_parts_ptr": lse_part,
                    "out_ptr": out,
                    **strides("o", "bhm", out),
                    "lse_ptr": lse,
                    "ranges": ranges,
                    "H": call.H,
                    "T": call.T,
                    "ALIGNED": call.aligned,
                    "D": call.D,
                    "BLOCK_D": padded(call.D),
                    "BLOCK_M": _RANGE_ROWS,
                },
            )
        self._operands, self._results = call.operands, (Buffer(out), Buffer(lse))
        self._attend = Step(
            forward_kernel,
            (tiles * call.B * call.H, ranges),
            {
                **call.described(kernel),
                "out_ptr": out_part,
                **strides("o", "bhm", out_part),
                "lse_ptr": lse_part,
                "range_keys": range_keys,
                **tiling,
            },
        )

    def run(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        tensors, device = self._operands.tensors(inputs), inputs.q.device
        out, lse = (x.allocate(device) for x in self._results)
        if self._parts is None:
            self._attend(tensors | {"out_ptr": out, "lse_ptr": lse})
        else:
            parts, lse_parts = (x.allocate(device) for x in self._parts)
            self._attend(tensors | {"out_ptr": parts, "lse_ptr": lse_parts})
            self._combine({"out_parts_ptr": parts, "lse_parts_ptr": lse_parts, "out_ptr": out, "lse_ptr": lse})
        return out, lse
