"""Options of the model: shared biases, checkpointing, dropout, tied weights; precision and training."""

import math

import pytest
import torch

from tests.models.tools import ADAPTIVE, LENGTHS, SIZES, make_model, make_segments, run
from txl_kernels.models import MemTransformerLM


def test_untie_r():
    tied, untied = make_model(), make_model(untie_r=True)
    assert untied.r_w_bias.shape == untied.r_r_bias.shape == (2, 2, 5)
    state = tied.state_dict()
    for name in ("r_w_bias", "r_r_bias"):
        state[name] = state[name].expand(2, 2, 5)
    untied.load_state_dict(state)
    wanted, got = (run(model, make_segments()) for model in (tied, untied))
    for name in ("r_w_bias", "r_r_bias"):
        assert not torch.equal(got[name][0], got[name][1])
        got[name] = got[name].sum(0)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("attn_type", [0, 1, 2, 3])
def test_gradient_checkpointing_changes_no_number(attn_type, dropout):
    options = {"attn_type": attn_type, "dropout": dropout, "dropatt": dropout, "same_length": True}
    results, layer_calls = [], []
    for flag in (False, True):
        model = make_model(**options, gradient_checkpointing=flag)
        calls = []
        model.layers[1].pos_ff.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(3)
        results.append(run(model, make_segments()))
        layer_calls.append(len(calls))
    assert layer_calls == [3, 6]
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("attn_type", [0, 1, 2, 3])
def test_dropout_in_training_only(attn_type):
    model, ((data, target), *_) = make_model(attn_type=attn_type, dropout=0.2, dropatt=0.2), make_segments()
    assert not torch.equal(model(data, target)[0], model(data, target)[0])
    assert torch.equal(model.eval()(data, target)[0], make_model(attn_type=attn_type)(data, target)[0])
    only_attention = make_model(attn_type=attn_type, dropatt=0.5)
    assert not torch.equal(only_attention(data, target)[0], only_attention(data, target)[0])
    everything = make_model(attn_type=attn_type, dropout=1.0)
    assert not everything._forward(data)[0].any()


@pytest.mark.parametrize("attn_type", [0, 1, 2, 3])
def test_dropout_is_on_embeddings_sinusoids_and_output(attn_type):
    model, ((data, _), *_) = make_model(attn_type=attn_type), make_segments()
    dropped = []

    def zero(module, inputs, output):
        dropped.append(inputs[0].shape)
        return torch.zeros_like(output)

    model.drop.register_forward_hook(zero)
    seen = []  # by the first layer
    model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[:2]))
    assert not model._forward(data)[0].any()
    assert dropped == [(5, 3, 12), *([(5, 1, 12)] if attn_type == 0 else []), (5, 3, 12)]
    states, *r = seen
    assert not states.any() if attn_type != 3 else torch.equal(states[:, 0], model.r_emb[0, -5:].flatten(1))
    assert attn_type != 0 or not r[0].any()


@pytest.mark.parametrize("attn_type", [0, 1, 2, 3])
def test_a_batch_of_none(attn_type):
    empty = torch.empty(5, 0, dtype=torch.int64)
    losses, *mems = make_model(attn_type=attn_type, **ADAPTIVE)(empty, empty)
    assert losses.shape == (5, 0)
    assert mems[0].shape == (5, 0, 12)


@pytest.mark.parametrize(
    ("options", "shared"),
    [
        (ADAPTIVE, [False, True, True]),
        (ADAPTIVE | {"tie_projs": [False]}, [False, False, False]),
        (ADAPTIVE | {"div_val": 1, "d_embed": 8}, [False, True, True]),
        (ADAPTIVE | {"div_val": 1}, []),
        (ADAPTIVE | {"tie_weight": False}, [False, True, True]),
    ],
)
def test_tied_weights_and_projections(options, shared):
    model = make_model(**options)
    embeddings, crit = model.word_emb, model.crit
    projections = {id(x) for x in embeddings.emb_projs}
    assert [id(x) in projections for x in crit.out_projs] == shared
    tied = options.get("tie_weight", True)
    for table, output in zip(embeddings.emb_layers, crit.out_layers, strict=True):
        assert (output.weight is table.weight) == tied
    twin = make_model(**options)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(run(twin, make_segments()), run(model, make_segments()), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, ADAPTIVE, {"d_embed": 8}], ids=str)
@pytest.mark.parametrize("attn_type", [0, 1, 2, 3])
def test_16_bits(attn_type, options):
    """Under autocast and in bfloat16 losses are float32, from a float32 logarithm."""
    model = make_model(torch.float32, attn_type=attn_type, **options)
    wanted = run(model, make_segments())["losses"]
    with torch.autocast("cpu", torch.bfloat16):
        got = run(model, make_segments())["losses"]
    low = run(model.bfloat16(), make_segments())["losses"]
    for losses in (got, low):
        assert losses.dtype == torch.float32
        assert not torch.equal(losses, losses.bfloat16().float())
        assert (losses - wanted).abs().max() < 0.3
        assert (losses - wanted).abs().mean() < 0.05


@pytest.mark.parametrize("attn_type", [0, 1, 2, 3])
def test_training_lowers_the_loss(attn_type):
    torch.manual_seed(0)
    sizes = SIZES | LENGTHS | {"d_head": 6, "attn_type": attn_type}
    model = MemTransformerLM(**sizes, dropout=0.1, dropatt=0.1, **ADAPTIVE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        losses.append(run(model, make_segments())["losses"].mean().item())
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(29), abs=0.5)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("attn_type", [0, 1, 2])
def test_compiles_as_one_graph(attn_type):
    torch.compiler.reset()
    for d_head in (5, 6):  # for the second the scale is no constant any more
        model, segments = make_model(attn_type=attn_type, d_head=d_head).eval(), make_segments(2)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        mems, compiled_mems = [], []
        for data, target in segments:
            losses, *mems = model(data, target, *mems)
            compiled_losses, *compiled_mems = compiled(data, target, *compiled_mems)
            torch.testing.assert_close(compiled_losses, losses, rtol=1e-12, atol=1e-12)
