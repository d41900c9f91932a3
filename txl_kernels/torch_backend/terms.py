"""What few calls add between the sum of AC and BD and the output: segment, softcap, masks, dropout."""

import torch
from torch import Tensor

from txl_kernels import dropout
from txl_kernels.arguments import Inputs, Options

ALL = slice(None)
_tanh_backward = torch.ops.aten.tanh_backward.grad_input


class Terms:
    """The optional terms of one tile; slices say which batches, heads, query rows and keys it holds.

    The backward needs the tanh of the softcap: kept in a place, or made again.

    Attributes:
        dropout_scale: what the surviving weights are multiplied by.
    """

    def __init__(
        self,
        inputs: Inputs,
        options: Options,
        batches: slice,
        heads: slice,
        rows: slice,
        keys: slice,
        tanh: Tensor | None,
    ) -> None:
        self._inputs, self._options = inputs, options
        self._where = batches, heads, rows, keys
        self._mask = None if inputs.attn_mask is None else part(inputs.attn_mask, *self._where)
        self._tanh, self._differs, self._dropped = tanh, None, None
        if inputs.segment_scores is not None:
            q_ids, k_ids = inputs.segment_q_ids[batches, rows], inputs.segment_k_ids[batches, keys]
            self._differs = (q_ids[:, :, None] != k_ids[:, None])[:, None]
        self.dropout_scale = 1 / (1 - options.dropout_p)

    def finish(self, scores: Tensor, for_backward: bool = False) -> None:
        """Completes scale * (AC + BD), -inf where hidden, in place: (b, h, t, n)."""
        softcap = self._options.softcap
        if self._differs is not None:
            same, other = (self._inputs.segment_scores[self._where[:3]].to(scores.dtype) * self._options.scale).split(
                1, -1
            )
            scores += torch.where(self._differs, other, same)
        if softcap is not None:
            hidden = scores == -torch.inf
            if self._tanh is None and for_backward:
                self._tanh = torch.empty_like(scores)
            tanh = torch.tanh(scores.div_(softcap), out=scores if self._tanh is None else self._tanh)
            torch.mul(tanh, softcap, out=scores).masked_fill_(hidden, -torch.inf)
        if self._mask is not None:
            if self._mask.dtype == torch.bool:
                scores.masked_fill_(~self._mask, -torch.inf)
            else:
                scores += self._mask
        if (beyond := beyond_lengths(self._inputs, *self._where)) is not None:
            scores.masked_fill_(beyond[:, None, None], -torch.inf)

    def backward(self, dscores: Tensor, totals: dict[str, Tensor]) -> None:
        """Turns the gradient (b, h, t, n) of what finish made, in place, into that of what it was given.

        Gradients of a mask and of the segment scores are added to those of totals that are wanted.
        """
        if "attn_mask" in totals:
            total = part(totals["attn_mask"], *self._where)
            total += dscores.sum_to_size(total.shape)
        if self._tanh is not None:
            _tanh_backward(dscores, self._tanh, grad_input=dscores)
        if "segment_scores" in totals:
            hidden_by = (self._differs, ~self._differs)
            sums = [dscores.masked_fill(hidden, 0.0).sum(-1) for hidden in hidden_by]
            totals["segment_scores"][self._where[:3]] = torch.stack(sums, -1).mul_(self._options.scale)

    def drop(self, x: Tensor) -> Tensor:
        """x (b, h, t, n) with zeros where dropout strikes, in place."""
        if self._dropped is None:
            heads, p = self._inputs.q.shape[1], self._options.dropout_p
            self._dropped = dropout.kept(self._inputs.seed, *self._where, heads, p).logical_not_()
        return x.masked_fill_(self._dropped, 0.0)


def needed(inputs: Inputs, options: Options) -> bool:
    """Whether a call has any of these terms."""
    return (
        inputs.attn_mask is not None
        or inputs.segment_scores is not None
        or options.softcap is not None
        or options.dropout_p > 0
        or not lengths_on_host(inputs)
    )


def lengths_on_host(inputs: Inputs) -> bool:
    """Whether keys beyond the lengths can be cut off; elsewhere, reading the lengths would stall a device."""
    return inputs.key_lengths is None or inputs.key_lengths.device.type == "cpu"


def beyond_lengths(inputs: Inputs, batches: slice, heads: slice, rows: slice, keys: slice) -> Tensor | None:
    """Which keys lie beyond the lengths (b, n), where they are not cut off."""
    if lengths_on_host(inputs):
        return None
    return torch.arange(keys.start, keys.stop, device=inputs.q.device) >= inputs.key_lengths[batches, None]


def part(x: Tensor, *where: slice) -> Tensor:
    """x[where], but all of a dimension of size 1, which serves every index."""
    return cut(x, *[slice(None) if size == 1 else index for size, index in zip(x.shape, where, strict=False)])


def cut(x: Tensor, *where: slice) -> Tensor:
    """x[where]; where that is all of x, x itself, which takes a fraction of the time."""
    for size, index in zip(x.shape, where, strict=False):
        if index.start or (index.stop is not None and index.stop < size):
            return x[where]
    return x
