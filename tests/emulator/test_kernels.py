"""The compiled kernels on an emulated GPU, instruction by instruction, against the definition: sm_80 and sm_90.

What the interpreter cannot see is here: Triton's layouts, its pipelines of copies and asynchronous products, barriers,
fences, tensor maps. `memory.Error` says where a GPU might go wrong without always doing so.
"""

import functools

import pytest
import torch

from tests.accuracy import (
    Tensors,
    assert_all_close_to_truth,
    make_inputs,
    outputs_and_gradients,
    tolerance,
    truth_and_reference,
)
from tests.compile.driver import MISSING
from tests.contract import FEATURES, compatible, make_problem
from tests.emulator.gpu import emulated_gpu
from txl_kernels import rel_attention
from txl_kernels.triton_backend import call, launch_backward, launch_forward, launch_table, ranges

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
triton_attention = functools.partial(rel_attention, backend="triton")


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def launches(request, tmp_path_factory):
    with emulated_gpu(tmp_path_factory.mktemp("driver"), request.param) as launches:
        yield launches


def upstream(inputs: Tensors) -> torch.Tensor:
    q = inputs["q"]
    return torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)


def check(inputs: Tensors, **options: object) -> None:
    dout = upstream(inputs)
    truth, reference = truth_and_reference(inputs, dout, **options)
    got = outputs_and_gradients(triton_attention, inputs, dout, **options)
    assert_all_close_to_truth(got, truth, reference)


@pytest.mark.parametrize(("T", "M", "D", "layout", "dtype"), [
    (100, 60, 64, "tbhd", torch.bfloat16),
    (70, 150, 128, "tbhd", torch.float16),
    (77, 40, 41, "tbhd", torch.bfloat16),
    (20, 70, 256, "bhtd", torch.bfloat16),
    (1, 300, 64, "tbhd", torch.bfloat16),
    (16, 30, 128, "bhtd", torch.float16),
    (33, 20, 64, "bhtd", torch.float32),
], ids=lambda x: str(x).removeprefix("torch."))  # fmt: skip
def test_sizes(T, M, D, layout, dtype, launches):
    check(make_inputs(1, 2, T, M, D, dtype=dtype, layout=layout))


# Each feature once, with others that it goes with.
@pytest.mark.parametrize("features", [
    {"bidirectional", "segment", "key mask", "row bias"},
    {"window", "softcap", "key lengths", "grouped heads"},
    {"right window", "float mask", "batched r"},
    {"band", "bool mask", "position query"},
    {"wrapped future", "segment", "head mask"},
    {"no r", "bidirectional", "key lengths"},
    {"shared r", "segment", "softcap"},
], ids=lambda x: ", ".join(sorted(x)))  # fmt: skip
def test_features(features, launches):
    assert compatible(features)
    inputs, options = make_problem(features, B=2, H=2, T=70, M=210, D=32, dtype=torch.bfloat16)
    check(inputs, **options)


def test_every_feature_is_tested():
    (mark,) = (x for x in test_features.pytestmark if x.name == "parametrize")
    assert set().union(*mark.args[1]) == set(FEATURES)


@pytest.mark.parametrize("unroll", [None, 2])
@pytest.mark.parametrize("features", [{"right window"}, {"right window", "float mask"}])
def test_narrow_windows(features, unroll, launches, monkeypatch):
    """No tile that is visible as a whole: the main loops do nothing, unrolled or not."""
    if unroll:
        monkeypatch.setattr(call, "launch_for", lambda *of: launch_table.launch_for(*of)._replace(unroll=unroll))
        monkeypatch.setattr(launch_backward.PLANS, "most_steps", 0)
    inputs, options = make_problem(features, B=1, H=2, T=70, M=210, D=64, dtype=torch.bfloat16)
    check(inputs, **options | {"window": (10, 3)})


def test_dropout(launches):
    """The other backend draws the same mask."""
    inputs = make_inputs(1, 2, 70, 80, 64, dtype=torch.bfloat16)
    dout = upstream(inputs)
    got, expected, exact = (
        outputs_and_gradients(seeded(backend), {name: x.to(dtype) for name, x in inputs.items()}, dout, dropout_p=0.3)
        for backend, dtype in (("triton", torch.bfloat16), ("torch", torch.bfloat16), ("torch", torch.float64))
    )
    plain = outputs_and_gradients(seeded("torch"), inputs, dout)
    for name, truth in exact.items():
        allowed = tolerance(truth, expected[name], 3)
        assert (got[name] - truth).abs().max() <= allowed < (plain[name] - truth).abs().max(), name


