"""A training run: its step, and the state that it can go on from."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .configurations import Configuration
from .corpus import Corpus, Segments
from .evaluation import evaluation_segments, mixed_precision
from .ranks import Ranks


def scheduled_rate(step: int, configuration: Configuration) -> float:
    """Of the step'th step, from 0: a linear rise over warmup steps, then a cosine down to min_lr."""
    c = configuration
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    done = (step - c.warmup) / (c.steps - c.warmup)
    return c.min_lr + (c.lr - c.min_lr) * (1 + math.cos(math.pi * done)) / 2


class Training:
    """A model on its way through a text, each segment with the memory of the one before.

    The text is cut into ``batch`` parallel streams, the columns of the batch. Each rank has the next few of them, and
    each of its ``accumulate`` parts the next few of those, with their memory. When the text ends it is read again,
    without memory at first, as in the original.

    Args:
        configuration: Sizes and schedule.
        corpus: The text.
        ranks: This process and the others.
        compiled: Whether the model goes through torch.compile.

    Raises:
        ValueError: The batch can't be cut evenly, the text is too short, or a size does not fit.
    """

    def __init__(self, configuration: Configuration, corpus: Corpus, ranks: Ranks, compiled: bool = False) -> None:
        c, parts = configuration, ranks.size * configuration.accumulate
        if c.batch % parts:
            wanted = f"a multiple of {parts} (processes times --accumulate)"
            raise ValueError(f"--batch: expected {wanted}, got {c.batch}")
        self.configuration, self.corpus, self.ranks = c, corpus, ranks
        self.segments = Segments(corpus.splits["train"], c.batch, c.tgt_len, ranks.columns(c.batch))
        for split in ("valid", "test"):  # what does not fit is better known now than at the first validation
            evaluation_segments(corpus.splits[split], c, ranks)
        torch.manual_seed(c.seed)
        self.model = c.build(len(corpus.vocabulary)).to(ranks.device)
        torch.manual_seed(c.seed + 1 + ranks.rank)  # each rank drops other values
        if compiled:
            self.model.compile()
        self._parallel: nn.Module = self.model
        if ranks.size > 1:
            self._parallel = DistributedDataParallel(self.model)
        matrices = [x for name, x in self.model.named_parameters() if x.ndim > 1 and not name.endswith("bias")]
        others = [x for name, x in self.model.named_parameters() if x.ndim == 1 or name.endswith("bias")]
        groups = [{"params": matrices, "weight_decay": c.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, c.lr, fused=ranks.device.type == "cuda")
        self._scaler = torch.amp.GradScaler(ranks.device.type, enabled=c.amp == "fp16")
        self._mems: list[list[Tensor]] = []
        self.step, self.best, self.learning_rate = 0, math.inf, 0.0
        self._loss, self._loss_steps = torch.zeros((), dtype=torch.float64, device=ranks.device), 0

    def advance(self) -> int:
        """Takes a step; returns the number of tokens, of all ranks, that it learned from."""
        c, device, segment = self.configuration, self.ranks.device, self.step % len(self.segments)
        if segment == 0:
            self._mems = [[] for _ in range(c.accumulate)]
        data, target = (x.to(device, non_blocking=True) for x in self.segments[segment])
        parts = list(zip(data.chunk(c.accumulate, 1), target.chunk(c.accumulate, 1), strict=True))
        for i, part in enumerate(parts):
            # gradients travel between ranks once a step
            alone = self.ranks.size > 1 and i < len(parts) - 1
            with self._parallel.no_sync() if alone else nullcontext():
                with mixed_precision(c.amp, device):
                    losses, *self._mems[i] = self._parallel(*part, *self._mems[i])
                    loss = losses.mean() / c.accumulate
                self._scaler.scale(loss).backward()
            self._loss += loss.detach()
        self._scaler.unscale_(self._optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        self.learning_rate = scheduled_rate(self.step, c)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        self.step, self._loss_steps = self.step + 1, self._loss_steps + 1
        return target.shape[0] * c.batch

    def take_loss(self) -> float:
        """Mean loss since the last call, over all ranks.

        Raises:
            FloatingPointError: It is not finite.
        """
        loss = self._finite_loss() / self._loss_steps
        self._loss, self._loss_steps = torch.zeros_like(self._loss), 0
        return loss

    def _finite_loss(self) -> float:
        loss = self.ranks.sum(self._loss).item() / self.ranks.size
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss: not finite by step {self.step}; lower --lr or raise --warmup")
        return loss

    def described_model(self) -> dict[str, Any]:
        """What `evaluate` and `generate` need: the model, and how to make it again."""
        return {
            "configuration": vars(self.configuration).copy(),
            "vocabulary": self.corpus.vocabulary.state(),
            "source": self.corpus.source,
            "fingerprint": self.corpus.fingerprint,
            "step": self.step,
            "model": self.model.state_dict(),
        }

    def state(self) -> dict[str, Any] | None:
        """Everything that the next step depends on, on the first rank; None on the others, which take part.

        The tensors are those in use: write them before the next step.

        Raises:
            FloatingPointError: A loss was not finite, or a parameter is not, so the state is worth nothing.
        """
        self._finite_loss()
        if not all(x.isfinite().all() for x in self.model.parameters()):
            raise FloatingPointError(f"parameters: not finite after step {self.step}; lower --lr or raise --warmup")
        # columns side by side again, so that a run can go on with another number of ranks or parts
        layers = [torch.cat([part.cpu() for part in parts], 1) for parts in zip(*self._mems, strict=True)]
        mems = [self.ranks.gather(layer) for layer in layers]
        generators = self.ranks.gather(torch.get_rng_state())
        cuda = self.ranks.gather(torch.cuda.get_rng_state()) if self.ranks.device.type == "cuda" else None
        loss = self.ranks.gather(self._loss)
        if not self.ranks.first:
            return None
        return self.described_model() | {
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "mems": [torch.cat(columns, 1) for columns in mems],
            "generators": generators,
            "cuda_generators": cuda,
            "loss": torch.stack(loss),
            "loss_steps": self._loss_steps,
            "best": self.best,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a state; bit by bit on one machine with as many ranks.

        Raises:
            ValueError: It belongs to another text.
        """
        if state["fingerprint"] != self.corpus.fingerprint:
            raise ValueError("--data: expected the text that the run was started with, got another")
        c, ranks, device = self.configuration, self.ranks, self.ranks.device
        self.model.load_state_dict(state["model"])
        options = [{key: group[key] for key in ("weight_decay", "fused")} for group in self._optimizer.param_groups]
        self._optimizer.load_state_dict(state["optimizer"])
        for group, ours in zip(self._optimizer.param_groups, options, strict=True):
            group.update(ours)  # of this run, not of the one that was saved
        if state["scaler"]:  # empty unless the run was in fp16
            self._scaler.load_state_dict(state["scaler"])
        self.step, self.best = state["step"], state["best"]
        layers = [layer[:, ranks.columns(c.batch)].to(device) for layer in state["mems"]]
        parts = zip(*(layer.chunk(c.accumulate, 1) for layer in layers), strict=True)
        self._mems = [[x.contiguous() for x in part] for part in parts] or [[] for _ in range(c.accumulate)]
        self._loss = state["loss"].mean(0).to(device)
        self._loss_steps = state["loss_steps"]
        if len(state["generators"]) == ranks.size:
            torch.set_rng_state(state["generators"][ranks.rank])
            if device.type == "cuda" and state["cuda_generators"]:
                torch.cuda.set_rng_state(state["cuda_generators"][ranks.rank])
            self._loss = state["loss"][ranks.rank].to(device)
