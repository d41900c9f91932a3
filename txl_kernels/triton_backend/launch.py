"""Launchers: the two entry points of the backend, from validated tensors to kernel arguments."""

import contextlib
import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from txl_kernels import dropout
from txl_kernels.arguments import DIFFERENTIABLE, Inputs, Options
from txl_kernels.triton_backend.backward_dkv_kernel import backward_dkv_kernel
from txl_kernels.triton_backend.backward_dmask_kernel import backward_dmask_kernel
from txl_kernels.triton_backend.backward_dq_kernel import backward_dq_kernel
from txl_kernels.triton_backend.backward_dr_kernel import backward_dr_kernel
from txl_kernels.triton_backend.forward_kernel import forward_kernel
from txl_kernels.triton_backend.launch_table import COPY_ENGINE, FEW_QUERIES, Launch, generation_of, launch_for
from txl_kernels.triton_backend.vector_kernels import combine_kernel, row_stats_kernel

_VECTOR_BLOCK = 64
# The dr kernel divides the batch where it has fewer (row block, head) pairs than this: a few for each processor.
# The number is fixed, not read off the device, so that sums have the same order everywhere.
_DR_PROGRAMS = 512
# One tile of queries, as in generation, leaves most of a GPU idle where there are few (batch, head) pairs: the keys
# are divided into ranges of a multiple of _RANGE_KEYS, up to so many programs. Fixed numbers, for the same reason.
_RANGE_PROGRAMS, _RANGE_KEYS, _RANGE_ROWS = 512, 128, 16


