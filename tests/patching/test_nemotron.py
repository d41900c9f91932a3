"""Nemotron ASR streaming of Hugging Face before and after `patch`."""

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
    copied,
    randomized,
    results,
    states_and_weights,
)
from txl_kernels.patching import replacement

transformers = pytest.importorskip("transformers", reason="transformers is not installed: the extra families")

C, MELS = 32, 16


def make_encoder(implementation: str = "sdpa", **options) -> torch.nn.Module:
    """Of two layers, without dropout; chunks of 4 frames that see one chunk before their own."""
    sizes = {"hidden_size": C, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 24}
    sizes |= {"num_mel_bins": MELS, "subsampling_conv_channels": 8, "conv_kernel_size": 5}
    sizes |= {"sliding_window": 8, "default_num_lookahead_tokens": 3}
    no_dropout = {"dropout": 0.0, "dropout_positions": 0.0, "layerdrop": 0.0, "attention_dropout": 0.0}
    no_dropout |= {"activation_dropout": 0.0}
    config = transformers.NemotronAsrStreamingEncoderConfig(**(sizes | no_dropout | options))
    config._attn_implementation = implementation
    torch.manual_seed(0)
    return randomized(transformers.NemotronAsrStreamingEncoder(config)).eval()


def batch(frames: int = 200, shortest: float = 0.9, B: int = 3) -> dict[str, torch.Tensor]:
    """Padded features; where the last sequence is much shorter, some of its padded frames see nothing."""
    torch.manual_seed(1)
    mask = torch.arange(frames) < torch.linspace(frames, frames * shortest, B).long()[:, None]
    return {"input_features": torch.randn(B, frames, MELS), "attention_mask": mask}


def states(model, **inputs):
    return model(**inputs).last_hidden_state


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_bias": False, "scale_input": False},
        {"default_num_lookahead_tokens": 0},  # chunks of one frame
        {"sliding_window": 71, "default_num_lookahead_tokens": 13},  # that reach farther than the sequence is long
        {"sliding_window": 6},  # one that is no multiple of the chunks
        {"sliding_window": 3},  # frames see their own chunk alone
    ],
)
def test_padded_batch(options):
    report = assert_same_when_patched(make_encoder(**options), states, batch())
    assert report.patched == ("", "layers.0.self_attn", "layers.1.self_attn")


@pytest.mark.parametrize("lookahead", [0, 1, 6])
def test_lookahead_of_the_call(lookahead):
    run = lambda model, **inputs: states(model, num_lookahead_tokens=lookahead, **inputs)  # noqa: E731
    assert_same_when_patched(make_encoder(), run, batch())


def test_all_frames_before():
    """A sliding window of 0 is a context of -1: no bound."""
    assert_same_when_patched(make_encoder(sliding_window=0), states, batch())


def test_without_mask_and_in_training_mode():
    inputs = {"input_features": batch()["input_features"]}
    assert_same_when_patched(make_encoder().train(), states, inputs)


def test_double_precision():
    inputs = batch()
    inputs["input_features"] = inputs["input_features"].double()
    assert_same_when_patched(make_encoder().double(), states, inputs)


def test_frames_that_see_nothing_get_zeros():
    """And, in the convolution, count as padding, which other padded frames do not."""
    model, inputs = make_encoder(), batch(shortest=0.2)
    wanted = model(**inputs)
    unseeing = wanted.last_hidden_state.shape[1] - wanted.attention_mask.sum(1)
    assert unseeing.max() > 8  # some are more than two chunks behind the last frame
    patched = copied(model)
    for grad_mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with grad_mode():
            got = patched(**inputs)
            assert_alike("states", got.last_hidden_state, wanted.last_hidden_state.detach(), 3e-5)
            assert torch.equal(got.attention_mask, wanted.attention_mask)
    gradients = results(patched, states, inputs).gradients
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_dense_masks_of_one_s_own_are_served():
    attention = make_encoder().layers[0].self_attn
    torch.manual_seed(2)
    mask = torch.rand(2, 1, 9, 9) < 0.5
    mask[0, 0, 4] = False  # sees nothing: zeros
    inputs = {"x": torch.randn(2, 9, C), "positions": torch.randn(2, 17, C)}
    valid = mask.any(-1).squeeze(1)[..., None]
    assert_same_when_patched(attention, lambda m, x, positions: m(x, positions, mask)[0], inputs, valid)
    out, _ = attention(inputs["x"], inputs["positions"], mask)
    assert torch.equal(out[0, 4], attention.o_proj.bias)


@pytest.mark.parametrize("B", [1, 2])
def test_streaming_with_caches(B):
    """Six chunks of four frames: the cache of keys and values fills, and then slides."""
    torch.manual_seed(1)
    chunks = torch.randn(6, B, 32, MELS)

    def stream(model):
        out, caches = [], {}
        for chunk in chunks:
            got = model(chunk, use_cache=True, num_lookahead_tokens=3, **caches)
            caches = {"past_key_values": got.past_key_values, "padding_cache": got.padding_cache}
            out.append(got.last_hidden_state)
        keys = [layer.keys for layer in got.past_key_values.layers]
        return (torch.cat(out, 1), *keys)

    report = assert_same_when_patched(make_encoder(), stream, {})
    assert len(report.patched) == 3
    assert [x.shape[2] for x in stream(make_encoder())[1:]] == [7, 7]  # of 24 frames


