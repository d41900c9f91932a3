"""What a kept memory saves: the attention layer of the large WikiText-103 model with a `Cache` ("ours").

Against the same layer projecting the memory again ("projected again"), and against the original. All project the
segment, attend, and have the output projection, residual and LayerNorm.
"""

import pytest
import torch

from benchmarks.measure import CLOCK, Comparison, Stopwatch, rounds_within
from reference.layer import RelPartialLearnableMultiHeadAttn as ReferenceLayer
from tests.accuracy import OUTPUT_FACTOR, assert_close_to_truth
from tests.layer_tools import same_length_mask
from txl_kernels.models import MemTransformerLM

pytestmark = pytest.mark.benchmark(timer=CLOCK.now)

SECONDS = 30.0  # of timing for each benchmark, all sides together
SIZES = {"B": 1, "H": 16, "D": 64, "C": 1024, "M": 1600}
SMOKE = {"B": 1, "H": 2, "D": 8, "C": 16, "M": 24}


@pytest.mark.parametrize(("name", "T"), [("segment", 128), ("one token", 1)])
@torch.no_grad()
def test_kept_projections(benchmark, settings, record, name, T):
    sizes = SMOKE if settings.smoke else SIZES
    B, H, D, C, M = sizes.values()
    torch.manual_seed(0)
    lengths = {"tgt_len": T, "ext_len": 0, "mem_len": M, "same_length": True}
    model = MemTransformerLM(2, 1, H, C, D, 1, 0.0, 0.0, **lengths).to(settings.device, settings.dtype).eval()
    layer = model.layers[0].dec_attn
    original = ReferenceLayer(H, C, D, 0.0).to(settings.device, settings.dtype).eval()
    original.load_state_dict(layer.state_dict())
    memory, w = (torch.randn(n, B, C, device=settings.device, dtype=settings.dtype) for n in (M, T))
    r = model.pos_emb(torch.arange(M + T - 1, -1, -1, device=settings.device))
    biases, mask = (model.r_w_bias, model.r_r_bias), same_length_mask(T, M, M, torch.bool).to(settings.device)
    cache = model.init_cache(B, memory, memory)

    def kept():
        cache.make_room(model, T)
        out = cache.attend(model, 0, w)
        cache.advance(model, T)
        return out

    truth, wanted = (
        original.to(dtype)(*(x.to(dtype) for x in (w, r, *biases)), mask, memory.to(dtype))
        for dtype in (torch.float64, settings.dtype)
    )
    sides = {
        "ours": kept,
        "projected again": lambda: layer(w, r, *biases, mems=memory, window=model.window),
        "original": lambda: original(w, r, *biases, mask, memory),
    }
    for side in ("ours", "projected again"):  # and compilation
        assert_close_to_truth(side, sides[side](), truth, wanted, OUTPUT_FACTOR)

    stopwatch = Stopwatch(settings.device)
    comparison = Comparison(sides, stopwatch)
    rounds = 1 if settings.smoke else rounds_within(SECONDS, sum(map(stopwatch, sides.values())))
    benchmark.group = "kept projections"
    comparison.run(benchmark, rounds)
    record(
        comparison.results()
        | {
            "kept_projections": name,
            "sizes": sizes | {"T": T},
            "dtype": str(settings.dtype).removeprefix("torch."),
        }
    )