def forward(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """Output like q and log-sum-exp (B, H, T), of non-empty inputs as the operator normalises them."""
    q = inputs.q
    with _on_device_of(q):
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=inputs.kernel_lse_dtype, device=q.device)
        kernel = "few" if q.shape[2] <= FEW_QUERIES else "forward"
        call = _Call(inputs, options, out, copy_rows=kernel == "forward")
        tiling = call.tiling(kernel)
        tiles, ranges, range_keys = triton.cdiv(call.T, tiling["BLOCK_M"]), 1, None
        if tiles == 1:
            ranges = max(1, min(_RANGE_PROGRAMS // (call.B * call.H), call.S // _RANGE_KEYS))
        if ranges > 1:
            range_keys = _RANGE_KEYS * triton.cdiv(call.S, _RANGE_KEYS * ranges)
            ranges = triton.cdiv(call.S, range_keys)
            parts = torch.empty((ranges * call.B, *q.shape[1:]), dtype=torch.float32, device=q.device)
            lse_parts = lse.new_empty(len(parts), *lse.shape[1:])
        else:
            parts, lse_parts = out, lse
        forward_kernel[(tiles * call.B * call.H, ranges)](
            **call.operands(kernel),
            **_strided("out", "o", "bhm", parts),
            lse_ptr=lse_parts,
            range_keys=range_keys,
            **tiling,
        )
        if ranges > 1:
            combine_kernel[(triton.cdiv(call.T, _RANGE_ROWS) * call.B * call.H,)](
                out_parts_ptr=parts,
                lse_parts_ptr=lse_parts,
                **_strided("out", "o", "bhm", out),
                lse_ptr=lse,
                ranges=ranges,
                H=call.H,
                T=call.T,
                ALIGNED=call.aligned,
                D=call.D,
                BLOCK_D=_padded(call.D),
                BLOCK_M=_RANGE_ROWS,
            )
    return out, lse


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
    with _on_device_of(out):
        call = _Call(inputs, options, out, dout, copy_rows=True)
        shared = {**_strided("do", "do", "bhm", call.dout), **_row_stats(call, out, dout, lse, dlse)}
        needed = {name for name, needs in zip(DIFFERENTIABLE, needs_grad, strict=True) if needs}
        grads = {}
        for names, gradients in (
            (("q", "q_pos", "segment_scores"), _query_gradients),
            (("k", "v", "content_bias"), _key_gradients),
            (("r", "position_bias", "r_bias"), _row_gradients),
            (("attn_mask",), _mask_gradient),
        ):
            if needed.intersection(names):
                grads |= zip(names, gradients(call, shared), strict=True)
    return [grads[name] if name in needed else None for name in DIFFERENTIABLE]


class _Call:
    """The sizes and kernel arguments that all passes of one call share."""

    def __init__(
        self, inputs: Inputs, options: Options, out: Tensor, dout: Tensor | None = None, copy_rows: bool = False
    ):
        self.inputs = inputs
        q, q_pos = _query_operands(inputs)
        k, v, r = inputs.k, inputs.v, inputs.r
        self.generation, self.itemsize = generation_of(q.device), q.element_size()
        operands = (q, k, v, r, q_pos, dout)
        # Rows that do not start on 16 bytes would come element by element, and their columns masked one by one.
        self.copied = copy_rows and self.generation in COPY_ENGINE and self.itemsize == 2 and not _all_aligned(operands)
        if self.copied:
            operands = tuple(_in_aligned_rows(x) for x in operands)
        q, k, v, r, q_pos, self.dout = operands
        self._r_table = r
        self.B, self.H, self.T, self.D = q.shape
        self.S, self.P = k.shape[2], inputs.rows
        M = self.S - self.T
        self.group = self.H // k.shape[1]
        # A table that serves all batch elements or heads has stride 0 there.
        self.r = None if r is None else r.expand(self.B, self.H, -1, -1)
        self.r_batches = 1 if r is None else len(r)
        self.DR = self.D if r is None else r.shape[-1]
        # The gradient of q_pos may be denser than q_pos.
        dense = inputs.q_pos is None or self.DR * self.itemsize % 16 == 0
        self.aligned = dense and not self.copied and _all_aligned((*operands, out))
        # Beyond these bounds no pair has a row of r, or is in the window, and int32 would overflow.
        rel_offset = max(-self.S, min(options.first_distance - M, self.P + self.T))
        reach = self.S if options.right < 0 else min(M + 1 + options.right, self.S)
        # Rows of r in the future of every query are not read.
        self.r_rows = min(self.P, rel_offset + reach)
        # What a descriptor cannot do, beside rows not aligned: repeat some, have none, r by batch element alone.
        plain = all(0 not in x.stride() and x.stride(-1) == 1 for x in operands if x is not None)
        self.describable = (self.aligned or self.copied) and plain
        self._descriptors: dict[tuple[str, int], TensorDescriptor] = {}
        if r is not None:
            self.describable &= self.r_rows > 0 and (len(r) == 1 or r.shape[1] == self.H)
        self.arguments = {
            **_strided("q", "q", "bhm", q),
            **_strided("k", "k", "bhn", k),
            **_strided("v", "v", "bhn", v),
            **_strided("r", "r", "bhp", self.r),
            **_strided("q_pos", "p", "bhm", q_pos),
            "r_bias_ptr": _contiguous(inputs.r_bias),
            **self._terms(options),
            "H": self.H,
            "group": self.group,
            "T": self.T,
            "S": self.S,
            "P": self.P,
            "rel_offset": rel_offset,
            "begin": None if options.left < 0 else max(M - options.left, -self.T),
            "reach": reach,
            "scale": options.scale,
            "PRECISION": _input_precision(q.dtype),
            "ALIGNED": self.aligned,
            "D": self.D,
            "BLOCK_D": _padded(self.D),
            "DR": self.DR,
            "BLOCK_DR": _padded(self.DR),
        }

    def row(self, kernel: str) -> Launch:
        width = max(_padded(self.D), _padded(self.DR))
        row = launch_for(kernel, self.generation, width, self.itemsize)
        return row._replace(descriptors=True) if self.copied else row

    def operands(self, kernel: str, **others: object) -> dict:
        """The arguments that all passes share, and others; what tiles are loaded from as its row of the table says."""
        arguments, row = self.arguments | others, self.row(kernel)
        if row.descriptors and self.describable:
            blocks = dict.fromkeys(("q", "q_pos", "do"), row.block_m) | dict.fromkeys(("k", "v"), row.block_n)
            for name, block in blocks.items():
                if (x := arguments.get(f"{name}_ptr")) is not None:
                    arguments[f"{name}_ptr"] = self._descriptor(name, x, block)
            if self.r is not None:
                arguments["r_ptr"] = self._descriptor("r", self._rows_of_r(), row.block_n)
        return arguments

    def _descriptor(self, name: str, x: Tensor, block: int) -> TensorDescriptor:
        """x (..., rows, D) by tiles of so many rows; passes with the same tiles share it."""
        if (name, block) not in self._descriptors:
            tile = [1] * (x.dim() - 2) + [block, _padded(x.shape[-1])]
            self._descriptors[name, block] = TensorDescriptor(x, x.shape, x.stride(), tile)
        return self._descriptors[name, block]

    def _rows_of_r(self) -> Tensor:
        """Those that are read, without the dimensions that batch elements or heads share."""
        r = self._r_table[:, :, : self.r_rows]
        if len(r) > 1:
            return r
        return r[0, 0] if r.shape[1] == 1 else r[0]

    def tiling(self, kernel: str) -> dict[str, int]:
        row = self.row(kernel)
        options = {"num_warps": row.num_warps, "num_stages": row.num_stages}
        return {"BLOCK_M": row.block_m, "BLOCK_N": row.block_n, "UNROLL": row.unroll} | options

    def _terms(self, options: Options) -> dict:
        """The optional terms of a score; None where absent."""
        inputs = self.inputs
        mask = inputs.attn_mask
        if mask is not None:
            mask = mask.expand(self.B, self.H, self.T, self.S)
            mask = mask.view(torch.uint8) if mask.dtype is torch.bool else mask
        dropping = inputs.seed is not None
        return {
            "segment_ptr": _contiguous(inputs.segment_scores),
            "q_ids_ptr": _contiguous(inputs.segment_q_ids),
            "k_ids_ptr": _contiguous(inputs.segment_k_ids),
            **_strided("mask", "m", "bhmn", mask),
            "lengths_ptr": _contiguous(inputs.key_lengths),
            "seed_ptr": inputs.seed,
            "softcap": options.softcap,
            "keep_below": dropout.threshold(options.dropout_p) if dropping else None,
            "keep_scale": 1 / (1 - options.dropout_p) if dropping else None,
        }


def _row_stats(call: _Call, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None) -> dict[str, Tensor | None]:
    """The three vectors of row_stats_kernel, (B, H, T) in float32, under the names of the kernels' arguments."""

    def vector() -> Tensor:
        return torch.empty(lse.shape, dtype=torch.float32, device=lse.device)

    delta, lse_stat = vector(), vector()
    rest = vector() if lse.dtype is torch.float64 else None
    row_stats_kernel[(triton.cdiv(call.T, _VECTOR_BLOCK) * call.B * call.H,)](
        **_strided("out", "o", "bhm", out),
        **_strided("do", "do", "bhm", dout),
        lse_ptr=lse,
        dlse_ptr=_contiguous(dlse),
        lse_stat_ptr=lse_stat,
        rest_ptr=rest,
        delta_ptr=delta,
        H=call.H,
        T=call.T,
        ALIGNED=call.aligned,
        D=call.D,
        BLOCK_D=_padded(call.D),
        BLOCK_M=_VECTOR_BLOCK,
    )
    return {"lse_ptr": lse_stat, "rest_ptr": rest, "delta_ptr": delta}


def _query_gradients(call: _Call, shared: dict) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dq, dq_pos and the gradient of the segment scores."""
    q, q_pos, scores = call.inputs.q, call.inputs.q_pos, call.inputs.segment_scores
    dq = torch.empty_like(q)
    dq_pos = None if q_pos is None else torch.empty_like(q_pos)
    dscores = None if scores is None else torch.empty(scores.shape, dtype=torch.float32, device=q.device)
    tiling = call.tiling("dq")
    backward_dq_kernel[(triton.cdiv(call.T, tiling["BLOCK_M"]) * call.B * call.H,)](
        **call.operands("dq", **shared),
        **_strided("dq", "dq", "bhm", dq),
        **_strided("dq_pos", "dp", "bhm", dq_pos),
        dsegment_ptr=dscores,
        **tiling,
    )
    return dq, dq_pos, _like(scores, dscores)


def _key_gradients(call: _Call, shared: dict) -> tuple[Tensor, Tensor, Tensor | None]:
    """dk, dv and the gradient of the content bias."""
    k, v, content_bias = call.inputs.k, call.inputs.v, call.inputs.content_bias
    if call.group == 1:
        dk, dv = torch.empty_like(k), torch.empty_like(v)
    else:  # a part for each query head of a group
        shape = (call.B, call.H, call.S, call.D)
        dk, dv = (torch.empty(shape, dtype=torch.float32, device=k.device) for _ in range(2))
    tiling = call.tiling("dkv")
    tiles = triton.cdiv(call.S, tiling["BLOCK_N"])
    bias_parts = None
    if content_bias is not None:
        bias_parts = torch.empty((call.B, call.H, tiles, call.D), dtype=torch.float32, device=k.device)
    backward_dkv_kernel[(tiles * call.B * call.H,)](
        **call.operands("dkv", **shared),
        **_strided("dk", "dk", "bhn", dk),
        **_strided("dv", "dv", "bhn", dv),
        du_ptr=bias_parts,
        **tiling,
    )
    if call.group > 1:
        dk, dv = (_like(x, parts.unflatten(1, (-1, call.group)).sum(2)) for x, parts in ((k, dk), (v, dv)))
    return dk, dv, _like(content_bias, bias_parts, (0, 2))


def _row_gradients(call: _Call, shared: dict) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dr and the gradients of the position bias and of r_bias."""
    inputs, H, P = call.inputs, call.H, call.P
    if P == 0:
        return tuple(
            None if x is None else torch.zeros_like(x) for x in (inputs.r, inputs.position_bias, inputs.r_bias)
        )
    tiling = call.tiling("dr")
    blocks = triton.cdiv(P, tiling["BLOCK_N"])
    batched = call.r_batches > 1
    ranges = call.B if batched else max(1, min(call.B, _DR_PROGRAMS // (blocks * H)))

    def parts(like: Tensor | None, *shape: int) -> Tensor | None:
        return None if like is None else torch.empty((ranges, *shape), dtype=torch.float32, device=like.device)

    dr_parts = parts(inputs.r, H, P, call.DR)
    dposition_parts = parts(inputs.position_bias, blocks, H, call.D)
    dr_bias_parts = parts(inputs.r_bias, H, P)
    backward_dr_kernel[(blocks * H, ranges)](
        **call.operands("dr", **shared),
        B=call.B,
        dr_ptr=dr_parts,
        dposition_bias_ptr=dposition_parts,
        dr_bias_ptr=dr_bias_parts,
        **tiling,
    )
    served = [] if batched else [0]
    if inputs.r is not None and inputs.r.shape[1] != H:
        served.append(1)
    return (
        _like(inputs.r, dr_parts, served),
        _like(inputs.position_bias, dposition_parts, (0, 1)),
        _like(inputs.r_bias, dr_bias_parts, (0,)),
    )


def _mask_gradient(call: _Call, shared: dict) -> tuple[Tensor]:
    """The gradient of a float mask, in its own shape."""
    mask = call.inputs.attn_mask
    dmask = torch.empty(mask.shape, dtype=torch.float32, device=mask.device)
    mask_b, mask_h, mask_t, mask_s = mask.shape
    tiling = call.tiling("dmask")
    tiles = (triton.cdiv(size, block) for size, block in ((mask_t, tiling["BLOCK_M"]), (mask_s, tiling["BLOCK_N"])))
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
    return (_like(mask, dmask),)


def _like(x: Tensor | None, total: Tensor | None, dimensions: Sequence[int] = ()) -> Tensor | None:
    """A float32 gradient, summed over its parts, in the dtype and layout of x."""
    if x is None:
        return None
    total = total.sum(dimensions) if dimensions else total
    return torch.empty_like(x).copy_(total.view(x.shape))


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _padded(width: int) -> int:
    """The columns of a tile: a power of two, as Triton's matrix products want them."""
    return max(16, triton.next_power_of_2(width))


def _strided(pointer: str, stride: str, dimensions: str, x: Tensor | None) -> dict:
    """A tensor and its strides by dimension under the names of the kernels' arguments; zeros for None."""
    strides = {f"stride_{stride}{dim}": 0 if x is None else x.stride(i) for i, dim in enumerate(dimensions)}
    return {f"{pointer}_ptr": x, **strides}


def _is_aligned(x: Tensor) -> bool:
    """Whether every row starts on 16 bytes."""
    itemsize = x.element_size()
    return x.data_ptr() % 16 == 0 and all(stride * itemsize % 16 == 0 for stride in x.stride()[:-1])


def _all_aligned(tensors: Sequence[Tensor | None]) -> bool:
    return all(x is None or _is_aligned(x) for x in tensors)


def _in_aligned_rows(x: Tensor | None) -> Tensor | None:
    """x, or a copy whose rows start on 16 bytes; what lies between them is never read."""
    if x is None or _is_aligned(x):
        return x
    width, step = x.shape[-1], 16 // x.element_size()
    return x.new_empty(*x.shape[:-1], step * triton.cdiv(width, step))[..., :width].copy_(x)


def _query_operands(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """The queries of content and position, q + u and q + v (or q_pos), rounded once; None where they are the same."""
    q, q_pos = inputs.q, inputs.q_pos
    if q_pos is None and inputs.r is not None and inputs.position_bias is not inputs.content_bias:
        q_pos = _with_bias(q, inputs.position_bias)
    return _with_bias(q, inputs.content_bias), q_pos


def _with_bias(q: Tensor, bias: Tensor | None) -> Tensor:
    return q if bias is None else torch.add(q, bias[:, None], out=torch.empty_like(q))


def _input_precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: exactly, unless the user lets PyTorch use tf32 on an NVIDIA GPU."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32" and not torch.version.hip
    return "tf32" if dtype is torch.float32 and allowed else "ieee"


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()