def test_autocast():
    model, inputs = make_encoder(), batch()
    assert_same_under_autocast(model, lambda model: states(model, **inputs))


def test_dropout_of_attention():
    attention = make_encoder(attention_dropout=0.3).layers[0].self_attn.train()
    torch.manual_seed(2)
    x, positions = torch.randn(2, 9, C), torch.randn(1, 17, C).expand(2, -1, -1)
    assert_same_dropout(attention, lambda module: module(x, positions)[0])


def test_dropout_of_positions_differs_between_sequences():
    def seeded(model, **inputs):
        torch.manual_seed(3)
        return states(model, **inputs)

    assert_same_when_patched(make_encoder(dropout_positions=0.5).train(), seeded, batch())


def test_layers_left_out():
    """The same ones, as the generator gives the same numbers."""

    def seeded(model, **inputs):
        torch.manual_seed(1)  # of the two layers, the second
        return states(model, **inputs)

    model = make_encoder(layerdrop=0.5).train()
    whole = states(make_encoder(), **batch())
    assert not torch.equal(seeded(model, **batch()), whole)
    assert_same_when_patched(model, seeded, batch())


def test_attention_weights_come_from_its_own_method():
    """Which, being "sdpa", gives none."""
    inputs = batch()
    run = lambda model: states_and_weights(model(**inputs, output_attentions=True))  # noqa: E731
    assert len(assert_own_method(make_encoder(), run, "NemotronAsrStreamingEncoderAttention: attention weights")) == 1


def test_hidden_states_are_recorded():
    model, inputs = make_encoder(), batch()
    wanted = model(**inputs, output_hidden_states=True).hidden_states
    got = copied(model)(**inputs, output_hidden_states=True).hidden_states
    assert len(got) == len(wanted) == 3
    for a, b in zip(got, wanted, strict=True):
        assert_alike("hidden states", a, b, 3e-5)


def test_eager_attention_is_left_alone(monkeypatch):
    model, inputs = make_encoder("eager"), batch()
    report = txl_kernels.patch(model)
    assert report.patched == ()
    assert len(report.left_alone) == 3
    assert all("_attn_implementation" in entry.reason for entry in report.left_alone)
    # nor is what was patched before it was chosen
    wanted, patched = states(model, **inputs), copied(make_encoder())
    patched.set_attn_implementation("eager")
    monkeypatch.setattr(replacement, "_warned", set())
    with pytest.warns(UserWarning, match="mask that is not bool"):
        assert torch.equal(states(patched, **inputs), wanted)


def test_a_patched_encoder_with_attention_of_its_own():
    """A class of which the encoder alone is patched, makes the mask that its attention wants."""
    model, inputs = make_encoder(), batch()
    wanted = states(model, **inputs)
    try:
        txl_kernels.patch(type(model))
        assert torch.equal(states(model, **inputs), wanted)
    finally:
        txl_kernels.unpatch(type(model))


def test_masks_are_read_once_for_all_layers():
    model, inputs = make_encoder(), batch()
    assert_reads_once(model, lambda model: states(model, **inputs))


def test_nothing_quadratic_is_made():
    """The mask of chunks included."""
    model = make_encoder(subsampling_factor=2, subsampling_conv_channels=2)

    def step(model, frames):
        inputs = batch(frames, 0.5, 2)
        return lambda: states(model, **inputs).sum().backward()

    assert_nothing_quadratic(model, step, 1200)


def test_compiled_in_one_graph():
    model, inputs = make_encoder(), batch(80)
    inputs["num_lookahead_tokens"] = 3
    wanted = states(model, **inputs)
    got = states(torch.compile(copied(model), fullgraph=True, backend="aot_eager"), **inputs)
    assert_alike("states", got, wanted, 3e-5)


def test_gradient_checkpointing():
    model = make_encoder().train()
    model.activation_checkpointing_enable()
    assert_same_when_patched(model, states, batch())


def test_a_model_on_the_encoder():
    config = transformers.NemotronAsrStreamingConfig(
        vocab_size=11, blank_token_id=10, decoder_hidden_size=16, encoder_config=make_encoder().config.to_dict()
    )
    model, inputs = randomized(transformers.NemotronAsrStreamingForRNNT(config)).eval(), batch()
    inputs["decoder_input_ids"] = torch.randint(10, (3, 1))
    wanted = model(**inputs).logits
    report = txl_kernels.patch(model, strict=True)
    assert "encoder.layers.0.self_attn" in report.patched
    assert_alike("logits", model(**inputs).logits, wanted, 3e-5)
