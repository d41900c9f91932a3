"""Audio encoders of Gemma 3n and Gemma 4 of Hugging Face before and after `patch`."""

import importlib

import pytest
import torch

import txl_kernels
from tests.patching.tools import (
    assert_alike,
    assert_nothing_quadratic,
    assert_own_method,
    assert_reads_once,
    assert_same_under_autocast,
    assert_same_when_patched,
    assert_too_wide,
    copied,
    randomized,
    states_and_weights,
)
from txl_kernels import rel_attention

transformers = pytest.importorskip("transformers", reason="transformers is not installed: the extra families")
from transformers.models.gemma3n import modeling_gemma3n as gemma3n  # noqa: E402
from transformers.models.gemma4 import modeling_gemma4 as gemma4  # noqa: E402

C, MELS = 32, 16
# block, keys back and ahead, as the configurations count them: keys back with the query itself
SHAPES = {"default": (12, 13, 0), "short": (4, 6, 3), "one_ahead": (5, 3, 1), "wide": (3, 11, 2)}


def config3n(shape: str = "default"):
    chunk, left, right = SHAPES[shape]
    window = {"conf_attention_chunk_size": chunk, "conf_attention_context_left": left}
    return transformers.Gemma3nAudioConfig(
        **{"hidden_size": C, "conf_num_attention_heads": 4, "conf_num_hidden_layers": 2, "input_feat_size": MELS},
        **{"sscp_conv_channel_size": (8, 4), "conf_reduction_factor": 2, "conf_attention_logit_cap": 3.0},
        **window,
        conf_attention_context_right=right,
    )


def config4(shape: str = "default", **options):
    chunk, left, right = SHAPES[shape]
    window = {"attention_chunk_size": chunk, "attention_context_left": left, "attention_context_right": right}
    sizes = {"hidden_size": C, "num_attention_heads": 4, "num_hidden_layers": 2, "output_proj_dims": 20}
    sizes |= {"subsampling_conv_channels": (MELS, 4), "attention_logit_cap": 3.0}
    config = transformers.Gemma4AudioConfig(**(sizes | window | options))
    config._attn_implementation = "eager"
    return config


def make(cls, config) -> torch.nn.Module:
    torch.manual_seed(0)
    return randomized(cls(config)).eval()


