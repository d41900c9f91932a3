"""The kernels in Triton's interpreter against float64, with tiles small enough that every edge happens."""

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.accuracy import (
    assert_all_close_to_truth,
    assert_close_to_truth,
    make_inputs,
    outputs_and_gradients,
    truth_and_reference,
)
from txl_kernels import rel_attention
from txl_kernels.triton_backend import call, launch_backward


def triton_attention(**kwargs):
    return rel_attention(**kwargs, backend="triton")


def check(inputs, **options):
    """Outputs, log-sum-exp and all gradients of the kernels against the error policy."""
    q = inputs["q"]
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(q.shape, generator=generator)
    dlse = torch.randn(q.shape[:3], generator=generator)
    truth, reference = truth_and_reference(inputs, dout, dlse, **options)
    got = outputs_and_gradients(triton_attention, inputs, dout, dlse, **options)
    assert_all_close_to_truth(got, truth, reference)


# (T, M, D, tile): why
CASES = {
    "odd lengths, edges on every side": (37, 21, 16, (16, 16)),
    "head size of wt103 base, two blocks of r kept": (37, 20, 41, (32, 16)),
    "head size 64, keys wider than queries": (33, 31, 64, (16, 32)),
    "lm1b large head size": (18, 15, 80, (16, 16)),
    "head size 128": (17, 16, 128, (16, 16)),
    "four blocks of r kept": (66, 3, 16, (64, 16)),
    "no memory": (37, 0, 16, (16, 16)),
    "one query": (1, 40, 16, (16, 16)),
    "one query, two keys": (1, 1, 16, (16, 16)),
    "lengths that fill the tiles": (32, 32, 16, (16, 16)),
    "memory longer than the segment": (9, 60, 16, (16, 16)),
    "head size 1": (19, 6, 1, (16, 16)),
    "padded head size under a tile": (19, 6, 5, (16, 16)),
}


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_every_gradient(case, is_causal, use_tiles):
    T, M, D, tile = CASES[case]
    use_tiles(*tile)
    check(make_inputs(2, 2, T, M, D, is_causal=is_causal), is_causal=is_causal)


def test_one_query_one_key(use_tiles):
    """The probability is 1, exactly: the value passes through, and so does its gradient."""
    use_tiles(16, 16)
    inputs = make_inputs(2, 2, 1, 0, 16)
    dout = torch.randn(inputs["q"].shape)
    got = outputs_and_gradients(triton_attention, inputs, dout)
    assert torch.equal(got["out"], inputs["v"])
    assert torch.equal(got["v"], dout)


def test_float16(use_tiles):
    use_tiles(32, 16)
    check(make_inputs(2, 2, 37, 21, 32, dtype=torch.float16))


@pytest.mark.parametrize("D", [5, 41])
def test_rows_that_do_not_start_on_16_bytes(D, use_tiles, monkeypatch):
    """Copies in rows that do give the same bits as the rows themselves, and come by descriptors."""
    use_tiles(32, 16)
    inputs = make_inputs(2, 2, 37, 21, D, dtype=torch.float16, layout="tbhd")
    dout = torch.randn(inputs["q"].shape).half()
    wanted = outputs_and_gradients(triton_attention, inputs, dout)
    monkeypatch.setattr(call, "generation_of", lambda device: "sm_90")
    described = []
    monkeypatch.setattr(call, "TensorDescriptor", lambda *args: described.append(args) or TensorDescriptor(*args))
    got = outputs_and_gradients(triton_attention, inputs, dout)
    assert described
    for name in wanted:
        assert torch.equal(got[name], wanted[name]), name


def test_large_row_bias(use_tiles):
    """Queries beyond T have a row bias too, here one whose exponential float32 does not hold."""
    use_tiles(16, 16)
    inputs = make_inputs(1, 1, 5, 9, 16, dtype=torch.float16)
    inputs["r_bias"] = torch.linspace(0, 1000, 14, dtype=torch.float16)[None]
    check(inputs)


def test_float32_biases_beside_float16(use_tiles):
    use_tiles(16, 16)
    inputs = make_inputs(2, 2, 21, 9, 16, dtype=torch.float16)
    for name in ("content_bias", "position_bias"):
        inputs[name] = torch.randn(2, 16, generator=torch.Generator().manual_seed(5))
    check(inputs)


@pytest.mark.parametrize("biases", [(), ("content_bias",), ("position_bias",)], ids=["none", "content", "position"])
def test_biases_left_out(biases, use_tiles):
    use_tiles(16, 16)
    inputs = make_inputs(2, 2, 21, 9, 16)
    check({name: x for name, x in inputs.items() if not name.endswith("bias") or name in biases})


