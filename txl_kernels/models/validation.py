"""Checks of the language model's arguments. Every message names the argument, what was wanted and what came."""

import operator
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from txl_kernels.validation import has_values

if TYPE_CHECKING:
    from txl_kernels.models.language_model import MemTransformerLM


_SWITCHES = (
    *("tie_weight", "pre_lnorm", "adapt_inp", "same_length"),
    *("untie_r", "gradient_checkpointing", "zero_memory"),
)


def plain_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments as Python's own bool, int, float and list, as a file can hold them.

    Raises:
        ValueError: One is of another kind, or a dropout is no probability.
    """
    return {name: _plain(name, value) for name, value in arguments.items()}


def _plain(name: str, value: Any) -> Any:
    if name in _SWITCHES:
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected a bool, got {value!r}")
        return value
    if name in ("dropout", "dropatt"):
        number = not isinstance(value, (bool, str)) and hasattr(value, "__float__")
        if not (number and 0 <= float(value) <= 1) or (name == "dropatt" and float(value) == 1):
            raise ValueError(f"{name}: expected a probability{', below 1' * (name == 'dropatt')}, got {value!r}")
        return float(value)
    if name in ("cutoffs", "tie_projs"):
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise ValueError(f"{name}: expected a sequence, got {value!r}")
        return [bool(x) if name == "tie_projs" else _plain("cutoffs: each", x) for x in value]
    try:
        return operator.index(value)
    except TypeError:
        if name not in ("div_val", "attn_type", "clamp_len", "sample_softmax", "cutoffs: each"):
            return value  # counts, of which check_counts knows the least
        raise ValueError(f"{name}: expected an int, got {value!r}") from None


def check_counts(least: int, counts: dict[str, int]) -> None:
    """Raises ValueError unless all counts are ints from least on."""
    for name, count in counts.items():
        if not isinstance(count, int) or count < least:
            raise ValueError(f"{name}: expected an int >= {least}, got {count!r}")


def check_segment(
    model: "MemTransformerLM", data: Tensor, target: Tensor | None = None, mems: tuple[Tensor, ...] = ()
) -> None:
    """Raises TypeError or ValueError unless the arguments fit the contract of `MemTransformerLM.forward`."""
    tokens = {"data": data} if target is None else {"data": data, "target": target}
    for name, x in tokens.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor of tokens, got {type(x).__name__}")
        if x.dtype != torch.int64:
            raise TypeError(f"{name}: expected dtype torch.int64, got {x.dtype}")
    if data.ndim != 2 or not data.shape[0]:
        raise ValueError(f"data: expected (T, B) with T >= 1, got {tuple(data.shape)}")
    T, B = data.shape
    if target is not None and (target.ndim != 2 or target.shape[1] != B or not 1 <= target.shape[0] <= T):
        raise ValueError(f"target: expected (1 to {T}, {B}) as data, got {tuple(target.shape)}")
    check_mems(model, mems, B)
    for name, x in tokens.items():
        # elsewhere a look at the tokens would wait for the device
        if x.device.type == "cpu" and x.numel() and has_values(x):
            low, high = (int(bound) for bound in x.aminmax())
            if low < 0 or high >= model.n_token:
                raise ValueError(f"{name}: expected tokens in 0 ... {model.n_token - 1}, got {low} ... {high}")


def check_mems(model: "MemTransformerLM", mems: tuple[Tensor, ...], B: int, at_most: int | None = None) -> None:
    """Raises ValueError unless mems are none or what `MemTransformerLM.forward` returns, M <= at_most."""
    if mems and len(mems) != model.n_layer + 1:
        raise ValueError(f"mems: expected n_layer + 1 = {model.n_layer + 1} tensors or none, got {len(mems)}")
    M = mems[0].shape[0] if mems else 0
    if any(m.shape[0] != M or (M and m.shape != (M, B, model.d_model)) for m in mems):
        shapes = [tuple(m.shape) for m in mems]
        raise ValueError(f"mems: expected (M, B, d_model) = (M, {B}, {model.d_model}) for each, got {shapes}")
    if at_most is not None and at_most < M:
        raise ValueError(f"mems: expected M <= mem_len = {at_most}, got M = {M}")
