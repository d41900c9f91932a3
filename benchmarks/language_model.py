"""A small byte-level Transformer-XL language model (Dai et al. 2019) with either layer, and its training."""

import functools
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

TEXT_VARIABLE = "TXL_BENCH_TEXT"
BYTES = 256


@dataclass(frozen=True)
class Config:
    """Sizes of model and training; the memory is as long as the segment, as in the paper's training."""

    n_layer: int = 4
    d_model: int = 144
    n_head: int = 4
    d_head: int = 36
    d_inner: int = 432
    segment: int = 256  # T = M
    batch: int = 4
    steps: int = 400
    learning_rate: float = 1e-3  # after a linear rise, before a linear fall to 0
    warmup: int = 40
    clip: float = 0.25  # largest gradient norm


def load_text(at_least: int) -> tuple[str, bytes]:
    """The text to learn and its name: CPython's documentation topics, or the file that TXL_BENCH_TEXT names.

    Args:
        at_least: bytes needed.

    Raises:
        FileNotFoundError: the file named does not exist.
        ValueError: it is shorter than at_least.
    """
    name = os.environ.get(TEXT_VARIABLE)
    if name is None:
        return "pydoc_data.topics", "\n".join(topics[key] for key in sorted(topics)).encode()
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"{TEXT_VARIABLE}={name}: no such file")
    text = path.read_bytes()
    if len(text) < at_least:
        raise ValueError(f"{TEXT_VARIABLE}={name}: {len(text)} bytes, needs at least {at_least}")
    return path.name, text


def unigram_entropy(text: bytes) -> float:
    """Nats a byte that a model pays which knows only how frequent each byte is."""
    return -sum(n / len(text) * math.log(n / len(text)) for n in Counter(text).values())


class LanguageModel(nn.Module):
    """Embedding, decoder layers with memory, softmax over bytes; one u and v for all layers, as the original.

    Args:
        config: sizes.
        attention: class of the attention layer, with the original's constructor and forward.
        passes_mask: whether the layer is given the causal mask (the original's layer) or None.
    """

    def __init__(self, config: Config, attention: type[nn.Module], passes_mask: bool) -> None:
        super().__init__()
        self.d_model, self.passes_mask = config.d_model, passes_mask
        self.embedding = nn.Embedding(BYTES, config.d_model)
        self.r_w_bias, self.r_r_bias = (nn.Parameter(torch.empty(config.n_head, config.d_head)) for _ in range(2))
        self.attention = nn.ModuleList(
            attention(config.n_head, config.d_model, config.d_head, dropout=0.0) for _ in range(config.n_layer)
        )
        self.feed_forward = nn.ModuleList(
            nn.Sequential(
                nn.Linear(config.d_model, config.d_inner),
                nn.ReLU(),
                nn.Linear(config.d_inner, config.d_model),
            )
            for _ in range(config.n_layer)
        )
        self.norm = nn.ModuleList(nn.LayerNorm(config.d_model) for _ in range(config.n_layer))
        self.head = nn.Linear(config.d_model, BYTES)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor, mems: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """Mean loss (nats) of targets (T, B) after tokens (T, B), and the memory that each layer hands on."""
        T, M = len(tokens), 0 if mems is None else len(mems[0])
        mask = _causal_mask(T, M + T, tokens.device) if self.passes_mask else None
        r = _sinusoids(M + T, self.d_model, tokens.device)
        hidden = self.embedding(tokens) * math.sqrt(self.d_model)
        new_mems = []
        for n, (attention, feed_forward, norm) in enumerate(
            zip(self.attention, self.feed_forward, self.norm, strict=True)
        ):
            new_mems.append(hidden.detach())
            memory = None if mems is None else mems[n]
            hidden = attention(hidden, r, self.r_w_bias, self.r_r_bias, mask, memory)
            hidden = norm(hidden + feed_forward(hidden))
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten()), new_mems


class Training:
    """A model on its way through a text: batch streams side by side, memory from each segment to the next.

    Args:
        model: on the device to train on.
        text: at least minimum_bytes(config) long; read again from the start, without memory, when it ends.
        config: sizes.
    """

    def __init__(self, model: LanguageModel, text: bytes, config: Config) -> None:
        self.model, self.config = model, config
        length = len(text) // config.batch
        device = model.head.weight.device
        data = torch.tensor(list(text[: length * config.batch])).view(config.batch, length)
        self.data = data.t().contiguous().to(device)
        self.losses: list[float] = []
        self._segments = (length - 1) // config.segment
        self._mems: list[Tensor] | None = None
        self._optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda n: min((n + 1) / config.warmup, (config.steps - n) / config.steps)
        )

    def run(self, steps: int) -> None:
        """Trains on the next segments."""
        for _ in range(steps):
            self._step(len(self.losses) % self._segments)

    def _step(self, segment: int) -> None:
        T = self.config.segment
        window = self.data[segment * T : (segment + 1) * T + 1]
        mems = self._mems if segment else None
        loss, self._mems = self.model(window[:-1], window[1:], mems)
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self._optimizer.step()
        self._schedule.step()
        self.losses.append(loss.item())


def minimum_bytes(config: Config) -> int:
    """Text for two segments, so that memory is used."""
    return config.batch * (2 * config.segment + 1)


@functools.lru_cache(maxsize=2)
def _causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    return torch.ones(T, S, dtype=torch.bool, device=device).triu(1 + S - T)[:, :, None]


@functools.lru_cache(maxsize=2)
def _sinusoids(S: int, d_model: int, device: torch.device) -> Tensor:
    """R (S, 1, d_model): [sin | cos] of distance S-1 ... 0 times the inverse frequencies."""
    distance = torch.arange(S - 1, -1, -1.0, device=device)
    frequency = 10000 ** -(torch.arange(0, d_model, 2.0, device=device) / d_model)
    angle = distance[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[:, None]
