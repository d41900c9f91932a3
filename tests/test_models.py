"""The language model and its parts: the original's numbers and checkpoints, a plain definition, and bad input."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.layer_tools import CountOps, original_mask
from txl_kernels.models import (
    AdaptiveEmbedding,
    MemTransformerLM,
    MultiHeadAttn,
    PositionalEmbedding,
    ProjectedAdaptiveLogSoftmax,
)

GOLDEN = np.load(Path(__file__).parent / "golden" / "original_lm.npz")
CASES = sorted({key.split("/")[0] for key in GOLDEN.files if "/" in key})
# no two sizes alike, and H * D != C where the attention type allows it
SIZES = {"n_token": 29, "n_layer": 2, "n_head": 2, "d_model": 12, "d_head": 5, "d_inner": 17}
LENGTHS = {"tgt_len": 5, "ext_len": 0, "mem_len": 7}
ADAPTIVE = {"cutoffs": [8, 19], "div_val": 2, "tie_projs": [False, True, True]}


def make_model(dtype=torch.float64, **options):
    """A model without dropout unless options say so; the same numbers each time, none of them zero."""
    torch.manual_seed(0)
    if options.get("attn_type") == 3:
        options = {"d_head": SIZES["d_model"] // SIZES["n_head"]} | options
    model = MemTransformerLM(**(SIZES | LENGTHS | {"dropout": 0.0, "dropatt": 0.0} | options))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def make_segments(n=3, T=5, B=3):
    generator = torch.Generator().manual_seed(1)
    stream = torch.randint(0, SIZES["n_token"], (n * T + 1, B), generator=generator)
    return [(stream[i * T : (i + 1) * T], stream[i * T + 1 : (i + 1) * T + 1]) for i in range(n)]


def run(model, segments):
    """Losses of all segments, the last memory, and the gradients of their mean, by name."""
    model.zero_grad()
    losses, mems = [], []
    for data, target in segments:
        loss, *mems = model(data, target, *mems)
        losses.append(loss)
    torch.cat(losses).mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"losses": torch.cat(losses).detach(), "mems": mems} | gradients


# The original's numbers


def golden(case, dtype=torch.float64):
    """The model of a golden case, and its numbers."""
    numbers = {
        key.removeprefix(f"{case}/"): torch.from_numpy(GOLDEN[key])
        for key in GOLDEN.files
        if key.startswith(f"{case}/") and GOLDEN[key].dtype.kind in "if"
    }
    model = MemTransformerLM(**json.loads(str(GOLDEN[f"{case}/cfg"]))).to(dtype)
    model.load_state_dict({k.removeprefix("param/"): x for k, x in numbers.items() if k.startswith("param/")})
    return model, numbers


def by_cluster(losses, target, model):
    """Losses as the original returns them: those of the first cluster first."""
    cutoffs = torch.tensor(model.crit.cutoff_ends[1:-1], dtype=torch.int64)
    order = torch.bucketize(target.flatten(), cutoffs, right=True).argsort(stable=True)
    return losses.flatten()[order].view_as(losses)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_the_numbers_of_the_original(case, dtype):
    model, numbers = golden(case, dtype)
    # the golden scores went through float32 to be masked
    allowed = {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}

    def assert_golden(name, got):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), numbers[name], **allowed, msg=lambda text: f"{name}: {text}")

    mems, total = [], 0
    for n in range(3):
        data, target = numbers[f"in/data{n}"], numbers[f"in/target{n}"]
        assert_golden(f"out/hidden{n}", model._forward(data, mems or model.init_mems())[0])
        losses, *mems = model(data, target, *mems)
        losses = by_cluster(losses, target, model)
        assert_golden(f"out/nll{n}", losses)
        for i, memory in enumerate(mems):
            assert_golden(f"out/mems{n}.{i}", memory)
        total = total + (losses * numbers[f"gout/nll{n}"]).sum()
    total.backward()
    parameters = dict(model.named_parameters())
    assert parameters.keys() == {k.removeprefix("gparam/") for k in numbers if k.startswith("gparam/")}
    for name, parameter in parameters.items():
        assert_golden(f"gparam/{name}", parameter.grad)


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_are_the_original_s(case):
    prefix = f"{case}/param/"
    shapes = {k.removeprefix(prefix): GOLDEN[k].shape for k in GOLDEN.files if k.startswith(prefix)}
    state = golden(case)[0].state_dict()
    assert {name: tuple(x.shape) for name, x in state.items()} == shapes
    assert list(state) == list(shapes)  # optimizer states count the parameters in this order


# A plain definition of the model, query by query, for what the golden cases do not cover


def plain_forward(model, data, mems):
    """Hidden states and new memory as MemTransformerLM._forward, from the formulas."""
    T, M, C, kind = data.shape[0], mems[0].shape[0], model.d_model, model.attn_type
    far = model.clamp_len if model.clamp_len > 0 else M + T
    frequency = (1 / 10000 ** (torch.arange(0, C, 2) / C)).double()  # a float32 buffer in the original
    angle = torch.arange(M + T).clamp(max=far)[:, None] * frequency  # by distance
    sinusoid = torch.cat([angle.sin(), angle.cos()], 1)
    h, mems, hids = model.word_emb(data), list(mems), []
    for n, layer in enumerate(model.layers):
        if kind == 3 or (kind == 2 and n == 0):
            rows = sinusoid.flip(0) if kind == 2 else by_distance(model.r_emb[n], M + T).flip(0).flatten(1)
            h, mems[n] = h + rows[M:, None], mems[n] + rows[:M, None] if M else mems[n]
        hids.append(h)
        att, x = layer.dec_attn, torch.cat([mems[n], h])
        norm = att.layer_norm if att.pre_lnorm else lambda x: x
        heads = (-1, data.shape[1], att.n_head, att.d_head)
        if kind < 2:
            q, k, v = (x.reshape(heads) for x in att.qkv_net(norm(x)).chunk(3, -1))
            q = q[M:]
        else:
            q, k, v = (x.reshape(heads) for x in (att.q_net(h), *att.kv_net(norm(x)).chunk(2, -1)))
        u = v_pos = r_bias = r = 0
        if kind == 0:
            u, v_pos = (b if b.ndim == 2 else b[n] for b in (model.r_w_bias, model.r_r_bias))
            r = att.r_net(sinusoid).reshape(-1, *heads[2:])
        if kind == 1:
            u = model.r_w_bias[n]
            r, r_bias = (by_distance(x[n][-far:], M + T) for x in (model.r_emb, model.r_bias))
        outs = []
        for i in range(T):
            first = max(0, i + M - model.mem_len + 1) if model.same_length else 0
            keys = torch.arange(first, i + M + 1)
            score = torch.einsum("bnd,jbnd->jbn", q[i] + u, k[keys])
            if kind < 2:
                distance = i + M - keys
                score = score + torch.einsum("bnd,jnd->jbn", q[i] + v_pos, r[distance])
                score = score + (r_bias[distance][:, None] if kind == 1 else 0)
            prob = torch.softmax(score / att.d_head**0.5, 0)
            outs.append(torch.einsum("jbn,jbnd->bnd", prob, v[keys]).flatten(1))
        out = h + att.o_net(torch.stack(outs))
        out = out if att.pre_lnorm else att.layer_norm(out)
        net = layer.pos_ff
        h = out + net.CoreNet(net.layer_norm(out)) if net.pre_lnorm else net.layer_norm(out + net.CoreNet(out))
    hids.append(h)
    end = T + max(0, M - model.ext_len)
    new = [torch.cat([m, x])[max(0, end - model.mem_len) : end].detach() for m, x in zip(mems, hids, strict=True)]
    return h, new


def by_distance(rows, n):
    """Rows for distances 0 ... n - 1 of rows whose last stands for 0; the first stands for all beyond it."""
    return rows.flip(0)[torch.arange(n).clamp(max=rows.shape[0] - 1)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pre_lnorm": True},
        {"same_length": True},
        {"same_length": True, "mem_len": 3},  # a window shorter than the segment
        {"clamp_len": 4},
        {"same_length": True, "clamp_len": 3, "pre_lnorm": True},
        {"ext_len": 2},
        {"mem_len": 0},
        {"mem_len": 2},
        {"mem_len": 40, "tgt_len": 1},
    ],
    ids=lambda options: " ".join(f"{k}={x}" for k, x in options.items()) or "plain",
)
@pytest.mark.parametrize("attn_type", [0, 1, 2, 3])
def test_the_plain_definition(attn_type, options):
    model = make_model(attn_type=attn_type, **options)
    ours, plain, got, wanted = model.init_mems(), [torch.empty(0, 3, 12).double()] * 3, [], []
    for data, _ in make_segments():
        hidden, ours = model._forward(data, ours)
        plain_hidden, plain = plain_forward(model, data, plain)
        got.append(hidden)
        wanted.append(plain_hidden)
        for x, y in zip(ours or [], plain if ours else [], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    got, wanted = torch.stack(got), torch.stack(wanted)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    gout = torch.randn(got.shape, generator=torch.Generator().manual_seed(2)).double()
    grads = [torch.autograd.grad(out, list(model.parameters()), gout, materialize_grads=True) for out in (got, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


# Lengths and memory


@pytest.mark.parametrize("attn_type", [0, 1, 2, 3])
def test_memory_carries_no_gradient_and_is_not_written_to(attn_type):
    model, (first, second, _) = make_model(attn_type=attn_type), make_segments()
    _, *mems = model(*first)
    assert len(mems) == 3
    before = copy.deepcopy(mems)
    losses, *new = model(*second, *mems)
    for memory, kept in zip(mems, before, strict=True):
        assert torch.equal(memory, kept)
    for memory in (*mems, *new):
        assert not memory.requires_grad
        assert memory.untyped_storage().nbytes() == memory.numel() * memory.element_size()
    with_history = [m.clone().requires_grad_() for m in mems]
    _, *new = model(*second, *with_history)
    assert not any(m.requires_grad for m in new)
    assert losses.requires_grad


@pytest.mark.parametrize("ext_len", [0, 2, 9])
@pytest.mark.parametrize(("M", "T", "mem_len"), [(0, 5, 7), (3, 5, 7), (7, 5, 7), (9, 2, 7), (4, 5, 0), (1, 9, 4)])
def test_the_rows_of_the_new_memory(M, T, mem_len, ext_len):
    model = make_model(mem_len=mem_len, ext_len=ext_len)
    memory, states = torch.arange(M).float(), M + torch.arange(T).float()
    end = T + max(0, M - ext_len)
    wanted = torch.arange(max(0, end - mem_len), end).float()
    for got in model._update_mems([states[:, None, None]] * 3, [memory[:, None, None]] * 3):
        assert torch.equal(got.flatten(), wanted)


def test_no_memory_means_no_memory_is_returned():
    model, (first, *_) = make_model(mem_len=0), make_segments()
    assert model.init_mems() is None
    assert len(model(*first)) == 1
    model.reset_length(5, 0, 3)
    assert [m.shape for m in model.init_mems()] == [(0,)] * 3
    losses, *mems = model(*first)
    assert [m.shape for m in mems] == [(3, 3, 12)] * 3
    assert torch.equal(model(*first, *model.init_mems())[0], losses)


def test_reset_length_changes_window_and_memory():
    """Evaluation as the original does it: short segments, a long memory, learned elsewhere."""
    model = make_model(attn_type=0, n_layer=1)
    long = make_segments(1, T=12)[0]
    model.reset_length(12, 0, 0)
    wanted = model(*long)[0]
    model.reset_length(3, 0, 40)
    got, mems = [], []
    for i in range(0, 12, 3):
        losses, *mems = model(long[0][i : i + 3], long[1][i : i + 3], *mems)
        got.append(losses)
    torch.testing.assert_close(torch.cat(got), wanted, rtol=1e-10, atol=1e-10)
    assert mems[0].shape[0] == 12
    assert (model.tgt_len, model.ext_len, model.mem_len) == (3, 0, 40)


def test_targets_of_the_last_tokens_only():
    """With ext_len a segment repeats tokens of the one before; only its last ones have targets."""
    model, ((data, target), *_) = make_model(ext_len=2, tgt_len=3), make_segments()
    assert torch.equal(model(data, target[2:])[0], model(data, target)[0][2:])


def test_same_length_hides_what_is_farther_back():
    model, ((data, target), *_) = make_model(n_layer=1, same_length=True, mem_len=4), make_segments(1, T=9)
    other = data.clone()
    other[2] = (data[2] + 1) % SIZES["n_token"]
    a, b = (model(x, target)[0] for x in (data, other))
    assert torch.equal(a[:2], b[:2])
    assert (a[2:6] != b[2:6]).all()  # tokens 2 to 5 see token 2
    torch.testing.assert_close(a[6:], b[6:])


def test_clamp_len_beyond_all_distances_changes_nothing():
    for attn_type in (0, 2):
        plain, clamped, tight = (make_model(attn_type=attn_type, clamp_len=n) for n in (-1, 11, 10))
        a, b, c = (run(model, make_segments())["losses"] for model in (plain, clamped, tight))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


# Options


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
    states, r = seen
    assert not states.any() if attn_type != 3 else torch.equal(states[:, 0], model.r_emb[0, -5:].flatten(1))
    assert attn_type != 0 or not r.any()


@pytest.mark.parametrize("attn_type", [0, 1, 2, 3])
def test_a_batch_of_none(attn_type):
    empty = torch.empty(5, 0, dtype=torch.int64)
    losses, *mems = make_model(attn_type=attn_type, **ADAPTIVE)(empty, empty)
    assert losses.shape == (5, 0)
    assert mems[0].shape == (5, 0, 12)


class Shapes(TorchDispatchMode):
    """Collects the shapes of all results outside of rel_attention."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(x.shape) for x in (out if isinstance(out, tuple | list) else [out]) if hasattr(x, "shape")}
        return out


