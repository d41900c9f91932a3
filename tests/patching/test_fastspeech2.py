"""FastSpeech2-Conformer of Hugging Face before and after `patch`."""

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
    training,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed: the extra families")

C, MELS, WORDS = 32, 6, 20


def make_model(**options) -> torch.nn.Module:
    """Two layers each of encoder and decoder, without dropout."""
    config = transformers.FastSpeech2ConformerConfig()
    sizes = {"hidden_size": C, "vocab_size": WORDS, "num_mel_bins": MELS, "speech_decoder_postnet_units": 16}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_num_attention_heads": 4, f"{part}_linear_units": 24}
    for part in ("duration", "pitch", "energy"):
        sizes |= {f"{part}_predictor_channels": 8}
    no_dropout = {name: 0.0 for name in config.to_dict() if name.endswith(("dropout", "dropout_rate"))}
    assert len(no_dropout) >= 10
    torch.manual_seed(0)
    config = transformers.FastSpeech2ConformerConfig(**(no_dropout | sizes | options))
    return randomized(transformers.FastSpeech2ConformerModel(config)).eval()


def words(T: int = 30, B: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, T) and the mask of those that count; the last sequence is a third as long as the first."""
    torch.manual_seed(1)
    mask = torch.arange(T) < torch.linspace(T, T // 3, B).long()[:, None]
    return torch.randint(1, WORDS, (B, T)) * mask, mask.long()


def encoded(encoder, x, mask=None):
    return encoder(x, mask, return_dict=True).last_hidden_state


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_decoder_on_a_padded_batch(dtype):
    _, mask = words()
    torch.manual_seed(2)
    decoder, mask = make_model().decoder, mask[:, None].to(dtype)
    run = lambda model, x: encoded(model, x, mask)  # noqa: E731
    report = assert_same_when_patched(decoder, run, {"x": torch.randn(3, 30, C)})
    assert report.patched == ("", "conformer_layers.0.self_attn", "conformer_layers.1.self_attn")


def test_decoder_without_mask_in_double_precision():
    torch.manual_seed(2)
    assert_same_when_patched(make_model().decoder.double(), encoded, {"x": torch.randn(3, 30, C).double()})


def test_padding_in_front():
    _, mask = words()
    torch.manual_seed(2)
    mask = mask.flip(1)[:, None]
    assert_same_when_patched(make_model().decoder, lambda m, x: encoded(m, x, mask), {"x": torch.randn(3, 30, C)})


def test_a_sequence_of_nothing_but_padding_gets_zeros():
    _, mask = words()
    mask[1] = 0
    torch.manual_seed(2)
    inputs = {"x": torch.randn(3, 30, C)}
    assert_same_when_patched(make_model().decoder, lambda m, x: encoded(m, x, mask[:, None]), inputs)
    attention = copied(make_model()).decoder.conformer_layers[0].self_attn
    out, _ = attention(inputs["x"], mask[:, None], torch.randn(1, 59, C))
    assert torch.equal(out[1], attention.linear_out.bias.expand(30, C))


def test_the_whole_model_in_training_mode():
    """With the labels, from whose padding the decoder gets its mask."""
    ids, mask = words()
    torch.manual_seed(2)
    durations = torch.randint(1, 3, ids.shape) * mask
    frames = durations.sum(1)
    spectrogram = torch.randn(3, int(frames.max()), MELS)
    spectrogram[torch.arange(spectrogram.shape[1]) >= frames[:, None]] = -100.0
    labels = {"spectrogram_labels": spectrogram, "duration_labels": durations}
    labels |= {name: torch.randn(3, 30, 1) for name in ("pitch_labels", "energy_labels")}
    model = training(make_model())

    def run(model, **inputs):
        out = model(input_ids=ids, attention_mask=mask, **labels)
        return out.loss, out.spectrogram, out.encoder_last_hidden_state

    # against the model in float64 the patched one errs less than before: it is the other side that rounds
    report = assert_same_when_patched(model, run, {}, relative=1e-4)
    assert len(report.patched) == 6


@pytest.mark.parametrize("options", [{}, {"encoder_concat_after": True, "decoder_normalize_before": True}])
def test_the_whole_model_speaks_the_same(options):
    ids, mask = words()
    model = make_model(**options)
    run = lambda model: model(input_ids=ids, attention_mask=mask)  # noqa: E731
    wanted, got = run(model), run(copied(model))
    assert torch.equal(got.duration_outputs, wanted.duration_outputs)
    assert_alike("spectrogram", got.spectrogram, wanted.spectrogram, 1e-4)


def test_positions_of_one_s_own_for_each_sequence():
    attention = make_model().encoder.conformer_layers[0].self_attn
    torch.manual_seed(2)
    inputs = {"x": torch.randn(2, 9, C), "positions": torch.randn(2, 17, C)}
    assert_same_when_patched(attention, lambda m, x, positions: m(x, pos_emb=positions)[0], inputs)


def test_autocast():
    decoder, mask = make_model().decoder, words()[1][:, None]
    torch.manual_seed(2)
    x = torch.randn(3, 30, C)
    assert_same_under_autocast(decoder, lambda model: encoded(model, x, mask))


def test_dropout_of_attention():
    attention = make_model(encoder_attention_dropout_rate=0.3).encoder.conformer_layers[0].self_attn.train()
    torch.manual_seed(2)
    x, positions = torch.randn(2, 9, C), torch.randn(1, 17, C)
    assert_same_dropout(attention, lambda module: module(x, pos_emb=positions)[0])


def test_attention_weights_come_from_its_own_method():
    ids, mask = words()

    def run(model):
        out = model(input_ids=ids, attention_mask=mask, output_attentions=True)
        return (out.spectrogram, *out.encoder_attentions, *out.decoder_attentions)

    assert len(assert_own_method(make_model(), run, "FastSpeech2ConformerAttention: attention weights")) == 1 + 4


def test_masks_of_another_shape_are_refused_as_before():
    decoder = copied(make_model().decoder)
    with pytest.raises(ValueError, match="Attention mask should be of size"):
        decoder(torch.randn(2, 9, C), torch.ones(2, 9))


def test_a_patched_encoder_with_attention_of_its_own():
    """A class of which the encoder alone is patched, hands on the mask that it got."""
    decoder, mask = make_model().decoder, words()[1][:, None]
    torch.manual_seed(2)
    x = torch.randn(3, 30, C)
    wanted = encoded(decoder, x, mask)
    try:
        txl_kernels.patch(type(decoder))
        assert torch.equal(encoded(decoder, x, mask), wanted)
    finally:
        txl_kernels.unpatch(type(decoder))


def test_masks_are_read_once_for_all_layers():
    decoder, mask = make_model().decoder, words()[1][:, None]
    assert_reads_once(decoder, lambda model: encoded(model, torch.randn(3, 30, C), mask))


def test_nothing_quadratic_is_made():
    model = make_model().decoder

    def step(model, T):
        x, mask = torch.randn(2, T, C), (torch.arange(T) < torch.tensor([T, T // 2])[:, None])[:, None]
        return lambda: encoded(model, x, mask).sum().backward()

    assert_nothing_quadratic(model, step, 400)


def test_compiled_in_one_graph():
    model, mask = make_model().decoder, words()[1][:, None]
    torch.manual_seed(2)
    x = torch.randn(3, 30, C)
    wanted = encoded(model, x, mask)
    got = encoded(torch.compile(copied(model), fullgraph=True, backend="aot_eager"), x, mask)
    assert_alike("states", got, wanted, 3e-5)


def test_wide_heads():
    decoder, mask = make_model(hidden_size=272, decoder_num_attention_heads=1).decoder, words()[1][:, None]
    assert_too_wide(decoder, lambda m: encoded(m, torch.ones(3, 30, 272), mask), "head_dim")
