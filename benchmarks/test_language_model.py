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
from benchmarks.measure import CLOCK, Pair, Stopwatch
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
    reference_model = LanguageModel(config, ReferenceLayer, passes_mask=True)
    our_model = LanguageModel(config, OurLayer, passes_mask=False)
    our_model.load_state_dict(reference_model.state_dict())
    ours, reference = (Training(m.to(settings.device), text, config) for m in (our_model, reference_model))
    pair = Pair(lambda: ours.run(CHUNK), lambda: reference.run(CHUNK), Stopwatch(settings.device))
    tokens = CHUNK * config.batch * config.segment

    def show_progress():
        ours_rate, reference_rate = tokens / pair.ours_seconds[-1], tokens / pair.reference_seconds[-1]
        with capsys.disabled():
            print(
                f"\nstep {len(ours.losses)}/{config.steps}: loss {ours.losses[-1]:.4f} (reference "
                f"{reference.losses[-1]:.4f}), {ours_rate:.0f} tokens/s (reference {reference_rate:.0f})",
                end="",
                flush=True,
            )

    pair.run(benchmark, rounds=config.steps // CHUNK, after_round=show_progress)

    results = pair.results()
    entropy = unigram_entropy(text)
    pairs = zip(ours.losses[:FIRST], reference.losses[:FIRST], strict=True)
    first_difference = max(abs(a - b) / b for a, b in pairs)
    ours_last, reference_last = mean(ours.losses[-LAST:]), mean(reference.losses[-LAST:])
    assert first_difference < 1e-5
    if not settings.smoke:
        assert abs(ours_last - reference_last) < 0.01 * reference_last
        assert ours_last < 0.8 * entropy
    record(
        results
        | {
            "text": text_name,
            "text_bytes": len(text),
            "unigram_entropy": entropy,
            "config": dataclasses.asdict(config),
            "tokens_per_second": tokens / results["seconds"],
            "reference_tokens_per_second": tokens / results["reference_seconds"],
            "first_losses_difference": first_difference,
            "last_loss": ours_last,
            "reference_last_loss": reference_last,
            "dtype": "float32",
        }
    )