@pytest.mark.parametrize("same_length", [False, True])
@pytest.mark.parametrize("attn_type", [0, 1])
def test_no_tensor_of_queries_by_keys_on_the_causal_path(attn_type, same_length):
    model = make_model(attn_type=attn_type, mem_len=50, same_length=same_length)
    long, (data, target) = make_segments(1, T=31)[0], make_segments(1, T=11)[0]
    _, *mems = model(*long)
    with Shapes() as shapes:
        model(data, target, *mems)[0].sum().backward()
    assert (11, 3, 12) in shapes.seen
    assert not [shape for shape in shapes.seen if 11 in shape and 42 in shape]


def test_a_same_length_mask_is_made_and_read_once():
    model, ((data, target), *_) = make_model(same_length=True, n_layer=3, mem_len=6), make_segments()
    mems = [torch.randn(6, 3, 12).double() for _ in range(4)]
    with CountOps() as ops:
        for _ in range(2):
            model(data, target, *mems)
    assert ops.calls["rel_attention"] == 6
    assert ops.calls["triu"] <= 1  # none if a test before has made it
    assert ops.calls["amin"] <= 1
    assert model._mask(5, 6, data.device) is model._mask(5, 6, data.device)  # layers know a mask by its object


# Parts


def test_positional_embedding():
    rows = PositionalEmbedding(6)(torch.tensor([3.0, 0.0]))
    angles = [3 / 10000 ** (2 * k / 6) for k in range(3)]
    wanted = [[math.sin(x) for x in angles] + [math.cos(x) for x in angles], [0.0] * 3 + [1.0] * 3]
    torch.testing.assert_close(rows, torch.tensor(wanted)[:, None])
    assert torch.equal(PositionalEmbedding(6)(torch.tensor([3.0, 0.0]), 4), rows.expand(2, 4, 6))


