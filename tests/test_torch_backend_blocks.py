"""Narrow windows on a CPU: blocks of queries as the batch of one small problem."""

import itertools

import pytest
import torch

from tests.contract import make_problem
from tests.torch_backend_tools import assert_right, backend_call, run, upstream
from txl_kernels.torch_backend import blocks, kept_in, room, tiles

# left, right
WINDOWS = [(12, 0), (0, 0), (0, 9), (5, 7), (1, 0), (16, 16), (47, 0), (31, 32)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Two or three blocks of two heads."""
    monkeypatch.setattr(blocks, "PART_SCORES", 3 * 2 * blocks.ROWS * 2 * blocks.ROWS)


def cut_into(inputs, **options):
    """The parts of a call, none where it stays whole."""
    call = backend_call(inputs, **options)
    return blocks.parts(*call) if blocks.fits(*call) else []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", ["bhtd", "tbhd"])
@pytest.mark.parametrize("window", WINDOWS)
def test_windows(window, layout, dtype):
    inputs, options = make_problem({"bidirectional"}, 1, 2, T=165, M=9, D=8, dtype=dtype, layout=layout)
    options["window"] = window
    assert len(cut_into(inputs, **options)) > 1
    assert_right(inputs, **options)


@pytest.mark.parametrize(
    "features",
    [{"softcap"}, {"position query"}, {"row bias"}, {"shared r"}, {"no r"}, {"band"}, {"grouped heads"},
     {"grouped heads", "shared r"}, {"key lengths"}, {"softcap", "grouped heads", "band", "key lengths"},
     {"softcap", "position query", "row bias"}, {"no r", "grouped heads", "key lengths"}],
    ids="+".join,
)  # fmt: skip
@pytest.mark.parametrize("window", [(12, 0), (5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_features(features, window, dtype):
    inputs, options = make_problem(features | {"bidirectional"}, 2, 4, T=133, M=0, D=8, dtype=dtype)
    options["window"] = window
    assert cut_into(inputs, **options)
    assert_right(inputs, **options)


@pytest.mark.parametrize("window", [(12, 0), (5, 7)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_without_biases(softcap, window):
    """Queries of the content and of the position term are the same."""
    inputs, options = make_problem({"bidirectional"}, 2, 2, T=100, M=4, D=8, biases=False)
    assert_right(inputs, **options | {"window": window, "softcap": softcap})


@pytest.mark.parametrize("features", [set(), {"position query", "row bias", "softcap"}, {"no r"}], ids=str)
def test_any_choice_of_gradients(features):
    """Each is the same whether others are wanted or not."""
    inputs, options = make_problem(features, 1, 2, T=80, M=3, D=8)
    dout, dlse = upstream(inputs)
    everything = run(inputs, dout, dlse, **options, window=(9, 0))
    for wanted in itertools.chain(((name,) for name in inputs), itertools.combinations(inputs, 2)):
        got = run(inputs, dout, dlse, wanted=wanted, **options, window=(9, 0))
        for name in wanted:
            torch.testing.assert_close(got[name], everything[name])


@pytest.mark.parametrize("first_distance", [-90, -10, -1, 0, 12, 13, 86, 300])
def test_bands_of_other_distances(first_distance):
    """Pairs without a row of r have no position term, be it some of the window's or all."""
    inputs, options = make_problem({"band", "row bias", "bidirectional"}, 1, 2, T=80, M=0, D=8)
    assert_right(inputs, **options | {"window": (5, 7), "first_distance": first_distance})


@pytest.mark.parametrize("T", [63, 64, 65, 79, 80, 81, 300])
@pytest.mark.parametrize("M", [0, 3, 12, 13, 100])
def test_sizes(T, M):
    inputs, options = make_problem(set(), 1, 2, T=T, M=M, D=4, dtype=torch.float64)
    assert bool(cut_into(inputs, **options, window=(12, 0))) == (T >= 64)
    assert_right(inputs, **options, window=(12, 0))


@pytest.mark.parametrize("scores", [1, 10, 100])
def test_parts_have_each_query_with_a_key_once(scores, monkeypatch):
    """Those of neighbours of equal length are one, as far as it is no larger than wanted."""
    monkeypatch.setattr(blocks, "PART_SCORES", scores * 2 * blocks.ROWS * 2 * blocks.ROWS)
    inputs, options = make_problem({"bidirectional"}, 6, 2, T=100, M=0, D=8)
    lengths = torch.tensor([100, 100, 0, 37, 37, 100])
    cut = cut_into(inputs, **options, window=(6, 3), key_lengths=lengths)
    seen = torch.zeros(6, 100, dtype=torch.int64)
    for part in cut:
        seen[part.where[0], part.where[2]] += 1
        assert part.lanes <= 2 * (max(scores, 2) + 7)
    first_key = (torch.arange(100) - 6).clamp(min=0)
    assert torch.equal(seen, (first_key < lengths[:, None]).long())
    assert len(cut) == {1: 4 + 4 + 2 + 2 + 4, 10: 1 + 1 + 1 + 1, 100: 3}[scores]


@pytest.mark.parametrize("lengths", [[0, 100], [7, 93], [70, 71], [100, 50]])
def test_queries_beyond_the_lengths(lengths):
    """Zeros and -inf in whole blocks and within; NaN beyond the lengths reaches nothing."""
    inputs, options = make_problem({"bidirectional"}, 2, 2, T=100, M=0, D=8, seed=1)
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


@pytest.mark.parametrize("in_hardware", [True, False])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_weights_of_bfloat16_are_kept_as_they_are(softcap, in_hardware, monkeypatch):
    """In float32, whatever the dtype of products in tiles."""
    monkeypatch.setattr(tiles, "cpu_multiplies_bfloat16", lambda: in_hardware)
    inputs, options = make_problem({"bidirectional"}, 1, 2, T=150, M=0, D=8, dtype=torch.bfloat16)
    options |= {"window": (9, 4), "softcap": softcap}
    call = backend_call(inputs, **options)
    weights = room(*call)
    wanted = run(inputs, *upstream(inputs), **options)
    got = run(inputs, *upstream(inputs), weights=weights, **options)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    kept = kept_in(weights)
    assert all(part.places(kept)[2] for part in blocks.parts(*call))


@pytest.mark.parametrize("features", [{"bool mask"}, {"float mask"}, {"segment"}, {"batched r"}])
def test_what_has_a_place_for_each_pair_or_batch_stays_whole(features):
    inputs, options = make_problem(features, 2, 2, T=100, M=0, D=8)
    assert not cut_into(inputs, **options, window=(9, 0))
    assert_right(inputs, **options, window=(9, 0))


def test_wide_windows_and_dropout_stay_whole():
    inputs, _ = make_problem(set(), 2, 2, T=200, M=0, D=8)
    assert not cut_into(inputs, window=(9, 0), dropout_p=0.1, seed=torch.tensor(1))
    assert cut_into(inputs, window=(blocks.WIDEST, 0))
    assert not cut_into(inputs, window=(blocks.WIDEST + 1, 0))
    assert not cut_into(inputs)
