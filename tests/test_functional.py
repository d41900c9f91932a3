"""The public function and the registered operator, on CPU tensors: contract, errors, autograd, autocast, compile."""

import os
import subprocess
import sys

import pytest
import torch

from reference import rel_attention_definition
from tests.accuracy import (
    assert_all_close_to_truth,
    assert_close_to_truth,
    make_inputs,
    outputs_and_gradients,
    truth_and_reference,
)
from txl_kernels import rel_attention

B, H, T, M, D = 2, 3, 7, 5, 8
S = M + T


def inputs_with(**changes):
    return make_inputs(B, H, T, M, D) | changes


def changed(name, *shape, **options):
    return {name: torch.randn(*shape, **options)}


# What is wrong -> (changes, exception, parts of the message: the argument, the wanted, the got)
BAD = {
    "q is not a tensor": ({"q": [1.0]}, TypeError, ("q:", "tensor", "list")),
    "q has rank 3": (changed("q", H, T, D), ValueError, ("q:", "(B, H, T, D)", f"({H}, {T}, {D})")),
    "k has rank 5": (changed("k", 1, B, H, S, D), ValueError, ("k:", "4 dimensions")),
    "r has rank 4": (changed("r", 1, H, S, D), ValueError, ("r:", "3 dimensions", "(H, P, D)")),
    "k has other heads": (changed("k", B, 2, S, D), ValueError, ("k:", f"({B}, {H}, {S}, {D})", f"({B}, 2, {S}, {D})")),
    "v has other heads": (changed("v", B, 4, S, D), ValueError, ("v:", f"({B}, 4, {S}, {D})")),
    "r has other heads": (changed("r", 1, S, D), ValueError, ("r:", f"({H}, {S}, {D})", f"(1, {S}, {D})")),
    "k has another batch": (changed("k", 1, H, S, D), ValueError, ("k:", f"(1, {H}, {S}, {D})")),
    "v is shorter than k": (changed("v", B, H, S - 1, D), ValueError, ("v:", f"({B}, {H}, {S - 1}, {D})")),
    "v is wider than q": (changed("v", B, H, S, D + 1), ValueError, ("v:",)),
    "r is wider than q": (changed("r", H, S, D + 1), ValueError, ("r:",)),
    "fewer keys than queries": (changed("k", B, H, T - 1, D), ValueError, ("k:", "S >= T", f"S = {T - 1}", f"T = {T}")),
    "too few rows of r": (changed("r", H, S - 1, D), ValueError, ("r:", f"P = S = {S}", f"got {S - 1}")),
    "content_bias has rank 1": (changed("content_bias", D), ValueError, ("content_bias:", "(H, D)", f"({D},)")),
    "position_bias has other heads": (changed("position_bias", 1, D), ValueError, ("position_bias:", f"(1, {D})")),
    "k in float64": (changed("k", B, H, S, D, dtype=torch.float64), TypeError, ("k:", "float32", "float64")),
    "r in bfloat16": (changed("r", H, S, D, dtype=torch.bfloat16), TypeError, ("r:", "float32", "bfloat16")),
    "a bias in float64": (
        changed("content_bias", H, D, dtype=torch.float64),
        TypeError,
        ("content_bias:", "float32", "float64"),
    ),
    "a bias in float16 beside float32": (
        changed("position_bias", H, D, dtype=torch.float16),
        TypeError,
        ("position_bias:", "float32", "float16"),
    ),
    "integers": ({"q": torch.ones(B, H, T, D, dtype=torch.int64)}, TypeError, ("q:", "float16", "int64")),
    "v on another device": (changed("v", B, H, S, D, device="meta"), ValueError, ("v:", "cpu", "meta")),
    "a bias on another device": (changed("content_bias", H, D, device="meta"), ValueError, ("content_bias:", "meta")),
    "is_causal is not a bool": ({"is_causal": 1}, TypeError, ("is_causal:", "bool", "int")),
    "scale is a tensor": ({"scale": torch.ones(())}, TypeError, ("scale:", "float", "Tensor")),
    "first_distance is a float": ({"first_distance": 3.0}, TypeError, ("first_distance:", "int", "float")),
    "unknown backend": ({"backend": "cuda"}, ValueError, ("backend:", "'triton'", "'torch'", "'cuda'")),
    "triton for CPU tensors": ({"backend": "triton"}, ValueError, ("backend:", "CUDA", "TRITON_INTERPRET", "cpu")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_argument_wanted_and_got(case):
    changes, exception, parts = BAD[case]
    with pytest.raises(exception) as raised:
        rel_attention(**inputs_with(**changes))
    assert str(raised.value).startswith(parts[0])
    for part in parts:
        assert part in str(raised.value)


def test_head_size_over_256():
    with pytest.raises(ValueError, match=r"^q: .*1 to 256, got 257"):
        rel_attention(**make_inputs(1, 1, 2, 0, 257))


def test_head_size_256():
    assert rel_attention(**make_inputs(1, 1, 2, 0, 256)).shape == (1, 1, 2, 256)


def test_bidirectional_needs_the_negative_distances():
    with pytest.raises(ValueError, match=rf"r: .*S \+ T - 1 = {S + T - 1} rows.*got {S + T - 2}"):
        rel_attention(**make_inputs(B, H, T, M, D, P=S + T - 2), is_causal=False)
    assert rel_attention(**make_inputs(B, H, T, M, D, P=S + T - 1), is_causal=False).shape == (B, H, T, D)


def test_triton_refuses_float64():
    inputs = {name: x.double() for name, x in inputs_with().items()}
    with pytest.raises(TypeError, match=r"'triton' takes .* float32, got torch\.float64"):
        rel_attention(**inputs, backend="triton")


@pytest.mark.parametrize("is_causal", [True, False])
def test_against_the_definition(is_causal):
    inputs = {name: x.double() for name, x in make_inputs(1, 2, 4, 3, 5, is_causal=is_causal).items()}
    out, lse = rel_attention(**inputs, is_causal=is_causal, return_lse=True)
    wanted_out, wanted_lse = rel_attention_definition(**inputs, is_causal=is_causal, return_lse=True)
    torch.testing.assert_close(out, wanted_out)
    torch.testing.assert_close(lse, wanted_lse)


def test_gradients_by_finite_differences():
    inputs = {name: x.double().requires_grad_() for name, x in make_inputs(1, 2, 4, 3, 3).items()}
    assert torch.autograd.gradcheck(lambda *args: rel_attention(*args, return_lse=True), tuple(inputs.values()))


def test_second_derivatives_raise():
    inputs = {name: x.requires_grad_() for name, x in inputs_with().items()}
    (dq,) = torch.autograd.grad(rel_attention(**inputs).sum(), [inputs["q"]], create_graph=True)
    with pytest.raises(NotImplementedError, match="rel_attention: second derivatives"):
        dq.sum().backward()


@pytest.mark.parametrize(("lengths", "batch"), [((T, M), 0), ((T, 0), B), ((0, M), B), ((0, 0), B)])
def test_empty_batch_memory_and_segment(lengths, batch):
    inputs = make_inputs(batch, H, *lengths, D)
    out = outputs_and_gradients(rel_attention, inputs, torch.ones_like(inputs["q"]), torch.ones(inputs["q"].shape[:3]))
    assert out["out"].shape == inputs["q"].shape
    assert out["lse"].shape == inputs["q"].shape[:3]
    for name, x in inputs.items():
        assert out[name].shape == x.shape
        assert torch.isfinite(out[name]).all()
        if batch == 0 or lengths[0] == 0:
            assert torch.count_nonzero(out[name]) == 0


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_stays_in_its_batch_element(name):
    inputs = inputs_with()
    clean = rel_attention(**inputs)
    inputs[name][1, 0, 2] = float("nan")
    out = rel_attention(**inputs)
    assert out[1].isnan().any()
    assert torch.equal(out[0], clean[0])


def test_output_is_dense_in_the_dimension_order_of_q():
    inputs = make_inputs(B, H, T, M, D, layout="tbhd")
    assert rel_attention(**inputs).permute(2, 0, 1, 3).is_contiguous()
    assert rel_attention(**inputs_with()).is_contiguous()


def test_scale_defaults_to_the_square_root_of_the_head_size():
    inputs = inputs_with()
    assert torch.equal(rel_attention(**inputs), rel_attention(**inputs, scale=D**-0.5))
    assert not torch.equal(rel_attention(**inputs), rel_attention(**inputs, scale=1))


def test_last_stride_other_than_one_is_copied():
    inputs = inputs_with()
    strided = {n: x.mT.contiguous().mT if x.ndim > 2 else x.t().contiguous().t() for n, x in inputs.items()}
    torch.testing.assert_close(rel_attention(**strided), rel_attention(**inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_large_inputs_but_not_the_biases(dtype):
    inputs = inputs_with()
    with torch.autocast("cpu", dtype):
        out = rel_attention(**inputs)
    cast = {name: x if name.endswith("bias") else x.to(dtype) for name, x in inputs.items()}
    assert out.dtype == dtype
    assert torch.equal(out, rel_attention(**cast))


def test_gradients_under_autocast_come_back_in_the_dtype_of_each_input():
    inputs = {name: x.requires_grad_() for name, x in inputs_with().items()}
    with torch.autocast("cpu", torch.bfloat16):
        rel_attention(**inputs).sum().backward()
    assert {x.grad.dtype for x in inputs.values()} == {torch.float32}


def test_autocast_leaves_float64_alone():
    inputs = {name: x.double() for name, x in inputs_with().items()}
    with torch.autocast("cpu", torch.bfloat16):
        assert rel_attention(**inputs).dtype == torch.float64


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_bias_dtypes_beside_bfloat16(bias_dtype):
    inputs = make_inputs(B, H, T, M, D, dtype=torch.bfloat16)
    inputs |= {n: inputs[n].to(bias_dtype) for n in ("content_bias", "position_bias")}
    dout = torch.randn(B, H, T, D)
    truth, reference = truth_and_reference(inputs, dout)
    got = outputs_and_gradients(rel_attention, inputs, dout)
    assert got["content_bias"].dtype == bias_dtype
    if bias_dtype == torch.bfloat16:
        assert_all_close_to_truth(got, truth, reference)
    else:
        assert_close_to_truth("out", got["out"], truth["out"], reference["out"].bfloat16(), factor=2)


@pytest.mark.parametrize("layout", ["bhtd", "tbhd", "last stride not 1"])
def test_operator_passes_opcheck(layout):
    inputs = make_inputs(B, H, T, M, D, layout="tbhd" if layout == "tbhd" else "bhtd")
    if layout == "last stride not 1":
        inputs |= {name: inputs[name].mT.contiguous().mT for name in ("q", "k", "v", "r")}
    leaves = [x.requires_grad_() for x in inputs.values()]
    operator = torch.ops.txl_kernels.rel_attention.default
    results = torch.library.opcheck(operator, (*leaves, True, D**-0.5, S - 1, "torch"))
    assert set(results.values()) == {"SUCCESS"}
    out, lse = operator(*leaves, True, D**-0.5, S - 1, "torch")
    backward = torch.ops.txl_kernels.rel_attention_backward.default
    saved = [x.detach() for x in (out, lse, *leaves, out, lse)]
    results = torch.library.opcheck(backward, (*saved, True, D**-0.5, S - 1, "torch", [True] * 6))
    assert set(results.values()) == {"SUCCESS"}


def test_overlapping_windows_are_copied():
    """Two unit strides: empty_like would make another dimension than the last contiguous."""
    windows = torch.randn(B, H, T + D - 1).unfold(-1, D, 1)
    inputs = inputs_with(q=windows)
    out = rel_attention(**inputs)
    assert out.is_contiguous()
    torch.testing.assert_close(out, rel_attention(**inputs | {"q": windows.contiguous()}))


def test_forward_mode_is_refused():
    """Rather than a tangent of zero."""
    inputs = inputs_with()
    with pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
        torch.func.jvp(lambda q: rel_attention(**inputs | {"q": q}), (inputs["q"],), (torch.ones(B, H, T, D),))


@pytest.mark.parametrize("first_distance", [2**31 - 2, -(2**31), 2**62])
def test_far_bands_leave_the_content_term(first_distance):
    inputs = inputs_with()
    without_rows = inputs | {"r": inputs["r"][:, :0]}
    far = rel_attention(**inputs, first_distance=first_distance)
    torch.testing.assert_close(far, rel_attention(**without_rows, first_distance=0))


def test_meta_tensors_have_shapes_only():
    inputs = {name: x.to("meta") for name, x in inputs_with().items()}
    out, lse = rel_attention(**inputs, return_lse=True)
    assert out.is_meta
    assert (out.shape, lse.shape) == ((B, H, T, D), (B, H, T))


def test_no_gradient_work_without_gradients():
    inputs = {name: x.requires_grad_() for name, x in inputs_with().items()}
    with torch.no_grad():
        assert rel_attention(**inputs).grad_fn is None
    with torch.inference_mode():
        assert rel_attention(**inputs).is_inference()
    assert rel_attention(**inputs).grad_fn is not None


def test_compile_full_graph_with_changing_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(rel_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for q_len, memory in ((7, 5), (9, 4), (12, 11)):
        inputs = make_inputs(B, H, q_len, memory, D)
        dout = torch.randn(B, H, q_len, D)
        got = outputs_and_gradients(compiled, inputs, dout)
        wanted = outputs_and_gradients(rel_attention, inputs, dout)
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name])


def test_import_touches_neither_a_device_nor_triton():
    program = (
        "import sys, torch, txl_kernels\n"
        "assert 'triton' not in sys.modules and not torch.cuda.is_initialized()\n"
        "x = torch.ones(1, 1, 2, 4)\n"
        "txl_kernels.rel_attention(x, x, x, x[0])\n"
        "assert 'triton' not in sys.modules\n"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=120)
