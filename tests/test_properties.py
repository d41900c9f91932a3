"""Random problems with any combination of the optional arguments: the torch backend against the definition."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from reference.definition import rel_attention_definition
from reference.eager import rel_attention_eager
from tests.accuracy import outputs_and_gradients
from tests.contract import FEATURES, compatible, make_problem
from txl_kernels import rel_attention
from txl_kernels.torch_backend import tiles


def problems(draw):
    features = draw(st.sets(st.sampled_from(FEATURES), max_size=8).filter(compatible))
    sizes = {
        "B": draw(st.integers(1, 2)),
        "H": draw(st.sampled_from([1, 2, 4])),
        "T": draw(st.integers(1, 7)),
        "M": draw(st.integers(0, 7)),
        "D": draw(st.integers(1, 5)),
        "seed": draw(st.integers(0, 99)),
        "layout": draw(st.sampled_from(["bhtd", "tbhd"])),
        "biases": draw(st.booleans()),
    }
    return make_problem(frozenset(features), dtype=torch.float64, **sizes)


def check(data):
    """Outputs and every gradient, in float64, where they agree to rounding."""
    inputs, options = problems(data.draw)
    generator = torch.Generator().manual_seed(1)
    shape = inputs["q"].shape
    dout, dlse = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, shape[:3]))
    truth = outputs_and_gradients(rel_attention_definition, inputs, dout, dlse, **options)
    eager = outputs_and_gradients(rel_attention_eager, inputs, dout, dlse, **options)
    torch.testing.assert_close(eager, truth, rtol=1e-10, atol=1e-12)
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):
            patch.setattr(tiles, "TILE_SCORES", 12)
            patch.setattr(tiles, "MAX_ROWS", 3)
            patch.setattr(tiles, "MANY_ROWS", 0)
        got = outputs_and_gradients(rel_attention, inputs, dout, dlse, **options)
    torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-12)


@given(st.data())
@settings(max_examples=60, deadline=None, derandomize=True, phases=[Phase.generate])
def test_random_problems(data):
    check(data)


@pytest.mark.long
@given(st.data())
@settings(max_examples=1500, deadline=None, phases=[Phase.generate])
def test_many_random_problems(data):
    check(data)
