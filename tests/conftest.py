"""Which tests can run in this process, and why the others are skipped."""

import os
from pathlib import Path

import pytest
import torch

from txl_kernels.torch_backend import tiles

_TESTS = Path(__file__).parent
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of interpreter/, compile/, emulator/ and gpu/, and skips what can't run here."""
    for item in items:
        kind = item.path.relative_to(_TESTS).parts[0]
        kind = "compile" if kind == "emulator" else kind
        if kind in ("interpreter", "compile", "gpu"):
            item.add_marker(kind)
        if kind == "interpreter" and not _INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="needs a process of its own with TRITON_INTERPRET=1: make test"))
        if kind in ("compile", "gpu") and _INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="kernels defined under TRITON_INTERPRET=1 cannot be compiled"))
        if kind == "gpu" and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


# Several tiles and several groups of lanes at sizes that an eager float64 truth does in milliseconds.
_SMALL_TILES = {"TILE_SCORES": 1500, "MAX_ROWS": 16, "MANY_ROWS": 0}


@pytest.fixture(params=["whole", "tiled"])
def tiling(request, monkeypatch):
    """Runs a test of the torch backend in one piece or tile, and in many tiles as other devices and long queries."""
    if request.param == "tiled":
        for name, value in _SMALL_TILES.items():
            monkeypatch.setattr(tiles, name, value)
