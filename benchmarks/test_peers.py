"""rel_attention against everything a user would pick instead: time, peak memory and useful TFLOP/s, by length.

All sides are timed in turn. A peer is measured only after it agreed with its truth; one that can't run here, or is
wrong, is recorded with the reason.
"""

import dataclasses

import pytest
import torch
import torch._functorch.config

from benchmarks.measure import CLOCK, Comparison, Stopwatch, peak_memory, rounds_within
from benchmarks.peers import PEERS, usable
from benchmarks.shapes import GPU_ONLY, PEER_SHAPES, shape_for
from tests.accuracy import make_inputs

pytestmark = pytest.mark.benchmark(timer=CLOCK.now)

SECONDS = 4.0  # of timing for each benchmark, all sides together
PASSES = {"forward": "forward", "forward_backward": "forward + backward", "backward": "backward"}


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("name", PEER_SHAPES)
def test_peers(benchmark, settings, record, name, which):
    if name.startswith("one_token") and which != "forward":
        pytest.skip("one token is inference")
    if settings.device.type == "cpu" and (name in GPU_ONLY or (which == "backward" and not settings.smoke)):
        pytest.skip("takes a GPU to be done within minutes")
    if settings.smoke and name.startswith("length") and name != "length_128x64":
        pytest.skip("the same tiny size")
    record(compare(benchmark, settings, name, PASSES[which]))


def compare(benchmark, settings, name, which):
    """Checks all sides, then measures those that can run and are right: what was found."""
    device, shape = settings.device, shape_for(name, settings.device, settings.smoke)
    inputs = make_inputs(**dataclasses.asdict(shape), dtype=settings.dtype, device=device, layout="tbhd")
    torch.manual_seed(0)
    dout = None if which == "forward" else torch.randn_like(inputs["q"])
    stopwatch, peers = Stopwatch(device), PEERS
    if settings.smoke:
        peers = {key: peer for key, peer in PEERS.items() if not peer.compiles}
    # Compiled code normally frees in the backward what a second backward of the same graph needs.
    with torch._functorch.config.patch(donated_buffer=which != "backward"):
        sides, unavailable = usable(peers, inputs, dout, which, shape.is_causal, stopwatch)
    comparison = Comparison(sides, stopwatch)
    rounds = 1 if settings.smoke else rounds_within(SECONDS, sum(map(stopwatch, sides.values())))
    benchmark.group = name
    comparison.run(benchmark, rounds)

    results = comparison.results()
    flop = {"forward": shape.flop(False), "forward + backward": shape.flop(True)}
    flop["backward"] = flop["forward + backward"] - flop["forward"]
    relative = [key for key in sides if key == "ours" or PEERS[key].is_relative]
    return results | {
        "peers": name,
        "pass": which,
        "sizes": dataclasses.asdict(shape),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "tflop_per_second": {key: flop[which] / results["seconds"][key] / 1e12 for key in relative},
        "peak_bytes": {key: peak_memory(side, device) for key, side in sides.items()},
        "unavailable": unavailable | {key: "smoke" for key in PEERS if key not in peers},
    }
