"""What one call of the operator is to the kernels: sizes, operands and how tiles of them are loaded."""

import contextlib
import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from txl_kernels import dropout
from txl_kernels.arguments import Inputs, Options
from txl_kernels.triton_backend.launch_table import COPY_ENGINE, Launch, generation_of, launch_for
from txl_kernels.triton_backend.ranges import Range


class Call:
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
        q, k, v, r, q_pos, self.dout = self._operands = operands
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
        self._descriptors: dict[tuple[str, int], TensorDescriptor] = {}
        self.arguments = {
            **strided("q", "q", "bhm", q),
            **strided("k", "k", "bhn", k),
            **strided("v", "v", "bhn", v),
            **strided("r", "r", "bhp", self.r),
            **strided("q_pos", "p", "bhm", q_pos),
            "r_bias_ptr": contiguous(inputs.r_bias),
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
            "BLOCK_D": padded(self.D),
            "DR": self.DR,
            "BLOCK_DR": padded(self.DR),
        }

    @functools.cached_property
    def describable(self) -> bool:
        """Whether descriptors can do it: rows that start on 16 bytes, none repeated, an r for all or for each head."""
        r = self._operands[3]
        if r is not None and (self.r_rows <= 0 or (len(r) > 1 and r.shape[1] != self.H)):
            return False
        if not (self.aligned or self.copied):
            return False
        return all(0 not in x.stride() and x.stride(-1) == 1 for x in self._operands if x is not None)

    def row(self, kernel: str) -> Launch:
        width = max(padded(self.D), padded(self.DR))
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
        if row.descriptors and kernel == "dq":
            ds = arguments["ds_ptr"]
            arguments["ds_ptr"] = TensorDescriptor(ds, ds.shape, ds.stride(), [1, row.block_m, row.block_n])
        return arguments

    def counted_from(self, part: Range) -> dict:
        """The bounds of what is visible, with queries and keys counted from the first of a range."""
        begin, reach, shift = (self.arguments[name] for name in ("begin", "reach", "rel_offset"))
        moved = part.i_first - part.j_first
        return {
            "begin": None if begin is None else begin + moved,
            "reach": reach + moved,
            "shift": shift - moved,
            "n_rows": part.i_last - part.i_first,
            "r_rows": self.r_rows,
        }

    def _descriptor(self, name: str, x: Tensor, block: int) -> TensorDescriptor:
        """x (..., rows, D) by tiles of so many rows; passes with the same tiles share it."""
        if (name, block) not in self._descriptors:
            tile = [1] * (x.dim() - 2) + [block, padded(x.shape[-1])]
            self._descriptors[name, block] = TensorDescriptor(x, x.shape, x.stride(), tile)
        return self._descriptors[name, block]

    def _rows_of_r(self) -> Tensor:
        """Those that are read, without the dimensions that batch elements or heads share."""
        r = self._operands[3][:, :, : self.r_rows]
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
            "segment_ptr": contiguous(inputs.segment_scores),
            "q_ids_ptr": contiguous(inputs.segment_q_ids),
            "k_ids_ptr": contiguous(inputs.segment_k_ids),
            **strided("mask", "m", "bhmn", mask),
            "lengths_ptr": contiguous(inputs.key_lengths),
            "seed_ptr": inputs.seed,
            "softcap": options.softcap,
            "keep_below": dropout.threshold(options.dropout_p) if dropping else None,
            "keep_scale": 1 / (1 - options.dropout_p) if dropping else None,
        }


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def padded(width: int) -> int:
    """The columns of a tile: a power of two, as Triton's matrix products want them."""
    return max(16, 1 << (width - 1).bit_length())


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up (triton.cdiv takes over a microsecond)."""
    return -(-a // b)


def strided(pointer: str, stride: str, dimensions: str, x: Tensor | None) -> dict:
    """A tensor and its strides by dimension under the names of the kernels' arguments; zeros for None."""
    strides = (0,) * len(dimensions) if x is None else x.stride()
    return dict(zip(_names(pointer, stride, dimensions), (x, *strides), strict=False))


@functools.cache
def _names(pointer: str, stride: str, dimensions: str) -> list[str]:
    return [f"{pointer}_ptr", *(f"stride_{stride}{dim}" for dim in dimensions)]


def _is_aligned(x: Tensor) -> bool:
    """Whether every row starts on 16 bytes."""
    bits, itemsize = x.data_ptr(), x.element_size()
    for stride in x.stride()[:-1]:
        bits |= stride * itemsize
    return bits % 16 == 0


def _all_aligned(tensors: Sequence[Tensor | None]) -> bool:
    return all(x is None or _is_aligned(x) for x in tensors)


def _in_aligned_rows(x: Tensor | None) -> Tensor | None:
    """x, or a copy whose rows start on 16 bytes; what lies between them is never read."""
    if x is None or _is_aligned(x):
        return x
    width, step = x.shape[-1], 16 // x.element_size()
    return x.new_empty(*x.shape[:-1], step * cdiv(width, step))[..., :width].copy_(x)


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


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()
