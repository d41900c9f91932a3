"""fairseq's Conformer attention before and after `patch`: alone, and in the speech-to-text encoder.

The package is the installed one; tests/patching/fairseq_package.py says what it takes to import it today.
"""

import argparse

import pytest
import torch

import txl_kernels
from tests.patching.loading import skip_without
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
)

skip_without("fairseq")
from tests.patching import fairseq_package as fairseq  # noqa: E402

C, H = 32, 4


def make_attention(dropout: float = 0.0, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return randomized(fairseq.RelPositionMultiHeadedAttention(C, H, dropout, **options)).eval()


def attention_inputs(T: int = 9, S: int = 9, B: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    shapes = {"query": (T, B, C), "key": (S, B, C), "value": (S, B, C), "pos_emb": (2 * S - 1, 1, C)}
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def padding(*lengths: int) -> torch.Tensor:
    """(B, S), True for padding."""
    return torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]


def run_attention(model, **inputs):
    return model(**inputs)[0]


def make_encoder(pos_enc_type: str = "rel_pos") -> torch.nn.Module:
    sizes = {"encoder_embed_dim": C, "encoder_ffn_embed_dim": 24, "encoder_attention_heads": H, "encoder_layers": 2}
    sizes |= {"input_feat_per_channel": 8, "input_channels": 1, "conv_channels": 16, "conv_kernel_sizes": "5"}
    options = {"no_scale_embedding": False, "max_source_positions": 50, "dropout": 0.0, "fp16": False}
    options |= {"depthwise_conv_kernel_size": 5, "attn_type": "espnet", "pos_enc_type": pos_enc_type}
    torch.manual_seed(0)
    return randomized(fairseq.S2TConformerEncoder(argparse.Namespace(**sizes, **options))).eval()


def run_encoder(model, x, lengths=(40, 26, 13)):
    return model(x, torch.tensor(lengths))["encoder_out"][0]


@pytest.mark.parametrize("zero_triu", [False, True])
@pytest.mark.parametrize("T", [9, 5])
@pytest.mark.parametrize("mask", [None, padding(9, 5), padding(9, 5).flip(1), padding(9, 5).byte()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention(zero_triu, T, mask, dtype):
    model, inputs = make_attention(zero_triu=zero_triu).to(dtype), attention_inputs(T, dtype=dtype)
    report = assert_same_when_patched(model, lambda m, **x: run_attention(m, **x, key_padding_mask=mask), inputs)
    assert report.patched == ("",)


def test_positions_of_each_sequence():
    inputs = attention_inputs()
    inputs["pos_emb"] = torch.randn(17, 2, C)
    assert_same_when_patched(make_attention(), run_attention, inputs)


def test_sequences_without_a_frame_are_zeros():
    """The projection's bias, that is. Its own are NaN, and so are its gradients."""
    model, inputs, mask = make_attention(), attention_inputs(), padding(9, 0)
    patched = copied(model)
    got = results(patched, lambda m, **x: run_attention(m, **x, key_padding_mask=mask), inputs)
    wanted, _ = model(**inputs, key_padding_mask=mask)
    assert_alike("other sequence", got.outputs[0][:, 0], wanted[:, 0], 3e-5)
    assert wanted[:, 1].isnan().all()
    assert torch.equal(got.outputs[0][:, 1], model.linear_out.bias.expand(9, -1))
    assert all(gradient.isfinite().all() for gradient in got.gradients.values())


def test_what_it_can_t_serve_comes_from_its_own_method():
    inputs = attention_inputs(5)
    inputs["pos_emb"] = inputs["pos_emb"][:-1]
    assert_own_method(make_attention(), lambda model: run_attention(model, **inputs), "positions other than")


def test_weights_are_not_kept():
    model, inputs = make_attention(), attention_inputs()
    with torch.no_grad():
        model(**inputs)
    patched = copied(model)
    assert patched.attn.shape == (2, H, 9, 9)
    assert patched(**inputs, need_weights=True)[1] is None
    assert patched.attn is None


def test_other_positions_are_left_alone():
    for model in (fairseq.ESPNETMultiHeadedAttention(C, H, 0.0), make_encoder("rope"), make_encoder("abs")):
        assert not txl_kernels.patch(model).entries


def test_dropout():
    model, inputs = make_attention(0.3).train(), attention_inputs(3, 5)
    assert_same_dropout(model, lambda m: run_attention(m, **inputs))


@pytest.mark.parametrize("train", [False, True])
def test_encoder_on_a_padded_batch(train):
    model = make_encoder().train(train)
    torch.manual_seed(1)
    report = assert_same_when_patched(model, run_encoder, {"x": torch.randn(3, 40, 8)})
    assert report.patched == ("conformer_layers.0.self_attn", "conformer_layers.1.self_attn")


def test_autocast():
    model, x = make_encoder(), torch.randn(3, 40, 8)
    assert_same_under_autocast(model, lambda model: run_encoder(model, x))


def test_masks_are_read_once_for_all_layers(monkeypatch):
    x, lengths = torch.randn(3, 40, 8), []
    assert_reads_once(make_encoder(), lambda model: run_encoder(model, x))
    file = txl_kernels.patching.families.fairseq
    kept = file.rel_attention
    monkeypatch.setattr(
        file, "rel_attention", lambda *x, **options: lengths.append(options["key_lengths"]) or kept(*x, **options)
    )
    run_encoder(copied(make_encoder()), x)
    assert lengths[0].tolist() == [20, 13, 7]
    assert lengths[1] is lengths[0]


def test_nothing_quadratic_is_made():
    model = make_encoder()

    def step(model, T):
        x = torch.randn(2, 2 * T, 8)
        return lambda: run_encoder(model, x, (2 * T, T)).sum().backward()

    assert_nothing_quadratic(model, step, 500)


def test_wide_heads():
    attention = fairseq.RelPositionMultiHeadedAttention(257, 1, 0.0)
    x, positions = torch.randn(9, 2, 257), torch.randn(17, 1, 257)
    assert_too_wide(attention, lambda m: m(x, x, x, positions)[0], "d_k")