def test_positions_of_a_16_bit_model_are_told_apart():
    module, positions = PositionalEmbedding(8), torch.arange(3000, 0, -1)
    got = copy.deepcopy(module).bfloat16()(positions)
    assert torch.equal(got, module(positions).bfloat16())


@pytest.mark.parametrize("mask", ["none", "causal", "by element", "keys"])
@pytest.mark.parametrize("pre_lnorm", [False, True])
@pytest.mark.parametrize(("T", "M"), [(4, 0), (4, 3), (1, 3)])
def test_multi_head_attention(T, M, pre_lnorm, mask):
    torch.manual_seed(0)
    layer = MultiHeadAttn(2, 12, 5, 0.0, pre_lnorm=pre_lnorm).double()
    h, mems = torch.randn(T, 3, 12).double(), torch.randn(M, 3, 12).double()
    hidden = original_mask(T, M)
    if mask == "by element":
        hidden = hidden | (torch.rand(T, M + T, 3) < 0.4) & ~torch.eye(T, M + T).roll(M, 1)[:, :, None].bool()
    if mask == "keys":
        hidden = torch.rand(M + T, 3) < 0.4
        hidden[0] = False
    got = layer(h, None if mask == "none" else hidden.to(torch.uint8), mems)
    states = torch.cat([mems, h])
    q = layer.q_net(h).view(T, 3, 2, 5)
    k, v = (
        x.view(M + T, 3, 2, 5) for x in layer.kv_net(layer.layer_norm(states) if pre_lnorm else states).chunk(2, -1)
    )
    score = torch.einsum("ibnd,jbnd->ijbn", q, k) / 5**0.5
    prob = score.masked_fill(hidden.expand(T, M + T, 3)[..., None], -math.inf).softmax(1)
    out = h + layer.o_net(torch.einsum("ijbn,jbnd->ibnd", prob, v).flatten(2))
    torch.testing.assert_close(got, out if pre_lnorm else layer.layer_norm(out), rtol=1e-10, atol=1e-10)


