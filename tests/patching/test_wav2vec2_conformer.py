"""Wav2Vec2-Conformer, Wav2Vec2-BERT and the speech encoder of SeamlessM4T before and after `patch`."""

import pytest
import torch

import txl_kernels
from tests.patching.tools import (
    assert_alike,
    assert_nothing_quadratic,
    assert_own_method,
    assert_reads_once,
    assert_same_dropout,
    assert_same_under_autocast,
    assert_same_when_patched,
    assert_too_wide,
    copied,
    randomized,
    results,
    states_and_weights,
    training,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed: the extra families")

from transformers.models.seamless_m4t.modeling_seamless_m4t import SeamlessM4TSpeechEncoder  # noqa: E402

from txl_kernels.patching.families import wav2vec2_conformer  # noqa: E402

C, FEATURES = 32, 12
FAMILIES = ["Wav2Vec2Conformer", "Wav2Vec2Bert", "SeamlessM4T"]


def make_model(family: str, implementation: str = "sdpa", **options) -> torch.nn.Module:
    """Of two layers, without dropout, layers left out or SpecAugment."""
    sizes = {"hidden_size": C, "position_embeddings_type": "relative", "max_source_positions": 40}
    if family == "SeamlessM4T":
        sizes |= {
            "speech_encoder_layers": 2,
            "speech_encoder_attention_heads": 4,
            "speech_encoder_intermediate_size": 24,
        }
        sizes |= {"feature_projection_input_dim": FEATURES, "speech_encoder_dropout": 0.0, "add_adapter": False}
        sizes |= {"speech_encoder_layerdrop": 0.0, "adaptor_dropout": 0.0, "conv_depthwise_kernel_size": 5}
        config, make = transformers.SeamlessM4TConfig(**(sizes | options)), SeamlessM4TSpeechEncoder
    else:
        sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "layerdrop": 0.0}
        sizes |= {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0}
        sizes |= {"conformer_conv_dropout": 0.0, "conv_depthwise_kernel_size": 5, "apply_spec_augment": False}
        if family == "Wav2Vec2Bert":
            sizes |= {"feature_projection_input_dim": FEATURES}
        else:
            sizes |= {"conv_dim": (8, 8), "conv_stride": (3, 2), "conv_kernel": (4, 3), "num_feat_extract_layers": 2}
        config = getattr(transformers, f"{family}Config")(**(sizes | options))
        make = getattr(transformers, f"{family}Model")
    config._attn_implementation = implementation
    torch.manual_seed(0)
    return randomized(make(config)).eval()


