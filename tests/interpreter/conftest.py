"""Fixtures of the interpreter tests: small tiles, so that every edge happens, and poisoned allocations."""

from collections.abc import Callable

import pytest
import torch

from txl_kernels.triton_backend import launch
from txl_kernels.triton_backend.launch_table import Launch


@pytest.fixture
def use_tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes every kernel use tiles of this many queries by this many keys."""

    def use(block_m: int, block_n: int) -> None:
        monkeypatch.setattr(launch, "launch_for", lambda *_: Launch(block_m, block_n, num_warps=4, num_stages=1))

    return use


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what torch.empty and torch.empty_like return with NaN, so that an element left unwritten shows."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poisoned(*args, _original=original, **kwargs):
            x = _original(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        monkeypatch.setattr(torch, name, poisoned)
