"""ESPnet's encoders before and after `patch`: espnet2's Conformer and E-Branchformer, and the modules alone."""

import copy
import sys
import types

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
)

pytest.importorskip("espnet", reason="espnet is not installed (tests/patching/requirements.txt)")

from espnet.nets.pytorch_backend import nets_utils
from espnet.nets.pytorch_backend.transformer import attention as own_code
from espnet2.asr.encoder.branchformer_encoder import BranchformerEncoder
from espnet2.asr.encoder.conformer_encoder import ConformerEncoder
from espnet2.asr.encoder.e_branchformer_ctc_encoder import EBranchformerCTCEncoder
from espnet2.asr.encoder.e_branchformer_encoder import EBranchformerEncoder
from espnet2.asr.encoder.multiconvformer_encoder import MultiConvConformerEncoder
from espnet2.slu.postencoder.conformer_postencoder import ConformerPostEncoder

from txl_kernels.patching.families.espnet import pad_mask

C, MELS = 32, 20
KINDS = {
    "latest": own_code.RelPositionMultiHeadedAttention,
    "legacy": own_code.LegacyRelPositionMultiHeadedAttention,
}


def make_encoder(kind: str = "latest", cls: type = ConformerEncoder, **options) -> torch.nn.Module:
    sizes = {"input_size": MELS, "output_size": C, "attention_heads": 4, "num_blocks": 2}
    if cls is not BranchformerEncoder:  # which has no feed-forward modules
        sizes["linear_units"] = 24
    no_dropout = {"dropout_rate": 0.0, "positional_dropout_rate": 0.0, "attention_dropout_rate": 0.0}
    torch.manual_seed(0)
    model = cls(**(sizes | no_dropout | {"rel_pos_type": kind} | options))
    return randomized(model).eval()


def make_attention(kind: str, dropout: float = 0.0, zero_triu: bool = False) -> torch.nn.Module:
    return randomized(KINDS[kind](4, C, dropout, zero_triu)).eval()


