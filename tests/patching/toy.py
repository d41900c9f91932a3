"""A relative attention of one's own, for the tests of `patch` itself; conftest.py has fixtures for it."""

import torch
from torch import nn

import txl_kernels
from reference.eager import rel_attention_eager
from txl_kernels.patching import Replacement, warn_own

B, T, H, D = 2, 7, 2, 4


class SelfAttention(nn.Module):
    """Somebody's relative attention."""

    def __init__(self, window: int = 0) -> None:
        super().__init__()
        self.project = nn.Linear(H * D, 3 * H * D)
        self.r = nn.Parameter(torch.randn(H, 2 * T - 1, D))
        self.register_buffer("seen", torch.zeros(()))
        self.window = window

    def forward(self, x, weights=False):
        """Attends."""
        return rel_attention_eager(*heads(self, x), self.r, is_causal=False)


class Inherits(SelfAttention):
    pass


class Overrides(SelfAttention):
    def forward(self, x, weights=False):
        return super().forward(x) + 1


class Renamed(SelfAttention):
    def forward(self, states, weights=False):
        return super().forward(states)


def heads(module, x):
    return module.project(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)


def fused(self, original, x, weights=False):
    if not torch.compiler.is_compiling():
        calls.append(self)
    if weights:
        warn_own(self, "attention weights")
        return original(x, weights)
    return txl_kernels.rel_attention(*heads(self, x), self.r, is_causal=False)


def check(module):
    return "a window" if module.window else None


calls: list[nn.Module] = []
REPLACEMENT = Replacement("forward", fused, ("x", "weights"), check, own="attention weights")


def is_fused(model, x) -> bool:
    calls.clear()
    model(x)
    return bool(calls)