def test_only_the_log_sum_exp_is_used(use_tiles):
    use_tiles(16, 16)
    inputs = make_inputs(1, 2, 21, 9, 16)

    def gradients(function, dtype):
        leaves = {n: x.to(dtype).requires_grad_() for n, x in inputs.items() if n != "v"}
        _, lse = function(**leaves, v=inputs["v"].to(dtype), return_lse=True)
        return torch.autograd.grad(lse.sum(), list(leaves.values()))

    from reference import rel_attention_eager

    truth, reference = (
        gradients(rel_attention_eager, torch.float64),
        gradients(rel_attention_eager, torch.float32),
    )
    names = [name for name in inputs if name != "v"]
    for name, *tensors in zip(names, gradients(triton_attention, torch.float32), truth, reference, strict=True):
        assert_close_to_truth(name, *tensors, factor=3)


@pytest.mark.parametrize("T", [1, 21])
def test_time_major_views_are_read_in_place(T, use_tiles, monkeypatch):
    use_tiles(16, 16)
    inputs = make_inputs(2, 2, T, 9, 16, layout="tbhd")
    check(inputs)
    monkeypatch.setattr(torch.Tensor, "contiguous", _refuse_copies(torch.Tensor.contiguous))
    out = triton_attention(**inputs)
    assert out.permute(2, 0, 1, 3).is_contiguous()


def _refuse_copies(original):
    def contiguous(self, *args, **kwargs):
        assert self.ndim < 3 or self.is_contiguous(), "an input was copied"
        return original(self, *args, **kwargs)

    return contiguous


def test_nothing_around_the_inputs_is_read(use_tiles):
    """Every input is a view into a larger tensor of NaN: one row before, one after, columns to the right."""
    use_tiles(16, 16)

    def surrounded(x):
        padded = torch.full((*x.shape[:-2], x.shape[-2] + 2, x.shape[-1] + 3), float("nan"))
        padded[..., 1:-1, :-3] = x
        return padded[..., 1:-1, :-3]

    inputs = make_inputs(2, 2, 21, 9, 13)
    check(inputs | {name: surrounded(inputs[name]) for name in ("q", "k", "v", "r")})


def test_last_stride_other_than_one(use_tiles):
    use_tiles(16, 16)
    inputs = make_inputs(2, 2, 21, 9, 16)
    check(inputs | {n: inputs[n].transpose(-1, -2).contiguous().transpose(-1, -2) for n in ("q", "k", "v", "r")})


def test_biases_of_any_strides(use_tiles):
    use_tiles(16, 16)
    inputs = make_inputs(2, 2, 21, 9, 16)
    check(inputs | {n: inputs[n].t().contiguous().t() for n in ("content_bias", "position_bias")})


def test_expanded_upstream_gradient(use_tiles):
    """`sum().backward()` hands the backward a tensor whose strides are all 0."""
    use_tiles(16, 16)
    inputs = make_inputs(2, 2, 21, 9, 16)
    ones = torch.ones(())
    shape = inputs["q"].shape
    truth, reference = truth_and_reference(inputs, ones.expand(shape), ones.expand(shape[:3]))
    got = outputs_and_gradients(triton_attention, inputs, ones.expand(shape), ones.expand(shape[:3]))
    assert_all_close_to_truth(got, truth, reference)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(
    ("P", "first_distance"),
    [(12, 9), (12, -4), (5, 60), (70, 69), (1, 0), (0, 0)],
    ids=["inside", "future only", "nothing in reach", "wider than needed", "one row", "no row"],
)
def test_banded_r(P, first_distance, is_causal, use_tiles):
    """A pair whose row falls outside r has no position term and stays visible."""
    use_tiles(16, 16)
    check(make_inputs(2, 2, 21, 9, 16, P=P), is_causal=is_causal, first_distance=first_distance)


@pytest.mark.parametrize("first_distance", [2**31 - 2, -(2**31), 2**62])
def test_far_bands(first_distance, use_tiles):
    use_tiles(16, 16)
    check(make_inputs(1, 1, 5, 3, 16, P=3), first_distance=first_distance)


def test_nan_in_rows_of_r_that_only_the_future_uses(use_tiles):
    use_tiles(16, 16)
    inputs = make_inputs(2, 2, 21, 9, 16, P=50)
    dout = torch.randn(inputs["q"].shape)
    clean = outputs_and_gradients(triton_attention, inputs, dout)
    inputs["r"][:, 30:] = float("nan")
    got = outputs_and_gradients(triton_attention, inputs, dout)
    assert all(torch.equal(got[name], clean[name]) for name in clean)


