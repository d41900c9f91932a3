"""The launches of one forward and backward, recorded on CPU tensors as if they were on a GPU."""

import functools
from unittest import mock

import torch

from tests.compile.ahead_of_time import Launch, record_launches
from txl_kernels.triton_backend import launch


@functools.cache
def launches(
    generation: str,
    D: int,
    dtype: torch.dtype = torch.bfloat16,
    T: int = 512,
    M: int = 512,
    biases: bool = True,
    H: int = 4,
) -> dict[str, Launch]:
    """Every kernel's launch by name, for B = 2, causal; of equal kernels the last launch."""
    B, S = 2, M + T

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    q, k, v, r = empty(B, H, T, D), empty(B, H, S, D), empty(B, H, S, D), empty(H, S, D)
    bias = empty(H, D) if biases else None
    lse = empty(B, H, T, dtype=torch.float32)
    options = (True, D**-0.5, S - 1)

    def run() -> None:
        launch.forward(q, k, v, r, bias, bias, *options)
        launch.backward(q, None, q, k, v, r, bias, bias, q, lse, *options, [True] * 4 + [biases] * 2)

    with mock.patch.object(launch, "generation_of", return_value=generation):
        return {x.kernel.__name__: x for x in record_launches(run)}
