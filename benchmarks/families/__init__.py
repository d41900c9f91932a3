"""Small models of the families that `txl_kernels.patch` knows, at the lengths people use: one file a family."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import pytest
from torch import Tensor, nn

FRAMES_PER_SECOND = 12.5
# length, frames (after subsampling by 8), batch and layers that two cores run in seconds
AUDIO = (("30 s", 375, 2, 1), ("2 min", 1500, 2, 1), ("10 min", 7500, 1, 1))


class Case(NamedTuple):
    """One model at one length.

    Attributes:
        family: As in the README's table.
        shape: Said in the report: "2 min: T = 1500, B = 2, 1 layer, 4 heads x 64".
        build: Makes the model, with attention that is not uniform (`benchmarks.measure.with_larger_weights`), and what
            runs it: run(model) gives states, differentiable in the model's parameters. Called with smoke=True for
            tiny sizes. Same numbers each time.
    """

    family: str
    shape: str
    build: Callable[[bool], tuple[nn.Module, Callable[[nn.Module], Tensor]]]


def shape_of(name: str, layers: int, heads: str = "4 heads x 64", **sizes: int) -> str:
    """As `Case.shape` has it: name: T = 1500, B = 2, 1 layer, 4 heads x 64."""
    parts = [f"{letter} = {n}" for letter, n in sizes.items()] + [f"{layers} layer{'s' * (layers > 1)}", heads]
    return f"{name}: {', '.join(parts)}"


class Encoder(NamedTuple):
    """An encoder of audio, at any length.

    Attributes:
        family: As in the README's table.
        attention: Name of the class that is its attention.
        build: As `Case.build`, after frames, batch and layers.
        heads: Said in the report.
    """

    family: str
    attention: str
    build: Callable[[int, int, int, bool], tuple[nn.Module, Callable[[nn.Module], Tensor]]]
    heads: str = "4 heads x 64"

    def case(self, length: str, T: int, B: int, layers: int) -> Case:
        """It at one length."""
        shape = shape_of(length, layers, self.heads, T=T, B=B)
        return Case(self.family, shape, functools.partial(self.build, T, B, layers))


# file of this folder -> the module that must be importable for its cases; those with encoders, and all
ENCODERS = {
    "parakeet": "transformers",
    "nemotron": "transformers",
    "wav2vec2_conformer": "transformers",
    "fastspeech2": "transformers",
    "gemma_audio": "transformers",
    "nemo": "nemo",
    "espnet": "espnet",
    "speechbrain": "speechbrain",
    "fairseq": "fairseq",
}
PACKAGES = {"transformer_xl": "torch", "xlnet": "transformers"} | ENCODERS | {"ding": "ding", "rllib": "ray"}


def cases(file: str) -> list[Case]:
    """The cases of one file; imports its package."""
    return importlib.import_module(f"benchmarks.families.{file}").CASES


def encoders(file: str) -> list[Encoder]:
    """The encoders of one file; imports its package."""
    return importlib.import_module(f"benchmarks.families.{file}").ENCODERS


def parameters(packages: dict[str, str], of: Callable[[str], dict[str, object]]) -> list:
    """Parameters of pytest, by id, for each file; one that is skipped where its package is missing."""
    found = []
    for file, package in packages.items():
        if importlib.util.find_spec(package) is None:
            reason = f"{package} is not installed (tests/patching/requirements.txt)"
            found.append(pytest.param(None, id=file, marks=pytest.mark.skip(reason=reason)))
        else:
            found += (pytest.param(x, id=name) for name, x in of(file).items())
    return found
