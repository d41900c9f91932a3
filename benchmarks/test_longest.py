"""The longest sequence that one forward + backward can train on, with 8 heads x 128, by side."""

import functools

import pytest
import torch

from benchmarks.measure import Stopwatch, longest, runner
from benchmarks.peers import PEERS
from txl_kernels import rel_attention

HEADS, HEAD_SIZE = 8, 128
SIDES = {"ours": rel_attention} | {name: PEERS[name].function for name in ("eager", "sdpa + BD mask")}


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_longest(benchmark, settings, record, is_causal):
    if settings.device.type == "cpu":
        pytest.skip("how long a sequence fits is a question about a GPU's memory")
    stopwatch = Stopwatch(settings.device)
    most = 2048 if settings.smoke else None

    def search():
        return {
            name: longest(lambda T, f=function: seconds_of(f, T, is_causal, settings, stopwatch), most)
            for name, function in SIDES.items()
        }

    benchmark.group = "longest"
    found = benchmark.pedantic(search, rounds=1)
    record(
        {
            "longest": found,
            "direction": "causal" if is_causal else "bidirectional",
            "sizes": {"B": 1, "H": HEADS, "D": HEAD_SIZE},
            "dtype": str(settings.dtype).removeprefix("torch."),
        }
    )


def seconds_of(function, T, is_causal, settings, stopwatch):
    """The time of one forward + backward, or None if it does not fit."""

    def draw(*shape):
        return torch.randn(shape, device=settings.device, dtype=settings.dtype)

    try:
        inputs = {name: draw(1, HEADS, T, HEAD_SIZE) for name in "qkv"}
        inputs["r"] = draw(HEADS, T if is_causal else 2 * T - 1, HEAD_SIZE)
        inputs |= {name: draw(HEADS, HEAD_SIZE) for name in ("content_bias", "position_bias")}
        function, dout = functools.partial(function, is_causal=is_causal), torch.ones_like(inputs["q"])
        return stopwatch(runner(function, inputs, dout, "forward + backward"))
    except torch.OutOfMemoryError:
        return None
