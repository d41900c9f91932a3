"""The main job: one small language model trained on English text with the original's layer and with ours."""

import dataclasses
from statistics import mean

import pytest
import torch

from benchmarks.language_model import (
    Config,
    LanguageModel,
    Training,
    load_text,
    minimum_bytes,
    unigram_entropy,
)
from benchmarks.measure import CLOCK, Comparison, Stopwatch
from reference.layer import RelPartialLearnableMultiHeadAttn as ReferenceLayer
from txl_kernels.layer import RelPartialLearnableMultiHeadAttn as OurLayer

FIRST, LAST = 20, 50  # steps compared one by one, and on average
CHUNK = 10  # steps before the other side has its turn
SMOKE = Config(d_model=32, n_head=2, d_head=16, d_inner=64, segment=24, batch=2, steps=FIRST)


@pytest.mark.benchmark(timer=CLOCK.now, group="language model")
def test_training(benchmark, settings, record, capsys):
    """Losses agree, each of the first and the mean of the last, and fall far below the unigram entropy."""
    config = SMOKE if settings.smoke else Config()
    text_name, text = load_text(minimum_bytes(config))
    torch.manual_seed(0)
    original_model = LanguageModel(config, ReferenceLayer, passes_mask=True)
    our_model = LanguageModel(config, OurLayer, passes_mask=False)
    our_model.load_state_dict(original_model.state_dict())
    ours, original = (Training(m.to(settings.device), text, config) for m in (our_model, original_model))
    sides = {"ours": lambda: ours.run(CHUNK), "original": lambda: original.run(CHUNK)}
    comparison = Comparison(sides, Stopwatch(settings.device))
    tokens = CHUNK * config.batch * config.segment

    def show_progress():
        rates = {name: tokens / seconds[-1] for name, seconds in comparison.seconds.items()}
        with capsys.disabled():
            print(
                f"\nstep {len(ours.losses)}/{config.steps}: loss {ours.losses[-1]:.4f}, {rates['ours']:.0f} tokens/s; "
                f"original: loss {original.losses[-1]:.4f}, {rates['original']:.0f} tokens/s",
                end="",
                flush=True,
            )

    comparison.run(benchmark, rounds=config.steps // CHUNK, after_round=show_progress)

    entropy = unigram_entropy(text)
    pairs = zip(ours.losses[:FIRST], original.losses[:FIRST], strict=True)
    first_difference = max(abs(a - b) / b for a, b in pairs)
    last = {"ours": mean(ours.losses[-LAST:]), "original": mean(original.losses[-LAST:])}
    assert first_difference < 1e-5
    if not settings.smoke:
        assert abs(last["ours"] - last["original"]) < 0.01 * last["original"]
        assert last["ours"] < 0.8 * entropy
    results = comparison.results()
    record(
        results
        | {
            "text": text_name,
            "text_bytes": len(text),
            "unigram_entropy": entropy,
            "config": dataclasses.asdict(config),
            "dtype": "float32",
            "tokens_per_second": {name: tokens / seconds for name, seconds in results["seconds"].items()},
            "first_losses_difference": first_difference,
            "last_loss": last,
        }
    )
