"""The registered operators `txl_kernels::rel_attention` and its backward, and their route through autograd.

Both devices and both backends sit behind one operator. Of the routes through autograd, measured on one CPU core
with an empty body (forward without gradient / with gradient / with gradient and backward):
`torch.library.register_autograd` 9 / 46 / 120 us, an `autograd.Function` in front of a raw operator 4 / 15 / 76 us,
an `autograd.Function` inside the operator's own Autograd kernel 8 / 19 / 81 us. The last is used: 4 us more than
the fastest buy an operator that is differentiable by itself, traced and exported as one node.
"""

import contextlib

import torch
from torch import Tensor

_library = torch.library.Library("txl_kernels", "DEF")
_library.define(
    "rel_attention(Tensor q, Tensor k, Tensor v, Tensor r, Tensor? content_bias, Tensor? position_bias, "
    "bool is_causal, float scale, SymInt first_distance, str backend) -> (Tensor out, Tensor lse)"
)
_library.define(
    "rel_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor r, "
    "Tensor? content_bias, Tensor? position_bias, Tensor out, Tensor lse, "
    "bool is_causal, float scale, SymInt first_distance, str backend, bool[] needs_grad) -> Tensor[]"
)


def _backend_module(backend: str):
    # Imported on first use: Triton is slow to import and not needed for CPU tensors.
    if backend == "triton":
        from txl_kernels import triton_backend

        return triton_backend
    from txl_kernels import torch_backend

    return torch_backend


def _unit_last_stride(x: Tensor) -> Tensor:
    """x itself where its last dimension, and no other, is contiguous; else a copy (never of a time-major view).

    With a second unit stride (windows that overlap) empty_like(x) would have another last dimension contiguous.
    """
    unit = [dim for dim in range(x.ndim) if x.stride(dim) == 1 and x.shape[dim] > 1]
    return x if unit == [x.ndim - 1] or x.shape[-1] == 1 else x.contiguous()


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for the device of x; some devices have none."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _autocast_off(x: Tensor) -> contextlib.AbstractContextManager:
    """Dtypes are settled when the operator runs: autocast must not touch the products inside a backend."""
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x) else contextlib.nullcontext()


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype is torch.float64 else torch.float32


def _forward(q, k, v, r, content_bias, position_bias, is_causal, scale, first_distance, backend):
    if q.numel() == 0:
        return _forward_fake(q, k, v, r, content_bias, position_bias, is_causal, scale, first_distance, backend)
    q, k, v, r = map(_unit_last_stride, (q, k, v, r))
    run = _backend_module(backend).forward
    with _autocast_off(q):
        return run(q, k, v, r, content_bias, position_bias, is_causal, scale, first_distance)


def _forward_fake(q, k, v, r, content_bias, position_bias, is_causal, scale, first_distance, backend):
    return torch.empty_like(_unit_last_stride(q)), q.new_empty(q.shape[:3], dtype=_lse_dtype(q))


def _backward(
    dout, dlse, q, k, v, r, content_bias, position_bias, out, lse, is_causal, scale, first_distance, backend, needs_grad
):
    q, k, v, r, dout = map(_unit_last_stride, (q, k, v, r, dout))
    inputs = (q, k, v, r, content_bias, position_bias)
    if q.numel() == 0:
        return [torch.zeros_like(x) for x, needed in zip(inputs, needs_grad, strict=True) if needed]
    run = _backend_module(backend).backward
    with _autocast_off(q):
        grads = run(
            dout, dlse, q, k, v, r, content_bias, position_bias, out, lse, is_causal, scale, first_distance, needs_grad
        )
    return [grad for grad, needed in zip(grads, needs_grad, strict=True) if needed]


def _backward_fake(
    dout, dlse, q, k, v, r, content_bias, position_bias, out, lse, is_causal, scale, first_distance, backend, needs_grad
):
    inputs = (*map(_unit_last_stride, (q, k, v, r)), content_bias, position_bias)
    return [torch.empty_like(x) for x, needed in zip(inputs, needs_grad, strict=True) if needed]


class _RelAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = rel_attention(*args)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:6], out, lse)
        ctx.options = args[6:]
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, r, content_bias, position_bias, out, lse = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        needs_grad = list(ctx.needs_input_grad[:6])
        grads = iter(
            rel_attention_backward(
                dout, dlse, q, k, v, r, content_bias, position_bias, out, lse, *ctx.options, needs_grad
            )
        )
        return *(next(grads) if needed else None for needed in needs_grad), None, None, None, None


class _NotTwiceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(rel_attention_backward(*args))

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError("rel_attention: second derivatives are not implemented")


def _needs_autograd(tensors) -> bool:
    # Forward-mode tangents do not show on requires_grad; the Function refuses them, where the operator would drop them.
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _forward_autograd(*args):
    if _needs_autograd(args[:6]):
        return _RelAttention.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return rel_attention(*args)


def _backward_autograd(*args):
    if _needs_autograd(args[:10]):
        return list(_NotTwiceDifferentiable.apply(*args))
    with torch._C._AutoDispatchBelowAutograd():
        return rel_attention_backward(*args)


_library.impl("rel_attention", _forward, "CompositeExplicitAutograd")
_library.impl("rel_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("txl_kernels::rel_attention", _forward_fake, lib=_library)
torch.library.register_fake("txl_kernels::rel_attention_backward", _backward_fake, lib=_library)
_library.impl("rel_attention", _forward_autograd, "Autograd")
_library.impl("rel_attention_backward", _backward_autograd, "Autograd")

rel_attention = torch.ops.txl_kernels.rel_attention.default
rel_attention_backward = torch.ops.txl_kernels.rel_attention_backward.default
