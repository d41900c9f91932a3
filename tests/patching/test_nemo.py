"""NeMo's Conformer encoder before and after `patch`; `nemo_package` says what of NeMo is loaded."""

import copy

import pytest
import torch

import txl_kernels
from tests.patching.loading import skip_without
from tests.patching.tools import (
    assert_alike,
    assert_nothing_quadratic,
    assert_reads_once,
    assert_same_dropout,
    assert_same_under_autocast,
    assert_same_when_patched,
    assert_too_wide,
    copied,
    largest_tensor,
    randomized,
    results,
    training,
)

skip_without("nemo")

from tests.patching.nemo_package import (  # noqa: E402
    ConformerEncoder,
    MHAResidualAddAdapterStrategy,
    RelPositionMultiHeadAttentionAdapter,
    multi_head_attention,
)

C, MELS = 32, 16
CHUNKED = {"att_context_style": "chunked_limited"}
LOCAL = {"self_attention_model": "rel_pos_local_attn", "att_context_size": [3, 3]}


def make_encoder(**options) -> torch.nn.Module:
    sizes = {"feat_in": MELS, "n_layers": 2, "d_model": C, "n_heads": 4, "ff_expansion_factor": 1}
    sizes |= {"subsampling": "dw_striding", "subsampling_conv_channels": 8, "conv_kernel_size": 5}
    dropout = dict.fromkeys(("dropout", "dropout_pre_encoder", "dropout_emb", "dropout_att"), 0.0)
    torch.manual_seed(0)
    return randomized(ConformerEncoder(**(sizes | dropout | options))).eval()


def make_attention(seed: int = 0, **options) -> torch.nn.Module:
    options = {"n_head": 4, "n_feat": C, "dropout_rate": 0.0, "pos_bias_u": None, "pos_bias_v": None} | options
    kind = multi_head_attention.RelPositionMultiHeadAttention
    if "att_context_size" in options:
        kind = multi_head_attention.RelPositionMultiHeadAttentionLongformer
    return randomized(kind(**options), seed).eval()


def batch(frames: int = 150, B: int = 3) -> dict[str, torch.Tensor]:
    """Padded features; the last sequence is a third as long as the first."""
    torch.manual_seed(1)
    length = torch.linspace(frames, frames // 3, B).long()
    return {"audio_signal": torch.randn(B, MELS, frames), "length": length}


def states(model, audio_signal, length):
    return model(audio_signal=audio_signal, length=length)[0]


def attended(model, x, positions, mask=None):
    return model(x, x, x, mask, positions)


@pytest.mark.parametrize("sdpa", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"untie_biases": False, "use_bias": False, "xscaling": False},
        {"reduction": "striding", "reduction_position": 0, "reduction_factor": 2},
        {"att_context_size": [4, 2]},
        {"att_context_size": [4, -1]},
        {"att_context_size": [-1, 0]},
        {"att_context_size": [6, 2]} | CHUNKED,
        {"att_context_size": [-1, 2]} | CHUNKED,
        {"att_context_size": [0, 0]} | CHUNKED,
        {"att_context_size": [[0, -1], [6, 2]]} | CHUNKED,
        {"att_context_size": [-1, -1, -1], "att_context_style": "chunked_limited_with_rc"},
    ],
)
def test_padded_batch(options, sdpa):
    """Padded frames too: their queries see nothing and get zeros."""
    report = assert_same_when_patched(make_encoder(use_pytorch_sdpa=sdpa, **options), states, batch())
    assert report.patched == ("", "layers.0.self_attn", "layers.1.self_attn")


@pytest.mark.parametrize("sizes", [[4, 3, 2], [0, 1, 0], [7, 4, 0]])
def test_chunks_with_right_context(sizes):
    model = make_encoder(att_context_style="chunked_limited_with_rc")
    model.att_context_size = sizes  # as its users choose it
    assert_same_when_patched(model, states, batch())


@pytest.mark.parametrize("options", [{}, {"att_context_size": [2, 2]}, {"att_context_size": [200, 200]}])
def test_longformer(options):
    assert_same_when_patched(make_encoder(**(LOCAL | options)), states, batch())


@pytest.mark.parametrize("options", [{}, LOCAL])
def test_training_mode(options):
    model = training(make_encoder(dropout_emb=0.3, **options))  # drops of the positions, alike for all sequences

    def seeded(model, **inputs):
        torch.manual_seed(3)
        return states(model, **inputs)

    assert_same_when_patched(model, seeded, batch())


