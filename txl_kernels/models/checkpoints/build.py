"""From constructor arguments and tensors to a model, whole or not at all."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from txl_kernels.models.checkpoints.files import CheckpointError
from txl_kernels.models.language_model import MemTransformerLM

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def build(arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> MemTransformerLM:
    """The model of these constructor arguments with these tensors, in evaluation mode.

    Args:
        arguments: Arguments of `MemTransformerLM`.
        state: Its state_dict; of names that share a tensor some may be missing.

    Raises:
        CheckpointError: An argument, or the name, shape or kind of a tensor does not fit.
    """
    model = skeleton(arguments, state)
    wanted, groups = model.state_dict(keep_vars=True), shared_names(model)
    missing = [names[0] for names in groups if not state.keys() & {*names}]
    unknown = state.keys() - wanted.keys()
    if missing or unknown:
        raise CheckpointError(f"expected the tensors of this model, missing {_some(missing)}, unknown {_some(unknown)}")
    for name, tensor in state.items():
        _check(name, tensor, wanted[name].shape)
    filled = {}
    for names in groups:
        first, *others = (state[name].detach() for name in names if name in state)
        if not all(torch.equal(first, other) for other in others):
            raise CheckpointError(
                f"{' and '.join(names)}: expected the same values, as they are tied, got different ones"
            )
        # a copy, as tensors of a file may overlap
        copy = first.clone(memory_format=torch.contiguous_format)
        copy = nn.Parameter(copy) if isinstance(wanted[names[0]], nn.Parameter) else copy
        filled |= dict.fromkeys(names, copy)
    # assigned: each keeps the dtype of the file, and a tied one stays one
    model.load_state_dict(filled, assign=True)
    return model.eval()


def skeleton(arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> MemTransformerLM:
    """The model of these arguments on the meta device, with learned positions for as many rows as state has.

    Raises:
        CheckpointError: An argument does not fit.
    """
    lengths = {name: arguments.get(name) for name in ("tgt_len", "ext_len", "mem_len")}
    made_with = lengths
    if "r_emb" in state and state["r_emb"].ndim == 4:
        made_with = {"tgt_len": state["r_emb"].shape[1], "ext_len": 0, "mem_len": 0}
    try:
        with torch.device("meta"):
            model = MemTransformerLM(**{**arguments, **made_with})
        model.reset_length(**lengths)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the model's arguments do not fit: {error}") from error
    return model


def shared_names(model: nn.Module) -> list[list[str]]:
    """The names of its state_dict, those of one tensor together."""
    groups = defaultdict(list)
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups[id(tensor)].append(name)
    return list(groups.values())


def _check(name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.dtype not in _DTYPES or tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
        raise CheckpointError(f"{name}: expected a dense floating-point tensor, got {tensor.layout}, {tensor.dtype}")
    if tensor.shape != shape:
        raise CheckpointError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"
