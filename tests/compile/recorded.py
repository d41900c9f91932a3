"""The launches of one forward and backward, recorded on CPU tensors as if they were on a GPU."""

import functools
from unittest import mock

import torch

from tests.compile.ahead_of_time import Launch, record_launches
from txl_kernels import triton_backend
from txl_kernels.arguments import DIFFERENTIABLE, Inputs, Options
from txl_kernels.triton_backend import call
from txl_kernels.triton_backend.launch_table import Launch as Row
from txl_kernels.triton_backend.launch_table import launch_for
from txl_kernels.triton_backend.plans import PLANS


def _optional(terms: str, B: int, H: int, T: int, S: int, D: int, empty) -> dict:
    if not terms:
        return {}
    changes = {
        "r_bias": empty(H, S),
        "attn_mask": empty(B, H, T, S),
        "segment_scores": empty(B, H, T, 2),
        "segment_q_ids": empty(B, T, dtype=torch.int32),
        "segment_k_ids": empty(B, S, dtype=torch.int32),
        "key_lengths": empty(B, dtype=torch.int64),
        "seed": empty(dtype=torch.int64),
    }
    if terms == "no r":
        changes |= {
            "r": None,
            "content_bias": None,
            "position_bias": None,
            "attn_mask": empty(B, 1, 1, S, dtype=torch.bool),
        }
        changes |= {"k": empty(B, H // 2, S, D), "v": empty(B, H // 2, S, D)}
    if terms == "batched r":
        changes |= {"r": empty(B, H, S, D), "key_lengths": empty(B, dtype=torch.int32)}
    if terms == "q_pos":
        changes |= {"position_bias": None, "q_pos": empty(B, H, T, D // 2), "r": empty(1, H, S, D // 2)}
    return changes


@functools.cache
def launches(
    generation: str,
    D: int,
    dtype: torch.dtype = torch.bfloat16,
    T: int = 512,
    M: int = 512,
    biases: bool = True,
    H: int = 4,
    terms: str = "",
    row: Row | None = None,
) -> dict[str, Launch]:
    """Every kernel's launch by name, for B = 2, causal; of equal kernels the last launch.

    With terms = "all" a window and every optional term of a score is there; with "q_pos" also a position query of half
    the width, with "no r" grouped heads, a boolean mask and a row bias alone, with "batched r" an r by batch element.
    With `row` every kernel has that row of the launch table.
    """
    B, S = 2, M + T

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    q, k, v, r = empty(B, H, T, D), empty(B, H, S, D), empty(B, H, S, D), empty(1, H, S, D)
    content_bias, position_bias = (empty(H, D), empty(H, D)) if biases else (None, None)
    inputs = Inputs(q, k, v, r, content_bias, position_bias)._replace(**_optional(terms, B, H, T, S, D, empty))
    softcap, dropout_p = (30.0, 0.1) if terms else (None, 0.0)
    options = Options(T // 2 if terms else -1, 0, D**-0.5, S - 1, softcap, dropout_p)
    needs_grad = [(x := getattr(inputs, n)) is not None and x.is_floating_point() for n in DIFFERENTIABLE]

    def run() -> None:
        out, lse = triton_backend.forward(inputs, options)
        triton_backend.backward(q, None, inputs, out, lse, options, needs_grad)

    generations = mock.patch.object(call, "generation_of", return_value=generation)
    rows = mock.patch.object(call, "launch_for", side_effect=launch_for if row is None else lambda *_: row)
    with generations, rows, mock.patch.object(PLANS, "most_steps", 0):
        return {x.kernel.__name__: x for x in record_launches(run)}
