"""SpeechBrain before and after `patch`: the attention alone, its Conformer, and TransformerASR around that.

The package is the installed one; where torchaudio or scipy is missing a mock stands for it while it is imported.
"""

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
)

skip_without("speechbrain")
from tests.patching import speechbrain_package as speechbrain  # noqa: E402

C, H = 32, 4


def make_attention(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    return randomized(speechbrain.RelPosMHAXL(C, H, **options)).eval()


def positions(S: int) -> torch.Tensor:
    return speechbrain.RelPosEncXL(C).make_pe(S)


def padding(*lengths: int) -> torch.Tensor:
    """(B, S), True for padding."""
    return torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]


def run_self(model, x, **masks):
    return model(x, x, x, positions(x.shape[1]), **masks)[0]


def run_cross(model, query, key, value, **masks):
    return model(query, key, value, positions(key.shape[1]), **masks)[0]


def make_encoder(layers: int = 2, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return randomized(speechbrain.ConformerEncoder(layers, C, 24, H, kernel_size=5, **options)).eval()


def run_encoder(model, x, **masks):
    return model(x, pos_embs=positions(x.shape[1]), **masks)[0]


def attn_mask(kind: str, T: int, S: int) -> torch.Tensor:
    torch.manual_seed(2)
    if kind == "bool 2-D":
        hidden = torch.rand(T, S) < 0.5
        hidden[:, 0] = False  # no row without a visible key, whose gradient is NaN upstream
        return hidden
    if kind == "bool 3-D":
        hidden = torch.rand(2 * H, T, S) < 0.5
        hidden[..., 0] = False
        return hidden
    if kind == "float 2-D":
        return torch.randn(T, S)
    if kind == "float 3-D":
        return torch.randn(2 * H, T, S).double()
    if kind == "bytes":
        return torch.randint(0, 3, (T, S), dtype=torch.uint8)  # added, in spite of what its docstring says
    assert kind == "look-ahead"
    return torch.full((T, S), -torch.inf).triu(1 + S - T)


MASKS = ["bool 2-D", "bool 3-D", "float 2-D", "float 3-D", "bytes", "look-ahead"]


@pytest.mark.parametrize("kind", [None, *MASKS])
@pytest.mark.parametrize("lengths", [None, (9, 5), "in front"])
def test_masks_of_self_attention(kind, lengths):
    masks = {} if kind is None else {"attn_mask": attn_mask(kind, 9, 9)}
    if lengths is not None:
        # column 0 stays, so that every row of the masks above sees a key
        masks["key_padding_mask"] = padding(9, 5) if lengths != "in front" else padding(9, 8).roll(2, 1)
    torch.manual_seed(1)
    assert_same_when_patched(make_attention(), lambda m, x: run_self(m, x, **masks), {"x": torch.randn(2, 9, C)})


@pytest.mark.parametrize("kind", [None, *MASKS])
@pytest.mark.parametrize("T", [9, 5])
def test_query_key_and_value_of_their_own(kind, T):
    """The same weight, read in another way; fewer queries than keys are the last ones."""
    masks = {} if kind is None else {"attn_mask": attn_mask(kind, T, 9)}
    torch.manual_seed(1)
    inputs = {"query": torch.randn(2, T, C), "key": torch.randn(2, 9, C), "value": torch.randn(2, 9, C)}
    assert_same_when_patched(make_attention(), lambda m, **x: run_cross(m, **x, **masks), inputs)


def test_equal_tensors_are_self_attention():
    x = torch.randn(2, 9, C)
    model = copied(make_attention())
    assert torch.equal(run_cross(model, x, x.clone(), x), run_self(model, x))
    assert not torch.allclose(run_cross(model, x, x, x + 1e-6), run_self(model, x), atol=1e-2)


@pytest.mark.parametrize(
    "options", [{"vbias": True}, {"mask_pos_future": True}, {"vbias": True, "mask_pos_future": True}]
)
@pytest.mark.parametrize("T", [9, 6])
def test_options(options, T):
    torch.manual_seed(1)
    model, x = make_attention(**options), torch.randn(2, 9, C)
    inputs = {"query": x[:, 9 - T :].clone(), "key": x, "value": torch.randn(2, 9, C)}
    assert_same_when_patched(model, run_cross, inputs)
    assert_same_when_patched(make_attention(**options), run_self, {"x": x})


@pytest.mark.parametrize("kind", ["float 3-D", "bytes"])
def test_masks_that_are_added_are_not_inverted(kind, monkeypatch):
    """Where they tell no window, a tensor as large as they are would be made for nothing."""
    monkeypatch.setattr("txl_kernels.patching.families.speechbrain.allowed", None)
    mask = attn_mask(kind, 9, 9)
    assert_same_when_patched(make_attention(), lambda m, x: run_self(m, x, attn_mask=mask), {"x": torch.randn(2, 9, C)})


def test_rows_without_a_visible_key_are_zeros():
    """The projection's bias, that is. Its own gradient is NaN there."""
    model, x = make_attention(), torch.randn(2, 9, C)
    hidden = attn_mask("bool 2-D", 9, 9)
    hidden[4] = True
    masks = {"attn_mask": hidden, "key_padding_mask": padding(9, 0)}
    patched = copied(model)
    x.requires_grad_()
    out = run_self(patched, x, **masks)
    assert_alike("out", out, run_self(model, x, **masks), 3e-5)
    assert torch.equal(out[0, 4], model.out_proj.bias)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.isfinite().all()
    added = torch.zeros(9, 9).masked_fill(hidden, -torch.inf)  # NaN upstream
    assert torch.equal(run_self(patched, x, attn_mask=added)[0, 4], model.out_proj.bias)


def test_what_is_returned():
    x, pos = torch.randn(2, 9, C), positions(9)
    model = make_attention()
    patched = copied(model)
    out, weights = patched(x, x, x, pos)
    assert weights is None
    assert torch.equal(patched(x, x, x, pos, return_attn_weights=False), out)
    assert_alike("out", model(x, x, x, pos, return_attn_weights=False), out, 3e-5)
    mask = attn_mask("look-ahead", 9, 9)
    got = assert_own_method(model, lambda m: m(x, x, x, pos, None, mask, True), "RelPosMHAXL: attention weights")
    assert torch.equal(got[1], model(x, x, x, pos, None, mask)[1])  # by default


def test_what_it_can_t_serve_comes_from_its_own_method():
    x, pos = torch.randn(2, 9, C), positions(9)[:, :16]
    assert_own_method(make_attention(), lambda model: model(x[:, :5], x, x, pos), "positions other than")
    report = txl_kernels.patch(speechbrain.RelPosMHAXL(C, H, vdim=2 * C))
    assert "no forward for a vdim" in report.left_alone[0].reason


def test_dropout():
    attention = make_attention(dropout=0.3).train()
    x = torch.randn(2, 9, C)
    assert_same_dropout(attention, lambda m: run_self(m, x, key_padding_mask=padding(9, 5)))


@pytest.mark.parametrize("train", [False, True])
def test_conformer_on_a_padded_batch(train):
    model = make_encoder().train(train)
    torch.manual_seed(1)
    masks = {"src_key_padding_mask": padding(20, 13, 7)}
    report = assert_same_when_patched(model, lambda m, x: run_encoder(m, x, **masks), {"x": torch.randn(3, 20, C)})
    assert report.patched == ("layers.0.mha_layer", "layers.1.mha_layer")
    assert "None comes in place of the weights" in str(report)


def test_conformer_streams_with_left_context():
    config = speechbrain.DynChunkTrainConfig(chunk_size=4, left_context_size=2)
    chunks = torch.randn(2, 20, C).split(4, dim=1)

    def stream(model):
        context, outputs = model.make_streaming_context(config), []
        for chunk in chunks:
            seen = context.layers[0].mha_left_context
            length = chunk.shape[1] + (0 if seen is None else seen.shape[1])
            outputs.append(model.forward_streaming(chunk, context, positions(length))[0])
        return torch.cat(outputs, 1)

    model = make_encoder()
    assert_same_when_patched(model, stream, {})


@pytest.mark.parametrize(
    ("module", "causal", "chunks"),
    [("conformer", False, (4, 1)), ("conformer", False, (4,))]  # chunks are for a Conformer that is not causal
    + [(module, causal, None) for module in ("conformer", "branchformer") for causal in (False, True)],
)
def test_transformer_asr(module, causal, chunks):
    """The whole encoder, with its look-ahead or chunk mask."""
    chunks = chunks and speechbrain.DynChunkTrainConfig(*chunks)
    sizes = {"d_model": C, "nhead": H, "num_encoder_layers": 2, "num_decoder_layers": 0, "d_ffn": 24}
    torch.manual_seed(0)
    model = speechbrain.TransformerASR(
        11, 12, **sizes, csgu_linear_units=16, kernel_size=5, encoder_module=module, causal=causal,
        attention_type="RelPosMHAXL", dropout=0.0, normalize_before=True,
    )  # fmt: skip
    model = speechbrain.EncoderWrapper(randomized(model)).eval()
    lengths = torch.tensor([1.0, 0.5])

    def run(model, x):
        return model(x, lengths, dynchunktrain_config=chunks)

    assert_same_when_patched(model, run, {"x": torch.randn(2, 18, 12)})


def test_autocast():
    model, x = make_encoder(), torch.randn(2, 20, C)
    masks = {"src_key_padding_mask": padding(20, 13)}
    assert_same_under_autocast(model, lambda model: run_encoder(model, x, **masks))


@pytest.mark.parametrize("kind", [None, *MASKS])
@pytest.mark.parametrize("lengths", [None, (20, 13)])
def test_masks_are_read_once_for_all_layers(kind, lengths):
    masks = {} if kind is None else {"src_mask": attn_mask(kind, 20, 20)}
    masks |= {} if lengths is None else {"src_key_padding_mask": padding(*lengths)}
    model, x = make_encoder(3), torch.randn(2, 20, C)
    assert_reads_once(model, lambda model: run_encoder(model, x, **masks))


def test_what_is_read_is_shared(monkeypatch):
    """`rel_attention` gets the same tensors in every layer, and a window with a look-ahead mask."""
    calls = []
    file = txl_kernels.patching.families.speechbrain
    kept = file.rel_attention
    monkeypatch.setattr(file, "rel_attention", lambda *x, **options: calls.append(options) or kept(*x, **options))
    masks = {"src_key_padding_mask": padding(20, 13), "src_mask": attn_mask("look-ahead", 20, 20)}
    run_encoder(copied(make_encoder(3)), torch.randn(2, 20, C), **masks)
    assert len({id(call["key_lengths"]) for call in calls}) == 1
    assert [call["window"] for call in calls] == [(19, 0)] * 3
    chunks = torch.arange(20)[:, None] // 4 != torch.arange(20) // 4
    run_encoder(copied(make_encoder(3)), torch.randn(2, 20, C), src_mask=chunks)
    assert [call["window"] for call in calls[3:]] == [(3, 3)] * 3
    assert len({call["attn_mask"].data_ptr() for call in calls[3:]}) == 1


def test_nothing_quadratic_is_made():
    model = make_encoder()

    def step(model, T):
        x, mask = torch.randn(2, T, C), padding(T, T // 2)
        return lambda: run_encoder(model, x, src_key_padding_mask=mask).sum().backward()

    assert_nothing_quadratic(model, step, 500)


def test_compiled_in_one_graph():
    model, x = make_encoder(), torch.randn(2, 20, C)
    pos, masks = positions(20), {"src_key_padding_mask": padding(20, 13)}
    wanted = model(x, pos_embs=pos, **masks)[0]
    got = torch.compile(copied(model), fullgraph=True, backend="aot_eager")(x, pos_embs=pos, **masks)[0]
    assert_alike("states", got, wanted, 3e-5)


def test_wide_heads():
    attention, x = speechbrain.RelPosMHAXL(258, 1), torch.randn(2, 9, 258)
    positions = speechbrain.RelPosEncXL(258).make_pe(9)
    assert_too_wide(attention, lambda m: m(x, x, x, positions)[0], "head_dim")
