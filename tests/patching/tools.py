"""A model before and after `patch`: outputs, gradients, autocast, statistics of dropout, and what it allocates."""

import copy
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import txl_kernels
from txl_kernels.patching import replacement
from txl_kernels.torch_backend import kept

# Of the largest entry: both sides round, in another order, through every layer of the model.
RELATIVE = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 4e-2}

Run = Callable[..., Tensor | tuple[Tensor, ...]]  # run(model, **inputs): what to compare


class Results(NamedTuple):
    """What a run gave: its outputs, and the gradients of inputs and parameters by name."""

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor]


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with every parameter drawn anew, so that no bias is zero and attention prefers some keys."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 * fan_in**-0.5)
    return model


def training(model: nn.Module) -> nn.Module:
    """In training mode, but for the batch norms: the gradient of what they subtract is all rounding."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    return model


def results(model: nn.Module, run: Run, inputs: dict[str, Tensor], valid: Tensor | None = None) -> Results:
    """Runs it, and back from cotangents that are drawn anew but the same each time.

    Args:
        model: Whose parameters get gradients.
        run: Called as run(model, **inputs).
        inputs: Those of floating point get gradients.
        valid: Broadcasts against every output: False where the cotangent is zero, as in rows that see no key,
            whose gradient in some models is a rounding artefact.
    """
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    outputs = run(model, **leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
    if valid is not None:
        cotangents = [x * valid for x in cotangents]
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    wanted |= {name: x for name, x in model.named_parameters() if x.requires_grad}
    gradients = torch.autograd.grad(outputs, list(wanted.values()), cotangents, allow_unused=True)
    gradients = {name: g for name, g in zip(wanted, gradients, strict=True) if g is not None}
    assert gradients, "no gradient reaches anything"
    return Results(tuple(x.detach() for x in outputs), gradients)


def assert_alike(name: str, got: Tensor, wanted: Tensor, relative: float) -> None:
    """Fails unless got is wanted, but for `relative` times its largest entry. NaN never passes."""
    assert got.shape == wanted.shape, f"{name}: shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    assert got.dtype == wanted.dtype, f"{name}: {got.dtype}, wanted {wanted.dtype}"
    error, largest = (got - wanted).abs().max().item(), wanted.abs().max().item()
    assert error <= relative * largest, f"{name}: differs by {error:.3g}, largest {largest:.3g}"


def assert_same_when_patched(
    model: nn.Module, run: Run, inputs: dict[str, Tensor], valid: Tensor | None = None, relative: float | None = None
) -> txl_kernels.Report:
    """Outputs and gradients before and after ``patch(model, strict=True)``, which leaves the model patched.

    Args:
        model: Not patched yet.
        run: As in `results`.
        inputs: As in `results`.
        valid: As in `results`.
        relative: Difference allowed, of the largest entry; by default that of the first output's dtype.
    """
    before = results(model, run, inputs, valid)
    report = txl_kernels.patch(model, strict=True)
    after = results(model, run, inputs, valid)
    relative = RELATIVE[before.outputs[0].dtype] if relative is None else relative
    assert len(after.outputs) == len(before.outputs)
    for i, (got, wanted) in enumerate(zip(after.outputs, before.outputs, strict=True)):
        assert_alike(f"output {i}", got, wanted, relative)
    assert after.gradients.keys() == before.gradients.keys()
    # gradients that are sums of what cancels (of a key's bias, say) are held against the largest of all
    largest = max(x.abs().max().item() for x in before.gradients.values())
    for name, wanted in before.gradients.items():
        got, floor = after.gradients[name], 1e-2 * largest
        error, allowed = (got - wanted).abs().max().item(), 3 * relative * max(wanted.abs().max().item(), floor)
        assert got.dtype == wanted.dtype
        assert error <= allowed, f"gradient of {name}: differs by {error:.3g}, allowed {allowed:.3g}"
    return report


def assert_same_under_autocast(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> None:
    """In bfloat16, the output has the same dtype as before `patch`, and an error of at most twice that of before."""
    patched = copied(model)  # before the model keeps weights, which can't be copied
    truth = run(model)

    def error(model: nn.Module) -> tuple[float, torch.dtype]:
        with torch.autocast("cpu", torch.bfloat16):
            out = run(model)
        return (out.float() - truth).abs().max().item(), out.dtype

    (before, dtype), (after, patched_dtype) = error(model), error(patched)
    assert patched_dtype == dtype
    assert after <= 2 * before + torch.finfo(torch.bfloat16).eps * truth.abs().max().item()


def assert_too_wide(model: nn.Module, run: Callable[[nn.Module], Tensor], name: str) -> None:
    """Attention with heads wider than a fused kernel takes, given by the attribute of that name, is left alone."""
    patched = copy.deepcopy(model)
    left = txl_kernels.patch(patched).left_alone
    assert left
    assert all(entry.reason.startswith(f"{name}: expected at most 256, got ") for entry in left)
    assert torch.equal(run(patched), run(model))


def assert_own_method(
    model: nn.Module, run: Callable[[nn.Module], Tensor | tuple[Tensor, ...]], warning: str
) -> tuple[Tensor, ...]:
    """What run(model) gives is bit for bit the same after `patch`, with a warning that the module's own method runs.

    Args:
        model: Not patched.
        run: Makes a request that no fused kernel serves.
        warning: What the warning says, a regular expression.

    Returns:
        What run gives.
    """
    patched = copied(model)  # before the model keeps weights, which can't be copied
    wanted = run(model)
    with mock.patch.object(replacement, "_warned", set()), pytest.warns(UserWarning, match=warning):
        got = run(patched)
    got, wanted = (x if isinstance(x, tuple) else (x,) for x in (got, wanted))
    assert len(got) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    return got


def states_and_weights(out) -> tuple[Tensor, ...]:
    """The tensors of an output of Hugging Face's models that was asked for attention weights."""
    return (out.last_hidden_state, *out.attentions)


