"""Checkpoints of the original PyTorch code (kimiyoung/transformer-xl): its ``model.pt`` is a pickled module."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from txl_kernels.models.checkpoints.build import build
from txl_kernels.models.checkpoints.files import CheckpointError, reading
from txl_kernels.models.checkpoints.pickles import load_tensors, plain, read_pickle
from txl_kernels.models.language_model import MemTransformerLM


def load_original(path: str | Path, **arguments: Any) -> MemTransformerLM:
    """Loads a checkpoint of the original code, of PyTorch 0.4 or newer, without running anything that it holds.

    A pickled module (``model.pt``), also one inside DataParallel, says itself how it was made. A state_dict does
    not: give the arguments of `MemTransformerLM`::

        model = load_original("model.pt")
        model = load_original("model.pt", tgt_len=128, mem_len=1600, clamp_len=1000, same_length=True)  # to evaluate
        model = load_original("state.pt", n_token=204, n_layer=12, n_head=8, d_model=512, d_head=64, d_inner=2048,
                              dropout=0.1, dropatt=0.0, tgt_len=512, ext_len=0, mem_len=512)

    Args:
        path: The file.
        arguments: Arguments of `MemTransformerLM`; they go before those in the file.

    Returns:
        The model on the CPU, in the dtype of the file and in evaluation mode.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file asks for anything but modules of the original and tensors, is damaged, or is
            something else; arguments are missing or do not fit its tensors.
    """
    path = Path(path)
    with reading(path):
        content = read_pickle(path)
        if type(content).__name__ in ("DataParallel", "BalancedDataParallel"):
            content = _child(content, "module")
        if isinstance(content, dict):
            told, state = {}, load_tensors(content)
        elif type(content).__name__ == "MemTransformerLM":
            told, state = _told(content), load_tensors(dict(_tensors(content)))
        else:
            raise CheckpointError(f"expected a MemTransformerLM or its state_dict, got {type(content).__name__}")
        parameters = inspect.signature(MemTransformerLM).parameters.values()
        needed = [p.name for p in parameters if p.default is p.empty] + ["tgt_len", "ext_len", "mem_len"]
        if missing := [name for name in needed if name not in {**told, **arguments}]:
            raise CheckpointError(
                f"a state_dict does not say how its model was made: give its arguments, also {', '.join(missing)}"
            )
        return build({**told, **arguments}, state)


def _told(model: Any) -> dict[str, Any]:
    """The constructor arguments, from the attributes of a pickled MemTransformerLM."""
    sizes = ("n_token", "n_head", "d_model", "d_head", "d_embed", "tgt_len", "ext_len", "mem_len")
    embedding, crit, layers = (_child(model, name) for name in ("word_emb", "crit", "layers"))
    attention, net = (_child(layers, "0", name) for name in ("dec_attn", "pos_ff"))
    cutoffs = _get(embedding, "cutoffs", list)[:-1]
    div_val = _get(embedding, "div_val", int)
    emb_projs, out_projs = (_get(_child(*of), "_parameters") for of in ((embedding, "emb_projs"), (crit, "out_projs")))
    clusters = [str(i) for i in range(len(cutoffs) + 1)]
    return {
        **{name: _get(model, name, int) for name in (*sizes, "attn_type", "clamp_len")},
        "same_length": bool(_get(model, "same_length", int)),
        "n_layer": len(_get(layers, "_modules")),
        "d_inner": _get(net, "d_inner", int),
        "dropout": _get(_child(model, "drop"), "p", (int, float)),
        "dropatt": _get(_child(attention, "dropatt"), "p", (int, float)),
        "pre_lnorm": bool(_get(attention, "pre_lnorm", int)),
        "cutoffs": cutoffs,
        "div_val": div_val,
        "tie_weight": _weight(crit, "out_layers", "0") is _weight(embedding, "emb_layers", "0"),
        "tie_projs": [
            i in out_projs and out_projs[i] is emb_projs.get("0" if div_val == 1 else i, False) for i in clusters
        ],
    }


def _tensors(model: Any) -> Iterator[tuple[str, Any]]:
    """The state_dict of a pickled module, item by item."""
    left, seen = [("", model)], set()
    while left:
        prefix, module = left.pop()
        if id(module) in seen:
            raise CheckpointError(f"damaged: the module {prefix} is also somewhere else")
        seen.add(id(module))
        for name, tensor in {**_get(module, "_parameters"), **_get(module, "_buffers")}.items():
            if tensor is not None:
                yield f"{prefix}{name}", tensor
        left += [(f"{prefix}{name}.", child) for name, child in _get(module, "_modules").items()]


def _weight(module: Any, *names: str) -> Any:
    return _get(_child(module, *names), "_parameters").get("weight")


def _child(module: Any, *names: str) -> Any:
    for name in names:
        module = _get(module, "_modules").get(name)
        if module is None:
            raise CheckpointError(f"damaged: expected a module named {name}, found none")
    return module


def _get(module: Any, name: str, kind: type | tuple[type, ...] = dict) -> Any:
    value = getattr(module, "__dict__", {}).get(name)
    if not isinstance(value, kind):
        raise CheckpointError(f"damaged: expected {name} of a {type(module).__name__}, got {type(value).__name__}")
    return plain(value) if isinstance(value, dict) else value
