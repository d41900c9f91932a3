"""A future that wraps (`wrap_future`) beside windows and at the edges; by itself it is a feature of the contract."""

import pytest
import torch

from reference.eager import rel_attention_eager
from tests.accuracy import make_inputs, outputs_and_gradients
from tests.contract import make_problem
from txl_kernels import rel_attention


def test_a_future_that_wraps_in_a_window_takes_half_the_head_size():
    inputs = make_inputs(1, 1, 2, 1, 129) | {"is_causal": False, "wrap_future": True}
    with pytest.raises(ValueError, match=r"^wrap_future: .*at most 128, got 129"):
        rel_attention(**inputs, window=(-1, 1))
    assert rel_attention(**inputs).shape == (1, 1, 2, 129)
    r_bias_alone = {name: inputs[name] for name in ("q", "k", "v")} | {"r": None, "r_bias": torch.zeros(1, 3)}
    options = {"is_causal": False, "wrap_future": True, "window": (-1, 1)}
    assert rel_attention(**r_bias_alone, **options).shape == (1, 1, 2, 129)


@pytest.mark.parametrize("window", [(-1, 3), (4, -1), (5, 2)])
@pytest.mark.parametrize("features", [(), ("row bias", "shared r"), ("position query", "row bias"), ("no r",)])
def test_a_future_that_wraps_in_a_window(features, window):
    inputs, options = make_problem({"wrapped future", *features}, T=6, M=3, D=5, dtype=torch.float64)
    dout, dlse = torch.ones_like(inputs["q"]), torch.ones_like(inputs["q"][..., 0])
    got, wanted = (
        outputs_and_gradients(function, inputs, dout, dlse, window=window, **options)
        for function in (rel_attention, rel_attention_eager)
    )
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_a_future_that_wraps_around_no_queries():
    inputs = make_inputs(2, 3, 0, 5, 8) | {"is_causal": False, "wrap_future": True}
    for window in (None, (2, 1)):
        assert rel_attention(**inputs, window=window).shape == (2, 3, 0, 8)