CLUSTERS = [
    {"cutoffs": [], "div_val": 1},
    {"cutoffs": [8, 19], "div_val": 1},
    {"cutoffs": [8, 19], "div_val": 2},
    {"cutoffs": [1], "div_val": 4},
    {"cutoffs": [], "div_val": 2},
]


@pytest.mark.parametrize("d_embed", [12, 8])
@pytest.mark.parametrize("clusters", CLUSTERS, ids=str)
def test_adaptive_embedding_token_by_token(clusters, d_embed):
    module = AdaptiveEmbedding(29, d_embed, 12, **clusters)
    ends, got = [0, *clusters["cutoffs"], 29], module(torch.arange(29).flip(0).view(29, 1))
    for token in range(29):
        i = max(n for n, left in enumerate(ends) if token >= left)
        first = ends[i] if clusters["div_val"] != 1 else 0
        layer = i if clusters["div_val"] != 1 else 0
        wanted = module.emb_layers[layer].weight[token - first]
        if len(module.emb_projs):
            wanted = module.emb_projs[layer] @ wanted
        torch.testing.assert_close(got[28 - token, 0], wanted * 12**0.5)
    assert got.shape == (29, 1, 12)
    assert len(module.emb_projs) == (0 if clusters["div_val"] == 1 and d_embed == 12 else len(module.emb_layers))


