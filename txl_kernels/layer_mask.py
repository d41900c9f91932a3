"""What a mask of the original Transformer-XL says, in the arguments of `rel_attention`.

The original builds one mask per forward of the model and hands it to every layer. `rel_attention` hides the future,
and what is too far back, by index arithmetic, so the layer has only to know that the mask says nothing else. That
is found out once per mask object, from vectors of length T and M and with one copy to the host; for a mask that says
more, the copy tells whether it hides the future. For a mask (T, S, 1) of zeros and ones:

- the first hidden key of the segment, for query i, is i + 1, none for the last: its past in the segment is visible;
- the first query that sees key c of the segment is c: the future is hidden;
- the first key that query i sees is lo(i) = max(0, lo(T - 1) - (T - 1 - i)): what is farther back is hidden;
- the first query that memory key j is hidden from, if any, is the first i with lo(i) > j: what is nearer is visible.

So the mask is causal where lo(T - 1) = 0, and else the original's ``same_length``. One whose window is shorter than
the segment is not recognised and serves as a mask. Row sums would prove as much, but PyTorch sums bytes by
copying them to int64 first.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from txl_kernels.per_mask import once_per_mask, readable


class Visibility(NamedTuple):
    """Which keys a query sees.

    Attributes:
        window: as in `rel_attention`.
        attn_mask: (1|B, 1, 1|T, 1|S) bool, True = may attend, or None.
        future: whether keys of the query's future may be among them.
    """

    window: tuple[int, int] | None = None
    attn_mask: Tensor | None = None
    future: bool = False

    def within(self, window: tuple[int, int] | None) -> "Visibility":
        """What a window, as in `rel_attention`, leaves of it."""
        if window is None:
            return self
        if self.window is not None and not 0 <= window[0] < self.window[0]:
            window = (self.window[0], window[1])
        return self._replace(window=window)


def visibility(
    attn_mask: Tensor | None, T: int, S: int, B: int, batch_first: bool = False, reader: nn.Module | None = None
) -> Visibility:
    """Reads a mask of the original, once per mask object: layers that share one share the result.

    Synchronises once for a mask object, and again after an edit in place; once for each forward in which the layers
    that name themselves share an inference tensor, of which no edit shows. Under torch.compile, CUDA graph capture and
    on the meta device entries can't be read: then any mask serves as a mask, and its future may be visible.

    Args:
        attn_mask: None (causal), or (1|T, 1|S, 1|B), or for all queries alike (1|S, 1|B); bool or uint8,
            True or non-zero = hidden.
        T: Number of queries.
        S: Number of keys, S = M + T.
        B: Batch size.
        batch_first: Whether attn_mask is that of NVIDIA's version in place of these: (1|B, 1|T, 1|S), or for all
            sequences alike (1|T, 1|S).
        reader: The layer that asks.

    Raises:
        TypeError: attn_mask is not a bool or uint8 tensor.
        ValueError: Its shape is none of those above.
    """
    if attn_mask is None:
        return Visibility()
    if not isinstance(attn_mask, Tensor) or attn_mask.dtype not in (torch.bool, torch.uint8):
        got = attn_mask.dtype if isinstance(attn_mask, Tensor) else type(attn_mask).__name__
        raise TypeError(f"attn_mask: expected None or a bool or uint8 tensor, True or 1 = hidden, got {got}")
    hidden = _time_major(attn_mask, batch_first)
    if hidden.ndim != 3 or any(n not in (1, size) for n, size in zip(hidden.shape, (T, S, B), strict=True)):
        raise ValueError(
            f"attn_mask: expected None, (T, S, 1) = ({T}, {S}, 1), (T, S, B) = ({T}, {S}, {B}) or "
            f"(S, B) = ({S}, {B}), got shape {tuple(attn_mask.shape)}"
        )
    if not T * S * B:
        return Visibility()
    return _read(attn_mask, T, S, batch_first, reader=reader) if readable(attn_mask) else _as_mask(hidden, future=True)


def _as_mask(hidden: Tensor, future: bool) -> Visibility:
    return Visibility(attn_mask=hidden.logical_not().permute(2, 0, 1)[:, None], future=future)


def _time_major(attn_mask: Tensor, batch_first: bool) -> Tensor:
    hidden = attn_mask[None] if attn_mask.ndim == 2 else attn_mask
    return hidden.movedim(0, -1) if batch_first else hidden


@once_per_mask
def _read(attn_mask: Tensor, T: int, S: int, batch_first: bool) -> Visibility:
    hidden, M = _time_major(attn_mask, batch_first), S - T
    entries = hidden.view(torch.uint8).expand(T, S, -1)
    segment, memory = entries[:, M:], entries[:, :M]
    # argmin and argmax give the first of equal entries
    vectors = [segment.argmin(0), segment.amin(0)]
    if hidden.shape[2] == 1:
        vectors += [segment.amax(0), segment.argmax(1), entries.argmin(1), memory.argmax(0), memory.amax(0)]
    vectors = torch.cat([x.flatten().long() for x in vectors]).cpu()
    read = 2 * T * hidden.shape[2]
    first_query, unseen = vectors[:read].view(2, T, -1)
    query, key = torch.arange(T), torch.arange(M)
    if hidden.shape[2] == 1:
        left = S - 1 - int(vectors[read + 3 * T - 1])  # the last query is the one that sees farthest forward
        first_without = (key + left - M + 1).clamp(min=0)
        wanted = [query > 0, (query + 1) % T, (query + M - left).clamp(min=0)]
        wanted += [first_without * (first_without < T), first_without < T]
        if torch.equal(first_query[:, 0], query) and torch.equal(vectors[read:], torch.cat([x.long() for x in wanted])):
            return Visibility(window=None if left == S - 1 else (left, -1))
    hides_future = ((first_query >= query[:, None]) | (unseen > 0)).all()
    return _as_mask(hidden, future=not hides_future)
