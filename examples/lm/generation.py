"""Text from a model, token by token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from txl_kernels.models import MemTransformerLM


def distribution(log_probs: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The probabilities to draw the next token from.

    Args:
        log_probs: Of all tokens, (n_token,).
        temperature: Below 1 likely tokens become likelier; 0: the likeliest token, and no other.
        top_k: Only this many of the likeliest tokens; 0: all.
        top_p: Of those, only the likeliest whose probabilities reach top_p together (Holtzman et al. 2020, nucleus
            sampling, arXiv 1904.09751); 1: all.

    Returns:
        (n_token,), float64, summing to 1; of tokens with the same probability, the first are kept.
    """
    if temperature == 0:
        temperature, top_k = 1.0, 1
    below_largest = log_probs.double() - log_probs.max()  # what is divided by a tiny number stays finite or -inf
    probabilities, order = (below_largest / temperature).softmax(0).sort(descending=True, stable=True)
    if top_k:
        probabilities[top_k:] = 0
        probabilities /= probabilities.sum()
    probabilities[probabilities.cumsum(0) - probabilities >= top_p] = 0
    return torch.zeros_like(probabilities).index_copy(0, order, probabilities / probabilities.sum())


def generate(
    model: MemTransformerLM,
    prompt: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Tokens that follow the prompt, without end; the same for the same seed.

    Args:
        model: In eval mode, ``attn_type`` 0 or 1.
        prompt: Tokens (T,), int64, T >= 1, read in segments of the model's tgt_len.
        temperature: See `distribution`, as the next two.
        top_k: See `distribution`.
        top_p: See `distribution`.
        seed: Of the draws.

    Raises:
        ValueError: An argument is out of range, or the model has another ``attn_type``.
    """
    for name, good, wanted, got in (
        ("temperature", temperature >= 0, ">= 0", temperature),
        ("top_k", top_k >= 0, ">= 0, 0 for all", top_k),
        ("top_p", 0 < top_p <= 1, "0 < p <= 1", top_p),
    ):
        if not good:
            raise ValueError(f"{name}: expected {wanted}, got {got}")
    generator = torch.Generator().manual_seed(seed)
    return _tokens(model, prompt, temperature, top_k, top_p, generator=generator)


def _tokens(model: MemTransformerLM, prompt: Tensor, *filters: float, generator: torch.Generator) -> Iterator[int]:
    device = next(model.parameters()).device
    cache = model.init_cache(1)
    for segment in prompt.split(model.tgt_len):
        log_probs = model.log_probs(segment[:, None].to(device), cache)
    while True:
        # drawn on the CPU, so that every device draws the same
        token = torch.multinomial(distribution(log_probs[0].cpu(), *filters), 1, generator=generator)
        yield token.item()
        log_probs = model.log_probs(token[:, None].to(device), cache)
