"""Evaluation of a language model, a token: with a kept memory ("ours") against recomputing the window.

The comparison of Dai et al. 2019 (arXiv 1901.02860), table 9: the vanilla model of Al-Rfou et al. 2018 sees as many
tokens, but runs over all of them again for each token that it predicts ("vanilla"). Both models have the same sizes
and batch; the segments of "ours" are what it evaluates at a time. "projected again" is our model without a `Cache`.
"""

import copy

import pytest
import torch
from torch import Tensor

from benchmarks.measure import CLOCK, Comparison, Stopwatch, rounds_within, with_larger_weights
from tests.accuracy import OUTPUT_FACTOR, assert_close_to_truth
from txl_kernels.models import Cache, MemTransformerLM

pytestmark = pytest.mark.benchmark(timer=CLOCK.now)

SECONDS = 15.0  # of timing for each length, all sides together
PUBLISHED = {800: 363, 1800: 773, 2800: 1409, 3800: 1874}  # attention length: times faster, on one GPU
N_TOKEN, BATCH, SEGMENT = 256, 1, 128
SMALL = {"n_layer": 4, "n_head": 4, "d_model": 256, "d_head": 64, "d_inner": 1024}
ENWIK8_BASE = {"n_layer": 12, "n_head": 8, "d_model": 512, "d_head": 64, "d_inner": 2048}
SMOKE = {"n_layer": 1, "n_head": 2, "d_model": 16, "d_head": 8, "d_inner": 16}


@pytest.mark.parametrize("length", PUBLISHED)
@torch.no_grad()
def test_evaluation_speed(benchmark, settings, record, length):
    sizes = ENWIK8_BASE if settings.device.type == "cuda" else SMALL
    published = PUBLISHED[length]
    T, L = SEGMENT, length
    if settings.smoke:
        sizes, T, L = SMOKE, 4, length // 100
    torch.manual_seed(0)

    def model(attn_type: int, **lengths: int | bool) -> MemTransformerLM:
        made = MemTransformerLM(
            N_TOKEN, *sizes.values(), dropout=0.0, dropatt=0.0, attn_type=attn_type, ext_len=0, **lengths
        )
        return with_larger_weights(made).to(settings.device).eval()

    ours = model(0, tgt_len=T, mem_len=L, same_length=True)
    vanilla = model(3, tgt_len=L, mem_len=0)
    tokens = torch.randint(N_TOKEN, (L + T + 1, BATCH), device=settings.device)
    memory, data, target = tokens[:L], tokens[L : L + T], tokens[L + 1 :]

    def with_memory(model: MemTransformerLM) -> tuple[Cache, list[Tensor]]:
        cache = model.init_cache(BATCH)
        model.losses(memory, tokens[1 : L + 1], cache)
        return cache, model(memory, tokens[1 : L + 1])[1:]

    # in float32, which would show what 16 bits hide
    (cache, mems), double = with_memory(ours), copy.deepcopy(ours).double()
    truth, wanted = double(data, target, *with_memory(double)[1])[0], ours(data, target, *mems)[0]
    assert_close_to_truth("losses", ours.losses(data, target, cache), truth, wanted, OUTPUT_FACTOR)

    ours, vanilla = ours.to(settings.dtype), vanilla.to(settings.dtype)
    cache, mems = with_memory(ours)

    sides = {
        "ours": lambda: ours.losses(data, target, cache),
        "projected again": lambda: ours(data, target, *mems),
        "vanilla": lambda: vanilla(tokens[:L], tokens[L : L + 1]),
    }
    stopwatch = Stopwatch(settings.device)
    comparison = Comparison(sides, stopwatch)
    rounds = 1 if settings.smoke else rounds_within(SECONDS, sum(map(stopwatch, sides.values())))
    benchmark.group = "evaluation speed"
    comparison.run(benchmark, rounds)
    results = comparison.results()
    results["ratio"]["vanilla"] *= T  # it has one token for each of its calls
    record(
        results
        | {
            "attention_length": L,
            "published": published,
            "sizes": sizes | {"T": T, "batch": BATCH},
            "dtype": str(settings.dtype).removeprefix("torch."),
        }
    )
