"""The workspace of the backward pass: ds for a range of pairs at a time, in the dtype of the inputs.

The dk/dv kernel makes ds, the gradients of the scores; the dq and dr kernels multiply them: with keys as ds[i, j], and
with rows of r as ds_raw[i, p], p = j - i + rel_offset. That is the same memory with rows one element longer: the
rel-shift of the gradient costs nothing but loads that do not start on 16 bytes. So the backward has 9 products of a
pair (10 where tiles touch two blocks of r for their keys), in place of the 17 of three kernels that each make ds anew.
Ranges run one after the other, so sums over them have one order.
"""

from collections.abc import Iterator
from typing import NamedTuple

# Bytes of the workspace, exceeded by no more than what whole tiles take.
WORKSPACE = 64 << 20
# Queries of a range, where there are as many. Few, so that many (batch, head) pairs and keys fill the GPU in each; but
# dk and dv are read and written once for each range of queries.
QUERIES = 512
# Ranges of queries and keys start at multiples of it; no tile is larger.
ALIGNMENT = 128


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

    A range has as many pairs as the workspace holds: first up to QUERIES queries, then keys, then heads, then batch
    elements. Their queries divide T evenly.
    """
    return [
        Range(*batches, *heads, *queries, *keys)
        for queries in _spans(0, T, _even(T, QUERIES))
        for keys in _keys(queries, S, begin, reach, itemsize)
        for batches, heads in _lanes(B, H, WORKSPACE // (itemsize * (queries[1] - queries[0]) * (keys[1] - keys[0])))
    ]


def _keys(queries: tuple[int, int], S: int, begin: int | None, reach: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Ranges of the keys that some of the queries sees."""
    i_first, i_last = queries
    first = 0 if begin is None else _down(max(0, i_first + begin), ALIGNMENT)
    last = min(S, i_last - 1 + reach)
    most = max(1, WORKSPACE // (itemsize * (i_last - i_first)))
    return _spans(first, last, _even(last - first, most))


def _lanes(B: int, H: int, most: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Ranges of batch elements and of heads with at most so many pairs, but one."""
    for batches in _spans(0, B, max(1, most // H)):
        for heads in _spans(0, H, min(H, max(1, most))):
            yield batches, heads


def _even(size: int, most: int) -> int:
    """The length of equal parts of at most about `most`, a multiple of ALIGNMENT."""
    parts = max(1, -(-size // most))
    return max(ALIGNMENT, _up(-(-size // parts), ALIGNMENT))


def _spans(first: int, last: int, step: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + step, last)) for start in range(first, last, step))


def _down(x: int, multiple: int) -> int:
    return x // multiple * multiple


def _up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
