"""Checkpoints of Hugging Face's Transformer-XL (``TransfoXLLMHeadModel``, up to transformers 4)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from txl_kernels.models.checkpoints.build import build
from txl_kernels.models.checkpoints.files import CheckpointError, read_json, read_safetensors, reading
from txl_kernels.models.checkpoints.pickles import load_tensors, read_pickle
from txl_kernels.models.decoder import PositionalEmbedding
from txl_kernels.models.language_model import MemTransformerLM

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# arguments of MemTransformerLM and what their absence means there
_DEFAULTS = {
    **{"n_token": 267735, "n_layer": 18, "n_head": 16, "d_model": 1024, "d_head": 64, "d_inner": 4096},
    **{"d_embed": 1024, "div_val": 4, "cutoffs": [20000, 40000, 200000], "pre_lnorm": False, "attn_type": 0},
    **{"mem_len": 1600, "clamp_len": 1000, "same_length": True, "dropout": 0.1, "dropatt": 0.0, "untie_r": True},
}
_OTHER_NAMES = {
    "n_token": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "d_model": "hidden_size",
}


def load_huggingface(path: str | Path) -> MemTransformerLM:
    """Loads a checkpoint of Hugging Face's Transformer-XL with its language-model head; its tokenizer is not touched.

    As there, the memory starts as mem_len states of zeros that are attended to (``zero_memory``). It has the output
    of the last layer too, so one tensor more than there. That implementation has no segment length; its configuration
    of old, and 128 where there is none, gives ``tgt_len``.

    Args:
        path: A directory with config.json and model.safetensors or pytorch_model.bin, or the file with the weights
            in such a directory.

    Returns:
        The model on the CPU, in the dtype of the file and in evaluation mode.

    Raises:
        FileNotFoundError: path does not exist.
        ImportError: The weights are in safetensors format and safetensors is not installed.
        CheckpointError: A file is missing, damaged or something else, or the two do not fit each other.
    """
    path = Path(path)
    with reading(path):
        directory = path if path.is_dir() else path.parent
        config = read_json(directory / "config.json")
        arguments = _arguments(config)
        found = [directory / name for name in _WEIGHTS if (directory / name).is_file()] if path.is_dir() else [path]
        if not found:
            raise CheckpointError(f"expected {' or '.join(_WEIGHTS)} (in one piece) in this directory, found neither")
        pickled = found[0].suffix != ".safetensors"
        state = load_tensors(read_pickle(found[0])) if pickled else read_safetensors(found[0])
        return build(arguments, _renamed(state, arguments))


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    if (kind := config.get("model_type", "transfo-xl")) != "transfo-xl":
        raise CheckpointError(f"config.json: expected model_type transfo-xl, got {kind}")
    if (epsilon := config.get("layer_norm_epsilon", 1e-5)) != 1e-5:
        raise CheckpointError(f"config.json: expected layer_norm_epsilon 1e-05, the only one here, got {epsilon}")
    arguments = {}
    for name, default in _DEFAULTS.items():
        value = config.get(name, config.get(_OTHER_NAMES.get(name), default))
        if not isinstance(value, (int, float) if isinstance(default, float) else type(default)):
            raise CheckpointError(f"config.json: expected {name} like {default}, got {value!r}")
        arguments[name] = value
    if arguments["attn_type"] != 0:
        raise CheckpointError(f"config.json: expected attn_type 0, the only one there, got {arguments['attn_type']}")
    share = config.get("proj_share_all_but_first", True)
    return {
        **arguments,
        "tie_weight": config.get("tie_word_embeddings", True),
        "tie_projs": config.get("tie_projs", [False] + [share] * len(arguments["cutoffs"])),
        "tgt_len": config.get("tgt_len", 128),
        "ext_len": 0,
        "zero_memory": True,
    }


def _renamed(state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state_dict of `MemTransformerLM` from that of ``TransfoXLLMHeadModel``."""
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    for bias in ("r_w_bias", "r_r_bias"):
        names = [f"layers.{i}.dec_attn.{bias}" for i in range(arguments["n_layer"])]
        of_layers = [state.pop(name) for name in names if name in state]
        if arguments["untie_r"]:
            if len(of_layers) < len(names) or len({tensor.shape for tensor in of_layers}) > 1:
                raise CheckpointError(f"expected {names[0]} and its like for every layer, in one shape")
            state[bias] = torch.stack(of_layers)
        elif of_layers:  # files may have it once, or again for each layer
            state.setdefault(bias, of_layers[0])
            if not all(torch.equal(tensor, state[bias]) for tensor in of_layers):
                raise CheckpointError(f"expected the same {bias} in every layer, without untie_r, got different ones")
    # there the head has the first cluster's logit first, in the original the last one's
    for name in ("crit.cluster_weight", "crit.cluster_bias"):
        if name in state:
            state[name] = state[name].flip(0)
    # files may lack it, or have it in float32 beside parameters of 16 bits
    frequencies = state.get("pos_emb.inv_freq")
    if frequencies is None:
        frequencies = PositionalEmbedding(arguments["d_model"]).inv_freq
    state["pos_emb.inv_freq"] = frequencies.to(state.get("crit.out_layers.0.bias", frequencies).dtype)
    return state
