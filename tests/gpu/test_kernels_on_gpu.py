"""The compiled kernels on a GPU, at the sizes of real models."""

import pytest
import torch

from tests.accuracy import assert_all_close_to_truth, make_inputs, outputs_and_gradients, truth_and_reference
from txl_kernels import rel_attention

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# (B, H, T, M, D): why
SHAPES = {
    "wt103 base, odd head size": (4, 10, 150, 150, 41),
    "wt103 large": (2, 16, 384, 384, 64),
    "enwik8 large": (1, 8, 768, 768, 128),
    "lm1b large": (8, 16, 32, 32, 80),
    "evaluation": (1, 16, 128, 1600, 64),
    "one token": (2, 16, 1, 1600, 64),
    "no memory, odd length": (2, 4, 333, 0, 64),
    "largest head size": (1, 2, 100, 60, 256),
    "small head size": (2, 4, 77, 50, 8),
}


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Leaves NaN in the memory that the allocator will hand out next."""
    blocks = [torch.full((size,), float("nan"), device="cuda") for size in (2**12, 2**16, 2**20, 2**24, 2**26)]
    del blocks


def cotangents(inputs):
    generator = torch.Generator().manual_seed(1)
    shape = inputs["q"].shape
    return (torch.randn(s, generator=generator).to("cuda", inputs["q"].dtype) for s in (shape, shape[:3]))


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_every_gradient(shape, dtype, is_causal):
    inputs = make_inputs(*SHAPES[shape], dtype=DTYPES[dtype], device="cuda", is_causal=is_causal, layout="tbhd")
    dout, dlse = cotangents(inputs)
    truth, reference = truth_and_reference(inputs, dout, dlse, is_causal=is_causal)
    got = outputs_and_gradients(rel_attention, inputs, dout, dlse, is_causal=is_causal, backend="triton")
    assert_all_close_to_truth(got, truth, reference)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_backend_on_a_gpu(dtype):
    inputs = make_inputs(2, 4, 150, 70, 64, dtype=DTYPES[dtype], device="cuda")
    dout, dlse = cotangents(inputs)
    truth, reference = truth_and_reference(inputs, dout, dlse)
    got = outputs_and_gradients(rel_attention, inputs, dout, dlse, backend="torch")
    assert_all_close_to_truth(got, truth, reference)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_hundred_runs_give_the_same_bits(dtype):
    """A race shows as a difference between runs."""
    inputs = make_inputs(2, 8, 300, 200, 64, dtype=DTYPES[dtype], device="cuda")
    dout, dlse = cotangents(inputs)
    first = outputs_and_gradients(rel_attention, inputs, dout, dlse)
    for _ in range(200):
        again = outputs_and_gradients(rel_attention, inputs, dout, dlse)
        for name in first:
            assert torch.equal(first[name], again[name]), name


@pytest.mark.parametrize("D", [41, 64, 128])
@pytest.mark.parametrize("window", [None, (100, -1)], ids=["all keys", "window"])
def test_several_ranges_of_the_workspace(window, D, monkeypatch):
    """Sums over ranges of heads, queries and keys, as long sequences have them."""
    from txl_kernels.triton_backend import ranges
    from txl_kernels.triton_backend.plans import PLANS

    monkeypatch.setattr(PLANS, "most_steps", 0)
    monkeypatch.setattr(ranges, "WORKSPACE", 1 << 18)
    monkeypatch.setattr(ranges, "QUERIES", 128)
    inputs = make_inputs(2, 4, 300, 250, D, dtype=torch.bfloat16, device="cuda")
    dout, dlse = cotangents(inputs)
    truth, reference = truth_and_reference(inputs, dout, dlse, window=window)
    got = outputs_and_gradients(rel_attention, inputs, dout, dlse, window=window)
    assert_all_close_to_truth(got, truth, reference)


def test_banded_r_and_extra_rows():
    for P, first_distance in ((40, 30), (900, 700)):
        inputs = make_inputs(2, 4, 200, 100, 64, P=P, dtype=torch.bfloat16, device="cuda")
        dout, dlse = cotangents(inputs)
        truth, reference = truth_and_reference(inputs, dout, dlse, first_distance=first_distance)
        got = outputs_and_gradients(rel_attention, inputs, dout, dlse, first_distance=first_distance)
        assert_all_close_to_truth(got, truth, reference)


def test_peak_memory_is_linear_in_length():
    def peak(T):
        inputs = make_inputs(1, 4, T, T, 64, dtype=torch.bfloat16, device="cuda")
        for x in inputs.values():
            x.requires_grad_()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = rel_attention(**inputs)
        out.backward(torch.ones_like(out))
        return torch.cuda.max_memory_allocated() - before

    peak(1024)
    assert peak(8192) <= 4.2 * peak(2048)


def test_lengths_do_not_compile_variants():
    from txl_kernels.triton_backend import forward_kernel as module

    device = torch.cuda.current_device()

    def variants():
        return len(module.forward_kernel.device_caches[device][0])

    def run(T, M):
        rel_attention(**make_inputs(1, 2, T, M, 64, dtype=torch.bfloat16, device="cuda"))

    # few queries have a variant of their own, and one more for ranges of keys
    for T, M in ((64, 64), (1, 0), (1, 512)):
        run(T, M)
    before = variants()
    for T in (1, 150, 160, 512, 513):
        for M in (0, 150, 512):
            run(T, M)
    assert variants() == before
