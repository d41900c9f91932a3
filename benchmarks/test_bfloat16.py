"""What bfloat16 gives on a CPU that multiplies it: rel_attention in bfloat16 ("ours") against itself in float32."""

import dataclasses

import pytest
import torch

from benchmarks.measure import CLOCK, Comparison, Stopwatch, rounds_within, runner, truth_and_reference_by_head
from benchmarks.shapes import TRAINED, shape_for
from reference.eager import rel_attention_original
from tests.accuracy import assert_all_close_to_truth, make_inputs, outputs_and_gradients
from txl_kernels import rel_attention
from txl_kernels.torch_backend.tiles import cpu_multiplies_bfloat16

pytestmark = pytest.mark.benchmark(timer=CLOCK.now)

SECONDS = 4.0  # of timing for each benchmark, all sides together
SHAPES = ("wt103_base", "enwik8_base", "square_1024", "eval_128_1600", "one_token_1600")


@pytest.mark.parametrize("which", ["forward", "forward + backward"], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("name", SHAPES)
def test_bfloat16(benchmark, settings, record, name, which):
    if settings.device.type != "cpu" or not (cpu_multiplies_bfloat16() or settings.smoke):
        pytest.skip("for CPUs with bfloat16 instructions")
    if which != "forward" and name not in TRAINED:
        pytest.skip("is inference")
    shape = shape_for(name, settings.device, settings.smoke)
    half, single = (
        make_inputs(**dataclasses.asdict(shape), dtype=dtype, layout="tbhd")
        for dtype in (torch.bfloat16, torch.float32)
    )
    torch.manual_seed(0)
    dout = None if which == "forward" else torch.randn_like(half["q"])
    assert_all_close_to_truth(
        outputs_and_gradients(rel_attention, half, dout), *truth_and_reference_by_head(half, dout)
    )
    sides = {
        "ours": runner(rel_attention, half, dout, which),
        "float32": runner(rel_attention, single, None if dout is None else dout.float(), which),
        "original": runner(rel_attention_original, half, dout, which),
    }
    stopwatch = Stopwatch(settings.device)
    for side in sides.values():
        side()
    comparison = Comparison(sides, stopwatch)
    rounds = 1 if settings.smoke else rounds_within(SECONDS, sum(map(stopwatch, sides.values())))
    benchmark.group = name
    comparison.run(benchmark, rounds)
    record(
        comparison.results()
        | {"bfloat16": name, "pass": which, "sizes": dataclasses.asdict(shape), "dtype": "bfloat16"}
    )
