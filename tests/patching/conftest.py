"""Tests that compile start from nothing compiled; fixtures for the tests of `patch` itself."""

import pytest
import torch
from torch import nn

from tests.patching import toy
from txl_kernels import patching
from txl_kernels.patching import table


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """torch.compile gives up on code that it compiled eight times."""
    torch.compiler.reset()


@pytest.fixture
def registered(monkeypatch):
    """`patch` knows the toy's attention, and has warned of nothing."""
    monkeypatch.setattr(table, "_registered", {})
    monkeypatch.setattr("txl_kernels.patching.replacement._warned", set())
    patching.register(toy.SelfAttention, toy.REPLACEMENT)
    toy.calls.clear()


@pytest.fixture
def model() -> nn.Module:
    """With the toy's attention in front."""
    torch.manual_seed(0)
    return nn.Sequential(toy.SelfAttention(), nn.Flatten(2))


@pytest.fixture
def x() -> torch.Tensor:
    """An input for it."""
    return torch.randn(toy.B, toy.T, toy.H * toy.D, generator=torch.Generator().manual_seed(1))