@pytest.mark.parametrize("d_embed", [12, 8])
@pytest.mark.parametrize("clusters", CLUSTERS, ids=str)
def test_adaptive_softmax_is_a_distribution_in_token_order(clusters, d_embed):
    torch.manual_seed(0)
    module = ProjectedAdaptiveLogSoftmax(29, d_embed, 12, **clusters).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    hidden = torch.randn(12).double()
    losses = module(hidden.expand(29, 12), torch.arange(29))
    torch.testing.assert_close((-losses).exp().sum(), torch.tensor(1.0).double())
    order = torch.randperm(29)
    torch.testing.assert_close(module(hidden.expand(29, 12), order), losses[order])
    alone = [module(hidden[None], torch.tensor([token])) for token in range(29)]  # all other clusters empty
    torch.testing.assert_close(torch.cat(alone), losses)
    assert {module(hidden[None], torch.tensor([t])).dtype for t in (0, 28)} == {torch.float64}


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


# Precision and training


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


def test_parameters_are_drawn_as_the_training_script_does():
    torch.manual_seed(0)
    sizes = {"n_token": 400, "n_layer": 2, "n_head": 8, "d_model": 64, "d_head": 16, "d_inner": 64}
    for attn_type in (0, 1):
        model = MemTransformerLM(
            **sizes | LENGTHS | ADAPTIVE, dropout=0.0, dropatt=0.0, attn_type=attn_type, tie_weight=False
        )
        for name, x in model.named_parameters():
            mean, std = float("layer_norm.weight" in name), 0.01 if "projs" in name else 0.02
            if name.endswith(".bias") or name in ("r_bias", "crit.cluster_bias"):
                assert not x.any(), name
            else:
                assert abs(x.mean().item() - mean) < 5 * std / x.numel() ** 0.5, name
                assert x.std().item() == pytest.approx(std, rel=5 / x.numel() ** 0.5), name


