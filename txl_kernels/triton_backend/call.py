"""What one call of the operator is to the kernels: sizes, arguments and how tiles are loaded."""

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from txl_kernels import dropout
from txl_kernels.arguments import Inputs, Options
from txl_kernels.triton_backend.launch_table import COPY_ENGINE, Launch, generation_of, launch_for
from txl_kernels.triton_backend.operands import Operands, all_aligned
from txl_kernels.triton_backend.ranges import Range
from txl_kernels.triton_backend.sizes import padded, strides


class Call:
    """The sizes and kernel arguments that all passes of one call share, from which its plan is made.

    Args:
        inputs, options: the problem.
        out: or a tensor laid out like it.
        dout: of a backward.
        biased: as in `Operands`.
        copy_rows: whether rows may be copied.
    """

    def __init__(
        self,
        inputs: Inputs,
        options: Options,
        out: Tensor,
        dout: Tensor | None = None,
        biased: bool = False,
        copy_rows: bool = False,
    ):
        self.generation, self.itemsize = generation_of(inputs.q.device), inputs.q.element_size()
        # Rows that do not start on 16 bytes would come element by element, and their columns masked one by one.
        copied = copy_rows and self.generation in COPY_ENGINE and self.itemsize == 2
        copied = copied and not all_aligned((*inputs[:4], inputs.q_pos, dout))
        self.operands = Operands(inputs, biased, copied)
        tensors = self.operands.samples(inputs, dout)
        tiled = [tensors[f"{name}_ptr"] for name in ("q", "k", "v", "r", "q_pos", "do")]
        q, k, v, r, q_pos, dout = tiled
        self.B, self.H, self.T, self.D = q.shape
        self.S, self.P = k.shape[2], inputs.rows
        M = self.S - self.T
        self.group = self.H // k.shape[1]
        self.r_batches = 1 if r is None else len(r)
        self.DR = self.D if r is None else r.shape[-1]
        # The gradient of q_pos may be denser than q_pos.
        dense = inputs.q_pos is None or self.DR * self.itemsize % 16 == 0
        self.aligned = dense and not self.operands.copied and all_aligned((*tiled, out))
        # Beyond these bounds no pair has a row of r, or is in the window, and int32 would overflow.
        rel_offset = max(-self.S, min(options.first_distance - M, self.P + self.T))
        reach = self.S if options.right < 0 else min(M + 1 + options.right, self.S)
        # Rows of r in the future of every query are not read.
        self.r_rows = min(self.P, rel_offset + reach)
        self._describable = self._can_be_described(tiled, r)
        mask, dropping = inputs.attn_mask, inputs.seed is not None
        self.arguments = {
            **tensors,
            **strides("q", "bhm", q),
            **strides("k", "bhn", k),
            **strides("v", "bhn", v),
            # A table that serves all batch elements or heads has stride 0 there.
            **strides("r", "bhp", None if r is None else r.expand(self.B, self.H, -1, -1)),
            **strides("p", "bhm", q_pos),
            **strides("m", "bhmn", None if mask is None else mask.expand(self.B, self.H, self.T, self.S)),
            **strides("do", "bhm", dout),
            "H": self.H,
            "group": self.group,
            "T": self.T,
            "S": self.S,
            "P": self.P,
            "rel_offset": rel_offset,
            "begin": None if options.left < 0 else max(M - options.left, -self.T),
            "reach": reach,
            "scale": options.scale,
            "softcap": options.softcap,
            "keep_below": dropout.threshold(options.dropout_p) if dropping else None,
            "keep_scale": 1 / (1 - options.dropout_p) if dropping else None,
            "PRECISION": input_precision(q.dtype),
            "ALIGNED": self.aligned,
            "D": self.D,
            "BLOCK_D": padded(self.D),
            "DR": self.DR,
            "BLOCK_DR": padded(self.DR),
        }

    def _can_be_described(self, tiled: Iterable[Tensor | None], r: Tensor | None) -> bool:
        """Whether descriptors can do it: rows that start on 16 bytes, none repeated, an r for all or for each head."""
        if r is not None and (self.r_rows <= 0 or (len(r) > 1 and r.shape[1] != self.H)):
            return False
        if not (self.aligned or self.operands.copied):
            return False
        return all(0 not in x.stride() and x.stride(-1) == 1 for x in tiled if x is not None)

    def row(self, kernel: str) -> Launch:
        width = max(padded(self.D), padded(self.DR))
        row = launch_for(kernel, self.generation, width, self.itemsize, self._describable)
        return row._replace(descriptors=True) if self.operands.copied else row

    def described(self, kernel: str, **others: object) -> dict:
        """The arguments that all passes share, and others; what tiles are loaded from as its row of the table says."""
        arguments, row = self.arguments | others, self.row(kernel)
        if row.descriptors and self._describable:
            blocks = dict.fromkeys(("q", "q_pos", "do"), row.block_m) | dict.fromkeys(("k", "v"), row.block_n)
            for name, block in blocks.items():
                if (x := arguments.get(f"{name}_ptr")) is not None:
                    arguments[f"{name}_ptr"] = _by_tiles(x, block)
            if (r := arguments["r_ptr"]) is not None:
                arguments["r_ptr"] = _by_tiles(self._rows_of_r(r), row.block_n)
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

    def _rows_of_r(self, r: Tensor) -> Tensor:
        """Those that are read, without the dimensions that batch elements or heads share."""
        r = r[:, :, : self.r_rows]
        if len(r) > 1:
            return r
        return r[0, 0] if r.shape[1] == 1 else r[0]

    def tiling(self, kernel: str) -> dict[str, int]:
        row = self.row(kernel)
        options = {"num_warps": row.num_warps, "num_stages": row.num_stages}
        return {"BLOCK_M": row.block_m, "BLOCK_N": row.block_n, "UNROLL": row.unroll} | options


def _by_tiles(x: Tensor, block: int) -> TensorDescriptor:
    """x (..., rows, D) by tiles of so many rows."""
    return TensorDescriptor(x, x.shape, x.stride(), [1] * (x.dim() - 2) + [block, padded(x.shape[-1])])


def input_precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: exactly, unless the user lets PyTorch use tf32 on an NVIDIA GPU."""
    if dtype is not torch.float32 or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()
