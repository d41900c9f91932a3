"""The registered operators `txl_kernels::rel_attention` and its backward, and their route through autograd.

Both devices and both backends sit behind one operator. Of the routes through autograd, measured on one CPU core
with an empty body (forward without gradient / with gradient / with gradient and backward):
`torch.library.register_autograd` 9 / 46 / 120 us, an `autograd.Function` in front of a raw operator 4 / 15 / 76 us,
an `autograd.Function` inside the operator's own Autograd kernel 8 / 19 / 81 us. The last is used: 4 us more than
the fastest buy an operator that is differentiable by itself, traced and exported as one node.

Where gradients are recorded, the torch backend runs `rel_attention_with_weights`, which also returns what it keeps for
the backward.
"""

import functools

import torch
from torch import Tensor

from txl_kernels.arguments import DIFFERENTIABLE, Inputs, Options

_library = torch.library.Library("txl_kernels", "DEF")
_INPUTS = ", ".join(f"Tensor{'' if name in 'qkv' else '?'} {name}" for name in Inputs._fields)
_OPTIONS = (
    "SymInt left, SymInt right, float scale, SymInt first_distance, float? softcap, float dropout_p, bool wrap_future, "
    "str backend"
)
_library.define(f"rel_attention({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor lse)")
_library.define(f"rel_attention_with_weights({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor lse, Tensor weights)")
_library.define(
    f"rel_attention_backward(Tensor dout, Tensor? dlse, {_INPUTS}, Tensor out, Tensor lse, {_OPTIONS}, "
    "bool[] needs_grad, Tensor? weights=None) -> Tensor[]"
)
_N_INPUTS, _N_DIFFERENTIABLE, _N_OPTIONS = len(Inputs._fields), len(DIFFERENTIABLE), len(Options._fields)
_N_SAVED = _N_INPUTS + 2  # with out and lse


