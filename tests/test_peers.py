"""The benchmarks' peers: they compute what they say, are left out for a reason, and reach tables and pictures."""

import json

import pytest
import torch

from benchmarks import peers, report
from benchmarks.measure import longest, runner
from benchmarks.peers import PEERS, Peer, rotary, usable
from benchmarks.shapes import Shape
from reference.eager import rel_attention_eager
from tests.accuracy import make_inputs
from tests.test_benchmarks import MACHINE


def use(peers, D=16, is_causal=True, backward=True):
    """What `usable` finds at T = M = 16: the names of the sides, and why the others are left out."""
    inputs = make_inputs(2, 2, 16, 16, D, is_causal=is_causal, layout="tbhd")
    dout = torch.randn(2, 2, 16, D, generator=torch.Generator().manual_seed(1)) if backward else None
    which = "forward + backward" if backward else "forward"
    sides, left_out = usable(peers, inputs, dout, which, is_causal, lambda side: side())
    return list(sides), left_out


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("D", [16, 41])
def test_peers_compute_what_they_say(monkeypatch, D, is_causal):
    monkeypatch.setattr(peers, "_compile", lambda function: function)
    others = {name: peer for name, peer in PEERS.items() if name != "flex"}
    assert use(others, D, is_causal) == (["ours", *others], {})
    assert use({"flex": PEERS["flex"]}, D, is_causal, backward=False) == (["ours", "flex"], {})


@pytest.mark.long
def test_compiled_peers_compute_what_they_say():
    compiled = {name: peer for name, peer in PEERS.items() if peer.compiles}
    assert use(compiled, 41, backward=False) == (["ours", "compiled", "flex"], {})
    assert use({"compiled": PEERS["compiled"]}, 41) == (["ours", "compiled"], {})


def test_rotary_scores_depend_on_the_distance_only():
    q, k = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    rotated_q, rotated_k = rotary(q.expand(1, 1, 4, 5), k.expand(1, 1, 6, 5))
    scores = (rotated_q @ rotated_k.mT)[0, 0]
    assert torch.unique(scores.diagonal(2).round(decimals=9)).numel() == 1
    assert torch.unique(scores[0].round(decimals=9)).numel() == 6
    torch.testing.assert_close(scores[0, 2], q @ k)  # the first query stands at key 2


