"""What the tests of the torch backend share: a call of it, past the operator, and its comparison with the reference."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.accuracy import INPUTS, assert_all_close_to_truth, truth_and_reference
from txl_kernels.arguments import DIFFERENTIABLE, Inputs, Options
from txl_kernels.torch_backend import backward, forward, kept_in

SIX = INPUTS[:6]
# Sets of features for `tests.contract.make_problem` that have all of them between them.
EVERYTHING = (
    {"window", "band", "float mask", "key lengths", "position query", "row bias", "segment", "softcap", "batched r"},
    {"bidirectional", "right window", "head mask", "no r", "segment", "softcap", "grouped heads", "key lengths"},
    {"bidirectional", "key mask", "row bias", "grouped heads", "shared r", "band"},
    {"wrapped future", "key lengths", "position query", "row bias", "segment", "batched r"},
)


def backend_call(
    inputs,
    is_causal=True,
    window=None,
    scale=None,
    first_distance=None,
    softcap=None,
    dropout_p=0.0,
    wrap_future=False,
    **tensors,
):
    """Inputs and Options of the backend with rel_attention's defaults."""
    q, k = inputs["q"], inputs["k"]
    tensors = inputs | tensors
    if "segment_ids" in tensors:
        tensors["segment_q_ids"], tensors["segment_k_ids"] = tensors.pop("segment_ids")
    for name in ("r", "attn_mask"):
        x = tensors.get(name)
        tensors[name] = None if x is None else x[(None,) * (4 - x.ndim)]
    left, right = window or (-1, -1)
    return Inputs(**tensors), Options(
        left,
        0 if is_causal else right,
        q.shape[3] ** -0.5 if scale is None else scale,
        k.shape[2] - 1 if first_distance is None else first_distance,
        softcap,
        dropout_p,
        wrap_future,
    )


def run(inputs, dout=None, dlse=None, wanted=INPUTS, weights=None, **options):
    """out and lse of the backend, and with dout its gradients by the names in wanted that are inputs.

    weights is the buffer in which the forward leaves weights for the backward.
    """
    tensors, options = backend_call(inputs, **options)
    out, lse = forward(tensors, options, kept_in(weights))
    results = {"out": out, "lse": lse}
    if dout is not None:
        needs_grad = [name in inputs and name in wanted for name in DIFFERENTIABLE]
        grads = backward(dout, dlse, tensors, out, lse, options, needs_grad, kept_in(weights))
        assert [grad is not None for grad in grads] == needs_grad
        for name, grad in zip(DIFFERENTIABLE, grads, strict=True):
            if grad is not None:
                assert grad.shape == getattr(tensors, name).shape
                results[name] = grad.view(inputs[name].shape)
    return results


def upstream(inputs, seed=7):
    """Random dout and dlse."""
    generator = torch.Generator().manual_seed(seed)
    q = inputs["q"]
    dout = torch.randn(q.shape, generator=generator).to(q.dtype)
    dlse = torch.randn(q.shape[:3], generator=generator)
    return dout, dlse.double() if q.dtype == torch.float64 else dlse


def assert_right(inputs, **options):
    """Output, log-sum-exp and all gradients against the reference, by the error policy."""
    dout, dlse = upstream(inputs)
    truth, reference = truth_and_reference(inputs, dout, dlse, **options)
    got = run(inputs, dout, dlse, **options)
    if inputs["q"].dtype == torch.float64:  # truth is another order of the same sums
        assert got.keys() == truth.keys()
        for name in truth:
            torch.testing.assert_close(got[name], truth[name], rtol=1e-12, atol=1e-12)
    else:
        assert_all_close_to_truth(got, truth, reference)


class CountProducts(TorchDispatchMode):
    """Counts batched matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
        return func(*args, **(kwargs or {}))
