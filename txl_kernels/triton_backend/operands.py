"""The tensors of one call as they come to the kernels: queries with their biases, rows where loads are fast."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from txl_kernels.arguments import Inputs
from txl_kernels.triton_backend.plans import Buffer, Step
from txl_kernels.triton_backend.sizes import cdiv, padded, strides
from txl_kernels.triton_backend.vector_kernels import biased_queries_kernel

_BLOCK = 64


class Operands:
    """How the tensors of calls that are laid out alike come to the kernels.

    Args:
        inputs: of one of them.
        biased: whether queries come with their biases, rounded once; else the kernel adds them.
        copied: whether rows that do not start on 16 bytes are copied into rows that do.
    """

    def __init__(self, inputs: Inputs, biased: bool, copied: bool) -> None:
        self.copied, self._biased = copied, biased
        q, u, v = inputs.q, inputs.content_bias, inputs.position_bias
        self._queries = None
        if biased and not (u is None and v is None):
            sample = _aligned_rows(q, device="meta") if copied else torch.empty_like(q, device="meta")
            B, H, T, D = q.shape
            self._queries = Buffer(sample)
            self._add_biases = Step(
                biased_queries_kernel,
                (cdiv(T, _BLOCK) * B * H,),
                {
                    "q_ptr": q,
                    "content_bias_ptr": u,
                    "position_bias_ptr": v,
                    "q_content_ptr": None if u is None else sample,
                    "q_position_ptr": None if v is None else sample,
                    **strides("q", "bhm", q),
                    **strides("o", "bhm", sample),
                    "H": H,
                    "T": T,
                    "ALIGNED": all_aligned((q, sample)),
                    "D": D,
                    "BLOCK_D": padded(D),
                    "BLOCK_M": _BLOCK,
                },
            )

    def tensors(self, inputs: Inputs, dout: Tensor | None = None) -> dict[str, Tensor | None]:
        """All of them by the names of the kernels' arguments; None where absent."""
        biases = contiguous(inputs.content_bias), contiguous(inputs.position_bias)
        if self._queries is None:
            return self._named(inputs, dout, biases)
        queries = [None if bias is None else self._queries.allocate(bias.device) for bias in biases]
        names = "content_bias_ptr", "position_bias_ptr", "q_content_ptr", "q_position_ptr"
        self._add_biases({"q_ptr": inputs.q, **dict(zip(names, (*biases, *queries), strict=True))})
        return self._named(inputs, dout, biases, queries)

    def samples(self, inputs: Inputs, dout: Tensor | None = None) -> dict[str, Tensor | None]:
        """Tensors that are laid out like those, without a launch."""
        biases = inputs.content_bias, inputs.position_bias
        if self.copied:
            inputs = inputs._replace(
                **{name: _row_sample(getattr(inputs, name)) for name in ("q", "k", "v", "r", "q_pos")}
            )
            dout = _row_sample(dout)
        if self._queries is None:
            return self._named(inputs, dout, biases)
        return self._named(inputs, dout, biases, [None if bias is None else self._queries.sample for bias in biases])

    def _named(
        self,
        inputs: Inputs,
        dout: Tensor | None,
        biases: Sequence[Tensor | None],
        queries: Sequence[Tensor | None] = (None, None),
    ) -> dict[str, Tensor | None]:
        """biases and queries (those with biases) are of content and of position."""
        q, k, v, r = inputs[:4]
        (q_content, q_position), q_pos, mask = queries, inputs.q_pos, inputs.attn_mask
        if self._queries is not None and r is not None and q_pos is None:
            q_pos = q if q_position is None else q_position
        q = q if q_content is None else q_content
        if self.copied:
            q, k, v, r, q_pos, dout = map(_in_aligned_rows, (q, k, v, r, q_pos, dout))
        return {
            "q_ptr": q,
            "k_ptr": k,
            "v_ptr": v,
            "r_ptr": r,
            "q_pos_ptr": q_pos,
            "do_ptr": dout,
            "content_bias_ptr": None if self._biased else biases[0],
            "position_bias_ptr": None if self._biased else biases[1],
            "r_bias_ptr": contiguous(inputs.r_bias),
            "segment_ptr": contiguous(inputs.segment_scores),
            "q_ids_ptr": contiguous(inputs.segment_q_ids),
            "k_ids_ptr": contiguous(inputs.segment_k_ids),
            "mask_ptr": mask.view(torch.uint8) if mask is not None and mask.dtype is torch.bool else mask,
            "lengths_ptr": contiguous(inputs.key_lengths),
            "seed_ptr": inputs.seed,
        }


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def all_aligned(tensors: Iterable[Tensor | None]) -> bool:
    """Whether every row of each starts on 16 bytes."""
    return all(x is None or _is_aligned(x) for x in tensors)


def _is_aligned(x: Tensor) -> bool:
    bits, itemsize = x.data_ptr(), x.element_size()
    for stride in x.stride()[:-1]:
        bits |= stride * itemsize
    return bits % 16 == 0


def _aligned_rows(x: Tensor, device: torch.device | str) -> Tensor:
    """A new tensor for x whose rows start on 16 bytes; what lies between them is never read."""
    width, step = x.shape[-1], 16 // x.element_size()
    return x.new_empty(*x.shape[:-1], step * cdiv(width, step), device=device)[..., :width]


def _row_sample(x: Tensor | None) -> Tensor | None:
    """x, or a tensor laid out like its copy in aligned rows."""
    return x if x is None or _is_aligned(x) else _aligned_rows(x, device="meta")


def _in_aligned_rows(x: Tensor | None) -> Tensor | None:
    return x if x is None or _is_aligned(x) else _aligned_rows(x, x.device).copy_(x)
