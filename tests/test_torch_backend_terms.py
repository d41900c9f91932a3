"""The torch backend with optional terms: gradients, queries without a key, NaN beyond the lengths, dropout."""

import itertools

import pytest
import torch

from tests.accuracy import INPUTS, assert_all_close_to_truth, make_inputs, truth_and_reference
from tests.contract import make_problem
from tests.test_dropout import keep
from tests.torch_backend_tools import EVERYTHING, assert_right, run, upstream
from txl_kernels import rel_attention
from txl_kernels.torch_backend import tiles


@pytest.mark.parametrize("wanted", INPUTS)
def test_each_gradient_alone_with_features(wanted, tiling):
    problems = [make_problem(features) for features in EVERYTHING]
    problems += [make_problem({"float mask", "segment", "softcap"})]
    inputs, options = next((x, y) for x, y in problems if wanted in x)
    dout, dlse = upstream(inputs)
    alone = run(inputs, dout, dlse, wanted=(wanted,), **options)
    assert torch.equal(alone[wanted], run(inputs, dout, dlse, **options)[wanted])


@pytest.mark.parametrize("features", [{"bool mask"}, {"float mask"}, {"key lengths"}, {"key lengths", "window"}])
def test_dead_queries(features, tiling):
    """Exactly 0, -inf and no gradient, whatever comes down to them."""
    inputs, options = make_problem(features)
    dout, dlse = upstream(inputs)
    dead = run(inputs, **options)["lse"] == float("-inf")
    assert dead.any()
    clean = run(inputs, dout.masked_fill(dead[..., None], 0), dlse.masked_fill(dead, 0), **options)
    dout, dlse = dout.masked_fill(dead[..., None], float("nan")), dlse.masked_fill(dead, float("nan"))
    got = run(inputs, dout, dlse, **options)
    assert torch.equal(got["out"][dead], torch.zeros_like(got["out"][dead]))
    assert torch.equal(got["q"][dead], torch.zeros_like(got["q"][dead]))
    for name in got:
        assert torch.equal(got[name], clean[name]), name


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("features", [set(), {"bidirectional", "float mask"}, {"window", "softcap", "grouped heads"}])
def test_nan_beyond_the_lengths_reaches_nothing(features, on_host, tiling, monkeypatch):
    """On the host keys are cut off; on a device, whose lengths are not read, they are masked."""
    inputs, options = make_problem(features | {"key lengths"}, B=3)
    options["key_lengths"] = torch.tensor([17, 30, 0])
    dout, dlse = upstream(inputs)
    truth, reference = truth_and_reference(inputs, dout, dlse, **options)
    for name, b in itertools.product("kv", range(3)):
        inputs[name] = inputs[name].clone()
        inputs[name][b, :, options["key_lengths"][b] :] = float("nan")
    if not on_host:
        monkeypatch.setattr(tiles.terms, "lengths_on_host", lambda inputs: inputs.key_lengths is None)
    assert_all_close_to_truth(run(inputs, dout, dlse, **options), truth, reference)


@pytest.mark.parametrize(("T", "M", "window", "lengths"), [(20, 0, (2, 0), [5, 15]), (33, 16, (1, 33), [37, 27])])
def test_dead_queries_of_a_window_beyond_the_lengths(T, M, window, lengths, tiling):
    """In tiles that have keys, for other queries."""
    inputs, options = make_problem(frozenset(), H=2, T=T, M=M, D=4)
    options |= {"window": window, "key_lengths": torch.tensor(lengths)}
    assert_right(inputs, **options)
    assert (run(inputs, **options)["lse"] == -torch.inf).any()


# Dropout


def test_dropout_mask_of_the_operator(tiling):
    """With values that pick single keys the output is the dropped weights."""
    B, H, T, M = 2, 3, 20, 5
    inputs = make_inputs(B, H, T, M, T + M, is_causal=False)
    inputs["v"] = torch.eye(T + M).expand(B, H, -1, -1)
    got = run(inputs, is_causal=False, dropout_p=0.4, seed=torch.tensor(77))["out"]
    assert torch.equal(got != 0, keep(0.4, B, H, T, T + M, seed=77))


@pytest.mark.parametrize("features", [set(), {"grouped heads", "segment"}, {"bool mask", "window"}, {"key lengths"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dropout(features, dtype, tiling):
    inputs, options = make_problem(features, dtype=dtype)
    (B, H, T, _), S = inputs["q"].shape, inputs["k"].shape[2]
    dout, dlse = upstream(inputs)
    with_mask = {"kept": keep(0.3, B, H, T, S, seed=5), "dropout_p": 0.3}
    truth, reference = truth_and_reference(inputs, dout, dlse, **options, **with_mask)
    got = run(inputs, dout, dlse, dropout_p=0.3, seed=torch.tensor(5), **options)
    if dtype == torch.float64:
        for name in truth:
            torch.testing.assert_close(got[name], truth[name], rtol=1e-12, atol=1e-12)
    else:
        assert_all_close_to_truth(got, truth, reference)


def test_dropout_repeats_with_the_seed():
    inputs = make_inputs(2, 2, 20, 9, 8)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(rel_attention(**inputs, dropout_p=0.5, backend="torch"))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
