"""Launchers of the backward pass: the passes that share the workspace of ranges.py, and what stands around them."""

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from txl_kernels.arguments import DIFFERENTIABLE, Inputs, Options
from txl_kernels.triton_backend.backward_dkv_kernel import backward_dkv_kernel
from txl_kernels.triton_backend.backward_dmask_kernel import backward_dmask_kernel
from txl_kernels.triton_backend.backward_dq_kernel import backward_dq_kernel
from txl_kernels.triton_backend.backward_dr_kernel import backward_dr_kernel
from txl_kernels.triton_backend.call import Call, cdiv, contiguous, on_device_of, padded, strided
from txl_kernels.triton_backend.ranges import Range, ranges_of
from txl_kernels.triton_backend.vector_kernels import row_stats_kernel

_VECTOR_BLOCK = 64
# The dr kernel divides the batch where it has fewer (row block, head) pairs than this: a few for each processor.
# The number is fixed, not read off the device, so that sums have the same order everywhere.
_DR_PROGRAMS = 512


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
    options: Options,
    needs_grad: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients in the order of DIFFERENTIABLE; None for those that need none."""
    with on_device_of(out):
        call = Call(inputs, options, out, dout, copy_rows=True)
        shared = {**strided("do", "do", "bhm", call.dout), **_row_stats(call, out, dout, lse, dlse)}
        needed = {name for name, needs in zip(DIFFERENTIABLE, needs_grad, strict=True) if needs}
        grads = {}
        if needed - {"attn_mask"}:
            grads = _Gradients(call, needed).run(shared)
        if "attn_mask" in needed:
            grads["attn_mask"] = _mask_gradient(call, shared)
    return [grads[name] if name in needed else None for name in DIFFERENTIABLE]


def _row_stats(call: Call, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None) -> dict[str, Tensor | None]:
    """The three vectors of row_stats_kernel, (B, H, T) in float32, under the names of the kernels' arguments."""

    def vector() -> Tensor:
        return torch.empty(lse.shape, dtype=torch.float32, device=lse.device)

    delta, lse_stat = vector(), vector()
    rest = vector() if lse.dtype is torch.float64 else None
    row_stats_kernel[(cdiv(call.T, _VECTOR_BLOCK) * call.B * call.H,)](
        **strided("out", "o", "bhm", out),
        **strided("do", "do", "bhm", dout),
        lse_ptr=lse,
        dlse_ptr=contiguous(dlse),
        lse_stat_ptr=lse_stat,
        rest_ptr=rest,
        delta_ptr=delta,
        H=call.H,
        T=call.T,
        ALIGNED=call.aligned,
        D=call.D,
        BLOCK_D=padded(call.D),
        BLOCK_M=_VECTOR_BLOCK,
    )
    return {"lse_ptr": lse_stat, "rest_ptr": rest, "delta_ptr": delta}


