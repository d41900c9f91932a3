"""The reference held against the index-by-index definition, gradcheck and the original's golden values."""

import pytest
import torch

import reference
from reference.definition import rel_attention_definition
from reference.eager import rel_attention_eager, rel_attention_original
from reference.layer import RelPartialLearnableMultiHeadAttn
from tests.accuracy import assert_close_to_truth, make_inputs, outputs_and_gradients
from tests.contract import make_problem
from tests.layer_tools import GOLDEN_CASES, assert_golden, golden, run

# T, M, is_causal, P (None: as many as needed), first_distance (None: S - 1)
CASES = {
    "causal": (5, 0, True, None, None),
    "causal_memory": (3, 4, True, None, None),
    "causal_extra_rows": (3, 4, True, 9, None),
    "one_token": (1, 6, True, None, None),
    "one_token_alone": (1, 0, True, None, None),
    "bidirectional": (4, 0, False, None, None),
    "bidirectional_memory": (3, 4, False, None, None),
    "bidirectional_extra_rows": (3, 2, False, 11, None),
    "table_from_farther_away": (3, 2, False, 15, 9),
    "causal_band": (4, 5, True, 3, 4),  # distances 4, 3, 2 of 8 ... 0
    "bidirectional_band": (4, 3, False, 4, 2),  # distances 2 ... -1 of 6 ... -3
    "band_of_hidden_pairs": (3, 2, True, 2, -1),
    "band_out_of_reach": (3, 2, False, 2, 40),
}


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no_biases"])
@pytest.mark.parametrize("case", CASES)
def test_eager_is_the_definition(case, biases):
    T, M, is_causal, P, first_distance = CASES[case]
    inputs = make_inputs(2, 2, T, M, 3, P, torch.float64, is_causal=is_causal, biases=biases)
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(2, 2, T, 3, dtype=torch.float64, generator=generator)
    dlse = torch.randn(2, 2, T, dtype=torch.float64, generator=generator)
    options = {"is_causal": is_causal, "first_distance": first_distance}
    wanted = outputs_and_gradients(rel_attention_definition, inputs, dout, dlse, **options)
    got = outputs_and_gradients(rel_attention_eager, inputs, dout, dlse, **options)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("T", "M"), [(4, 3), (5, 0), (1, 6), (2, 0)])
def test_eager_and_definition_agree_on_a_future_that_wraps(T, M):
    inputs, options = make_problem({"wrapped future", "row bias"}, 2, 2, T, M, 3, torch.float64)
    dout = torch.randn(2, 2, T, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = outputs_and_gradients(rel_attention_definition, inputs, dout, **options)
    got = outputs_and_gradients(rel_attention_eager, inputs, dout, **options)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("T", "M"), [(4, 3), (5, 0), (1, 6)])
def test_original_layout_gives_the_same(T, M):
    inputs = make_inputs(2, 3, T, M, 4, dtype=torch.float64, layout="tbhd")
    dout = torch.randn(2, 3, T, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got, wanted = (outputs_and_gradients(f, inputs, dout) for f in (rel_attention_original, rel_attention_eager))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


def test_scale_multiplies_both_terms():
    inputs = make_inputs(1, 2, 4, 3, 5, dtype=torch.float64)
    wanted = rel_attention_definition(**inputs, scale=0.3)
    torch.testing.assert_close(rel_attention_eager(**inputs, scale=0.3), wanted, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(wanted, rel_attention_definition(**inputs))


@pytest.mark.parametrize(("is_causal", "P", "first_distance"), [(True, 5, 4), (False, 7, 4), (False, 3, 1)])
def test_gradcheck(is_causal, P, first_distance):
    inputs = make_inputs(1, 2, 3, 2, 2, P, torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]

    def attend(*tensors):
        return rel_attention_eager(*tensors, is_causal=is_causal, first_distance=first_distance, return_lse=True)

    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_stays_near_and_returns_float32_lse(dtype):
    inputs = make_inputs(2, 2, 17, 9, 8, dtype=dtype)
    out, lse = rel_attention_eager(**inputs, return_lse=True)
    truth_out, truth_lse = rel_attention_definition(**inputs, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    # scores reach about 10 here, so a score's own rounding is 10 eps and moves lse by as much
    eps = torch.finfo(dtype).eps
    assert (lse - truth_lse).abs().max() < 10 * eps
    assert (out - truth_out).abs().max() < 10 * eps * truth_out.abs().max()


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_layer_has_the_numbers_of_the_original(case):
    layer, inputs, numbers = golden(case, reference)
    assert_golden(run(layer, inputs, numbers["gout/output"], numbers["in/attn_mask"]), numbers)


def test_layer_masks():
    torch.manual_seed(0)
    T, M, B, C = 3, 2, 2, 8
    layer = RelPartialLearnableMultiHeadAttn(2, C, 4, dropout=0.0).double()
    w, mems, r = (torch.randn(n, b, C, dtype=torch.float64) for n, b in ((T, B), (M, B), (T + M, 1)))
    u, v = torch.randn(2, 2, 4, dtype=torch.float64)
    key_mask = torch.zeros(T + M, B, dtype=torch.bool)
    key_mask[1, 0] = True  # key 1 of batch element 0

    unmasked, masked = layer(w, r, u, v, None, mems), layer(w, r, u, v, key_mask, mems)
    assert torch.equal(layer(w, r, u, v, torch.zeros(T, T + M, 1), mems), unmasked)
    assert torch.equal(masked[:, 1], unmasked[:, 1])
    assert not torch.allclose(masked[:, 0], unmasked[:, 0])
    assert torch.equal(layer(w, r, u, v, key_mask.expand(T, T + M, B).byte(), mems), masked)


def test_error_policy_rejects_what_it_should():
    truth = torch.tensor([1.0, -2.0], dtype=torch.float64)
    reference = truth.float() + 1e-4
    assert_close_to_truth("out", truth.float() + 1.9e-4, truth, reference, 2)
    for wrong in (truth.float() + 2.1e-4, torch.tensor([1.0, float("nan")])):
        with pytest.raises(AssertionError, match=r"out: error"):
            assert_close_to_truth("out", wrong, truth, reference, 2)
    with pytest.raises(AssertionError, match=r"out: torch\.float64"):
        assert_close_to_truth("out", truth, truth, reference, 2)
    with pytest.raises(AssertionError, match="out: shape"):
        assert_close_to_truth("out", reference[:1], truth, reference, 2)
