"""The workspace of the backward pass: ds for a range of pairs at a time, in the dtype of the inputs.

The dk/dv kernel makes ds, the gradients of the scores; the dq and dr kernels multiply them: with keys as ds[i, j], and
with rows of r as ds_raw[i, p], p = j - i + rel_offset. That is the same memory with rows one element longer: the
rel-shift of the gradient costs nothing but loads that do not start on 16 bytes. So the backward has 9 products a pair,
in place of the 17 of three kernels that each make ds anew. Ranges run one after the other: sums have one order.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

# Bytes of the workspace, exceeded by no more than what whole tiles take.
WORKSPACE = 64 << 20
# Queries of a range, where there are as many, and twice as many keys; more where few (batch, head) pairs leave room.
# dq is read and written once for each range of keys, dk and dv once for each of queries; smaller ranges would have more
# of these, larger ones fewer programs for the GPU.
QUERIES = 1024
# Ranges of queries and keys start at multiples of it; no tile is larger.
ALIGNMENT = 128
# Batch elements of a range: the dr kernel may have them as the second dimension of its grid.
BATCHES = 65535


class Range(NamedTuple):
    """Batch elements, heads, queries and keys, each from the first up to, but without, the last."""

    b_first: int
    b_last: int
    h_first: int
    h_last: int
    i_first: int
    i_last: int
    j_first: int
    j_last: int

    @property
    def slots(self) -> int:
        """Its (batch, head) pairs."""
        return (self.b_last - self.b_first) * (self.h_last - self.h_first)

    @property
    def pairs(self) -> int:
        """Elements of the workspace that it takes: its keys are in whole tiles."""
        return self.slots * (self.i_last - self.i_first) * _up(self.j_last - self.j_first, ALIGNMENT)


def ranges_of(B: int, H: int, T: int, S: int, begin: int | None, reach: int, itemsize: int) -> list[Range]:
    """Ranges that hold every visible pair once; begin and reach as in primitives.py.

    Those of queries divide T evenly, those of keys the keys that some of these queries see.
    """
    most_pairs = WORKSPACE // itemsize
    queries_of = max(QUERIES, math.isqrt(most_pairs // (2 * B * H)))
    parts = []
    for i_first, i_last in _even(0, T, queries_of):
        T_part = i_last - i_first
        first = 0 if begin is None else max(0, i_first + begin) // ALIGNMENT * ALIGNMENT
        keys_of = min(max(2 * queries_of, most_pairs // (B * H * T_part)), most_pairs // T_part)
        for j_first, j_last in _even(first, min(S, i_last - 1 + reach), keys_of):
            lanes = _lanes(B, H, most_pairs // (T_part * (j_last - j_first)))
            parts += [Range(*batches, *heads, i_first, i_last, j_first, j_last) for batches, heads in lanes]
    return parts


def _lanes(B: int, H: int, most: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Ranges of batch elements and of heads with at most so many pairs, but one."""
    for batches in _spans(0, B, max(1, min(most // H, BATCHES))):
        for heads in _spans(0, H, min(H, max(1, most))):
            yield batches, heads


def _even(first: int, last: int, most: int) -> Iterator[tuple[int, int]]:
    """Equal parts of at most about `most`, in multiples of ALIGNMENT."""
    parts = max(1, -(-(last - first) // max(most, ALIGNMENT)))
    return _spans(first, last, _up(-(-(last - first) // parts), ALIGNMENT))


def _spans(first: int, last: int, step: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + step, last)) for start in range(first, last, step))


def _up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
