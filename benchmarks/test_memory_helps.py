"""That memory helps (Dai et al. 2019, sections 4.2 and 4.4), where a text cannot be told without it.

The text repeats PERIOD random tokens, replaced by others after REPEATS repetitions, so that a token is known from the
one PERIOD before it, and that is farther away than a segment is long. Training memory reaches it from the later
tokens of a segment only; a longer memory in evaluation reaches it from all of them.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from benchmarks.measure import CLOCK, Stopwatch
from txl_kernels.models import MemTransformerLM

N_TOKEN, PERIOD, REPEATS = 16, 24, 8
SEGMENT, MEMORY, BATCH, STEPS, WARMUP, LEARNING_RATE = 16, 16, 32, 1200, 40, 3e-3
FARTHEST = SEGMENT + MEMORY - 1  # distance that training has seen
EVALUATED = (0, MEMORY, PERIOD, 4 * PERIOD)  # lengths of memory


@pytest.mark.benchmark(timer=CLOCK.now, group="memory helps")
def test_memory_helps(benchmark, settings, record):
    steps, segments = (2, 2) if settings.smoke else (STEPS, 256)
    stopwatch = Stopwatch(settings.device)
    models = {M: make_model(M).to(settings.device) for M in (MEMORY, 0)}
    texts = [repetitive_text(n * SEGMENT, seed).to(settings.device) for seed, n in enumerate((steps, segments))]
    benchmark.pedantic(lambda: CLOCK.advance(stopwatch(lambda: train(models[MEMORY], texts[0]))), rounds=1)
    train(models[0], texts[0])
    same = {"same_length": True}
    losses = {
        "trained without memory": {M: evaluate(models[0], texts[1], M) for M in EVALUATED},
        "trained with memory": {M: evaluate(models[MEMORY], texts[1], M) for M in EVALUATED},
        "same_length": {M: evaluate(models[MEMORY], texts[1], M, **same) for M in EVALUATED if M},
        "same_length, clamp_len": {
            M: evaluate(models[MEMORY], texts[1], M, clamp_len=FARTHEST, **same) for M in EVALUATED if M
        },
    }
    if not settings.smoke:
        helped, clamped = losses["trained with memory"], losses["same_length, clamp_len"]
        assert helped[MEMORY] < 0.85 * losses["trained without memory"][MEMORY]
        assert helped[PERIOD] < 0.85 * helped[MEMORY]
        assert clamped[MEMORY] > clamped[PERIOD] > clamped[4 * PERIOD]
    record({"memory_helps": losses, "period": PERIOD, "segment": SEGMENT, "memory": MEMORY, "clamp_len": FARTHEST})


def repetitive_text(n: int, seed: int) -> Tensor:
    """n + 1 tokens of BATCH streams, (n + 1, BATCH)."""
    generator = torch.Generator().manual_seed(seed)
    parts = math.ceil((n + 1) / (PERIOD * REPEATS))
    periods = torch.randint(N_TOKEN, (parts, 1, PERIOD, BATCH), generator=generator)
    return periods.expand(-1, REPEATS, -1, -1).reshape(-1, BATCH)[: n + 1]


def make_model(mem_len: int) -> MemTransformerLM:
    """Two small layers; the same numbers for every mem_len."""
    torch.manual_seed(0)
    return MemTransformerLM(N_TOKEN, 2, 4, 64, 16, 128, 0.0, 0.0, tgt_len=SEGMENT, ext_len=0, mem_len=mem_len)


def train(model: MemTransformerLM, text: Tensor) -> None:
    """Once through the text, with its memory, learning rate rising and then falling as a cosine."""
    optimizer, mems = torch.optim.Adam(model.parameters()), []
    steps = (len(text) - 1) // SEGMENT
    for step in range(steps):
        rate = LEARNING_RATE * min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens = text[step * SEGMENT : (step + 1) * SEGMENT + 1]
        losses, *mems = model(tokens[:-1], tokens[1:], *mems)
        optimizer.zero_grad()
        losses.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def evaluate(
    model: MemTransformerLM, text: Tensor, mem_len: int, same_length: bool = False, clamp_len: int = -1
) -> float:
    """Nats a token over the text, with a memory of this length."""
    model.eval()
    model.reset_length(SEGMENT, 0, mem_len)
    model.same_length, model.clamp_len = same_length, clamp_len
    cache = model.init_cache(BATCH)
    starts = range(0, len(text) - SEGMENT, SEGMENT)
    losses = [model.losses(text[i : i + SEGMENT], text[i + 1 : i + SEGMENT + 1], cache) for i in starts]
    return torch.cat(losses).mean().item()
