"""Our own format: a directory with the tensors in model.safetensors and the constructor's arguments in config.json."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from txl_kernels.models.checkpoints.build import build, shared_names, skeleton
from txl_kernels.models.checkpoints.files import CheckpointError, read_json, read_safetensors, reading, safetensors
from txl_kernels.models.language_model import MemTransformerLM

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_FORMAT = {"format": "txl_kernels.MemTransformerLM", "version": 1}


def save(model: MemTransformerLM, directory: str | Path) -> None:
    """Saves a model as model.safetensors and config.json, from which `load` makes it anew.

    Both are written beside their places and then moved there, so that what stood there before stays until they are
    whole. A tensor that has several names is stored once.

    Args:
        model: The model, on any device.
        directory: Where to; made if need be.

    Raises:
        ImportError: safetensors is not installed.
        TypeError: model is no `MemTransformerLM`.
        ValueError: It was changed so that the arguments it was made with no longer make it.
    """
    if not isinstance(model, MemTransformerLM):
        raise TypeError(f"model: expected a MemTransformerLM, got {type(model).__name__}")
    library = safetensors()
    state = model.state_dict()
    anew = skeleton(model.config, state)
    if shared_names(anew) != shared_names(model) or any(
        x.shape != state[name].shape for name, x in anew.state_dict().items()
    ):
        raise ValueError("model: expected the tensors, and those of them tied, that its config makes, got others")
    config = json.dumps({**_FORMAT, "arguments": model.config}, indent=2)
    tensors = {names[0]: state[names[0]].contiguous() for names in shared_names(model)}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=directory, prefix=".saving-") as scratch:
        library.save_file(tensors, Path(scratch, _WEIGHTS), metadata={"format": "pt"})
        Path(scratch, _CONFIG).write_text(config + "\n", encoding="utf-8")
        # the library makes a file that its owner alone can read
        Path(scratch, _WEIGHTS).chmod(Path(scratch, _CONFIG).stat().st_mode)
        for name in (_WEIGHTS, _CONFIG):
            os.replace(Path(scratch, name), directory / name)


def load(directory: str | Path) -> MemTransformerLM:
    """Loads what `save` saved.

    Args:
        directory: The directory.

    Returns:
        The model on the CPU, in the dtype it had and in evaluation mode.

    Raises:
        FileNotFoundError: There is no such directory.
        ImportError: safetensors is not installed.
        CheckpointError: A file is missing, damaged or something else, or the two do not fit each other.
    """
    directory = Path(directory)
    with reading(directory):
        if not directory.is_dir():
            raise CheckpointError("expected a directory, got a file")
        config = read_json(directory / _CONFIG)
        if (found := {name: config.get(name) for name in _FORMAT}) != _FORMAT:
            raise CheckpointError(f"{_CONFIG}: expected {_FORMAT}, got {found}")
        if not isinstance(config.get("arguments"), dict):
            raise CheckpointError(f"{_CONFIG}: expected an object named arguments")
        return build(config["arguments"], read_safetensors(directory / _WEIGHTS))
