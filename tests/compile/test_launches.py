"""Calls on their way to a driver that launches nothing (driver/): the limits of a Hopper GPU, and plans that repeat."""

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.accuracy import make_inputs
from tests.compile.driver import MISSING, driver_that_launches_nothing
from tests.contract import make_problem
from txl_kernels import rel_attention

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    with driver_that_launches_nothing(tmp_path_factory.mktemp("driver")) as launches:
        yield launches


def summary(launch: tuple) -> list:
    """Grid, function and arguments of a launch, with what may differ from call to call left out: where tensors are."""

    def of(x: object) -> object:
        if isinstance(x, TensorDescriptor):
            return "descriptor", of(x.base), tuple(x.shape), tuple(x.strides), tuple(x.block_shape)
        return (x.dtype, x.data_ptr() % 16) if isinstance(x, torch.Tensor) else x

    grid, function, arguments = launch[:3], launch[4], launch[9:]
    return [grid, function, *map(of, arguments)]


def run(inputs: dict, segment_ids: tuple | None = None, **options: object) -> None:
    """Forward and backward."""
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    arguments = {name: x for name, x in leaves.items() if name != "segment_scores"} | options
    if segment_ids is not None:
        arguments["segment"] = leaves["segment_scores"], *segment_ids
    out = rel_attention(**arguments, backend="triton")
    torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))


def assert_plan_repeats(launches: list[tuple], inputs: dict, **options: object) -> list:
    """Runs the problem twice, each time in other memory, and compares what was launched."""
    summaries = []
    for _ in range(2):
        del launches[:]
        run({name: x.detach().clone(memory_format=torch.preserve_format) for name, x in inputs.items()}, **options)
        summaries.append([summary(x) for x in launches])
    assert summaries[0] == summaries[1]
    return summaries[0]


@pytest.mark.parametrize(
    ("T", "M", "D", "layout"),
    [(1, 300, 64, "tbhd"), (16, 0, 128, "bhtd"), (150, 150, 41, "tbhd"), (300, 20, 128, "tbhd")],
)
def test_a_plan_launches_what_the_first_call_did(T, M, D, layout, launches):
    """The same variants with the same numbers, on other tensors; descriptors and grids within the driver's limits."""
    first = assert_plan_repeats(launches, make_inputs(2, 4, T, M, D, dtype=torch.bfloat16, layout=layout))
    assert len(first) >= 6
    assert "descriptor" in str(first)


@pytest.mark.parametrize(("dtype", "features"), [
    (torch.float16, {"float mask", "segment", "softcap", "grouped heads"}),
    (torch.bfloat16, {"key lengths", "window", "row bias", "position query", "dropout"}),
    (torch.float32, {"bool mask", "batched r", "bidirectional"}),
], ids=lambda x: ", ".join(sorted(x)) if isinstance(x, set) else str(x))  # fmt: skip
def test_every_term_reaches_the_driver(features, dtype, launches):
    inputs, options = make_problem(features, T=40, M=24, D=32, dtype=dtype)
    assert_plan_repeats(launches, inputs, **options | {"dropout_p": 0.3 if "dropout" in features else 0.0})