def assert_same_dropout(model: nn.Module, run: Callable[[nn.Module], Tensor], runs: int = 400) -> None:
    """Mean and spread of an output over many dropout masks, before and after `patch`; the model is in training mode."""

    def moments() -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        with torch.no_grad():
            draws = torch.stack([run(model).double() for _ in range(runs)])
        return draws.mean(0), draws.std(0)

    mean, std = moments()
    txl_kernels.patch(model, strict=True)
    patched_mean, patched_std = moments()
    assert std.mean() > 0, "nothing was dropped"
    standard_error = ((std**2 + patched_std**2) / runs).sqrt() + 1e-6
    worst = ((mean - patched_mean) / standard_error).abs().max().item()
    assert worst < 6, f"means differ by {worst:.1f} standard errors"
    ratio = (patched_std.mean() / std.mean()).item()
    assert 0.95 < ratio < 1.05, f"the spread is {ratio:.3f} of that before"


class _LargestStorage(TorchDispatchMode):
    """Bytes of the largest tensor that any operator makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


def largest_tensor(function: Callable[[], object]) -> int:
    """Bytes of the largest tensor that a call makes; what happens inside `rel_attention` is not seen.

    What that keeps for its backward has a bound (tests/test_torch_backend_kept.py), which is 0 here.
    """
    with mock.patch.object(kept, "MOST_BYTES", 0), _LargestStorage() as seen:
        function()
    return seen.largest


def assert_nothing_quadratic(model: nn.Module, step: Callable[[nn.Module, int], Callable[[], object]], T: int) -> None:
    """From T to 2T the largest tensor grows with the length after `patch`, and with its square before.

    Args:
        model: Not patched.
        step: step(model, length) prepares a call, a forward and backward say; the call alone is looked at.
        T: The shorter length.
    """
    growth = {
        name: largest_tensor(step(side, 2 * T)) / largest_tensor(step(side, T))
        for name, side in (("patched", copied(model)), ("own", model))
    }
    assert growth["patched"] < 2.1, growth
    assert growth["own"] > 3.5, growth  # or the measurement would show nothing


class Profile(NamedTuple):
    """What PyTorch's profiler saw of a call, inside `rel_attention` as well.

    Attributes:
        largest: Bytes of the largest allocation.
        pairs: Names of the operators that were handed a tensor with two dimensions of at least some length.
    """

    largest: int
    pairs: set[str]


def profiled(function: Callable[[], object], T: int) -> Profile:
    """The profile of a call, with T as the length of `Profile.pairs`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True) as seen:
        function()
    allocations = [x.nbytes() for x in seen.profiler.kineto_results.events() if x.name() == "[memory]"]
    pairs = {
        event.name
        for event in seen.events()
        for shape in event.input_shapes or ()
        if sum(isinstance(n, int) and n >= T for n in shape) >= 2
    }
    return Profile(max(allocations), pairs)


class _OperatorReads(TorchDispatchMode):
    """Counts the operators that bring entries of tensors to the host: for item, bool, int, arange(tensor), ..."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select")
        self.count += func.name() in names
        return func(*args, **(kwargs or {}))


class _MethodReads(TorchFunctionMode):
    """Counts the methods that do so without an operator where the host is where the tensor is."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__ in ("tolist", "numpy", "cpu", "__array__")
        return func(*args, **(kwargs or {}))


def reads(function: Callable[[], object]) -> int:
    """How often a call reads entries of tensors, for each of which a GPU would synchronise."""
    # lengths are validated where they are on the host only
    on_a_gpu = mock.patch("txl_kernels.validation.has_values", return_value=False)
    with on_a_gpu, _OperatorReads() as operators, _MethodReads() as methods:
        function()
    return operators.count + methods.count


def assert_reads_once(model: nn.Module, run: Callable[[nn.Module], object]) -> None:
    """run(model), one forward of several layers, reads entries once more than before `patch` at most."""
    patched = copied(model)
    before, after = reads(lambda: run(model)), reads(lambda: run(patched))
    assert after <= before + 1, f"{after} instead of {before}"


def copied(model: nn.Module, **options: bool) -> nn.Module:
    """A deep copy that was patched."""
    model = copy.deepcopy(model)
    txl_kernels.patch(model, strict=True, **options)
    return model