def make_inputs(kind: str, T: int = 9, S: int = 9, positions: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    rows = S if kind == "legacy" else 2 * S - 1
    return {"query": torch.randn(2, T, C), "key": torch.randn(2, S, C), "pos_emb": torch.randn(positions, rows, C)}


def attended(model, query, key, pos_emb, mask=None):
    return model(query, key, key, pos_emb, mask)


def batch(frames: int = 150, B: int = 3) -> dict[str, torch.Tensor]:
    """Padded features; the last sequence is a third as long as the first."""
    torch.manual_seed(1)
    return {"xs_pad": torch.randn(B, frames, MELS), "ilens": torch.linspace(frames, frames // 3, B).long()}


def states(model, **inputs):
    return model(**inputs)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero_triu", [False, True])
def test_padded_batch(kind, zero_triu):
    model = make_encoder(kind, cnn_module_kernel=5, macaron_style=True, zero_triu=zero_triu)
    report = assert_same_when_patched(model, states, batch())
    assert report.patched == ("", "encoders.0.self_attn", "encoders.1.self_attn")


GATED = {"cgmlp_linear_units": 24, "cgmlp_conv_kernel": 5}


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (BranchformerEncoder, GATED),
        (EBranchformerEncoder, GATED),
        (EBranchformerCTCEncoder, GATED),
        (MultiConvConformerEncoder, {"multicgmlp_kernel_sizes": "3,5"}),
    ],
)
def test_other_encoders(cls, options):
    report = assert_same_when_patched(make_encoder(cls=cls, **options), states, batch())
    assert len(report.patched) == 3


def test_encoder_of_another_s_states():
    torch.manual_seed(0)
    rates = dict.fromkeys(("dropout_rate", "positional_dropout_rate", "attention_dropout_rate"), 0.0)
    sizes = {"attention_heads": 4, "linear_units": 24, "num_blocks": 2, "input_layer": "linear"}
    model = ConformerPostEncoder(C, C, **(sizes | rates))
    inputs = {"input": torch.randn(3, 40, C), "input_lengths": torch.tensor([40, 13, 27])}
    report = assert_same_when_patched(randomized(model).eval(), states, inputs)
    assert len(report.patched) == 3


def test_padded_frames_are_those_of_espnet():
    for case in [{"lengths": torch.tensor([3, 1, 5])}, {"lengths": [3, 1]}]:
        assert torch.equal(pad_mask(**case), nets_utils.make_pad_mask(**case))
    shaped = torch.tensor([3, 1]), torch.zeros(2, 4, 7)
    assert torch.equal(pad_mask(*shaped), nets_utils.make_pad_mask(*shaped))


def test_encoder_without_relative_positions():
    model = make_encoder(pos_enc_layer_type="abs_pos", selfattention_layer_type="selfattn")
    report = txl_kernels.patch(model)
    assert [entry.reason for entry in report.left_alone] == ["none of its layers has relative positions"]
    assert not report.patched


@pytest.mark.parametrize("kind", KINDS)
def test_training_mode_and_dropout_of_positions(kind):
    model = make_encoder(kind, positional_dropout_rate=0.3, use_cnn_module=False).train()

    def seeded(model, **inputs):
        torch.manual_seed(3)
        return states(model, **inputs)

    assert_same_when_patched(model, seeded, batch())


def test_masks_are_read_once_for_all_layers():
    model, inputs = make_encoder(num_blocks=3), batch()
    assert_reads_once(model, lambda model: states(model, **inputs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero_triu", [False, True])
@pytest.mark.parametrize("mask", ["none", "dense", "causal", "of keys", "of keys in front", "for all", "bytes"])
def test_masks(kind, zero_triu, mask):
    inputs = make_inputs(kind)
    dense = torch.rand(2, 9, 9) < 0.5
    dense[0, 4] = False  # sees nothing: zeros
    row = torch.arange(9) < torch.tensor([[0], [9]])
    masks = {"none": None, "dense": dense, "causal": torch.ones(1, 9, 9).tril().bool(), "of keys": row[:, None]}
    masks |= {"of keys in front": row[:, None].flip(2), "for all": row[1:, None], "bytes": row[:, None].byte() * 3}
    model = make_attention(kind, zero_triu=zero_triu)
    assert_same_when_patched(model, lambda m, **x: attended(m, mask=masks[mask], **x), inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 2])
def test_fewer_queries_than_keys(kind, T):
    """As where ESPnet decodes step by step; for more than one query only the legacy kind has rows that fit."""
    if kind == "latest" and T > 1:
        model, inputs = make_attention(kind), make_inputs(kind, T)
        for side in (model, copied(model)):
            with pytest.raises((RuntimeError, ValueError)):
                attended(side, **(inputs | {"pos_emb": inputs["pos_emb"][:, : 2 * T - 1]}))
    else:
        assert_same_when_patched(make_attention(kind), attended, make_inputs(kind, T))


@pytest.mark.parametrize("kind", KINDS)
def test_float64_and_positions_of_each_sequence(kind):
    inputs = {name: x.double() for name, x in make_inputs(kind, positions=2).items()}
    assert_same_when_patched(make_attention(kind).double(), attended, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    model, inputs = make_encoder(kind), batch()
    assert_same_under_autocast(model, lambda model: states(model, **inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_of_attention(kind):
    inputs = make_inputs(kind)
    assert_same_dropout(make_attention(kind, dropout=0.3).train(), lambda model: attended(model, **inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_an_earlier_call_are_not_kept(kind):
    """Not even by a module that is copied."""
    model, inputs = make_attention(kind), make_inputs(kind)
    attended(model, **inputs)
    assert model.attn.shape == (2, 4, 9, 9)
    model.attn = model.attn.detach()  # or it could not be copied
    txl_kernels.patch(model, strict=True)
    attended(model, **inputs)
    assert model.attn is None
    assert copy.deepcopy(model).attn is None


@pytest.mark.filterwarnings("ignore:.*attention weights for plots")
@pytest.mark.parametrize("kind", KINDS)
def test_plots_of_the_trainer_get_weights(kind, monkeypatch):
    """By default it draws those of every attention after each epoch, and ended on one that had none."""
    alignments = types.ModuleType("espnet2.gan_tts.jets.alignments")  # whose package wants more than attention does
    alignments.AlignmentModule = type("AlignmentModule", (), {})
    monkeypatch.setitem(sys.modules, alignments.__name__, alignments)
    from espnet2.main_funcs.calculate_all_attentions import calculate_all_attentions

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = make_encoder(kind)

        def forward(self, speech, speech_lengths):
            return self.encoder(speech, speech_lengths)[0]

    model, inputs = Model().eval(), batch()
    sample = {"speech": inputs["xs_pad"], "speech_lengths": inputs["ilens"]}
    weights = lambda model: tuple(x for drawn in calculate_all_attentions(model, sample).values() for x in drawn)  # noqa: E731
    warning = "MultiHeadedAttention: attention weights for plots"
    assert len(assert_own_method(model, weights, warning)) == 2 * 3
    model = copied(Model().eval())
    calculate_all_attentions(model, sample)
    model(**sample)
    assert all(layer.self_attn.attn is None for layer in model.encoder.encoders)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_quadratic_is_made(kind):
    model = make_encoder(kind, num_blocks=1, use_cnn_module=False, input_layer="linear", max_pos_emb_len=1600)

    def step(model, frames):
        inputs = batch(frames, 2)
        return lambda: states(model, **inputs).sum().backward()

    assert_nothing_quadratic(model, step, 800)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_in_one_graph(kind):
    model, inputs = make_attention(kind), make_inputs(kind)
    mask = torch.arange(9) < torch.tensor([[[7]], [[9]]])
    wanted = attended(model, mask=mask, **inputs)
    model.attn = None
    got = attended(torch.compile(copied(model), fullgraph=True, backend="aot_eager"), mask=mask, **inputs)
    assert_alike("states", got, wanted, 3e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_wide_heads(kind):
    attention, x = KINDS[kind](1, 257, 0.0), torch.randn(2, 9, 257)
    positions = torch.randn(1, 9 if kind == "legacy" else 17, 257)
    assert_too_wide(attention, lambda m: m(x, x, x, positions, None), "d_k")
