"""The error of this package, and files without pickles: JSON and safetensors."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor


class CheckpointError(ValueError):
    """A file is not the checkpoint that it should be."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Names path in an error raised inside by what is read, and makes it a `CheckpointError`.

    Raises:
        FileNotFoundError: path does not exist.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a checkpoint, found nothing")
    try:
        yield
    except (ValueError, RuntimeError, OverflowError) as error:  # NotImplementedError is a RuntimeError
        raise CheckpointError(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: There is no such file, or something else in it.
    """
    if not path.is_file():
        raise CheckpointError(f"expected the file {path.name} in this directory")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name}: expected an object, got {type(content).__name__}")
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ImportError: safetensors is not installed.
        CheckpointError: There is no such file, or it is damaged or something else.
    """
    library = safetensors()
    if not path.is_file():
        raise CheckpointError(f"expected the file {path.name} in this directory")
    try:
        return library.load_file(path)
    except Exception as error:  # its errors have no common class
        raise CheckpointError(f"{path.name}: not a whole safetensors file: {error}") from error


def safetensors() -> Any:
    """The module safetensors.torch.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("safetensors is not installed; it comes with: pip install 'safetensors[torch]'") from error
    return safetensors.torch