@pytest.mark.parametrize(
    "options",
    [
        {"att_context_size": [6, 2]} | CHUNKED,
        {"att_context_size": [-1, 1]} | CHUNKED,
        {"att_context_size": [5, 2]},  # frames of the right context are taken again: cache_drop_size
    ],
)
@pytest.mark.parametrize("sdpa", [False, True])
def test_streaming_with_a_cache(options, sdpa):
    """Steps over one after the other: outputs, caches, and gradients through them."""
    causal = {"causal_downsampling": True, "conv_context_size": "causal", "conv_norm_type": "layer_norm"}
    model = make_encoder(use_pytorch_sdpa=sdpa, **causal, **options)
    model.setup_streaming_params(max_context=9)
    assert (model.streaming_cfg.cache_drop_size > 0) == ("att_context_style" not in options)
    first, others = model.streaming_cfg.chunk_size
    _, shift = model.streaming_cfg.shift_size

    def stream(model, audio_signal):
        cache, outputs, start = model.get_initial_cache_state(2), [], 0
        for step in range(4):
            n = others if step else first
            chunk = audio_signal[..., start : start + n]
            length = torch.tensor([n, max(n - 4 * step, 1)])
            out, _, *cache = model.cache_aware_stream_step(chunk, length, *cache, drop_extra_pre_encoded=0)
            outputs += [out, *cache[:2]]
            start += shift
        return tuple(outputs)

    torch.manual_seed(1)
    assert_same_when_patched(model, stream, {"audio_signal": torch.randn(2, MELS, 200)})


@pytest.mark.parametrize("sdpa", [False, True])
@pytest.mark.parametrize("kind", ["none", "dense", "of one row", "one row expanded", "without a batch"])
def test_masks_of_one_s_own(kind, sdpa):
    torch.manual_seed(2)
    hidden = torch.rand(2, 9, 9) < 0.5
    hidden[0, 4] = True  # sees nothing: zeros
    row = torch.arange(9) >= torch.tensor([[7], [9]])
    masks = {
        "none": None,
        "dense": hidden,
        "of one row": row[:, None],
        "one row expanded": row[:, None].expand(2, 9, 9),
    }
    mask = (masks | {"without a batch": hidden[:1]})[kind]
    inputs = {"x": torch.randn(2, 9, C), "positions": torch.randn(1, 17, C)}
    assert_same_when_patched(make_attention(use_pytorch_sdpa=sdpa), lambda m, **x: attended(m, mask=mask, **x), inputs)


def test_a_mask_of_one_row_stays_one():
    model, T = copied(make_attention()), 1024
    x, positions = torch.randn(2, T, C), torch.randn(1, 2 * T - 1, C)
    mask = (torch.arange(T) >= torch.tensor([[T - 2], [T]]))[:, None].expand(2, T, T)
    assert largest_tensor(lambda: attended(model, x, positions, mask)) < T * T


def test_float64_and_positions_of_each_sequence():
    torch.manual_seed(2)
    inputs = {"x": torch.randn(2, 9, C).double(), "positions": torch.randn(2, 17, C).double()}
    assert_same_when_patched(make_attention().double(), attended, inputs)


@pytest.mark.parametrize("options", [{"proj_dim": 8}, {}])
def test_adapter(options):
    options |= {"dropout_rate": 0.0, "adapter_strategy": MHAResidualAddAdapterStrategy()}
    model = randomized(RelPositionMultiHeadAttentionAdapter(n_head=4, n_feat=C, **options))
    torch.manual_seed(2)
    mask = torch.rand(2, 9, 9) < 0.5
    inputs = {"x": torch.randn(2, 9, C), "positions": torch.randn(1, 17, C)}
    report = assert_same_when_patched(model, lambda m, **x: attended(m, mask=mask, **x), inputs)
    assert report.patched == ("",)


@pytest.mark.parametrize("options", [{}, LOCAL])
def test_autocast(options):
    model, inputs = make_encoder(**options), batch()
    assert_same_under_autocast(model, lambda model: states(model, **inputs))


@pytest.mark.parametrize("options", [{}, {"att_context_size": [3, 3]}])
def test_inputs_are_cast_as_under_cuda_autocast(options, monkeypatch):
    """There is no CUDA here, so the question whether autocast is on is answered for it: inputs become float32."""
    model, x = make_attention(**options), torch.randn(1, 8, C).bfloat16()
    positions = torch.randn(1, 7 if options else 15, C)
    mask = torch.zeros(1, 8, dtype=torch.bool) if options else None
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: not device)
    monkeypatch.setattr(torch, "get_autocast_gpu_dtype", lambda: torch.bfloat16)
    wanted, got = (attended(side, x, positions, mask) for side in (model, copied(model)))
    assert_alike("states", got, wanted, 3e-5)


@pytest.mark.parametrize("options", [{}, {"use_pytorch_sdpa": True}, {"att_context_size": [8, 8]}])
def test_dropout_of_attention(options):
    attention = make_attention(dropout_rate=0.3, **options).train()
    x, positions = torch.randn(2, 9, C), torch.randn(1, 17, C)
    mask = torch.zeros(2, 9, dtype=torch.bool) if "att_context_size" in options else None
    assert_same_dropout(attention, lambda module: attended(module, x, positions, mask))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"att_context_size": [3, 2]}, "att_context_size"),
        ({"att_context_size": [3, 3], "global_tokens": 1}, "global_tokens"),
    ],
)
def test_longformer_that_is_left_alone(options, reason):
    attention = make_attention(**options)
    report = txl_kernels.patch(attention)
    assert report.patched == ()
    assert reason in report.left_alone[0].reason
    # nor is it served where the class was patched
    x, positions = torch.randn(1, 8, C), torch.randn(1, sum(options["att_context_size"]) + 1, C)
    mask = torch.zeros(1, 8, dtype=torch.bool)
    wanted = attended(attention, x, positions, mask)
    txl_kernels.patch(type(attention))
    try:
        assert torch.equal(attended(attention, x, positions, mask), wanted)
    finally:
        txl_kernels.unpatch(type(attention))


