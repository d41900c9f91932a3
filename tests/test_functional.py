"""The public function on CPU tensors: its contract."""

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


def test_head_size_256():
    assert rel_attention(**make_inputs(1, 1, 2, 0, 256)).shape == (1, 1, 2, 256)


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


def test_overlapping_windows_are_copied():
    """Two unit strides: empty_like would make another dimension than the last contiguous."""
    windows = torch.randn(B, H, T + D - 1).unfold(-1, D, 1)
    inputs = inputs_with(q=windows)
    out = rel_attention(**inputs)
    assert out.is_contiguous()
    torch.testing.assert_close(out, rel_attention(**inputs | {"q": windows.contiguous()}))


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