def test_a_peer_is_left_out_for_a_reason():
    def broken(*_, **__):
        raise NotImplementedError("not on this chip\nand more")

    def too_large(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def wrong(**inputs):
        return rel_attention_eager(**inputs) * 1.001

    sides, left_out = use({"broken": Peer(broken), "too large": Peer(too_large), "wrong": Peer(wrong)})
    assert sides == ["ours"]
    assert left_out.pop("wrong").startswith("AssertionError: out: error ")
    assert left_out == {"broken": "NotImplementedError: not on this chip", "too large": "out of memory"}


def test_ours_is_never_left_out(monkeypatch):
    def broken(*_, **__):
        raise NotImplementedError("ours")

    monkeypatch.setattr(peers, "rel_attention", broken)
    with pytest.raises(NotImplementedError, match="ours"):
        use({})


@pytest.mark.parametrize(
    ("which", "calls", "grads"), [("forward", 2, 0), ("forward + backward", 2, 2), ("backward", 1, 2)]
)
def test_a_pass_is_what_it_says(which, calls, grads):
    seen = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append("forward")
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            seen.append("backward")
            return 2 * g

    x = torch.ones(3)
    run = runner(lambda x, unused: Double.apply(x) * x, {"x": x, "unused": x}, x, which)
    run()
    run()
    assert (seen.count("forward"), seen.count("backward")) == (calls, grads)


@pytest.mark.parametrize(
    ("memory", "most", "found"),
    [
        (70_000, None, {"T": 69_632, "seconds": 17.0, "stopped_by": "memory"}),
        (10**9, None, {"T": 122_880, "seconds": 30.0, "stopped_by": "time"}),
        (10**9, 2048, {"T": 2048, "seconds": 0.5, "stopped_by": "limit"}),
        (1000, None, {"T": 0, "seconds": 0.0, "stopped_by": "memory"}),
    ],
)
def test_longest_is_bisected(memory, most, found):
    assert longest(lambda T: T / 4096 if memory >= T else None, most) == found


def test_flop_of_bidirectional_attention():
    assert Shape(B=2, H=3, T=4, M=7, D=5, is_causal=False).flop(backward=False) == 6 * 2 * 3 * 5 * 4 * 11


def peer_results():
    """What test_peers.py, test_host_time.py and test_longest.py record on a machine where two peers fail."""
    sides = {
        "ours": 0.001,
        "eager": 0.005,
        "sdpa + BD mask": 0.003,
        "flash, no position": 0.0005,
        "rotary + flash": 0.0006,
    }
    common = {"dtype": "bfloat16", "smoke": False, "machine": MACHINE | {"kind": "gpu"}}
    by_length = [
        {
            "peers": f"length_{T}x64", "pass": which,
            "sizes": {"B": 8, "H": 8, "T": T, "M": T, "D": 64, "is_causal": True},
            "seconds": sides, "ratio": {name: 1000 * seconds for name, seconds in sides.items() if name != "ours"},
            "tflop_per_second": {"ours": 123.4}, "peak_bytes": dict.fromkeys(sides, T << 20),
            "unavailable": {"compiled": "out of memory", "flex": "NotImplementedError: no"},
        }
        for which in ("forward + backward", "forward") for T in (256, 128)
    ]  # fmt: skip
    bidirectional = by_length[3] | {"peers": "conformer", "sizes": by_length[3]["sizes"] | {"is_causal": False}}
    host = {
        "host_time": "forward, no gradient", "sizes": {"B": 1, "H": 8, "T": 16, "M": 0, "D": 64},
        "seconds": {"ours": 60e-6, "sdpa": 20e-6, "eager": 150e-6}, "ratio": {"sdpa": 1 / 3, "eager": 2.5},
    }  # fmt: skip
    found = {
        "ours": {"T": 65536, "seconds": 28.4, "stopped_by": "time"},
        "eager": {"T": 8192, "seconds": 1.5, "stopped_by": "memory"},
    }
    long = {"longest": found, "direction": "causal", "sizes": {"B": 1, "H": 8, "D": 128}}
    return [x | common for x in (*by_length, bidirectional, host, long)]


def test_report_has_peers_in_table_pictures_and_sentences(tmp_path):
    stats = dict.fromkeys(report.KEPT_STATISTICS, 1)
    benchmarks = [{"name": str(n), "stats": stats, "extra_info": x} for n, x in enumerate(peer_results())]
    (tmp_path / "raw.json").write_text(json.dumps({"benchmarks": benchmarks}))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- benchmark:gpu begin --><!-- benchmark:gpu end -->")
    report.main([str(tmp_path / "raw.json"), "--readme", str(readme), "--figure", str(tmp_path / "new" / "gpu.svg")])

    text = readme.read_text()
    cells = "1 | 5 (5.00x) | out of memory | 3 (3.00x) | - | 0.5 (0.50x) | 0.6 (0.60x)"
    rows = [line for line in text.splitlines() if line.startswith("| 8, ")]
    assert rows == [
        f"| 8, 8 x 64, {T} + {T}{ending} | {which} | {cells} | {T} | {T} | {T} | {T} | 123 |"
        for T, which, ending in (
            (128, "forward", ""), (128, "forward + backward", ""),
            (256, "forward", ""), (256, "forward + backward", ""),
            (128, "forward", ", bidirectional"),
        )
    ]  # fmt: skip
    assert "- `flex`, 5 of 5 rows (length_128x64 forward, ...): NotImplementedError: no\n" in text
    assert "`compiled`, " not in text.split("Not measured")[1]
    assert "| forward, no gradient | 1, 8 x 64, 16 | 60 | 20 | 150 | 3.00x |" in text
    assert "bfloat16: ours 65536 (28 s; a longer one is stopped by time); eager 8192 (1.5 s;" in text
    for quantity in ("time", "memory"):
        assert f"](new/gpu-{quantity}.svg)" in text
        picture = (tmp_path / "new" / f"gpu-{quantity}.svg").read_text()
        for label in ("ours", "sdpa + BD mask", "rotary + flash", "forward + backward, head size 64"):
            assert f"<!-- {label} -->" in picture
    assert not (tmp_path / "new" / "gpu.svg").exists()  # of results that are not there