def test_encoder_with_an_attention_that_is_not_patched():
    """It gets NeMo's own mask, and so does the patched one beside it."""
    model, inputs = make_encoder(att_context_size=[6, 2], **CHUNKED), batch()
    wanted = results(model, states, inputs)
    own = copy.deepcopy(model.layers[1].self_attn)
    txl_kernels.patch(model, strict=True)
    model.layers[1].self_attn = own
    got = results(model, states, inputs)
    assert_alike("states", got.outputs[0], wanted.outputs[0], 3e-5)
    assert isinstance(model._create_masks([6, 2], torch.tensor([4]), 5, None, "cpu")[1], torch.Tensor)


@pytest.mark.parametrize("options", [{}, {"att_context_size": [6, 2]} | CHUNKED, LOCAL])
def test_mask_of_padded_frames(options):
    """The same as NeMo's, with a cache too; local attention takes no other."""
    model, sizes = make_encoder(**options), options.get("att_context_size", [-1, -1])
    for offset in (None, torch.tensor([3, 0])):
        arguments = sizes, torch.tensor([5, 9]), 8, offset, "cpu"
        (wanted, dense), (got, visible) = model._create_masks(*arguments), copied(model)._create_masks(*arguments)
        assert torch.equal(got, wanted)
        assert (visible is None) == (dense is None)


def test_encoder_with_absolute_positions():
    report = txl_kernels.patch(make_encoder(self_attention_model="abs_pos"))
    assert not report.patched
    assert "abs_pos" in report.left_alone[0].reason


def test_attention_models_can_be_changed():
    """NeMo makes new modules for that, which are patched in turn."""
    model, inputs = make_encoder(), batch()
    patched = copied(model)
    for side in (model, patched):
        side._cfg = type("Config", (), {"d_model": C, "n_heads": 4, "pos_emb_max_len": 5000} | dict.fromkeys(
            ("dropout", "dropout_emb", "dropout_att"), 0.0))  # fmt: skip
        side.change_attention_model("rel_pos_local_attn", [4, 4], update_config=False)
    assert_alike("states", states(patched.eval(), **inputs), states(model.eval(), **inputs), 3e-5)
    report = txl_kernels.patch(patched, strict=True)
    assert len(report.patched) == 3
    assert_alike("states", states(patched, **inputs), states(model, **inputs), 3e-5)


@pytest.mark.parametrize("options", [{}, {"att_context_size": [6, 2]} | CHUNKED, LOCAL])
def test_masks_are_read_once_for_all_layers(options):
    model, inputs = make_encoder(**options), batch()
    assert_reads_once(model, lambda model: states(model, **inputs))


@pytest.mark.parametrize("options", [{}, {"att_context_size": [20, 10]}])
def test_nothing_quadratic_is_made(options):
    model = make_encoder(subsampling_factor=2, subsampling_conv_channels=2, n_layers=1, **options)

    def step(model, frames):
        inputs = batch(frames, 2)
        return lambda: states(model, **inputs).sum().backward()

    assert_nothing_quadratic(model, step, 800)


def test_chunks_share_one_mask():
    """Of bytes, for the whole batch; NeMo's own has one for each sequence, and its scores are of floats."""
    model, T = copied(make_encoder(att_context_size=[6, 2], subsampling_factor=2, n_layers=1, **CHUNKED)), 400
    inputs = batch(2 * T, 4)
    assert largest_tensor(lambda: model._create_masks([6, 2], inputs["length"] // 2, T, None, "cpu")) == T * T


@pytest.mark.parametrize("options", [{}, {"att_context_size": [6, 2]} | CHUNKED, LOCAL])
def test_compiled_in_one_graph(options):
    """The encoder's steps after the type checks of its forward, which break graphs."""
    model, inputs = make_encoder(**options), batch(80)

    def run(model):
        return model.forward_internal(**inputs)[0]

    patched = copied(model)
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(patched)
    assert_alike("states", got, run(model), 3e-5)


@pytest.mark.parametrize("options", [{}, {"att_context_size": [4, 4]}])
def test_wide_heads(options):
    attention, x = make_attention(n_head=1, n_feat=257, **options), torch.randn(2, 9, 257)
    positions = torch.randn(1, 9 if options else 17, 257)
    pad = torch.zeros(2, 9, dtype=torch.bool) if options else None
    assert_too_wide(attention, lambda m: m(x, x, x, pad, positions), "d_k")