def test_tf32(launches, monkeypatch):
    """Where PyTorch may multiply so: numbers with 10 bits behind the point, cut off."""
    monkeypatch.setattr(call, "input_precision", lambda dtype: "tf32")
    monkeypatch.setattr(launch_backward.PLANS, "most_steps", 0)
    inputs = make_inputs(1, 2, 70, 90, 64)
    dout = upstream(inputs)
    truth, reference = truth_and_reference(inputs, dout)
    got = outputs_and_gradients(triton_attention, inputs, dout)
    for name, x in truth.items():
        error = (got[name] - x).abs().max()
        assert 10 * tolerance(x, reference[name], 3) < error < 4 * 2**-10 * x.abs().max(), name


def seeded(backend: str):
    def attention(**arguments):
        torch.manual_seed(3)
        return rel_attention(**arguments, backend=backend)

    return attention


def test_ranges_of_the_workspace_and_of_keys(launches, monkeypatch):
    """Passes that add to what earlier ranges left, and a forward of several programs a query."""
    monkeypatch.setattr(ranges, "WORKSPACE", 64 * 1024)
    monkeypatch.setattr(ranges, "QUERIES", 64)
    monkeypatch.setattr(launch_forward, "_RANGE_KEYS", 64)
    monkeypatch.setattr(launch_backward.PLANS, "most_steps", 0)
    del launches[:]
    check(make_inputs(1, 2, 150, 80, 64, dtype=torch.bfloat16))
    assert len(launches) > 3 + 2 * 3
    del launches[:]
    check(make_inputs(1, 2, 3, 250, 64, dtype=torch.bfloat16))
    assert max(x[1] for x in launches) == 2


def test_operands_that_the_copy_engine_cannot_load(launches):
    """Repeated keys, and an r of each batch element that its heads share: tiles come by pointers."""
    inputs = make_inputs(2, 2, 100, 60, 64, dtype=torch.bfloat16)
    for name in ("k", "r"):
        x = torch.randn(2, 1, 160, 64, generator=torch.Generator().manual_seed(2))
        inputs[name] = x.to(torch.bfloat16).expand(2, 2, 160, 64)
    check(inputs)


def test_gradient_of_a_float_mask_by_a_row_for_the_copy_engine(launches, monkeypatch):
    """Of dk and dv, whose tiles the engine loads; those of the mask's gradient come by pointers all the same."""
    monkeypatch.setitem(launch_table._HALF["sm_90"]["dkv"], 64, launch_table.Launch(64, 32, 4, 3, 1, True))
    inputs, options = make_problem({"float mask"}, B=1, H=2, T=70, M=60, D=64, dtype=torch.bfloat16)
    check(inputs, **options)


@pytest.mark.parametrize("generation", ["sm_90", "sm_100"])
def test_rows_of_the_table_that_compilers_get_wrong(generation, monkeypatch):
    """Pipelined tiles by pointers are not fenced, before 3.7 or at all: there are descriptors then, or no pipeline."""
    monkeypatch.setitem(launch_table._FENCES_IN_LOOPS, "sm_90", False)
    for kernel in ("forward", "dq", "dkv", "dr", "few"):
        for D in (64, 128, 256):
            by_engine, by_pointers = (launch_table.launch_for(kernel, generation, D, 2, x) for x in (True, False))
            if kernel != "few":
                assert by_engine.descriptors or by_engine.num_stages == 1
                assert by_pointers.num_stages == 1
            assert launch_table.launch_for("dmask", generation, D, 2).num_stages == 1  # never by the engine
    assert launch_table.launch_for("forward", "sm_80", 64, 2, False).num_stages == 2
    assert launch_table.launch_for("few", "sm_90", 64, 2, False).num_stages == 3


@pytest.mark.long
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("D", [41, 64, 128, 256])
def test_each_feature_at_each_head_size(D, feature, launches):
    inputs, options = make_problem({feature}, B=2, H=2, T=77, M=60, D=D, dtype=torch.float16, layout="tbhd")
    check(inputs, **options)
