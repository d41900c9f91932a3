"""TransfoXL of Hugging Face before and after `patch`, in an environment with the last transformers that runs it."""

import pytest
import torch

import txl_kernels
from tests.golden import huggingface_lm
from tests.layer_tools import original_mask
from tests.patching.tools import (
    assert_alike,
    assert_own_method,
    assert_same_dropout,
    assert_same_when_patched,
    copied,
    largest_tensor,
    states_and_weights,
)

pytest.importorskip(
    "transformers.models.deprecated.transfo_xl.modeling_transfo_xl",
    reason="transformers has no TransfoXL: make test-transfo-xl",
)

T, B = 5, 2


def make(case: str = "plain") -> torch.nn.Module:
    return huggingface_lm.model_of(case)


def tokens(n: int = 3) -> torch.Tensor:
    return torch.randint(huggingface_lm.SIZES["vocab_size"], (n, B, T), generator=torch.Generator().manual_seed(1))


def three_segments(model, **inputs) -> tuple[torch.Tensor, ...]:
    """Log-probabilities of each segment; the memory goes along."""
    outputs, mems = [], None
    for ids in tokens():
        out = model(ids, mems=mems, **inputs)
        mems = out.mems
        outputs.append(out.prediction_scores)
    return tuple(outputs)


@pytest.mark.parametrize("case", huggingface_lm.CASES)
def test_three_segments(case):
    """Every case of the golden values: same_length, clamp_len, shared biases, LayerNorm in front, adaptive softmax."""
    report = assert_same_when_patched(make(case), three_segments, {})
    assert report.patched == ("transformer.layers.0.dec_attn", "transformer.layers.1.dec_attn")


@pytest.mark.parametrize("case", huggingface_lm.CASES)
def test_loss_and_memory(case):
    model = make(case)
    patched, mems = copied(model), {}
    for ids in tokens():
        wanted, got = (side(ids, mems=mems.get(side), labels=ids) for side in (model, patched))
        assert_alike("loss", got.losses, wanted.losses, 1e-5)
        for i, (x, y) in enumerate(zip(got.mems, wanted.mems, strict=True)):
            assert_alike(f"mems {i}", x, y, 1e-5) if y.any() else torch.testing.assert_close(x, y)
        mems = {model: wanted.mems, patched: got.mems}


def layer_inputs(layer, M: int = 4) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    C = layer.d_model
    return {"w": torch.randn(T, B, C), "r": torch.randn(M + T, 1, C), "mems": torch.randn(M, B, C)}


@pytest.mark.parametrize("kind", ["of a batch", "keys", "none", "of integers"])
def test_masks_of_one_s_own(kind):
    layer, M = make().transformer.layers[0].dec_attn, 4
    causal = original_mask(T, M)
    of_a_batch = causal | (torch.rand(T, M + T, B, generator=torch.Generator().manual_seed(3)) < 0.4)
    mask = {"of a batch": of_a_batch, "keys": of_a_batch[0], "none": None, "of integers": causal.long()}[kind]
    valid = None
    if mask is not None and mask.ndim == 3:
        valid = ~mask.all(1)[..., None].expand(T, B, 1)
    assert_same_when_patched(layer, lambda layer, **x: layer(**x, attn_mask=mask)[0], layer_inputs(layer), valid)


def test_a_query_without_a_key_gets_the_mean_of_all_values():
    """As where same_length meets a memory of length 0."""
    layer, mask = make().transformer.layers[0].dec_attn, original_mask(T, 4)
    mask[2] = True
    inputs = layer_inputs(layer)
    assert_alike("states", copied(layer)(**inputs, attn_mask=mask)[0], layer(**inputs, attn_mask=mask)[0], 3e-5)


def test_dropout():
    layer = make().transformer.layers[0].dec_attn
    layer.dropatt.p, inputs, mask = 0.3, layer_inputs(layer), original_mask(T, 4)
    layer.dropatt.train()
    assert_same_dropout(layer, lambda layer: layer(**inputs, attn_mask=mask)[0])


def test_training_mode_and_autocast():
    model = make()
    truth = three_segments(model)[2]
    patched = copied(model)
    with torch.autocast("cpu", torch.bfloat16):
        before, after = three_segments(model)[2], three_segments(patched)[2]
    assert before.dtype == after.dtype
    worst = [(x.float() - truth).abs().max().item() for x in (before, after)]
    assert worst[1] <= 2 * worst[0]
    for module in (*model.modules(), *patched.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert_alike("scores", three_segments(patched.train())[2], three_segments(model.train())[2], 3e-5)


def test_weights_and_head_masks_come_from_its_own_method():
    ids, name = tokens()[0], "RelPartialLearnableMultiHeadAttn"
    run = lambda model: states_and_weights(model.transformer(ids, output_attentions=True))  # noqa: E731
    assert len(assert_own_method(make(), run, f"{name}: attention weights")) == 1 + 2
    run = lambda model: model.transformer(ids, head_mask=torch.tensor([1.0, 0.0])).last_hidden_state  # noqa: E731
    assert_own_method(make(), run, f"{name}: a head mask")


def test_the_model_is_found_by_its_own_family():
    report = txl_kernels.patch(make())
    assert {entry.reason for entry in report.entries} == {"attention weights, head masks"}


def test_nothing_of_T_by_T_but_the_model_s_mask():  # noqa: N802
    """Its mask is a byte for a query and a key, made once for all layers, sequences and heads."""
    model = make().transformer
    model.same_length, model.mem_len = False, 0
    T = 1024
    ids = torch.ones(B, T, dtype=torch.long)

    def step(model):
        return lambda: model(ids).last_hidden_state.sum().backward()

    assert largest_tensor(step(copied(model))) <= T * T
    assert largest_tensor(step(model)) >= 4 * B * 2 * T * T  # or the measurement would show nothing