def test_overlapping_windows_are_copied(use_tiles):
    use_tiles(16, 16)
    inputs = make_inputs(1, 2, 9, 4, 16)
    numbers = torch.randn(1, 2, 9 + 15, generator=torch.Generator().manual_seed(0))
    check(inputs | {"q": numbers.unfold(-1, 16, 1)})


@pytest.mark.parametrize(("T", "M"), [(21, 9), (50, 32)], ids=["few", "tiles that see keys alone"])
def test_rows_of_r_that_no_visible_pair_uses_get_zero_gradient(T, M, use_tiles):
    use_tiles(16, 16)
    inputs = make_inputs(2, 2, T, M, 16, P=T + M + 20)
    inputs["r"].requires_grad_()
    (dr,) = torch.autograd.grad(triton_attention(**inputs).square().sum(), [inputs["r"]])
    assert torch.count_nonzero(dr[:, T + M :]) == 0
    assert torch.all(dr[:, : T + M].abs().sum(-1) > 0)


@pytest.mark.parametrize("B", [1, 7])
def test_batch_split_of_dr(B, use_tiles, monkeypatch):
    """Batch elements are divided over programs unevenly (7 over 5), and summed in one order."""
    use_tiles(16, 16)
    monkeypatch.setattr(launch_backward, "_DR_PROGRAMS", 10)
    check(make_inputs(B, 1, 17, 9, 16))


def test_two_runs_give_the_same_bits(use_tiles):
    use_tiles(16, 16)
    inputs = make_inputs(2, 2, 21, 9, 16)
    dout, dlse = torch.randn(inputs["q"].shape), torch.randn(inputs["q"].shape[:3])
    first = outputs_and_gradients(triton_attention, inputs, dout, dlse)
    second = outputs_and_gradients(triton_attention, inputs, dout, dlse)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_stays_in_its_batch_element(name, use_tiles):
    use_tiles(16, 16)
    inputs = make_inputs(3, 2, 21, 9, 16)
    clean = outputs_and_gradients(triton_attention, inputs, torch.ones_like(inputs["q"]))
    inputs[name][1, 0, 4] = float("nan")
    got = outputs_and_gradients(triton_attention, inputs, torch.ones_like(inputs["q"]))
    assert got["out"][1].isnan().any()
    for result in ("out", "q", "k", "v"):
        assert torch.equal(got[result][[0, 2]], clean[result][[0, 2]]), result


@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_scale(scale, use_tiles):
    use_tiles(16, 16)
    check(make_inputs(1, 2, 21, 9, 16), scale=scale)


def test_large_scores_do_not_overflow(use_tiles):
    use_tiles(16, 16)
    inputs = make_inputs(1, 2, 21, 9, 16)
    check(inputs | {"q": inputs["q"] * 100})


def test_future_keys_change_nothing(use_tiles):
    use_tiles(16, 16)
    inputs = make_inputs(1, 2, 21, 9, 16)
    out = triton_attention(**inputs)
    changed = {name: x.clone() for name, x in inputs.items()}
    changed["k"][:, :, 20:] = 7.0
    changed["v"][:, :, 20:] = -5.0
    # Key 20 is the first that query 11 sees and query 10 does not.
    assert torch.equal(triton_attention(**changed)[:, :, :11], out[:, :, :11])
    assert torch.all((triton_attention(**changed)[:, :, 11:] - out[:, :, 11:]).abs().amax(-1) > 1e-3)


def test_one_long_segment_equals_two_with_memory(use_tiles):
    use_tiles(16, 16)
    inputs = make_inputs(1, 2, 30, 0, 16)
    q, k, v, r, u, w = inputs.values()
    whole = triton_attention(**inputs)
    first = triton_attention(
        q=q[:, :, :13], k=k[:, :, :13], v=v[:, :, :13], r=r[:, 17:], content_bias=u, position_bias=w
    )
    second = triton_attention(q=q[:, :, 13:], k=k, v=v, r=r, content_bias=u, position_bias=w)
    torch.testing.assert_close(torch.cat([first, second], 2), whole)


def test_without_position_term_it_is_plain_attention(use_tiles):
    use_tiles(16, 16)
    inputs = make_inputs(1, 2, 21, 9, 16) | {"position_bias": torch.zeros(2, 16)}
    inputs["r"] = torch.zeros_like(inputs["r"])
    visible = torch.ones(21, 30, dtype=torch.bool).tril(9)
    q = inputs["q"] + inputs["content_bias"][:, None]
    wanted = torch.nn.functional.scaled_dot_product_attention(q, inputs["k"], inputs["v"], attn_mask=visible)
    torch.testing.assert_close(triton_attention(**inputs), wanted)
