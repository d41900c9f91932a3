"""What a family file says of a class: which method is replaced, by what, and when it must be left alone."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

from torch import nn


def _fits(module: nn.Module) -> None:
    """Every instance is patched."""


def _every(module: nn.Module) -> bool:
    """Every instance has this attention."""
    return True


class Replacement(NamedTuple):
    """A method of somebody's class, and the function that takes its place.

    Attributes:
        method: Name of the method, nearly always "forward".
        function: Called as function(module, original, *args, **kwargs); original is the module's own bound method,
            for requests that `rel_attention` can't serve.
        parameters: Names of the method's parameters after self, as in the version that was read. A class whose method
            has others is left alone.
        check: Returns why an instance must be left alone (a configuration with another attention), or None.
        own: Requests that the module's own method serves, for the report ("attention weights").
        applies: Whether an instance has relative attention at all; others are passed over, in the report too (the
            attention of an adapter, which is built from the same class without positions).
        head_size: Name of the attribute that has the head size D, for an attention; what is wider than a fused kernel
            takes is left alone.
    """

    method: str
    function: Callable
    parameters: tuple[str, ...]
    check: Callable[[nn.Module], str | None] = _fits
    own: str = ""
    applies: Callable[[nn.Module], bool] = _every
    head_size: str = ""


_warned: set[tuple[str, str]] = set()


def warn_own(module: nn.Module, request: str) -> None:
    """Says, once for a class and a request, that the module's own slower method serves it."""
    name = type(module).__name__
    if (name, request) not in _warned:
        _warned.add((name, request))
        warnings.warn(
            f"{name}: {request}: no fused kernel serves that, its own method runs for such calls", stacklevel=3
        )
