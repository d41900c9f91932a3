"""The layer: the original's numbers, checkpoints and calls, its deviations, and its bad input."""

import copy
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from reference.layer import RelPartialLearnableMultiHeadAttn as ReferenceLayer
from tests.layer_tools import (
    INPUTS,
    C,
    CountOps,
    D,
    H,
    assert_as_accurate,
    make_inputs,
    make_layer,
    original_mask,
    run,
)
from txl_kernels.layer import RelPartialLearnableMultiHeadAttn

GOLDEN = np.load(Path(__file__).parent / "golden" / "original_attention.npz")
GOLDEN_CASES = sorted({key.split("/")[0] for key in GOLDEN.files if key.startswith("partial_")})


def golden(case):
    """One golden case: our layer with its parameters, its inputs as leaves, and all of its numbers."""
    numbers = {
        key.removeprefix(f"{case}/"): torch.from_numpy(GOLDEN[key])
        for key in GOLDEN.files
        if key.startswith(f"{case}/") and GOLDEN[key].dtype.kind in "fb"
    }
    cfg = json.loads(str(GOLDEN[f"{case}/cfg"]))
    layer = RelPartialLearnableMultiHeadAttn(
        cfg["n_head"], cfg["d_model"], cfg["d_head"], dropout=0.0, pre_lnorm=cfg["pre_lnorm"]
    ).double()
    layer.load_state_dict({k.removeprefix("param/"): x for k, x in numbers.items() if k.startswith("param/")})
    inputs = {name: numbers[f"in/{name}"].requires_grad_() for name in INPUTS if f"in/{name}" in numbers}
    return layer, inputs, numbers, cfg["mask"]


@pytest.mark.parametrize("mask_dtype", [None, torch.bool, torch.uint8], ids=["none", "bool", "uint8"])
@pytest.mark.parametrize("case", [case for case in GOLDEN_CASES if "same_length" not in case])
def test_the_numbers_of_the_original(case, mask_dtype):
    layer, inputs, numbers, mask_kind = golden(case)
    assert mask_kind == "causal"
    mask = None if mask_dtype is None else numbers["in/attn_mask"].to(mask_dtype)
    got = run(layer, inputs, numbers["gout/output"], mask)
    for name, x in got.items():
        kind = "out/output" if name == "out" else f"gin/{name}" if name in INPUTS else f"gparam/{name}"
        # the golden scores went through float32 to be masked
        torch.testing.assert_close(x, numbers[kind], rtol=1e-6, atol=2e-6, msg=lambda m, kind=kind: f"{kind}: {m}")


def test_a_same_length_mask_is_refused():
    layer, inputs, numbers, mask_kind = golden("partial_same_length_memfull")
    assert mask_kind == "same_length"
    with pytest.raises(ValueError, match=r"attn_mask: .* same_length and padding masks are not"):
        layer(**inputs, attn_mask=numbers["in/attn_mask"])


