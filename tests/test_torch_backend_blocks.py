"""Narrow windows on a CPU: blocks of queries as the batch of one small problem."""

import pytest
import torch

from tests.contract import make_problem
from tests.torch_backend_tools import assert_right, backend_call, run, upstream
from txl_kernels.torch_backend import blocks, tiles

# left, right
WINDOWS = [(12, 0), (0, 0), (0, 9), (5, 7), (1, 0), (32, 0), (16, 16)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Several parts of several blocks, with two (batch, head) lanes."""
    monkeypatch.setattr(blocks, "PART_SCORES", 4 * 2 * blocks.ROWS * blocks.ROWS)


def cut_into(inputs, **options):
    """The parts of a call: whether each has blocks."""
    return [part.blocks > 1 for part in blocks.parts(*backend_call(inputs, **options))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", ["bhtd", "tbhd"])
@pytest.mark.parametrize("window", WINDOWS)
def test_windows(window, layout, dtype):
    inputs, options = make_problem({"bidirectional"}, 1, 2, T=150, M=9, D=8, dtype=dtype, layout=layout)
    options["window"] = window
    assert sum(cut_into(inputs, **options)) > 1
    assert_right(inputs, **options)


@pytest.mark.parametrize(
    "features",
    [{"softcap"}, {"position query"}, {"row bias"}, {"shared r"}, {"no r"}, {"band"}, {"grouped heads"},
     {"key lengths"}, {"softcap", "grouped heads", "band", "key lengths"}],
    ids="+".join,
)  # fmt: skip
@pytest.mark.parametrize("window", [(12, 0), (5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_features(features, window, dtype):
    inputs, options = make_problem(features | {"bidirectional"}, 2, 4, T=133, M=0, D=8, dtype=dtype)
    options["window"] = window
    assert any(cut_into(inputs, **options))
    assert_right(inputs, **options)


@pytest.mark.parametrize("T", [40, 44, 47, 48, 49, 60, 64, 300])
@pytest.mark.parametrize("M", [0, 3, 12, 13, 100])
def test_sizes(T, M):
    inputs, options = make_problem(set(), 1, 2, T=T, M=M, D=4, dtype=torch.float64)
    assert any(cut_into(inputs, **options, window=(12, 0))) == (32 + max(12 - M, 0) <= T)
    # Queries that fill no block stand in front: behind a causal window there are none.
    behind = blocks.parts(*backend_call(inputs, **options, window=(12, 0)))[1:]
    assert all((part.rows.stop - part.rows.start) % blocks.ROWS == 0 for part in behind)
    assert_right(inputs, **options, window=(12, 0))


@pytest.mark.parametrize("lengths", [[0, 100], [7, 93], [70, 71], [100, 50]])
def test_queries_beyond_the_lengths(lengths):
    """Zeros and -inf in whole blocks and within; NaN beyond the lengths reaches nothing."""
    inputs, options = make_problem({"bidirectional"}, 2, 2, T=100, M=0, D=8)
    options |= {"window": (6, 3), "key_lengths": torch.tensor(lengths)}
    first_key = (torch.arange(100) - 6).clamp(min=0)
    dead = first_key >= options["key_lengths"][:, None]
    clean = run(inputs, *upstream(inputs), **options)
    assert torch.equal(clean["lse"].isneginf(), dead[:, None].expand(-1, 2, -1))
    assert not clean["out"].transpose(1, 2)[dead].any()
    assert_right(inputs, **options)
    for b, length in enumerate(lengths):
        for name in "kv":
            inputs[name][b, :, length:] = float("nan")
    for name, x in run(inputs, *upstream(inputs), **options).items():
        assert torch.equal(x, clean[name]), name


def test_two_runs_give_the_same_bits():
    inputs, options = make_problem({"bidirectional", "key lengths"}, 3, 2, T=200, M=5, D=16)
    first, second = (run(inputs, *upstream(inputs), **options, window=(9, 4)) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_sums_over_parts_are_rounded_once(monkeypatch):
    """In float32 nothing but the results is rounded, so those of bfloat16 are the same, rounded."""
    monkeypatch.setattr(tiles, "cpu_multiplies_bfloat16", lambda: False)
    inputs, options = make_problem({"bidirectional", "row bias"}, 2, 2, T=300, M=0, D=8, dtype=torch.bfloat16)
    dout, dlse = upstream(inputs)
    in_float = {name: x.float() for name, x in inputs.items()}
    exact = run(in_float, dout.float(), dlse, **options, window=(9, 4))
    for name, x in run(inputs, dout, dlse, **options, window=(9, 4)).items():
        assert torch.equal(x, exact[name].to(x.dtype)), name


@pytest.mark.parametrize("features", [{"bool mask"}, {"float mask"}, {"segment"}, {"batched r"}])
def test_what_has_a_place_for_each_pair_or_batch_stays_whole(features):
    inputs, options = make_problem(features, 2, 2, T=100, M=0, D=8)
    assert not cut_into(inputs, **options, window=(9, 0))
    assert_right(inputs, **options, window=(9, 0))


def test_wide_windows_and_dropout_stay_whole():
    inputs, _ = make_problem(set(), 2, 2, T=100, M=0, D=8)
    assert not cut_into(inputs, window=(9, 0), dropout_p=0.1, seed=torch.tensor(1))
    assert cut_into(inputs, window=(blocks.WIDEST, 0))
    assert not cut_into(inputs, window=(blocks.WIDEST + 1, 0))
    assert not cut_into(inputs)
