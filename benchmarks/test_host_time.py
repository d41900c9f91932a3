"""Host time of one small call: what Python, dispatch and launches cost, with PyTorch's own attention as yardstick.

On a GPU only the host is timed, with the queue emptied every few calls, so that it never waits. On a CPU the time
has the arithmetic of a T = S = 16 call in it, which is small.
"""

import time

import pytest
import torch

from benchmarks.measure import CLOCK, Comparison
from reference.eager import rel_attention_eager
from tests.accuracy import make_inputs
from txl_kernels import rel_attention

pytestmark = pytest.mark.benchmark(timer=CLOCK.now)

CALLS, CALLS_IN_QUEUE = 1000, 10
SIZES = {"B": 1, "H": 8, "T": 16, "M": 0, "D": 64}


class HostStopwatch:
    """Times the host's part of one call, in seconds, with at most CALLS_IN_QUEUE calls under way on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu, self._calls = device.type == "cuda", 0

    def __call__(self, function) -> float:
        if self._is_gpu and self._calls % CALLS_IN_QUEUE == 0:
            torch.cuda.synchronize()
        self._calls += 1
        start = time.perf_counter()
        function()
        return time.perf_counter() - start


@pytest.mark.parametrize("recorded", [False, True], ids=["no_gradient", "gradient_recorded"])
def test_host_time(benchmark, settings, record, recorded):
    leaves = leaves_of(settings.dtype, settings.device, recorded)
    q, k, v = (leaves[name] for name in "qkv")
    sides = {
        "ours": lambda: rel_attention(**leaves),
        "sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
        "eager": lambda: rel_attention_eager(**leaves),
    }
    measure(benchmark, settings, record, sides, recorded)


@pytest.mark.parametrize("recorded", [False, True], ids=["no_gradient", "gradient_recorded"])
def test_host_time_of_launches(benchmark, settings, record, recorded, tmp_path):
    """Where there is no GPU, all that the host does for one but the launch itself (tests/compile/driver)."""
    driver = pytest.importorskip("tests.compile.driver", reason="needs Triton")
    if driver.MISSING:
        pytest.skip(driver.MISSING)
    leaves = leaves_of(torch.bfloat16, torch.device("cpu"), recorded)
    with driver.driver_that_launches_nothing(tmp_path):
        sides = {"ours": lambda: rel_attention(**leaves, backend="triton")}
        measure(benchmark, settings, record, sides, recorded, "to a GPU's driver that launches nothing")


def leaves_of(dtype, device, recorded):
    inputs = make_inputs(**SIZES, dtype=dtype, device=device)
    return {name: x.requires_grad_(recorded) for name, x in inputs.items()}


def measure(benchmark, settings, record, sides, recorded, *where):
    for side in sides.values():  # compilation
        side()
    comparison = Comparison(sides, HostStopwatch(settings.device))
    benchmark.group = "host time"
    with torch.set_grad_enabled(recorded):
        comparison.run(benchmark, 3 if settings.smoke else CALLS)
    record(
        comparison.results()
        | {
            "host_time": ", ".join(["forward", "gradient recorded" if recorded else "no gradient", *where]),
            "sizes": SIZES,
        }
    )
