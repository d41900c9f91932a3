"""The ranges that the backward pass goes through: every visible pair once, within the workspace."""

import pytest
import torch

from txl_kernels.triton_backend import ranges

PROBLEMS = {
    "one range": (2, 8, 100, 200, None, 101, 2),
    "batch elements": (60, 10, 150, 300, None, 151, 2),
    "queries": (4, 8, 2500, 3000, None, 501, 2),
    "few heads": (1, 1, 5000, 6000, None, 1001, 2),
    "heads": (1, 64, 600, 4000, None, 4000, 4),
    "keys": (1, 2, 512, 262144, None, 262144, 2),
    "window": (2, 2, 2000, 2500, 500 - 255, 501, 2),
    "window of both sides": (1, 3, 700, 700, -10, 31, 4),
    "one query": (3, 1, 1, 5000, None, 5000, 2),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_visible_pair_is_in_one_range(name):
    B, H, T, S, begin, reach, itemsize = PROBLEMS[name]
    lanes = torch.zeros(B, H)
    seen = torch.zeros(T, S, dtype=torch.int32)
    for part in ranges.ranges_of(B, H, T, S, begin, reach, itemsize):
        assert part.pairs * itemsize <= 1.25 * ranges.WORKSPACE
        assert part.i_first % ranges.ALIGNMENT == part.j_first % ranges.ALIGNMENT == 0
        assert part.i_last <= T
        assert part.j_first < part.j_last <= S
        lanes[part.b_first : part.b_last, part.h_first : part.h_last] += 1
        if part.b_first == part.h_first == 0:
            seen[part.i_first : part.i_last, part.j_first : part.j_last] += 1
    assert (lanes == lanes[0, 0]).all()
    i, j = torch.arange(T)[:, None], torch.arange(S)[None]
    visible = (j < i + reach) & (j >= i + (-T if begin is None else begin))
    assert (seen <= 1).all()
    assert (seen[visible] == 1).all()


def test_a_window_has_no_ranges_of_what_it_hides():
    parts = ranges.ranges_of(8, 8, 100_000, 100_000, -255, 1, 2)
    assert sum(part.pairs for part in parts) < 64 * 100_000 * (256 + ranges.QUERIES + 2 * ranges.ALIGNMENT)
