"""Launchers of the backward pass: the passes that share the workspace of ranges.py, and what stands around them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from txl_kernels.arguments import DIFFERENTIABLE, Inputs, Options
from txl_kernels.triton_backend.backward_dkv_kernel import backward_dkv_kernel
from txl_kernels.triton_backend.backward_dmask_kernel import backward_dmask_kernel
from txl_kernels.triton_backend.backward_dq_kernel import backward_dq_kernel
from txl_kernels.triton_backend.backward_dr_kernel import backward_dr_kernel
from txl_kernels.triton_backend.call import Call, input_precision, on_device_of
from txl_kernels.triton_backend.operands import contiguous
from txl_kernels.triton_backend.plans import PLANS, Buffer, Step, layout_of
from txl_kernels.triton_backend.ranges import Range, ranges_of
from txl_kernels.triton_backend.sizes import cdiv, padded, strides
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
        given = {"out_ptr": out, "do_ptr": dout, "lse_ptr": lse, "dlse_ptr": contiguous(dlse)}
        layout = layout_of((*inputs, *given.values()))
        key = out.device, input_precision(out.dtype), options, tuple(needs_grad), layout
        return PLANS.find(_Backward, key, inputs, given, options, needs_grad).run(inputs, given)


class _Backward:
    """The plan of a backward pass; given is what row_stats_kernel reads, by its names."""

    def __init__(
        self, inputs: Inputs, given: dict[str, Tensor | None], options: Options, needs_grad: Sequence[bool]
    ) -> None:
        self._needed = {name for name, needs in zip(DIFFERENTIABLE, needs_grad, strict=True) if needs}
        out, dout, lse, _ = given.values()
        call = Call(inputs, options, out, dout, biased=True, copy_rows=True)
        self._operands = call.operands
        vector = torch.empty(lse.shape, dtype=torch.float32, device="meta")
        rest = vector if lse.dtype is torch.float64 else None
        stats = {"lse_ptr": vector, "rest_ptr": rest, "delta_ptr": vector}
        self._stats = _buffers(stats)
        self._row_stats = Step(
            row_stats_kernel,
            (cdiv(call.T, _VECTOR_BLOCK) * call.B * call.H,),
            {
                **given,
                **strides("o", "bhm", out),
                **strides("do", "bhm", dout),
                "lse_stat_ptr": vector,
                "rest_ptr": rest,
                "delta_ptr": vector,
                "H": call.H,
                "T": call.T,
                "ALIGNED": call.aligned,
                "D": call.D,
                "BLOCK_D": padded(call.D),
                "BLOCK_M": _VECTOR_BLOCK,
            },
        )
        self._gradients = self._mask = None
        if self._needed - {"attn_mask"}:
            self._gradients = _Gradients(call, inputs, stats, self._needed)
        self.n_steps = 3 + (0 if self._gradients is None else self._gradients.n_steps)
        if "attn_mask" in self._needed:
            self._mask = _MaskGradient(call, inputs, stats)

    def run(self, inputs: Inputs, given: dict[str, Tensor | None]) -> list[Tensor | None]:
        tensors = self._operands.tensors(inputs, given["do_ptr"])
        stats = _allocated(self._stats, inputs.q.device)
        self._row_stats(given | stats | {"lse_ptr": given["lse_ptr"], "lse_stat_ptr": stats["lse_ptr"]})
        tensors |= stats
        grads = {} if self._gradients is None else self._gradients.run(inputs, tensors)
        if self._mask is not None:
            grads["attn_mask"] = self._mask.run(inputs, tensors)
        return [grads[name] if name in self._needed else None for name in DIFFERENTIABLE]


class _Gradients:
    """The passes that share a workspace (ranges.py), and what they leave: float32 parts, or the gradients themselves.

    A kernel that runs for one range after the other adds to zeros.
    """

    def __init__(self, call: Call, inputs: Inputs, stats: dict[str, Tensor | None], needed: set[str]) -> None:
        begin, reach = call.arguments["begin"], call.arguments["reach"]
        self._ranges = ranges_of(call.B, call.H, call.T, call.S, begin, reach, call.itemsize)
        self._with_queries = bool(needed & {"q", "q_pos", "position_bias", "segment_scores"})
        self._with_rows = bool(needed & {"r", "r_bias"})
        self._group, self._r_batches = call.group, call.r_batches
        self._heads_share_r = inputs.r is not None and inputs.r.shape[1] != call.H
        self._dkv, self._dq, self._dr = (call.tiling(kernel) for kernel in ("dkv", "dq", "dr"))
        self._add_keys = any(part.i_first > 0 for part in self._ranges)
        self._add_queries = len({part[4:] for part in self._ranges}) > len({part.i_first for part in self._ranges})
        self._add_rows = len(self._ranges) > 1
        results, zeros = self._results(call, inputs)
        self._buffers = _buffers(results, zeros)
        shared = stats | results
        ds = torch.empty(max(part.pairs for part in self._ranges), dtype=inputs.q.dtype, device="meta")
        self._ds = Buffer(ds)
        self._steps = []
        for part in self._ranges:
            place = _place(part, ds[: part.pairs].view(part.slots, part.i_last - part.i_first, -1))
            keys = self._key_pass(call, part, place | shared)
            queries = self._query_pass(call, part, place | shared) if self._with_queries else None
            rows = self._row_pass(call, part, place | shared) if self._with_rows else None
            self._steps.append((keys, queries, rows))
        self.n_steps = 3 * len(self._steps)

    def _results(self, call: Call, inputs: Inputs) -> tuple[dict[str, Tensor | None], set[str]]:
        """What the passes write, by the names of their arguments, on the meta device, and what begins as zeros."""
        B, H, T, S, D = call.B, call.H, call.T, call.S, call.D

        def like(x: Tensor | None, add: bool) -> Tensor | None:
            dtype = torch.float32 if add else inputs.q.dtype
            return None if x is None else torch.empty_like(x, dtype=dtype, device="meta")

        def parts(wanted: bool, *shape: int) -> Tensor | None:
            return torch.empty(shape, dtype=torch.float32, device="meta") if wanted else None

        if call.group == 1:
            dk, dv = (like(x, self._add_keys) for x in (inputs.k, inputs.v))
        else:  # a part for each query head of a group
            dk, dv = (parts(True, B, H, S, D) for _ in range(2))
        key_tiles, query_tiles = cdiv(S, self._dkv["BLOCK_N"]), cdiv(T, self._dq["BLOCK_M"])
        blocks = cdiv(call.P, self._dr["BLOCK_N"])
        self._dr_parts = B if call.r_batches > 1 else max(1, min(B, _DR_PROGRAMS // max(1, blocks * H)))
        with_queries, with_rows = self._with_queries, self._with_rows
        by_key = {"dk_ptr": dk, "dv_ptr": dv, "du_ptr": parts(inputs.content_bias is not None, B, H, key_tiles, D)}
        by_query = {
            "dq_ptr": like(inputs.q if with_queries else None, self._add_queries),
            "dq_pos_ptr": like(inputs.q_pos if with_queries else None, self._add_queries),
            "dposition_bias_ptr": parts(with_queries and inputs.position_bias is not None, B, H, query_tiles, D),
            "dsegment_ptr": parts(with_queries and inputs.segment_scores is not None, B, H, T, 2),
        }
        by_row = {
            "dr_ptr": parts(with_rows and inputs.r is not None, self._dr_parts, H, call.P, call.DR),
            "dr_bias_ptr": parts(with_rows and inputs.r_bias is not None, self._dr_parts, H, call.P),
        }
        # Keys that lie before the first range are seen by nobody.
        unseen = self._ranges[0].j_first > 0
        kinds = ((by_key, self._add_keys or unseen), (by_query, self._add_queries), (by_row, self._add_rows))
        return by_key | by_query | by_row, {name for names, zeros in kinds if zeros for name in names}

    def run(self, inputs: Inputs, tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Runs the passes: gradients by name, in the dtype and layout of the inputs."""
        device = inputs.q.device
        made, ds = _allocated(self._buffers, device), self._ds.allocate(device)
        tensors = tensors | made | {"ds_ptr": ds, "ds_raw_ptr": ds}
        of_rows = tensors if tensors["q_pos_ptr"] is not None else tensors | {"q_pos_ptr": tensors["q_ptr"]}
        for keys, queries, rows in self._steps:
            keys(tensors)
            if queries is not None:
                queries(tensors)
            if rows is not None:
                rows(of_rows)

        dk, dv = made["dk_ptr"], made["dv_ptr"]
        if self._group > 1:
            parts = (x.unflatten(1, (-1, self._group)).sum(2) for x in (dk, dv))
            dk, dv = map(_like, (inputs.k, inputs.v), parts)
        grads = {"k": dk, "v": dv, "content_bias": _like(inputs.content_bias, made.get("du_ptr"), (0, 2))}
        if self._with_queries:
            grads |= {
                "q": made["dq_ptr"],
                "q_pos": made.get("dq_pos_ptr"),
                "position_bias": _like(inputs.position_bias, made.get("dposition_bias_ptr"), (0, 2)),
                "segment_scores": _like(inputs.segment_scores, made.get("dsegment_ptr")),
            }
        if self._with_rows:
            served = ([] if self._r_batches > 1 else [0]) + [1] * self._heads_share_r
            grads |= {
                "r": _like(inputs.r, made.get("dr_ptr"), served),
                "r_bias": _like(inputs.r_bias, made.get("dr_bias_ptr"), (0,)),
            }
        return {name: x if x is None else x.to(getattr(inputs, name).dtype) for name, x in grads.items()}

    def _key_pass(self, call: Call, part: Range, shared: dict) -> Step:
        tiles = cdiv(part.j_last - part.j_first, self._dkv["BLOCK_N"])
        arguments = {
            **call.described("dkv", **shared),
            **strides("dk", "bhn", shared["dk_ptr"]),
            **strides("dv", "bhn", shared["dv_ptr"]),
            "i_last": part.i_last,
            "ADD": self._add_keys,
        }
        return Step(backward_dkv_kernel, (tiles * part.slots,), arguments | self._dkv)

    def _query_pass(self, call: Call, part: Range, shared: dict) -> Step:
        tiles = cdiv(part.i_last - part.i_first, self._dq["BLOCK_M"])
        arguments = {
            **call.described("dq", **shared),
            **call.counted_from(part),
            "ds_raw_ptr": shared["ds_ptr"],
            **strides("dq", "bhm", shared["dq_ptr"]),
            **strides("dp", "bhm", shared["dq_pos_ptr"]),
            "ADD": self._add_queries,
        }
        return Step(backward_dq_kernel, (tiles * part.slots,), arguments | self._dq)

    def _row_pass(self, call: Call, part: Range, shared: dict) -> Step | None:
        block, batches = self._dr["BLOCK_N"], part.b_last - part.b_first
        arguments = call.described("dr", **shared) | call.counted_from(part)
        first, last = 0, cdiv(call.P, block)
        if self._add_rows:  # only blocks that have pairs of the range
            first_row = arguments["shift"] - (arguments["n_rows"] - 1)
            last_row = arguments["shift"] + part.j_last - part.j_first
            first, last = max(0, first_row // block), min(last, cdiv(last_row, block))
        if last <= first:
            return None
        if arguments["q_pos_ptr"] is None:
            arguments |= {"q_pos_ptr": arguments["q_ptr"]} | {f"stride_p{x}": arguments[f"stride_q{x}"] for x in "bhm"}
        batched = call.r_batches > 1
        arguments |= {
            "n_batches": batches,
            "first_block": first,
            "n_blocks": last - first,
            "first_part": part.b_first if batched else 0,
            "ADD": self._add_rows,
        }
        grid = (part.h_last - part.h_first) * (last - first), batches if batched else min(batches, self._dr_parts)
        return Step(backward_dr_kernel, grid, arguments | self._dr)


class _MaskGradient:
    """The gradient of a float mask, in its own shape."""

    def __init__(self, call: Call, inputs: Inputs, stats: dict[str, Tensor | None]) -> None:
        dmask = torch.empty(inputs.attn_mask.shape, dtype=torch.float32, device="meta")
        self._dmask = Buffer(dmask)
        mask_b, mask_h, mask_t, mask_s = dmask.shape
        tiling = call.tiling("dmask")
        tiles = (cdiv(size, block) for size, block in ((mask_t, tiling["BLOCK_M"]), (mask_s, tiling["BLOCK_N"])))
        sizes = {"B": call.B, "mask_b": mask_b, "mask_h": mask_h, "mask_t": mask_t, "mask_s": mask_s}
        self._step = Step(
            backward_dmask_kernel,
            (math.prod(tiles) * mask_b * mask_h,),
            {**call.arguments, **stats, **sizes, "dmask_ptr": dmask, **tiling},
        )

    def run(self, inputs: Inputs, tensors: dict[str, Tensor | None]) -> Tensor:
        dmask = self._dmask.allocate(inputs.q.device)
        self._step(tensors | {"dmask_ptr": dmask})
        return _like(inputs.attn_mask, dmask)


def _buffers(samples: dict[str, Tensor | None], zeros: Sequence[str] = ()) -> dict[str, Buffer]:
    return {name: Buffer(x, name in zeros) for name, x in samples.items() if x is not None}


def _allocated(buffers: dict[str, Buffer], device: torch.device) -> dict[str, Tensor]:
    return {name: buffer.allocate(device) for name, buffer in buffers.items()}


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


def _like(x: Tensor | None, total: Tensor | None, dimensions: Sequence[int] = ()) -> Tensor | None:
    """A float32 gradient, summed over its parts, in the dtype and layout of x."""
    if x is None:
        return None
    if dimensions := [dim for dim in dimensions if total.shape[dim] > 1]:
        total = total.sum(dimensions)
    total = total.view(x.shape)
    return total.to(x.dtype) if x.is_contiguous() else torch.empty_like(x).copy_(total)
