"""The layers: the original's numbers, checkpoints and calls, and their deviations."""

import copy
import io
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import reference
import txl_kernels
from tests.layer_tools import (
    GOLDEN,
    GOLDEN_CASES,
    C,
    CountOps,
    D,
    H,
    assert_as_accurate,
    assert_golden,
    golden,
    make_inputs,
    make_layer,
    original_mask,
    run,
    same_length_mask,
)
from txl_kernels import RelLearnableMultiHeadAttn, RelPartialLearnableMultiHeadAttn

ReferenceLayer = reference.RelPartialLearnableMultiHeadAttn
PAIRS = {
    "partial": (RelPartialLearnableMultiHeadAttn, ReferenceLayer),
    "learned": (RelLearnableMultiHeadAttn, reference.RelLearnableMultiHeadAttn),
}


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8])
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_the_numbers_of_the_original(case, mask_dtype):
    layer, inputs, numbers = golden(case, txl_kernels)
    got = run(layer, inputs, numbers["gout/output"], numbers["in/attn_mask"].to(mask_dtype))
    assert_golden(got, numbers)
    if "same_length" not in case:
        assert_golden(run(layer, inputs, numbers["gout/output"]), numbers)


@pytest.mark.parametrize("pre_lnorm", [False, True], ids=["post_lnorm", "pre_lnorm"])
@pytest.mark.parametrize(("T", "M"), [(9, 0), (1, 6), (13, 20)])
@pytest.mark.parametrize(
    ("autocast", "dtype"),
    [(None, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=["float32", "autocast", "autocast_of_bfloat16"],
)
@pytest.mark.parametrize("kind", PAIRS)
def test_as_accurate_as_the_reference(kind, T, M, pre_lnorm, autocast, dtype):
    inputs = make_inputs(T, M, learned=M + T if kind == "learned" else None)
    assert_as_accurate_as_the_reference(kind, inputs, original_mask(T, M), autocast, dtype, pre_lnorm=pre_lnorm)


def masks(T, M, B):
    """Masks by name that leave every query a key; those of the second half show a query its future."""
    generator, S = torch.Generator().manual_seed(4), M + T
    causal, itself = original_mask(T, M), torch.eye(T, S).roll(M, 1)[:, :, None].bool()
    some = (torch.rand(T, S, B, generator=generator) < 0.4) & ~itself
    keys = torch.rand(S, B, generator=generator) < 0.4
    keys[0] = False
    return {
        "same_length": same_length_mask(T, M, max(M, T)),
        "shorter than the segment": causal | torch.ones(T, S).tril(M - 2)[:, :, None].bool(),
        "by batch element": causal | some,
        "future": some,
        "keys": keys,
        "nothing": torch.zeros(T, S, 1, dtype=torch.bool),
    }


@pytest.mark.parametrize("mask", masks(1, 0, 1))
@pytest.mark.parametrize(("T", "M"), [(9, 0), (1, 6), (2, 3), (7, 12)])
@pytest.mark.parametrize("kind", PAIRS)
def test_masks_of_every_kind(kind, mask, T, M):
    assert_equal_in_float64(kind, make_inputs(T, M, learned=M + T if kind == "learned" else None), masks(T, M, 3)[mask])


@pytest.mark.parametrize("mask", ["same_length", "by batch element", "future"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("kind", PAIRS)
def test_as_accurate_as_the_reference_with_masks(kind, autocast, mask):
    inputs = make_inputs(13, 20, learned=33 if kind == "learned" else None)
    assert_as_accurate_as_the_reference(kind, inputs, masks(13, 20, 3)[mask], autocast)


@pytest.mark.parametrize("mask", ["same_length", "future"])
@pytest.mark.parametrize("rows", [1, 8, 13])
def test_learned_rows_are_repeated_in_front_or_left_out(rows, mask):
    assert_equal_in_float64("learned", make_inputs(5, 6, learned=rows), masks(5, 6, 3)[mask])


def assert_equal_in_float64(kind, inputs, mask):
    layer, other = (make_layer(cls, torch.float64) for cls in PAIRS[kind])
    other.load_state_dict(layer.state_dict())
    inputs = {name: x.double() for name, x in inputs.items()}
    gout = torch.randn(inputs["w"].shape, generator=torch.Generator().manual_seed(2)).double()
    got, wanted = (run(x, inputs, gout, mask) for x in (layer, other))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def assert_as_accurate_as_the_reference(kind, inputs, mask, autocast=None, dtype=torch.float32, **options):
    """Output and gradients, held against the reference layer in the same dtypes and in float64."""
    layer, other = (make_layer(cls, **options) for cls in PAIRS[kind])
    other.load_state_dict(layer.state_dict())
    exact = copy.deepcopy(other).double()
    inputs = {name: x if "bias" in name else x.to(dtype) for name, x in inputs.items()}
    gout = torch.randn(inputs["w"].shape, generator=torch.Generator().manual_seed(2)).to(dtype)

    got = run(layer, inputs, gout, mask, autocast)
    wanted = run(other, inputs, gout, mask, autocast)
    truth = run(exact, {name: x.double() for name, x in inputs.items()}, gout.double(), mask)
    assert_as_accurate(got, wanted, truth, autocast or dtype)


@pytest.mark.parametrize("mask", ["rows", "a batch element", "everything"])
def test_queries_without_a_key_attend_to_nothing(mask):
    hidden = torch.zeros(5, 8, 3, dtype=torch.bool)
    dead = (slice(2, 4), slice(None)) if mask == "rows" else (slice(None), 1 if mask == "a batch element" else slice(3))
    hidden[dead[0], :, dead[1]] = True
    layer, inputs = make_layer(pre_lnorm=True), make_inputs(5, 3)
    got = run(layer, inputs, torch.ones(5, 3, C), hidden)
    assert torch.equal(got["out"][dead], inputs["w"][dead])
    assert all(x.isfinite().all() for x in got.values())
    if mask == "everything":
        assert not got["qkv_net.weight"].any()


def test_none_means_causal_and_the_future_changes_nothing():
    layer, inputs = make_layer(), make_inputs(6, 4)
    out = layer(**inputs)
    assert torch.equal(layer(**inputs, attn_mask=original_mask(6, 4)), out)
    inputs["w"] = torch.cat([inputs["w"][:4], torch.full((2, 3, C), 7.0)])
    torch.testing.assert_close(layer(**inputs)[:4], out[:4])


@pytest.mark.parametrize("pre_lnorm", [False, True], ids=["post_lnorm", "pre_lnorm"])
def test_one_long_segment_equals_two_with_memory(pre_lnorm):
    layer = make_layer(dtype=torch.float64, pre_lnorm=pre_lnorm)
    inputs = make_inputs(11, 0, dtype=torch.float64)
    u, v, w, r = (inputs[name] for name in ("r_w_bias", "r_r_bias", "w", "r"))
    first = layer(w[:4], r[-4:], u, v)
    second = layer(w[4:], r, u, v, mems=w[:4])
    torch.testing.assert_close(torch.cat([first, second]), layer(w, r, u, v), rtol=1e-12, atol=1e-12)


def test_all_forms_of_no_memory():
    layer, inputs = make_layer(), make_inputs(5, 0)
    out = layer(**(inputs | {"mems": None}), attn_mask=original_mask(5, 0))
    for empty in (torch.empty(0), torch.empty(0, 3, C), torch.empty(0, 3, C, dtype=torch.float64)):
        assert torch.equal(layer(**(inputs | {"mems": empty}), attn_mask=original_mask(5, 0)), out)


def test_r_without_batch_dimension_and_with_extra_rows():
    layer, inputs = make_layer(), make_inputs(5, 3)
    out, r = layer(**inputs), inputs["r"]
    assert torch.equal(layer(**(inputs | {"r": r[:, 0]})), out)
    longer = torch.cat([r, torch.full((2, 1, C), 9.0)]).detach().requires_grad_()
    with_extra = layer(**(inputs | {"r": longer}))
    torch.testing.assert_close(with_extra, out)
    with_extra.sum().backward()
    assert not longer.grad[-2:].any()


def test_empty_batch():
    assert make_layer()(**make_inputs(4, 3, B=0), attn_mask=original_mask(4, 3)).shape == (4, 0, C)


def test_dropout_is_on_the_last_projection():
    layer, inputs = make_layer(dropout=1.0), make_inputs(4, 3)
    assert torch.equal(layer(**inputs), layer.layer_norm(inputs["w"]))
    assert torch.equal(layer.eval()(**inputs), make_layer()(**inputs))


def test_dropatt_drops_probabilities():
    layer = make_layer(dropatt=0.4, pre_lnorm=True)  # its output is linear in the probabilities
    inputs = {name: x.detach() for name, x in make_inputs(6, 5).items()}
    without = make_layer(pre_lnorm=True)(**inputs)
    assert torch.equal(layer.eval()(**inputs), without)
    layer.train()
    outs = torch.stack([seeded(seed, layer, inputs) for seed in range(400)])
    assert torch.equal(outs[7], seeded(7, layer, inputs))
    error, spread = (outs.mean(0) - without).abs(), outs.std(0)
    assert (spread > 0).all()
    assert (error / spread * 400**0.5).max() < 5  # in standard errors, 216 of them


def seeded(seed, layer, inputs, **options):
    torch.manual_seed(seed)
    return layer(**inputs, **options)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", PAIRS)
def test_activation_checkpointing_repeats_the_dropout(kind, use_reentrant):
    layer = make_layer(PAIRS[kind][0], dropatt=0.4, dropout=0.2)
    inputs = make_inputs(5, 3, learned=8 if kind == "learned" else None)
    *tensors, mems = inputs.values()
    grads = []
    for wrap in (lambda f, *args: f(*args), lambda f, *args: checkpoint(f, *args, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        out = wrap(layer, *tensors, original_mask(5, 3), mems)
        torch.rand(3)  # moves the generator on, as the layers in between do
        layer.zero_grad()
        for x in inputs.values():
            x.grad = None
        out.square().sum().backward()
        grads.append([out, *(x.grad for x in (*inputs.values(), *layer.parameters()))])
    for x, y in zip(*grads, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("M", [0, 6])
def test_nothing_is_copied_around_the_attention(M):
    layer, inputs = make_layer(), make_inputs(4, M)
    with CountOps() as ops:
        layer(**inputs)
    assert ops.calls["rel_attention_with_weights"] == 1
    assert ops.calls["cat"] == (M > 0)
    assert not {"clone", "copy_", "_to_copy", "contiguous"} & ops.calls.keys()


@pytest.mark.parametrize("kind", ["same_length", "by batch element", "future"])
def test_layers_that_share_a_mask_read_and_invert_it_once(kind):
    layers, inputs, mask = [make_layer() for _ in range(3)], make_inputs(4, 6), masks(4, 6, 3)[kind]
    with CountOps() as ops:
        for layer in layers:
            layer(**inputs, attn_mask=mask)
    assert ops.calls["rel_attention_with_weights"] == 3
    assert ops.calls["amin"] == 1
    assert ops.calls["logical_not"] == (kind != "same_length")


@pytest.mark.parametrize("case", ["partial_causal_mem", "learnable_R_eq"])
def test_checkpoints_are_the_original_s(case):
    prefix = f"{case}/param/"
    shapes = {k.removeprefix(prefix): GOLDEN[k].shape for k in GOLDEN.files if k.startswith(prefix)}
    layer, _, _ = golden(case, txl_kernels)
    state = layer.state_dict()
    assert {name: tuple(x.shape) for name, x in state.items()} == shapes
    assert list(state) == list(shapes)  # optimizer states count the parameters in this order
    golden(case, reference)[0].load_state_dict(state)


@pytest.mark.parametrize("mask", ["causal", "keys"])
@pytest.mark.parametrize("kind", PAIRS)
def test_runs_as_the_forward_of_another_class(kind, mask, monkeypatch):
    ours, theirs = PAIRS[kind]
    original, inputs = make_layer(theirs), make_inputs(4, 3, learned=7 if kind == "learned" else None)
    original.scale = 0.3  # not the default, to see that it counts
    mask = original_mask(4, 3) if mask == "causal" else masks(4, 3, 3)[mask]
    pickled, wanted = pickle.dumps(original), original(**inputs, attn_mask=mask)
    monkeypatch.setattr(theirs, "forward", ours.forward)
    for layer in (original, pickle.loads(pickled)):
        with CountOps() as ops:
            out = layer(**inputs, attn_mask=mask)
        assert ops.calls["rel_attention_with_weights"] == 1
        torch.testing.assert_close(out, wanted)


def test_takes_the_arguments_of_the_original_constructor():
    layer = RelPartialLearnableMultiHeadAttn(H, C, D, 0.1, 0.2, 36, 4, 36, True)
    assert (layer.drop.p, layer.dropatt.p, layer.pre_lnorm, layer.scale) == (0.1, 0.2, True, D**-0.5)
    named = RelPartialLearnableMultiHeadAttn(
        H, C, D, 0.1, dropatt=0.2, tgt_len=36, ext_len=4, mem_len=36, pre_lnorm=True
    )
    assert str(named) == str(layer)


def test_copies_and_pickles():
    layer, inputs = make_layer(), make_inputs(4, 3)
    out = layer(**inputs, attn_mask=original_mask(4, 3))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(twin(**inputs), out)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_training_lowers_the_loss(autocast):
    layer, inputs = make_layer(), make_inputs(6, 4)
    target = torch.randn(6, 3, C, generator=torch.Generator().manual_seed(3))
    parameters = [*layer.parameters(), inputs["r_w_bias"], inputs["r_r_bias"]]
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = (layer(**inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert not any(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


def test_meta_tensors_have_shapes_only():
    layer = RelPartialLearnableMultiHeadAttn(2, 16, 8, dropout=0.0).to("meta")
    w, r, bias = (torch.empty(shape, device="meta") for shape in ((3, 2, 16), (3, 1, 16), (2, 8)))
    assert layer(w, r, bias, bias).shape == (3, 2, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_biases_may_stay_in_float32(dtype):
    """As `rel_attention` takes them beside queries of 16 bits."""
    layer, inputs = make_layer(dtype=dtype), make_inputs(4, 3, dtype=dtype)
    wider = {name: inputs[name].float() for name in ("r_w_bias", "r_r_bias")}
    assert torch.equal(layer(**inputs | wider), layer(**inputs))