def test_importing_the_package_does_not_import_the_models():
    program = "import sys, txl_kernels; sys.exit('txl_kernels.models' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])


# Bad input


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"attn_type": 4}, ValueError, r"attn_type: expected 0, 1, 2 or 3, got 4"),
        (
            {"attn_type": 3, "d_head": 5},
            ValueError,
            r"attn_type 3: expected n_head \* d_head = d_model, got 2 \* 5 and 12",
        ),
        ({"cutoffs": [9, 9]}, ValueError, r"cutoffs: expected 0 < c1 < .* n_token = 29, got \[9, 9\]"),
        ({"cutoffs": [0]}, ValueError, r"cutoffs: .* got \[0\]"),
        ({"cutoffs": [29]}, ValueError, r"cutoffs: .* got \[29\]"),
        ({"cutoffs": [8, 19], "div_val": 4}, ValueError, r"div_val: expected 1 <= div_val\*\*2 <= d_embed = 12, got 4"),
        ({"div_val": 0}, ValueError, r"div_val: .* got 0"),
        ({"tie_projs": [False, True]}, ValueError, r"tie_projs: expected at most 1, .*got \[False, True\]"),
        ({"d_model": 11}, ValueError, r"demb: expected an even width .*, got 11"),
        ({"n_layer": 0}, ValueError, r"n_layer: expected an int >= 1, got 0"),
        ({"d_inner": 2.0}, ValueError, r"d_inner: expected an int >= 1, got 2\.0"),
        ({"tgt_len": None}, ValueError, r"tgt_len: expected an int >= 1, got None"),
        ({"mem_len": -1}, ValueError, r"mem_len: expected an int >= 0, got -1"),
        ({"untie_r": True, "attn_type": 2}, ValueError, r"untie_r: expected attn_type 0, .* got attn_type 2"),
        ({"sample_softmax": 10}, NotImplementedError, r"sample_softmax: expected <= 0 .* got 10"),
    ],
)
def test_bad_arguments_are_named(wrong, error, message):
    with pytest.raises(error, match=message):
        MemTransformerLM(**(SIZES | LENGTHS | {"dropout": 0.0, "dropatt": 0.0} | wrong))


