"""`patch` and `unpatch`: modules of known classes run their attention on `rel_attention`.

A patched instance has the same state, and a class derived from its own that overrides one method. So parameters,
buffers, hooks and whatever else sits on the instance stay as they are; `copy.deepcopy`, `pickle` and DataParallel's
replicas carry the class along, and nobody else's instances change.
"""

import functools
import inspect

from torch import nn

from txl_kernels.patching import table
from txl_kernels.patching.replacement import Replacement
from txl_kernels.patching.report import Entry, Report
from txl_kernels.validation import MAX_HEAD_SIZE


class PatchError(ValueError):
    """``patch(..., strict=True)`` found a module that it can't patch, or none that it knows."""


def patch(model: nn.Module | type[nn.Module], *, strict: bool = False) -> Report:
    """Makes the relative attention of a model's modules fused: same numbers, parameters and checkpoints.

    Patches in place and only this model's modules; a class instead of a model has its later and earlier instances
    patched, process-wide. Patching again changes nothing. README, "Models that people already have", has the families.

    Args:
        model: A model, or a known attention class.
        strict: Raise, and change nothing, unless there is a module to patch and all that are known can be patched.

    Returns:
        What was found and what was done with each; printing it gives a line for each kind of module.

    Raises:
        PatchError: See strict.
        TypeError: model is neither a module nor a class of modules.
    """
    if isinstance(model, type) and issubclass(model, nn.Module):
        plans = [("", model, model)]
    elif isinstance(model, nn.Module):
        plans = [(name, module, type(module)) for name, module in model.named_modules()]
    else:
        got = model.__name__ if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model: expected a torch.nn.Module or a class of modules, got {got}")

    entries, todo = [], []
    for name, target, cls in plans:
        found = table.find(cls)
        if found is None:
            continue
        known, replacement = found
        if not isinstance(replacement, str) and isinstance(target, nn.Module) and not replacement.applies(target):
            continue
        if not isinstance(replacement, str) and is_patched(cls, replacement.method):
            action, reason = "already patched", replacement.own
        else:
            reason = _obstacle(target, cls, known, replacement)
            action = "left alone" if reason else "patched"
            if not reason:
                todo.append((target, replacement))
                reason = replacement.own
        entries.append(Entry(name, known.__name__, action, reason))
    report = Report(tuple(entries), table.known_classes())
    if strict and (not entries or report.left_alone):
        raise PatchError(f"model: expected only modules that can be patched, and one at least; got\n{report}")
    for target, replacement in todo:
        if isinstance(target, type):
            setattr(target, replacement.method, _new_method(target, replacement))
        else:
            target.__class__ = _patched_class(type(target))
    return report


def unpatch(model: nn.Module | type[nn.Module]) -> None:
    """Gives every module its own class back, and a patched class its own method: the very same function.

    Args:
        model: What `patch` was called with, or a part of it. What is not patched stays as it is.

    Raises:
        PatchError: The class of a patched module was derived from since (by ``fully_shard``, say); nothing is changed.
        TypeError: model is neither a module nor a class of modules.
    """
    if isinstance(model, type) and issubclass(model, nn.Module):
        for name, attribute in list(vars(model).items()):
            if hasattr(attribute, "_txl_original"):
                if attribute._txl_inherited:
                    delattr(model, name)
                else:
                    setattr(model, name, attribute._txl_original)
    elif isinstance(model, nn.Module):
        patched = [(name, module) for name, module in model.named_modules() if isinstance(module, _Patched)]
        for name, module in patched:
            if not _is_direct(type(module)):
                bases = type(module).__mro__
                raise PatchError(f"model: expected {name or 'it'} as patch left it, got a class of {bases[1].__name__}")
        for _, module in patched:
            module.__class__ = type(module)._txl_class
    else:
        got = model.__name__ if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model: expected a torch.nn.Module or a class of modules, got {got}")


class _Patched:
    """Mixed into the class of a patched instance."""

    _txl_class: type

    def _get_name(self) -> str:
        """What printing the model shows."""
        return f"{self._txl_class.__name__}[txl_kernels]"

    def __reduce_ex__(self, protocol):
        """The class derived here has no name to be found by: pickles and copies name the original."""
        if not _is_direct(type(self)):
            return super().__reduce_ex__(protocol)
        _, _, *state = super().__reduce_ex__(protocol)
        return (_new, (self._txl_class,), *state)


def _is_direct(cls: type) -> bool:
    """Whether cls is what `patch` made, not derived from it (FSDP and parametrizations derive classes, too)."""
    return "_txl_class" in vars(cls)


def _new(cls: type) -> nn.Module:
    patched = _patched_class(cls)
    return patched.__new__(patched)


@functools.cache
def _patched_class(cls: type) -> type:
    """cls with its method replaced. Names stay: packages look classes up by them."""
    _, replacement = table.find(cls)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "_txl_class": cls}
    return type(cls)(cls.__name__, (_Patched, cls), names | {replacement.method: _new_method(cls, replacement)})


def _new_method(cls: type, replacement: Replacement):
    """The method that takes the place of that of cls, with the signature and documentation of the old one."""
    function, original = replacement.function, getattr(cls, replacement.method)

    @functools.wraps(original)
    def method(self, *args, **kwargs):
        return function(self, original.__get__(self), *args, **kwargs)

    # torch.compile counts what it compiles by code object: each class has its own
    method.__code__ = method.__code__.replace(co_name=replacement.method)
    method._txl_original = original
    method._txl_inherited = replacement.method not in vars(cls)
    return method


def is_patched(module: nn.Module | type, method: str = "forward") -> bool:
    """Whether `patch` has replaced the method of a module, or that of its class."""
    cls = module if isinstance(module, type) else type(module)
    return hasattr(getattr(cls, method), "_txl_original")


def _obstacle(target: nn.Module | type, cls: type, known: type, replacement: Replacement | str) -> str | None:
    """Why target can't be patched, or None."""
    if isinstance(replacement, str):
        return replacement
    method = replacement.method
    if getattr(cls, method) is not getattr(known, method):
        return f"{cls.__name__} overrides {method} of {known.__name__}"
    got = tuple(inspect.signature(getattr(cls, method)).parameters)[1:]
    if got != replacement.parameters:
        return f"{method}: expected the parameters ({', '.join(replacement.parameters)}), got ({', '.join(got)})"
    if isinstance(target, type):
        return None
    if method in vars(target):
        return f"{method} of this instance was replaced (by a hook, say); patch before that"
    return replacement.check(target) or _too_wide(target, replacement.head_size)


def _too_wide(target: nn.Module, name: str) -> str | None:
    size = getattr(target, name) if name else 0
    return f"{name}: expected at most {MAX_HEAD_SIZE}, got {size}" if size > MAX_HEAD_SIZE else None
