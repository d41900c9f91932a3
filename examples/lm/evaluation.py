"""The loss of a text under a model, with the memory of evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from txl_kernels.models import MemTransformerLM

from .configurations import Configuration
from .corpus import Segments
from .ranks import Ranks

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def mixed_precision(amp: str, device: torch.device):
    """The context that a forward pass runs in."""
    return nullcontext() if amp == "off" else torch.autocast(device.type, _DTYPES[amp])


@contextmanager
def evaluating(model: MemTransformerLM, configuration: Configuration) -> Iterator[None]:
    """The model without dropout and with the lengths of evaluation; as it was, afterwards."""
    before = model.training, model.clamp_len, model.same_length, (model.tgt_len, model.ext_len, model.mem_len)
    model.eval()
    model.clamp_len, model.same_length = configuration.eval_clamp_len, configuration.eval_same_length
    model.reset_length(configuration.eval_tgt_len, 0, configuration.eval_mem_len)
    try:
        yield
    finally:
        training, model.clamp_len, model.same_length, lengths = before
        model.reset_length(*lengths)
        model.train(training)


def evaluation_segments(stream: Tensor, configuration: Configuration, ranks: Ranks) -> Segments:
    """This rank's part of a text to evaluate.

    Raises:
        ValueError: The stream is too short, or there are fewer parallel streams than ranks.
    """
    batch = configuration.eval_batch
    if batch < ranks.size:
        raise ValueError(f"--eval-batch: expected at least {ranks.size}, one a process, got {batch}")
    return Segments(stream, batch, configuration.eval_tgt_len, ranks.columns(batch))


def evaluate(model: MemTransformerLM, stream: Tensor, configuration: Configuration, ranks: Ranks) -> tuple[float, int]:
    """Mean loss in nats and number of tokens that it is taken over; ranks share the work.

    As in the original, the text is cut into eval_batch parallel streams, whose first tokens see no others.

    Raises:
        ValueError: As `evaluation_segments`.
    """
    segments = evaluation_segments(stream, configuration, ranks)
    total = torch.zeros(2, dtype=torch.float64)
    with evaluating(model, configuration), mixed_precision(configuration.amp, ranks.device), torch.no_grad():
        losses = _reader(model, segments.rows.shape[0])
        for data, target in segments:
            loss = losses(data.to(ranks.device), target.to(ranks.device))
            total += torch.tensor([loss.double().sum().item(), target.numel()])
    loss, tokens = ranks.sum(total).tolist()
    return loss / tokens, int(tokens)


def _reader(model: MemTransformerLM, batch: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A function that gives the losses of one segment after the other."""
    if model.attn_type in (0, 1):
        cache = model.init_cache(batch)
        return lambda data, target: model.losses(data, target, cache)
    mems: list[Tensor] = []

    def with_memory(data: Tensor, target: Tensor) -> Tensor:
        losses, *mems[:] = model(data, target, *mems)
        return losses

    return with_memory