def batch(family: str, T: int = 50, B: int = 3) -> dict[str, torch.Tensor]:
    """Padded inputs for T frames; the last sequence is a third as long as the first."""
    torch.manual_seed(1)
    length = 6 * T + 4 if family == "Wav2Vec2Conformer" else T
    mask = torch.arange(length) < torch.linspace(length, length // 3, B).long()[:, None]
    if family == "Wav2Vec2Conformer":
        return {"input_values": torch.randn(B, length), "attention_mask": mask.long()}
    return {"input_features": torch.randn(B, length, FEATURES), "attention_mask": mask.long()}


def in_training(model: torch.nn.Module) -> torch.nn.Module:
    if hasattr(model, "freeze_feature_encoder"):
        model.freeze_feature_encoder()  # it would make leaves of its inputs
    return training(model)


def states(model, **inputs):
    return model(**inputs).last_hidden_state


def encoded(model: torch.nn.Module, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Of an encoder; one of them edits its input in place, another returns a tensor."""
    out = model(x * 1.0, attention_mask=valid)
    return getattr(out, "last_hidden_state", out)


def attention_of(model) -> torch.nn.Module:
    return model.encoder.layers[0].self_attn


every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padded_batch(family, implementation):
    """T = 50 is beyond max_source_positions: the table of positions grows."""
    report = assert_same_when_patched(make_model(family, implementation), states, batch(family))
    assert report.patched == ("encoder", "encoder.layers.0.self_attn", "encoder.layers.1.self_attn")


@every_family
def test_without_mask_and_in_training_mode(family):
    inputs = batch(family, T=30)
    del inputs["attention_mask"]
    assert_same_when_patched(in_training(make_model(family)), states, inputs)


@every_family
def test_padding_in_front(family):
    """Such a mask is no matter of lengths."""
    model = make_model(family).encoder
    torch.manual_seed(2)
    valid = torch.arange(20) >= torch.tensor([0, 7])[:, None]
    inputs = {"x": torch.randn(2, 20, C), "valid": valid}
    assert_same_when_patched(model, encoded, inputs)


@every_family
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_sequence_of_nothing_but_padding_gets_the_mean_of_all_values(family, implementation):
    model = make_model(family, implementation).encoder
    valid = torch.arange(20) < torch.tensor([20, 0])[:, None]
    torch.manual_seed(2)
    x = torch.randn(2, 20, C)
    wanted = encoded(model, x, valid)
    for grad_mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with grad_mode():
            assert_alike("states", encoded(copied(model), x, valid), wanted.detach(), 3e-5)
    # the gradient of such rows is an artefact of rounding before patching; afterwards it is that of the mean
    gradients = results(copied(model), encoded, {"x": x, "valid": valid}).gradients
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@every_family
def test_double_precision(family):
    inputs = batch(family)
    name = next(iter(inputs))
    assert_same_when_patched(make_model(family).double(), states, inputs | {name: inputs[name].double()})


@every_family
def test_autocast(family):
    model, inputs = make_model(family), batch(family)
    assert_same_under_autocast(model, lambda model: states(model, **inputs))


@every_family
def test_dropout_of_attention(family):
    option = "speech_encoder_dropout" if family == "SeamlessM4T" else "attention_dropout"
    attention = attention_of(make_model(family, **{option: 0.3})).train()
    torch.manual_seed(2)
    x, positions = torch.randn(2, 9, C), torch.randn(1, 17, C)
    assert_same_dropout(attention, lambda module: module(x, relative_position_embeddings=positions)[0])


@every_family
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_dense_masks_of_one_s_own_are_served(family, kind):
    attention = attention_of(make_model(family, "sdpa" if kind == "bool" else "eager"))
    torch.manual_seed(2)
    seen = torch.rand(2, 1, 9, 9) < 0.5
    seen[0, 0, 4] = False  # sees nothing: the mean of all values
    mask = seen if kind == "bool" else torch.where(seen, torch.randn(2, 1, 9, 9), torch.finfo(torch.float32).min)
    inputs = {"x": torch.randn(2, 9, C), "positions": torch.randn(2, 17, C)}
    valid = seen.any(-1).squeeze(1)[..., None]
    assert_same_when_patched(attention, lambda m, x, positions: m(x, mask, positions)[0], inputs, valid)


@every_family
@pytest.mark.parametrize("where", ["call", "configuration"])
def test_attention_weights_come_from_its_own_method(family, where):
    asked = where == "configuration"
    model, inputs = make_model(family, "eager", output_attentions=asked), batch(family)
    options = {} if asked else {"output_attentions": True}
    run = lambda model: states_and_weights(model(**inputs, **options))  # noqa: E731
    assert len(assert_own_method(model, run, "SelfAttention: attention weights")) == 1 + 2


@pytest.mark.parametrize("family", ["Wav2Vec2Bert", "SeamlessM4T"])
def test_the_attention_of_adapters_has_no_positions_and_is_passed_over(family):
    model = make_model(family, add_adapter=True, num_adapter_layers=1)
    assert len(model.adapter.layers) == 1
    inputs = batch(family)
    report = assert_same_when_patched(
        model.double(), states, inputs | {"input_features": inputs["input_features"].double()}
    )
    assert not any("adapter" in entry.name for entry in report.entries)


@every_family
def test_other_positions_are_left_alone(family):
    model = make_model(family, position_embeddings_type="rotary")
    report = txl_kernels.patch(model)
    assert report.patched == ()
    assert {entry.reason for entry in report.left_alone} == {
        'position_embeddings_type: expected "relative", got "rotary"'
    }
    assert len(report.left_alone) == 3
    if family != "SeamlessM4T":  # whose configuration wants a string
        assert txl_kernels.patch(make_model(family, position_embeddings_type=None)).entries == ()


@every_family
def test_a_patched_class_serves_instances_with_other_positions(family):
    rotary, relative = make_model(family, position_embeddings_type="rotary"), make_model(family)
    inputs = batch(family)
    wanted = states(rotary, **inputs), states(relative, **inputs)
    encoder, attention = type(relative.encoder), type(attention_of(relative))

    def assert_unchanged():
        assert torch.equal(states(rotary, **inputs), wanted[0])
        assert_alike("states", states(relative, **inputs), wanted[1], 3e-5)

    try:
        txl_kernels.patch(encoder)  # alone, it has nothing to hand lengths to
        assert_unchanged()
        txl_kernels.patch(attention)
        assert_unchanged()
        txl_kernels.unpatch(encoder)  # and makes a dense mask, which the attention takes as well
        assert_unchanged()
    finally:
        for cls in (encoder, attention):
            txl_kernels.unpatch(cls)


@every_family
def test_masks_are_read_once_for_all_layers(family):
    model, inputs = make_model(family), batch(family)
    assert_reads_once(model, lambda model: states(model, **inputs))


@every_family
def test_nothing_quadratic_is_made(family):
    model = make_model(family).encoder

    def step(model, T):
        x, valid = torch.randn(2, T, C), torch.arange(T) < torch.tensor([T, T // 2])[:, None]
        return lambda: encoded(model, x, valid).sum().backward()

    assert_nothing_quadratic(model, step, 400)


@every_family
@pytest.mark.parametrize("prepared", [True, False])
def test_compiled_in_one_graph(family, prepared, monkeypatch):
    """Also where torch.compile meets a patched encoder first, as in a process that unpickled it."""
    model = copied(make_model(family).encoder)
    if not prepared:
        monkeypatch.setattr(wav2vec2_conformer, "_forwards", {})
    torch.manual_seed(2)
    x, valid = torch.randn(2, 20, C), torch.arange(20) < torch.tensor([20, 12])[:, None]
    with torch.no_grad():
        wanted = encoded(make_model(family).encoder, x, valid)
        torch._dynamo.reset()
        compiled = torch.compile(encoded, fullgraph=True, backend="aot_eager")
        assert_alike("states", compiled(model, x, valid), wanted, 3e-5)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_alike("states", compiled(model, x, valid), wanted, 3e-5)


@every_family
def test_gradient_checkpointing(family):
    model = in_training(make_model(family))
    model.activation_checkpointing_enable()
    assert_same_when_patched(model, states, batch(family))


def test_a_model_with_a_head():
    config = make_model("Wav2Vec2Bert").config
    config.vocab_size, config.pad_token_id = 11, 10
    model = randomized(transformers.Wav2Vec2BertForCTC(config)).eval()
    inputs = batch("Wav2Vec2Bert") | {"labels": torch.randint(1, 10, (3, 5))}
    wanted = model(**inputs).loss
    report = txl_kernels.patch(model, strict=True)
    assert "wav2vec2_bert.encoder.layers.1.self_attn" in report.patched
    assert_alike("loss", model(**inputs).loss, wanted, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_wide_heads(family):
    heads = "speech_encoder_attention_heads" if family == "SeamlessM4T" else "num_attention_heads"
    model = make_model(family, hidden_size=272, **{heads: 1})
    assert_too_wide(model, lambda m: states(m, **batch(family)), "head_size")


@pytest.mark.parametrize("family", ["Wav2Vec2Bert", "SeamlessM4T"])
def test_one_mask_for_all_sequences(family):
    """Without padding: their own code refuses others."""
    inputs = batch(family)
    inputs["attention_mask"] = inputs["attention_mask"][:1]
    assert_same_when_patched(make_model(family), states, inputs)