@functools.cache
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
    strides = x.stride()
    if strides[-1] == 1 and 1 not in strides[:-1]:  # nearly always, and fast
        return x
    unit = [dim for dim in range(x.ndim) if strides[dim] == 1 and x.shape[dim] > 1]
    return x if unit == [x.ndim - 1] or x.shape[-1] == 1 else x.contiguous()


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for the device of x; some devices have none."""
    device = x.device.type
    return (device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)) and torch.is_autocast_enabled(device)


def _run(function, inputs: Inputs, *args):
    """function(inputs, *args). Dtypes are settled by now: autocast must not touch the products inside a backend."""
    if not autocast_enabled(inputs.q):
        return function(inputs, *args)
    with torch.autocast(inputs.q.device.type, enabled=False):
        return function(inputs, *args)


def _normalized(inputs: Inputs) -> Inputs:
    """What the backends ask for beyond the public contract: unit last strides, four dimensions of r and mask."""
    q, k, v, r, content_bias, position_bias, q_pos, r_bias, mask, *others = inputs
    if q_pos is not None:
        q_pos = _unit_last_stride(q_pos)
    if r is not None:
        r = _unit_last_stride(r)
        r = r if r.ndim == 4 else r.unsqueeze(0)
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]
    q, k, v = _unit_last_stride(q), _unit_last_stride(k), _unit_last_stride(v)
    return Inputs(q, k, v, r, content_bias, position_bias, q_pos, r_bias, mask, *others)


def _forward(*args):
    tensors, (*options, backend) = args[:_N_INPUTS], args[_N_INPUTS:]
    inputs = Inputs(*tensors)
    if inputs.q.numel() == 0:
        return _forward_fake(*args)
    return _run(_backend_module(backend).forward, _normalized(inputs), Options(*options))


def _forward_fake(*args):
    inputs, backend = Inputs(*args[:_N_INPUTS]), args[-1]
    q = inputs.q
    lse_dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    if backend == "triton":
        lse_dtype = inputs.kernel_lse_dtype
    return torch.empty_like(_unit_last_stride(q)), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _forward_with_weights(*args):
    inputs, (*options, backend) = Inputs(*args[:_N_INPUTS]), args[_N_INPUTS:]
    if inputs.q.numel() == 0:
        return _forward_with_weights_fake(*args)
    module, options = _backend_module(backend), Options(*options)
    weights = module.room(inputs, options)
    return *_run(module.forward, _normalized(inputs), options, module.kept_in(weights)), weights


def _forward_with_weights_fake(*args):
    inputs, (*options, backend) = Inputs(*args[:_N_INPUTS]), args[_N_INPUTS:]
    return *_forward_fake(*args), _backend_module(backend).room(inputs, Options(*options))


def _backward(dout, dlse, *args):
    inputs, (out, lse), rest = Inputs(*args[:_N_INPUTS]), args[_N_INPUTS:_N_SAVED], args[_N_SAVED:]
    options, (backend, needs_grad, *weights) = Options(*rest[:_N_OPTIONS]), rest[_N_OPTIONS:]  # no weights if None
    if inputs.q.numel() == 0:
        return [torch.zeros_like(x) for x in _wanted(inputs, needs_grad)]
    module = _backend_module(backend)
    backward = functools.partial(module.backward, _unit_last_stride(dout), dlse)
    kept = (module.kept_in(x) for x in weights)
    grads = _run(backward, _normalized(inputs), out, lse, options, needs_grad, *kept)
    pairs = zip(_wanted(grads, needs_grad), _wanted(inputs, needs_grad), strict=True)
    return [grad if grad.shape == x.shape else grad.view(x.shape) for grad, x in pairs]


def _backward_fake(dout, dlse, *args):
    inputs, needs_grad = Inputs(*args[:_N_INPUTS]), args[_N_SAVED + _N_OPTIONS + 1]
    wanted = _wanted(_normalized(inputs), needs_grad)
    return [torch.empty_like(x).view(y.shape) for x, y in zip(wanted, _wanted(inputs, needs_grad), strict=True)]


def _wanted(tensors, needs_grad: list[bool]) -> list[Tensor]:
    return [x for x, needed in zip(tensors, needs_grad, strict=False) if needed]


class _RelAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            if args[-1] == "torch":
                out, lse, weights = rel_attention_with_weights(*args)
            else:
                (out, lse), weights = rel_attention(*args), None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:_N_INPUTS], out, lse, weights)
        ctx.options = args[_N_INPUTS:]
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        *tensors, out, lse, weights = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        needs_grad = list(ctx.needs_input_grad[:_N_DIFFERENTIABLE])
        grads = iter(rel_attention_backward(dout, dlse, *tensors, out, lse, *ctx.options, needs_grad, weights))
        return *(next(grads) if needed else None for needed in needs_grad), *_NO_GRADIENT


_NO_GRADIENT = (None,) * (_N_INPUTS - _N_DIFFERENTIABLE + _N_OPTIONS + 1)


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
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def _forward_autograd(*args):
    if _needs_autograd(args[:_N_DIFFERENTIABLE]):
        return _RelAttention.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return rel_attention(*args)


def _backward_autograd(*args):
    if _needs_autograd(args[: 2 + _N_DIFFERENTIABLE]):
        return list(_NotTwiceDifferentiable.apply(*args))
    with torch._C._AutoDispatchBelowAutograd():
        return rel_attention_backward(*args)


_library.impl("rel_attention", _forward, "CompositeExplicitAutograd")
_library.impl("rel_attention_with_weights", _forward_with_weights, "CompositeExplicitAutograd")
_library.impl("rel_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("txl_kernels::rel_attention", _forward_fake, lib=_library)
torch.library.register_fake("txl_kernels::rel_attention_with_weights", _forward_with_weights_fake, lib=_library)
torch.library.register_fake("txl_kernels::rel_attention_backward", _backward_fake, lib=_library)
_library.impl("rel_attention", _forward_autograd, "Autograd")
_library.impl("rel_attention_backward", _backward_autograd, "Autograd")

rel_attention = torch.ops.txl_kernels.rel_attention.default
rel_attention_with_weights = torch.ops.txl_kernels.rel_attention_with_weights.default
rel_attention_backward = torch.ops.txl_kernels.rel_attention_backward.default