class _Gradients:
    """The passes that share a workspace (ranges.py), and what they leave: float32 parts, or the gradients themselves.

    A kernel that runs for one range after the other adds to zeros.
    """

    def __init__(self, call: Call, needed: set[str]) -> None:
        inputs, arguments = call.inputs, call.arguments
        self._call = call
        self._ranges = ranges_of(call.B, call.H, call.T, call.S, arguments["begin"], arguments["reach"], call.itemsize)
        self._with_queries = bool(needed & {"q", "q_pos", "position_bias", "segment_scores"})
        self._with_rows = bool(needed & {"r", "r_bias"})
        self._dkv, self._dq, self._dr = (call.tiling(kernel) for kernel in ("dkv", "dq", "dr"))
        self._add_keys = any(part.i_first > 0 for part in self._ranges)
        self._add_queries = len({part[4:] for part in self._ranges}) > len({part.i_first for part in self._ranges})
        self._add_rows = len(self._ranges) > 1

        # Keys that lie before the first range are seen by nobody.
        unseen = self._add_keys or self._ranges[0].j_first > 0
        B, H, T, S, D = call.B, call.H, call.T, call.S, call.D

        def like(x: Tensor | None, add: bool, zeros: bool = False) -> Tensor | None:
            if x is None:
                return None
            dtype = torch.float32 if add else x.dtype
            return (torch.zeros_like if add or zeros else torch.empty_like)(x, dtype=dtype)

        def parts(wanted: bool, zeros: bool, *shape: int) -> Tensor | None:
            make = torch.zeros if zeros else torch.empty
            return make(shape, dtype=torch.float32, device=inputs.q.device) if wanted else None

        if call.group == 1:
            self.dk, self.dv = (like(x, self._add_keys, unseen) for x in (inputs.k, inputs.v))
        else:  # a part for each query head of a group
            self.dk, self.dv = (parts(True, unseen, B, H, S, D) for _ in range(2))
        tiles = cdiv(S, self._dkv["BLOCK_N"])
        self.du = parts(inputs.content_bias is not None, unseen, B, H, tiles, D)

        add = self._add_queries
        self.dq, self.dq_pos = (like(x if self._with_queries else None, add) for x in (inputs.q, inputs.q_pos))
        tiles = cdiv(T, self._dq["BLOCK_M"])
        self.dposition_bias = parts(self._with_queries and inputs.position_bias is not None, add, B, H, tiles, D)
        self.dsegment = parts(self._with_queries and inputs.segment_scores is not None, add, B, H, T, 2)

        blocks = cdiv(call.P, self._dr["BLOCK_N"])
        self._dr_parts = B if call.r_batches > 1 else max(1, min(B, _DR_PROGRAMS // max(1, blocks * H)))
        self.dr = parts(self._with_rows and inputs.r is not None, self._add_rows, self._dr_parts, H, call.P, call.DR)
        self.dr_bias = parts(self._with_rows and inputs.r_bias is not None, self._add_rows, self._dr_parts, H, call.P)

    def run(self, shared: dict) -> dict[str, Tensor | None]:
        """Runs the passes: gradients by name, in the dtype and layout of the inputs."""
        call = self._call
        inputs = call.inputs
        buffer = inputs.q.new_empty(max(part.pairs for part in self._ranges))
        for part in self._ranges:
            ds = buffer[: part.pairs].view(part.slots, part.i_last - part.i_first, -1)
            self._key_pass(part, ds, shared)
            if self._with_queries:
                self._query_pass(part, ds)
            if self._with_rows:
                self._row_pass(part, ds)

        dk, dv = self.dk, self.dv
        if call.group > 1:
            parts = (x.unflatten(1, (-1, call.group)).sum(2) for x in (dk, dv))
            dk, dv = map(_like, (inputs.k, inputs.v), parts)
        grads = {"k": dk, "v": dv, "content_bias": _like(inputs.content_bias, self.du, (0, 2))}
        if self._with_queries:
            grads |= {
                "q": self.dq,
                "q_pos": self.dq_pos,
                "position_bias": _like(inputs.position_bias, self.dposition_bias, (0, 2)),
                "segment_scores": _like(inputs.segment_scores, self.dsegment),
            }
        if self._with_rows:
            served = [] if call.r_batches > 1 else [0]
            if inputs.r is not None and inputs.r.shape[1] != call.H:
                served.append(1)
            grads |= {"r": _like(inputs.r, self.dr, served), "r_bias": _like(inputs.r_bias, self.dr_bias, (0,))}
        return {name: x if x is None else x.to(getattr(inputs, name).dtype) for name, x in grads.items()}

    def _key_pass(self, part: Range, ds: Tensor, shared: dict) -> None:
        tiles = cdiv(part.j_last - part.j_first, self._dkv["BLOCK_N"])
        backward_dkv_kernel[(tiles * part.slots,)](
            **self._call.operands("dkv", **shared),
            **_place(part, ds),
            **strided("dk", "dk", "bhn", self.dk),
            **strided("dv", "dv", "bhn", self.dv),
            du_ptr=self.du,
            i_last=part.i_last,
            ADD=self._add_keys,
            **self._dkv,
        )

    def _query_pass(self, part: Range, ds: Tensor) -> None:
        tiles = cdiv(part.i_last - part.i_first, self._dq["BLOCK_M"])
        arguments = self._call.operands("dq", **_place(part, ds)) | self._call.counted_from(part)
        backward_dq_kernel[(tiles * part.slots,)](
            **_only(backward_dq_kernel, arguments),
            ds_raw_ptr=ds,
            **strided("dq", "dq", "bhm", self.dq),
            **strided("dq_pos", "dp", "bhm", self.dq_pos),
            dposition_bias_ptr=self.dposition_bias,
            dsegment_ptr=self.dsegment,
            ADD=self._add_queries,
            **self._dq,
        )

    def _row_pass(self, part: Range, ds: Tensor) -> None:
        call, block, batches = self._call, self._dr["BLOCK_N"], part.b_last - part.b_first
        arguments = call.operands("dr", **_place(part, ds)) | call.counted_from(part)
        first, last = 0, cdiv(call.P, block)
        if self._add_rows:  # only blocks that have pairs of the range
            first_row = arguments["shift"] - (arguments["n_rows"] - 1)
            last_row = arguments["shift"] + part.j_last - part.j_first
            first, last = max(0, first_row // block), min(last, cdiv(last_row, block))
        if last <= first:
            return
        if arguments["q_pos_ptr"] is None:
            arguments |= {"q_pos_ptr": arguments["q_ptr"]} | {f"stride_p{x}": arguments[f"stride_q{x}"] for x in "bhm"}
        batched = call.r_batches > 1
        parts = batches if batched else min(batches, self._dr_parts)
        backward_dr_kernel[((part.h_last - part.h_first) * (last - first), parts)](
            **_only(backward_dr_kernel, arguments),
            dr_ptr=self.dr,
            dr_bias_ptr=self.dr_bias,
            n_batches=batches,
            first_block=first,
            n_blocks=last - first,
            first_part=part.b_first if batched else 0,
            ADD=self._add_rows,
            **self._dr,
        )


def _place(part: Range, ds: Tensor) -> dict:
    """Where a range of pairs stands, for all passes."""
    return {
        "ds_ptr": ds,
        "stride_ds": ds.stride(1),
        "b_first": part.b_first,
        "h_first": part.h_first,
        "n_heads": part.h_last - part.h_first,
        "i_first": part.i_first,
        "j_first": part.j_first,
        "j_last": part.j_last,
    }


def _only(kernel: triton.runtime.JITFunction, arguments: dict) -> dict:
    """Those of the arguments that the kernel has."""
    return {name: arguments[name] for name in kernel.arg_names if name in arguments}


def _mask_gradient(call: Call, shared: dict) -> Tensor:
    """The gradient of a float mask, in its own shape."""
    mask = call.inputs.attn_mask
    dmask = torch.empty(mask.shape, dtype=torch.float32, device=mask.device)
    mask_b, mask_h, mask_t, mask_s = mask.shape
    tiling = call.tiling("dmask")
    tiles = (cdiv(size, block) for size, block in ((mask_t, tiling["BLOCK_M"]), (mask_s, tiling["BLOCK_N"])))
    backward_dmask_kernel[(math.prod(tiles) * mask_b * mask_h,)](
        **call.arguments,
        **shared,
        B=call.B,
        dmask_ptr=dmask,
        mask_b=mask_b,
        mask_h=mask_h,
        mask_t=mask_t,
        mask_s=mask_s,
        **tiling,
    )
    return _like(mask, dmask)


def _like(x: Tensor | None, total: Tensor | None, dimensions: Sequence[int] = ()) -> Tensor | None:
    """A float32 gradient, summed over its parts, in the dtype and layout of x."""
    if x is None:
        return None
    total = total.sum(dimensions) if dimensions else total
    return torch.empty_like(x).copy_(total.view(x.shape))
