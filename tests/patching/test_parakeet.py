"""Parakeet of Hugging Face before and after `patch`."""

import copy

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
    profiled,
    randomized,
    states_and_weights,
    training,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed: the extra families")

C, MELS = 32, 16


def make_encoder(implementation: str = "eager", **options) -> torch.nn.Module:
    sizes = {"hidden_size": C, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 24}
    sizes |= {"num_mel_bins": MELS, "subsampling_conv_channels": 8, "conv_kernel_size": 5}
    no_dropout = {"dropout": 0.0, "dropout_positions": 0.0, "layerdrop": 0.0, "attention_dropout": 0.0}
    no_dropout |= {"activation_dropout": 0.0}
    config = transformers.ParakeetEncoderConfig(**(sizes | no_dropout | options))
    config._attn_implementation = implementation
    torch.manual_seed(0)
    return randomized(transformers.ParakeetEncoder(config)).eval()


def batch(frames: int = 200, B: int = 3) -> dict[str, torch.Tensor]:
    """Padded features; the last sequence is a third as long as the first."""
    torch.manual_seed(1)
    mask = torch.arange(frames) < torch.linspace(frames, frames // 3, B).long()[:, None]
    return {"input_features": torch.randn(B, frames, MELS), "attention_mask": mask}


def states(model, **inputs):
    return model(**inputs).last_hidden_state


def valid_frames(model, inputs) -> torch.Tensor:
    return model(**inputs).attention_mask[..., None]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("options", [{}, {"attention_bias": False, "scale_input": True}, {"num_key_value_heads": 2}])
def test_padded_batch(implementation, options):
    model, inputs = make_encoder(implementation, **options), batch()
    report = assert_same_when_patched(model, states, inputs, valid_frames(model, inputs))
    assert report.patched == ("", "layers.0.self_attn", "layers.1.self_attn")


def test_without_mask_and_in_training_mode():
    model = training(make_encoder())
    assert_same_when_patched(model, states, {"input_features": batch()["input_features"]})


def test_outputs_without_gradient_and_of_an_empty_sequence():
    model, inputs = make_encoder(), batch()
    inputs["attention_mask"][2] = False
    patched = copied(model)
    for grad_mode in (torch.no_grad, torch.inference_mode):
        with grad_mode():
            got, wanted = patched(**inputs), model(**inputs)
            assert_alike("states", got.last_hidden_state, wanted.last_hidden_state, 3e-5)
            assert torch.equal(got.attention_mask, wanted.attention_mask)


def test_autocast():
    model, inputs = make_encoder(), batch()
    assert_same_under_autocast(model, lambda model: states(model, **inputs))


def test_dropout_of_attention():
    model = make_encoder(attention_dropout=0.3)
    attention = model.layers[0].self_attn.train()
    x, positions = torch.randn(2, 9, C), torch.randn(1, 17, C).expand(2, -1, -1)
    assert_same_dropout(attention, lambda module: module(x, positions)[0])


def test_dropout_of_positions_differs_between_sequences():
    model = training(make_encoder(dropout_positions=0.5))
    inputs = batch()

    def seeded(model, **inputs):
        torch.manual_seed(3)
        return states(model, **inputs)

    assert_same_when_patched(model, seeded, inputs, valid_frames(model, inputs))


def test_dense_masks_of_one_s_own_are_served():
    attention = make_encoder().layers[0].self_attn
    torch.manual_seed(2)
    mask = torch.rand(2, 1, 9, 9) < 0.5
    mask[0, 0, 4] = False  # sees nothing: the mean of all values
    inputs = {"x": torch.randn(2, 9, C), "positions": torch.randn(2, 17, C)}
    valid = mask.any(-1).squeeze(1)[..., None]
    assert_same_when_patched(attention, lambda m, x, positions: m(x, positions, mask)[0], inputs, valid)


def test_attention_weights_come_from_its_own_method():
    inputs = batch()
    run = lambda model: states_and_weights(model(**inputs, output_attentions=True))  # noqa: E731
    assert len(assert_own_method(make_encoder(), run, "ParakeetEncoderAttention: attention weights")) == 1 + 2


def test_masks_are_read_once_for_all_layers():
    model, inputs = make_encoder(), batch()
    assert_reads_once(model, lambda model: states(model, **inputs))


def test_nothing_quadratic_is_made():
    model = make_encoder(subsampling_factor=2, subsampling_conv_channels=2)

    def step(model, frames):
        inputs = batch(frames, 2)
        return lambda: states(model, **inputs).sum().backward()

    assert_nothing_quadratic(model, step, 1200)


def test_profile_of_6000_frames():
    """Eight minutes of audio, padded: not even a byte for each pair of frames, in any step of forward or backward."""
    sizes = {"hidden_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1}
    own, T = make_encoder(subsampling_factor=2, subsampling_conv_channels=2, **sizes), 6000
    inputs = batch(2 * T, 1)
    inputs["attention_mask"][:, -100:] = False
    patched, own = (
        profiled(lambda model=model: states(model, **inputs).sum().backward(), T - 50) for model in (copied(own), own)
    )
    assert patched.largest < T * T
    assert patched.pairs == set()
    assert own.largest >= 4 * T * (2 * T - 1)  # the position scores, before the shift
    assert {"aten::_softmax", "aten::bitwise_and"} <= own.pairs  # the scores, the mask


def test_compiled_in_one_graph():
    model, inputs = make_encoder(), batch(80)
    wanted = states(model, **inputs)
    got = states(torch.compile(copied(model), fullgraph=True, backend="aot_eager"), **inputs)
    assert_alike("states", got, wanted, 3e-5)


def test_gradient_checkpointing():
    model, inputs = training(make_encoder()), batch()
    model.activation_checkpointing_enable()
    assert_same_when_patched(model, states, inputs, valid_frames(model, inputs))


def test_a_model_on_the_encoder():
    """CTC: the encoder is found inside, the loss is the same."""
    config = transformers.ParakeetCTCConfig(
        vocab_size=11, pad_token_id=10, encoder_config=make_encoder().config.to_dict()
    )
    model, inputs = randomized(transformers.ParakeetForCTC(config)).eval(), batch(320)
    labels = torch.randint(1, 10, (3, 5))
    wanted = model(**inputs, labels=labels).loss
    before = copy.deepcopy(model.state_dict())
    report = txl_kernels.patch(model, strict=True)
    assert "encoder.layers.0.self_attn" in report.patched
    assert_alike("loss", model(**inputs, labels=labels).loss, wanted, 1e-5)
    assert model.state_dict().keys() == before.keys()


def test_wide_heads():
    model = make_encoder(num_attention_heads=1, head_dim=257)
    assert_too_wide(model, lambda m: states(m, **batch()), "head_dim")


def test_one_mask_for_all_sequences():
    model, inputs = make_encoder(), batch()
    inputs["attention_mask"] = inputs["attention_mask"][1:2]
    assert_same_when_patched(model, states, inputs, valid_frames(model, inputs))
