"""DI-engine's attention before and after `patch`: alone, and in GTrXL with memory over several segments.

The package's file is the installed one, imported without the rest of DI-engine.
"""

import copy
import pickle

import pytest
import torch

import txl_kernels
from tests.patching.loading import skip_without
from tests.patching.tools import (
    assert_alike,
    assert_nothing_quadratic,
    assert_own_method,
    assert_same_dropout,
    assert_same_under_autocast,
    assert_same_when_patched,
    copied,
    randomized,
    results,
)
from txl_kernels.per_mask import once_per_mask

skip_without("ding")
from tests.patching import ding_package as ding  # noqa: E402

C, D, H = 24, 16, 2


def make_attention(dropout: torch.nn.Module | None = None) -> torch.nn.Module:
    return randomized(ding.AttentionXL(C, D, H, dropout or torch.nn.Identity()))


def attention_inputs(T: int, M: int, B: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    shapes = {"inputs": (T, B, C), "pos_embedding": (M + T, 1, C), "full_input": (M + T, B, C)}
    shapes |= {"u": (H, D), "v": (H, D)}
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def causal(T: int, M: int) -> torch.Tensor:
    """(T, S, 1), True where hidden, made as GTrXL does."""
    return torch.triu(torch.ones(T, M + T), diagonal=1 + M).bool().unsqueeze(-1)


def make_model(layers: int = 2, M: int = 6, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return randomized(ding.GTrXL(8, D, C, H, 2, layers, M, **options))


def segments(n: int = 3, T: int = 5, B: int = 2) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(2)
    return torch.randn(n, T, B, 8).unbind()


def run_segments(model, **inputs):
    """Memory carried along from zeros; the outputs of all segments, and the memory after them."""
    model.reset_memory(batch_size=inputs["x0"].shape[1])
    outputs = [model(x)["logit"] for x in inputs.values()]
    return torch.cat(outputs)


@pytest.mark.parametrize(("T", "M"), [(5, 6), (5, 0), (1, 6), (1, 0), (5, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention(T, M, dtype):
    model = make_attention().to(dtype)
    mask = causal(T, M)
    assert_same_when_patched(model, lambda m, **x: m(**x, mask=mask), attention_inputs(T, M, dtype=dtype))


def test_other_masks():
    """One for each sequence, that hides some of the memory as well; a query that sees nothing gets zeros, not NaN."""
    mask = causal(5, 6).repeat(1, 1, 2)
    mask[:, :2, 1] = True
    assert_same_when_patched(make_attention(), lambda m, **x: m(**x, mask=mask), attention_inputs(5, 6))
    mask = mask.clone()
    mask[2, :, 1] = True
    model, inputs = copied(make_attention()), attention_inputs(5, 6)
    got = results(model, lambda m, **x: m(**x, mask=mask), inputs)
    assert torch.equal(got.outputs[0][2, 1], model.project[0].bias)
    assert all(gradient.isfinite().all() for gradient in got.gradients.values())


@pytest.mark.parametrize("M", [6, 0])
@pytest.mark.parametrize("masked", [False, True])
def test_a_visible_future(M, masked, monkeypatch):
    """Its distances wrap around; a mask may hide some of it."""
    monkeypatch.setattr("txl_kernels.patching.families.ding.warn_own", None)
    mask = None
    if masked:
        mask = torch.zeros(5, M + 5, 2, dtype=torch.bool)
        mask[1, 2:4] = mask[3, -1, 0] = True
    assert_same_when_patched(make_attention(), lambda m, **x: m(**x, mask=mask), attention_inputs(5, M))


def test_a_visible_future_with_wide_heads_comes_from_its_own_method():
    model, inputs = randomized(ding.AttentionXL(C, 129, 1, torch.nn.Identity())), attention_inputs(5, 6)
    inputs |= {"u": torch.randn(1, 129), "v": torch.randn(1, 129)}
    assert_own_method(model, lambda model: model(**inputs), "AttentionXL: a head size above 128")


def test_a_window():
    """The same number of keys for every query."""
    mask = causal(5, 6) | (torch.arange(11) < torch.arange(5)[:, None])[..., None]
    assert_same_when_patched(make_attention(), lambda m, **x: m(**x, mask=mask), attention_inputs(5, 6))


def test_without_mask_one_query_sees_everything(monkeypatch):
    monkeypatch.setattr("txl_kernels.patching.families.ding.warn_own", None)
    assert_same_when_patched(make_attention(), lambda m, **x: m(**x), attention_inputs(1, 6))


def test_dropout():
    model, inputs = make_attention(torch.nn.Dropout(0.3)).train(), attention_inputs(3, 4)
    assert_same_dropout(model, lambda m: m(**inputs, mask=causal(3, 4)))


def test_unknown_dropout_is_left_alone():
    report = txl_kernels.patch(make_attention(torch.nn.AlphaDropout(0.1)))
    assert report.left_alone[0].reason == "dropout: expected Dropout or Identity, got AlphaDropout"


@pytest.mark.parametrize(
    "options", [{}, {"M": 3}, {"gru_gating": False, "use_embedding_layer": False, "activation": torch.nn.Tanh()}]
)
def test_model_with_memory_over_segments(options):
    model = make_model(**options)
    inputs = {f"x{i}": x for i, x in enumerate(segments())}
    if "use_embedding_layer" in options:
        inputs = {name: torch.randn(5, 2, C) for name in inputs}
    unpatched = copy.deepcopy(model)
    report = assert_same_when_patched(model, run_segments, inputs)
    assert report.patched == ("layers.0.attention", "layers.1.attention")
    run_segments(unpatched, **inputs)
    assert_alike("memory", model.get_memory(), unpatched.get_memory(), 3e-5)


def test_segments_of_other_lengths_and_batch_first():
    """Each length has a mask of its own, down to one step at a time, as agents act."""
    model = make_model()
    torch.manual_seed(3)
    inputs = {f"x{i}": torch.randn(2, T, 8) for i, T in enumerate((5, 1, 1, 7))}

    def run(model, **inputs):
        model.reset_memory(batch_size=2)
        return torch.cat([model(x, batch_first=True, return_mem=False)["logit"] for x in inputs.values()], 1)

    assert_same_when_patched(model, run, inputs)


def test_autocast():
    model, inputs = make_model(), {f"x{i}": x for i, x in enumerate(segments())}
    assert_same_under_autocast(model, lambda model: run_segments(model, **inputs))


def test_masks_are_read_once_for_all_layers_and_segments(monkeypatch):
    reads = []
    read = txl_kernels.layer_mask._read.__wrapped__
    counted = once_per_mask(lambda *x: reads.append(1) or read(*x))
    monkeypatch.setattr(txl_kernels.layer_mask, "_read", counted)
    run_segments(copied(make_model(3)), **{f"x{i}": x for i, x in enumerate(segments(4))})
    assert len(reads) == 1


def test_copies_and_pickles_of_a_model_that_has_memory():
    model, inputs = make_model(), {f"x{i}": x for i, x in enumerate(segments())}
    keys = model.state_dict().keys()
    run_segments(model, **inputs)
    patched = copied(model)
    assert patched.state_dict().keys() == keys
    for again in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        assert "AttentionXL[txl_kernels]" in str(again)
        assert torch.equal(again(inputs["x0"])["logit"], copy.deepcopy(patched)(inputs["x0"])["logit"])


def test_nothing_quadratic_is_made():
    """Only GTrXL's own mask, one byte a pair and kept for later forwards, does."""
    model = make_attention()

    def step(model, T):
        inputs, mask = attention_inputs(T, T), causal(T, T)
        model(**inputs, mask=mask)  # reads the mask
        return lambda: model(**inputs, mask=mask).sum().backward()

    assert_nothing_quadratic(model, step, 400)
