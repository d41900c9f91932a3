"""Tests that compile start from nothing compiled: torch.compile gives up on code that it compiled eight times."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()