@pytest.mark.parametrize("pre_lnorm", [False, True], ids=["post_lnorm", "pre_lnorm"])
@pytest.mark.parametrize(("T", "M"), [(9, 0), (1, 6), (13, 20)])
@pytest.mark.parametrize(
    ("autocast", "dtype"),
    [(None, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=["float32", "autocast", "autocast_of_bfloat16"],
)
def test_as_accurate_as_the_reference(T, M, pre_lnorm, autocast, dtype):
    layer = make_layer(pre_lnorm=pre_lnorm)
    reference = make_layer(ReferenceLayer, pre_lnorm=pre_lnorm)
    reference.load_state_dict(layer.state_dict())
    exact = copy.deepcopy(reference).double()
    states = {name: x.to(dtype) for name, x in make_inputs(T, M).items() if "bias" not in name}
    inputs, mask = make_inputs(T, M) | states, original_mask(T, M)
    gout = torch.randn(T, 3, C, generator=torch.Generator().manual_seed(2)).to(dtype)

    got = run(layer, inputs, gout, mask, autocast)
    wanted = run(reference, inputs, gout, mask, autocast)
    truth = run(exact, {name: x.double() for name, x in inputs.items()}, gout.double(), mask)
    assert_as_accurate(got, wanted, truth, autocast or dtype)


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


def test_dropatt_is_refused_in_training_only():
    layer, inputs = make_layer(dropatt=0.1), make_inputs(4, 3)
    with pytest.raises(NotImplementedError, match=r"dropatt: expected 0 in training mode, got 0\.1"):
        layer(**inputs)
    assert torch.equal(layer.eval()(**inputs), make_layer()(**inputs))


@pytest.mark.parametrize("M", [0, 6])
def test_nothing_is_copied_around_the_attention(M):
    layer, inputs = make_layer(), make_inputs(4, M)
    with CountOps() as ops:
        layer(**inputs)
    assert ops.calls["rel_attention"] == 1
    assert ops.calls["cat"] == (M > 0)
    assert not {"clone", "copy_", "_to_copy", "contiguous"} & ops.calls.keys()


def test_layers_that_share_a_mask_verify_it_once():
    layers, inputs, mask = [make_layer() for _ in range(3)], make_inputs(4, 6), original_mask(4, 6)
    with CountOps() as ops:
        for layer in layers:
            layer(**inputs, attn_mask=mask)
    assert ops.calls["rel_attention"] == 3
    assert ops.calls["argmax"] == 1


def test_checkpoints_are_the_original_s():
    case = "partial_causal_mem/param/"
    shapes = {k.removeprefix(case): GOLDEN[k].shape for k in GOLDEN.files if k.startswith(case)}
    layer, sizes, _, _ = golden("partial_causal_mem")
    state = layer.state_dict()
    assert {name: tuple(x.shape) for name, x in state.items()} == shapes
    assert list(state) == list(shapes)  # optimizer states count the parameters in this order
    n_head, d_head = sizes["r_w_bias"].shape
    ReferenceLayer(n_head, layer.d_model, d_head, dropout=0.0).load_state_dict(state)


def test_runs_as_the_forward_of_another_class(monkeypatch):
    original, inputs = make_layer(ReferenceLayer), make_inputs(4, 3)
    original.scale = 0.3  # not the default, to see that it counts
    pickled, wanted = pickle.dumps(original), original(**inputs, attn_mask=original_mask(4, 3))
    monkeypatch.setattr(ReferenceLayer, "forward", RelPartialLearnableMultiHeadAttn.forward)
    for layer in (original, pickle.loads(pickled)):
        with CountOps() as ops:
            out = layer(**inputs, attn_mask=original_mask(4, 3))
        assert ops.calls["rel_attention"] == 1
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


def test_compiles_as_one_graph():
    layer, inputs = make_layer(), make_inputs(4, 3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    gout = torch.randn(4, 3, C, generator=torch.Generator().manual_seed(2))
    wanted = run(layer, inputs, gout)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = compiled(**leaves)
    got = torch.autograd.grad(out, list(leaves.values()), gout)
    torch.testing.assert_close([out, *got], [wanted["out"], *(wanted[name] for name in leaves)])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="attn_mask: expected None, which means causal"):
        compiled(**leaves, attn_mask=original_mask(4, 3))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"w": torch.ones(4, C)}, ValueError, r"w: expected \(T, B, d_model\) .* = 12, got \(4, 12\)"),
        ({"w": torch.ones(4, 3, C + 1)}, ValueError, r"w: .* d_model = 12, got \(4, 3, 13\)"),
        ({"w": torch.ones(4, 3, C).half()}, TypeError, r"w: expected dtype torch\.float32 .*float16"),
        ({"mems": torch.ones(3, 2, C)}, ValueError, r"mems: .*= \(M, 3, 12\) as w, got \(3, 2, 12\)"),
        ({"mems": torch.ones(3, 3, C - 1)}, ValueError, r"mems: .*= \(M, 3, 12\) as w, got \(3, 3, 11\)"),
        ({"mems": torch.ones(3)}, ValueError, r"mems: .* got \(3,\)"),
        ({"mems": torch.ones(3, 3, C).double()}, TypeError, r"mems: expected dtype torch\.float32 .*float64"),
        ({"r": torch.ones(6, 1, C)}, ValueError, r"r: expected P >= S = M \+ T = 3 \+ 4 rows, got 6"),
        ({"r": torch.ones(7, 3, C)}, ValueError, r"r: expected \(P, 1, d_model\) .* got \(7, 3, 12\)"),
        ({"r": torch.ones(7, 1, C + 1)}, ValueError, r"r: .* d_model = 12, got \(7, 1, 13\)"),
        ({"r": torch.ones(7)}, ValueError, r"r: .* got \(7,\)"),
        ({"r": torch.ones(7, 1, C).bfloat16()}, TypeError, r"r: expected dtype torch\.float32 .*bfloat16"),
        ({"r_w_bias": torch.ones(D, H)}, ValueError, r"content_bias: .* got \(5, 2\)"),
        ({"r_r_bias": torch.ones(H, D).double()}, TypeError, r"position_bias: .* got torch\.float64"),
        ({"attn_mask": torch.ones(4, 7, 3).bool()}, ValueError, r"attn_mask: .* got shape \(4, 7, 3\)"),
        ({"attn_mask": torch.ones(7, 3).bool()}, ValueError, r"attn_mask: .* got shape \(7, 3\)"),
        ({"attn_mask": original_mask(4, 0)}, ValueError, r"\(4, 7, 1\), got shape \(4, 4, 1\)"),
    ],
)
def test_bad_input_is_named(wrong, error, message):
    with pytest.raises(error, match=message):
        make_layer()(**(make_inputs(4, 3) | wrong))


def test_meta_tensors_have_shapes_only():
    layer = RelPartialLearnableMultiHeadAttn(2, 16, 8, dropout=0.0).to("meta")
    w, r, bias = (torch.empty(shape, device="meta") for shape in ((3, 2, 16), (3, 1, 16), (2, 8)))
    assert layer(w, r, bias, bias).shape == (3, 2, 16)