def batch(frames: int = 240, B: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Features, and which frames are valid; the last sequence is so short that far queries see padding only."""
    torch.manual_seed(1)
    lengths = torch.tensor([frames, frames // 2 + 3, frames // 6])[:B]
    return torch.randn(B, frames, MELS), torch.arange(frames) < lengths[:, None]


def padded_encoder(family: str) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The whole encoder of a family, features, and the mask as it takes it."""
    features, valid = batch()
    if family == "gemma3n":
        return make(gemma3n.Gemma3nAudioEncoder, config3n()), features, ~valid
    return make(gemma4.Gemma4AudioModel, config4()), features, valid


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_of_gemma3n(shape, side):
    """Queries that see padding only included: the mean of what their block has around it."""
    attention, T = make(gemma3n.Gemma3nAudioAttention, config3n(shape)), 31
    padded = torch.arange(T) >= torch.tensor([T, 20, 3])[:, None]
    padded = padded if side == "right" else padded.flip(1)
    inputs = {"hidden_states": torch.randn(3, T, C, generator=torch.Generator().manual_seed(1))}
    assert_same_when_patched(attention, lambda m, **x: m(**x, mask=padded), inputs)


@pytest.mark.parametrize("shape", SHAPES)
def test_encoder_of_gemma3n(shape):
    model, (features, valid) = make(gemma3n.Gemma3nAudioEncoder, config3n(shape)), batch()
    report = assert_same_when_patched(model, lambda m, x: m(x, ~valid).last_hidden_state, {"x": features})
    assert len(report.patched) == 2


@pytest.mark.parametrize("mask", ["right", "left", "none", "integers"])
@pytest.mark.parametrize("shape", SHAPES)
def test_encoder_of_gemma4(shape, mask):
    model, (features, valid) = make(gemma4.Gemma4AudioModel, config4(shape)), batch()
    masks = {"right": valid, "left": valid.flip(1), "none": None, "integers": valid.long()}
    # no gradients: in frames of zeros they overflow, through one RMSNorm after another, patched or not
    wanted = model(features, masks[mask])
    patched = copied(model)
    for grad_mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with grad_mode():
            got = patched(features, masks[mask])
        assert_alike("states", got.last_hidden_state, wanted.last_hidden_state, 3e-5)
        assert mask == "none" or torch.equal(got.attention_mask, wanted.attention_mask)


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_queries_that_see_padding_only(shape, family):
    """Of every length: the first of them stands anywhere in its block."""
    if family == "gemma3n":
        model = make(gemma3n.Gemma3nAudioAttention, config3n(shape))
        call = lambda m, x, valid: m(x, ~valid)  # noqa: E731
        x = torch.randn(2, 31, C)
    else:
        model, (x, _) = make(gemma4.Gemma4AudioModel, config4(shape, num_hidden_layers=1)), batch(124, 2)
        call = lambda m, x, valid: m(x, valid.repeat_interleave(4, 1)).last_hidden_state  # noqa: E731
    patched = copied(model)
    for length in range(32):
        valid = torch.arange(31) < torch.tensor([[31], [length]])
        with torch.no_grad():
            assert_alike(f"length {length}", call(patched, x, valid), call(model, x, valid), 3e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_gemma4(shape):
    """With little padding, that gradients stay finite."""
    model, (features, valid) = make(gemma4.Gemma4AudioModel, config4(shape)), batch()
    valid = valid | (torch.arange(240) < 236)
    report = assert_same_when_patched(model, lambda m, x: m(x, valid).last_hidden_state, {"x": features})
    assert report.patched == ("", "layers.0.self_attn", "layers.1.self_attn")


def test_clipped_projections():
    model, (features, valid) = make(gemma4.Gemma4AudioModel, config4(use_clipped_linears=True)), batch()
    for module in model.modules():
        if isinstance(module, gemma4.Gemma4ClippableLinear):
            module.output_min.fill_(-0.5), module.output_max.fill_(0.5)
    wanted = model(features, valid).last_hidden_state
    assert_alike("states", copied(model)(features, valid).last_hidden_state, wanted, 3e-5)


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_autocast(family):
    model, features, mask = padded_encoder(family)
    assert_same_under_autocast(model, lambda model: model(features, mask).last_hidden_state)


def test_gemma4_of_16_bits_attends_in_float32(monkeypatch):
    """As its own method does."""
    model, (features, valid) = make(gemma4.Gemma4AudioModel, config4()).bfloat16(), batch()
    patched, seen = copied(model), []
    family = importlib.import_module("txl_kernels.patching.families.gemma_audio")
    spy = lambda q, *args, **kwargs: seen.append(q.dtype) or rel_attention(q, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(family, "rel_attention", spy)
    got, wanted = (side(features.bfloat16(), valid).last_hidden_state for side in (patched, model))
    assert seen == [torch.float32] * 2
    assert_alike("states", got, wanted, 4e-2)


def test_attention_weights_and_masks_in_blocks_are_left_to_its_own_method():
    features, valid = batch()
    model = make(gemma4.Gemma4AudioModel, config4())
    run = lambda model: states_and_weights(model(features, valid, output_attentions=True))  # noqa: E731
    assert len(assert_own_method(model, run, "Gemma4AudioAttention: a mask in blocks")) == 1 + 2


@pytest.mark.parametrize(
    ("option", "reason"),
    [({"attention_context_left": 1}, "attention_context_left"), ({"attention_invalid_logits_value": -9.0}, "-200")],
)
def test_what_is_left_alone(option, reason):
    report = txl_kernels.patch(gemma4.Gemma4AudioAttention(config4(**option), layer_idx=0))
    assert reason in report.left_alone[0].reason


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_masks_are_read_once_for_all_layers(family):
    model, features, mask = padded_encoder(family)
    assert_reads_once(model, lambda model: model(features, mask))


def test_nothing_quadratic_is_made():
    """By Gemma 4, that is."""
    own = make(gemma4.Gemma4AudioModel, config4(num_hidden_layers=1))

    def step(model, frames):
        features, valid = batch(frames, 1)
        return lambda: model(features, valid).last_hidden_state.sum().backward()

    assert_nothing_quadratic(own, step, 8192)


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_compiled_in_one_graph(family):
    """The attention of Gemma 3n, whose encoder does not compile as one, and the encoder of Gemma 4."""
    features, valid = batch(96)
    if family == "gemma3n":
        model = make(gemma3n.Gemma3nAudioAttention, config3n())
        args = torch.randn(3, 31, C), torch.arange(31) >= torch.tensor([31, 20, 3])[:, None]
        run = lambda m: m(*args)  # noqa: E731
    else:
        model = make(gemma4.Gemma4AudioModel, config4())
        run = lambda m: m(features, valid).last_hidden_state  # noqa: E731
    wanted = run(model)
    assert_alike("states", run(torch.compile(copied(model), fullgraph=True, backend="aot_eager")), wanted, 3e-5)


def test_wide_heads():
    config, (features, valid) = config3n(), batch()
    config.hidden_size, config.conf_num_attention_heads = 272, 1
    encoder = make(gemma3n.Gemma3nAudioEncoder, config)
    assert_too_wide(encoder, lambda m: m(features, ~valid).last_hidden_state, "head_dim")
    encoder = make(gemma4.Gemma4AudioModel, config4(hidden_size=272, num_attention_heads=1))
    assert_too_wide(encoder, lambda m: m(features, valid).last_hidden_state, "head_dim")
