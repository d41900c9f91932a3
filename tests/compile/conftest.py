"""Launches recorded once for every head size and dtype of the compilation tests."""

import functools
from collections.abc import Callable

import pytest
import torch

from tests.compile.ahead_of_time import Launch, record_launches
from txl_kernels.triton_backend import launch


@functools.cache
def _record(generation: str, D: int, dtype: torch.dtype, T: int, M: int, biases: bool) -> dict[str, Launch]:
    B, H, S = 2, 4, M + T

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    q, k, v, r = empty(B, H, T, D), empty(B, H, S, D), empty(B, H, S, D), empty(H, S, D)
    bias = empty(H, D) if biases else None
    lse = empty(B, H, T, dtype=torch.float32)
    options = (True, D**-0.5, S - 1)

    def run() -> None:
        launch.forward(q, k, v, r, bias, bias, *options)
        launch.backward(q, None, q, k, v, r, bias, bias, q, lse, *options, [True] * 4 + [biases] * 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "generation_of", lambda _: generation)
        # Vector kernels run in forward and backward alike: of equal launches the last is kept.
        return {x.kernel.__name__: x for x in record_launches(run)}


@pytest.fixture(scope="session")
def launches() -> Callable[..., dict[str, Launch]]:
    """Every kernel's launch by name, recorded on CPU tensors as if they were on a GPU of the given generation."""

    def recorded(generation, D, dtype=torch.bfloat16, T=512, M=512, biases=True) -> dict[str, Launch]:
        return _record(generation, D, dtype, T, M, biases)

    return recorded