TOKENS = torch.zeros(5, 3, dtype=torch.int64)
MEMS = [torch.zeros(4, 3, 12).double()] * 3


@pytest.mark.parametrize(
    ("data", "target", "mems", "error", "message"),
    [
        (TOKENS.float(), TOKENS, [], TypeError, r"data: expected dtype torch\.int64, got torch\.float32"),
        (TOKENS, TOKENS.int(), [], TypeError, r"target: expected dtype torch\.int64, got torch\.int32"),
        (TOKENS[0], TOKENS, [], ValueError, r"data: expected \(T, B\) with T >= 1, got \(3,\)"),
        (TOKENS[:0], TOKENS, [], ValueError, r"data: .* got \(0, 3\)"),
        (TOKENS, TOKENS[:, :2], [], ValueError, r"target: expected \(1 to 5, 3\) as data, got \(5, 2\)"),
        (TOKENS[1:], TOKENS, [], ValueError, r"target: expected \(1 to 4, 3\) as data, got \(5, 3\)"),
        (TOKENS, TOKENS[:0], [], ValueError, r"target: .* got \(0, 3\)"),
        (TOKENS, TOKENS[0], [], ValueError, r"target: .* got \(3,\)"),
        (TOKENS + 29, TOKENS, [], ValueError, r"data: expected tokens in 0 \.\.\. 28, got 29 \.\.\. 29"),
        (TOKENS, TOKENS - 1, [], ValueError, r"target: expected tokens in 0 \.\.\. 28, got -1 \.\.\. -1"),
        (TOKENS, TOKENS, MEMS[:2], ValueError, r"mems: expected n_layer \+ 1 = 3 tensors or none, got 2"),
        (TOKENS, TOKENS, [*MEMS[:2], MEMS[0][:3]], ValueError, r"mems: .* = \(M, 3, 12\) .* \(3, 3, 12\)\]"),
        (TOKENS[:, :2], TOKENS[:, :2], MEMS, ValueError, r"mems: .* = \(M, 2, 12\) for each, got \[\(4, 3, 12\)"),
    ],
)
@pytest.mark.parametrize("attn_type", [0, 2])
def test_bad_input_is_named(attn_type, data, target, mems, error, message):
    with pytest.raises(error, match=message):
        make_model(attn_type=attn_type)(data, target, *mems)


def test_bad_lengths_are_named():
    model = make_model(same_length=True)
    with pytest.raises(ValueError, match=r"ext_len: expected an int >= 0, got -2"):
        model.reset_length(5, -2, 7)
    model.reset_length(5, 0, 0)
    with pytest.raises(ValueError, match=r"mem_len: expected >= 1 with same_length, .* got 0"):
        model(TOKENS, TOKENS)


def test_losses_want_a_target_for_each_state():
    with pytest.raises(ValueError, match=r"target: expected \(4,\) as hidden, got \(5,\)"):
        ProjectedAdaptiveLogSoftmax(29, 12, 12, [])(torch.zeros(4, 12), torch.zeros(5, dtype=torch.int64))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"h": torch.zeros(4, 3, 11)}, r"h: expected \(T, B, d_model\) with d_model = 12, got \(4, 3, 11\)"),
        ({"h": torch.zeros(4, 12)}, r"h: .* got \(4, 12\)"),
        ({"mems": torch.zeros(2, 1, 12)}, r"mems: expected .* = \(M, 3, 12\) as h, got \(2, 1, 12\)"),
        ({"attn_mask": original_mask(4, 0)}, r"attn_mask: expected \(4, 6, 1\), .* got \(4, 4, 1\)"),
    ],
)
def test_bad_input_of_multi_head_attention_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadAttn(2, 12, 5, 0.0)(**({"h": torch.zeros(4, 3, 12), "mems": torch.zeros(2, 3, 12)} | wrong))
