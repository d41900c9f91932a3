"""Checkpoints: a file is either complete or not there, whenever the process is killed."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

KEPT = 2  # the newest, and the one before it should the disk damage the newest


def save(contents: dict[str, Any], path: Path) -> None:
    """Writes the file beside its place, waits until the disk has it, and moves it there in one step."""
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        torch.save(contents, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    _sync(path.parent)


def load(path: Path) -> dict[str, Any]:
    """Reads what `save` wrote, onto the CPU; only tensors and plain Python values, never code.

    Raises:
        OSError: There is no such file, or it can't be read.
        ValueError: The file is cut off, damaged or something else.
    """
    with path.open("rb") as file:
        try:
            _check_sums(file)
            contents = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of about every kind, by where the damage is
            reason = str(error).split("\n")[0][:200] or type(error).__name__
            raise ValueError(
                f"{path}: expected a checkpoint, got a file that is cut off or damaged ({reason})"
            ) from error
    if not isinstance(contents, dict) or "configuration" not in contents:
        raise ValueError(f"{path}: expected a checkpoint of this program, got something else")
    return contents


def _check_sums(file: BinaryIO) -> None:
    """Raises ValueError, or zipfile's errors, unless every part has the checksum it was written with.

    `torch.load` does not look at them: a byte that the disk changed would be another weight.
    """
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of {damaged} does not fit")
    file.seek(0)


def step_path(run: Path, step: int) -> Path:
    """Where the checkpoint after a number of steps is."""
    return run / f"step-{step:08d}.pt"


def step_paths(run: Path) -> list[Path]:
    """The checkpoints to resume from, the newest last."""
    return sorted(run.glob("step-*.pt"))


def remove_old(run: Path) -> None:
    """Removes all but the newest checkpoints, and what a killed process left unfinished."""
    for path in [*step_paths(run)[:-KEPT], *run.glob("*.unfinished")]:
        path.unlink(missing_ok=True)


def newest(run: Path) -> dict[str, Any]:
    """The newest checkpoint of a run.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged; the message names the one before.
    """
    paths = step_paths(run)
    if not paths:
        raise FileNotFoundError(f"{run}: no checkpoint (step-*.pt) here")
    try:
        return load(paths[-1])
    except ValueError as error:
        before = f"; remove it to continue from {paths[-2].name}" if paths[1:] else ""
        raise ValueError(f"{error}{before}") from error


def model_path(path: Path) -> Path:
    """The file with the model of a run: the best by validation, or the newest; path itself if it is a file.

    Raises:
        FileNotFoundError: path is missing, or a folder without checkpoint.
    """
    candidates = [path] if path.is_file() else [path / "best.pt", *reversed(step_paths(path))]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"{path}: no checkpoint (best.pt, step-*.pt) here" if path.exists() else f"{path}: not there"
    )


def _sync(folder: Path) -> None:
    if os.name != "posix":  # a folder can't be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
