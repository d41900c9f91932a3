"""ESPnet's transducer encoders before and after `patch`: whole utterances, chunks of them, and one chunk at a time."""

import pytest
import torch

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
)

pytest.importorskip("espnet", reason="espnet is not installed (tests/patching/requirements.txt)")

from espnet2.asr_transducer.encoder import encoder as own_code
from espnet2.asr_transducer.encoder.modules.attention import RelPositionMultiHeadedAttention

C, MELS = 32, 20
CHUNKED = {"dynamic_chunk_training": True, "short_chunk_size": 3, "num_left_chunks": 2}


def make_encoder(block_type: str = "conformer", **options) -> torch.nn.Module:
    block = {"block_type": block_type, "hidden_size": C, "linear_size": 24, "conv_mod_kernel_size": 5, "num_blocks": 2}
    torch.manual_seed(0)
    model = own_code.Encoder(
        MELS, [block], input_conf={"conv_size": 8}, main_conf={"pos_wise_act_type": "swish"} | options
    )
    return randomized(model).eval()


def make_attention(simplified: bool, dropout: float = 0.0) -> torch.nn.Module:
    return randomized(RelPositionMultiHeadedAttention(4, C, dropout, simplified)).eval()


def make_inputs(T: int = 9, S: int = 9, positions: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    x, key = torch.randn(2, T, C), torch.randn(2, S, C)
    return {"query": x, "key": key, "pos_enc": torch.randn(positions, S + T - 1, C)}


def attended(model, query, key, pos_enc, mask=None, chunk_mask=None):
    mask = torch.zeros(key.shape[:2], dtype=torch.bool) if mask is None else mask
    return model(query, key, key, pos_enc, mask, chunk_mask, left_context=key.shape[1] - query.shape[1])


def batch(frames: int = 150, B: int = 3) -> dict[str, torch.Tensor]:
    """Padded features; the last sequence is a third as long as the first."""
    torch.manual_seed(1)
    return {"x": torch.randn(B, frames, MELS), "x_len": torch.linspace(frames, frames // 3, B).long()}


def states(model, **inputs):
    torch.manual_seed(3)  # of the sizes of chunks
    return model(**inputs)[0]


@pytest.mark.parametrize("block_type", ["conformer", "branchformer", "ebranchformer"])
@pytest.mark.parametrize("simplified", [False, True])
def test_padded_batch(block_type, simplified):
    report = assert_same_when_patched(make_encoder(block_type, simplified_att_score=simplified), states, batch())
    assert len(report.patched) == 2


@pytest.mark.parametrize("simplified", [False, True])
@pytest.mark.parametrize("short", [0.0, 1.0])
def test_chunks_of_whole_utterances(simplified, short):
    """Drawn as in training; short = 1 draws chunks of 3 or fewer, 0 whole utterances."""
    model = make_encoder(simplified_att_score=simplified, short_chunk_threshold=short, **CHUNKED)
    assert_same_when_patched(model, states, batch())


@pytest.mark.parametrize("simplified", [False, True])
@pytest.mark.parametrize("left_context", [0, 4])
def test_one_chunk_at_a_time(simplified, left_context):
    model = make_encoder(simplified_att_score=simplified, **CHUNKED)

    def stream(model, x):
        model.reset_cache(left_context, x.device)
        chunks = [x[:, 16 * i : 16 * i + 31] for i in range(4)]
        outputs = [
            model.chunk_forward(chunk, torch.tensor([31]), torch.tensor(4 * i), left_context)
            for i, chunk in enumerate(chunks)
        ]
        return tuple(outputs)

    assert_same_when_patched(model, stream, {"x": batch(100, 1)["x"]})


@pytest.mark.parametrize("simplified", [False, True])
@pytest.mark.parametrize("mask", ["of keys", "of keys in front", "chunks", "both", "both in front"])
def test_masks(simplified, mask):
    inputs = make_inputs()
    hidden = torch.arange(9) >= torch.tensor([[0], [7]])  # nothing is visible in the first: zeros
    chunks = torch.rand(9, 9) < 0.5
    masks = {"of keys": (hidden, None), "of keys in front": (hidden.flip(1), None), "chunks": (None, chunks)}
    masks |= {"both": (hidden, chunks), "both in front": (hidden.flip(1), chunks)}
    mask, chunk_mask = masks[mask]
    run = lambda model, **x: attended(model, mask=mask, chunk_mask=chunk_mask, **x)  # noqa: E731
    assert_same_when_patched(make_attention(simplified), run, inputs)


@pytest.mark.parametrize("simplified", [False, True])
def test_float64_left_context_and_positions_of_each_sequence(simplified):
    inputs = {name: x.double() for name, x in make_inputs(6, 9, positions=1 if simplified else 2).items()}
    assert_same_when_patched(make_attention(simplified).double(), attended, inputs)


def test_a_bias_of_each_sequence_comes_from_its_own_method():
    """Which keeps its weights as ever."""
    inputs = make_inputs(positions=2)
    run = lambda model: (attended(model, **inputs), model.attn)  # noqa: E731
    assert_own_method(make_attention(simplified=True), run, "RelPositionMultiHeadedAttention: a bias that differs")


@pytest.mark.parametrize("simplified", [False, True])
def test_autocast(simplified):
    model, inputs = make_encoder(simplified_att_score=simplified), batch()
    assert_same_under_autocast(model, lambda model: states(model, **inputs))


@pytest.mark.parametrize("simplified", [False, True])
def test_dropout_of_attention(simplified):
    inputs = make_inputs()
    assert_same_dropout(make_attention(simplified, dropout=0.3).train(), lambda model: attended(model, **inputs))


@pytest.mark.parametrize("options", [{}, {"short_chunk_threshold": 1.0} | CHUNKED])
def test_masks_are_read_once_for_all_layers(options):
    model, inputs = make_encoder(**options), batch()
    assert_reads_once(model, lambda model: states(model, **inputs))


@pytest.mark.parametrize("simplified", [False, True])
def test_nothing_quadratic_is_made(simplified):
    model = make_attention(simplified)

    def step(model, T):
        inputs = make_inputs(T, T)
        mask = torch.arange(T) >= torch.tensor([[T], [T // 2]])
        return lambda: attended(model, mask=mask, **inputs).sum().backward()

    assert_nothing_quadratic(model, step, 800)


@pytest.mark.parametrize("simplified", [False, True])
def test_compiled_in_one_graph(simplified):
    model, inputs = make_attention(simplified), make_inputs()
    mask = torch.arange(9) >= torch.tensor([[7], [9]])
    got = attended(torch.compile(copied(model), fullgraph=True, backend="aot_eager"), mask=mask, **inputs)
    assert_alike("states", got, attended(model, mask=mask, **inputs), 3e-5)
