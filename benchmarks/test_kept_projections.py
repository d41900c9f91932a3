"""What a kept memory saves: the attention layer of the large WikiText-103 model with a `Cache` ("ours").

Against the same layer projecting the memory again ("projected again"), and against the original. All project the
segment, attend, and have the output projection, residual and LayerNorm.
"""

import copy

import pytest
import torch

from benchmarks.measure import CLOCK, Comparison, Stopwatch, rounds_within, with_larger_weights
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
    checked = Sides(sizes, T, settings.device, torch.float32)  # which would show what 16 bits hide
    original = copy.deepcopy(checked.original).double()
    truth = original(*(x.double() for x in checked.arguments), checked.mask, checked.memory.double())
    wanted = checked.by_name["original"]()
    for side in ("ours", "projected again"):
        assert_close_to_truth(side, checked.by_name[side](), truth, wanted, OUTPUT_FACTOR)
    sides = Sides(sizes, T, settings.device, settings.dtype).by_name

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


class Sides:
    """The three of them on one segment of T tokens behind a full memory.

    Attributes:
        by_name: Callables that give the segment's hidden states.
        original, arguments, mask, memory: What the original is called with.
    """

    def __init__(self, sizes: dict[str, int], T: int, device: torch.device, dtype: torch.dtype) -> None:
        B, H, D, C, M = sizes.values()
        torch.manual_seed(0)
        lengths = {"tgt_len": T, "ext_len": 0, "mem_len": M, "same_length": True}
        model = with_larger_weights(MemTransformerLM(2, 1, H, C, D, 1, 0.0, 0.0, **lengths))
        model = model.to(device, dtype).eval()
        layer = model.layers[0].dec_attn
        self.original = ReferenceLayer(H, C, D, 0.0).to(device, dtype).eval()
        self.original.load_state_dict(layer.state_dict())
        self.memory, w = (torch.randn(n, B, C, device=device, dtype=dtype) for n in (M, T))
        r = model.pos_emb(torch.arange(M + T - 1, -1, -1, device=device))
        self.arguments = w, r, model.r_w_bias, model.r_r_bias
        self.mask = same_length_mask(T, M, M, torch.bool).to(device)
        cache = model.init_cache(B, self.memory, self.memory)

        def kept() -> torch.Tensor:
            cache.make_room(model, T)
            out = cache.attend(model, 0, w)
            cache.advance(model, T)
            return out

        self.by_name = {
            "ours": kept,
            "projected again": lambda: layer(*self.arguments, mems=self.memory, window=model.window),
            "original": lambda: self.original(*self.arguments, self.mask, self.memory),
        }
