"""Sizes, lengths and schedules: those of the original training scripts by name, and one for a laptop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any

from txl_kernels.models import MemTransformerLM

AMP = ("off", "bf16", "fp16")


def _option(group: str, help: str, default: Any = MISSING, fixed: bool = False) -> Any:
    """A field that is also an option of the command line; a run can't change fixed ones when it resumes."""
    metadata = {"group": group, "help": help, "fixed": fixed}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def _model(help: str, default: Any = MISSING) -> Any:
    return _option("model", help, default, fixed=True)


@dataclass(frozen=True)
class Configuration:
    """Everything that the curve of a run depends on beside the text; each field's help says what it is."""

    n_layer: int = _model("layers")
    n_head: int = _model("heads")
    d_model: int = _model("width of the hidden states")
    d_head: int = _model("head size")
    d_inner: int = _model("inner width of the feed-forward nets")
    tgt_len: int = _model("tokens of a training segment")
    mem_len: int = _model("hidden states of earlier segments that training sees")
    batch: int = _option("training", "streams that the training text is cut into, over all processes", fixed=True)
    steps: int = _option("training", "optimiser steps of the whole run")
    dropout: float = _option("model", "probability on embeddings, outputs and in the feed-forward nets", 0.1)
    dropatt: float = _option("model", "probability on the attention probabilities", 0.0)
    attn_type: int = _model("0: relative, 1: learned relative, 2: sinusoids, 3: learned positions", 0)
    clamp_len: int = _option("model", "largest distance told apart in training, -1: all", -1)
    cutoffs: tuple[int, ...] = _model(
        "first tokens of the vocabulary's clusters; those it doesn't have are left out", ()
    )
    div_val: int = _model("each cluster's embeddings are narrower than those before by this factor", 1)
    tie_projs: bool = _model("clusters after the first share the projection of input and output", False)
    gradient_checkpointing: bool = _option("model", "recompute layers in the backward pass to save memory", False)
    lr: float = _option("training", "largest learning rate of Adam", 0.00025)
    min_lr: float = _option("training", "learning rate that the cosine ends at", 0.0)
    warmup: int = _option("training", "steps of linear rise to the largest learning rate", 0)
    clip: float = _option("training", "largest norm of the gradient", 0.25)
    weight_decay: float = _option("training", "decoupled weight decay of matrices (AdamW); 0: Adam", 0.0)
    accumulate: int = _option("training", "parts of the batch, computed one after the other to save memory", 1)
    amp: str = _option("training", "mixed precision: bf16, or fp16 with a scaled loss", "off")
    seed: int = _option("training", "of parameters and dropout", 1111, fixed=True)
    log_every: int = _option("training", "steps between two lines of the log", 200)
    valid_every: int = _option("training", "steps between two validations", 4000)
    save_every: int = _option("training", "steps between two checkpoints: what a kill can cost", 1000)
    eval_tgt_len: int = _option("evaluation", "tokens of a segment", 128)
    eval_mem_len: int = _option("evaluation", "hidden states of earlier segments", 128)
    eval_clamp_len: int = _option("evaluation", "largest distance told apart, -1: all", -1)
    eval_same_length: bool = _option("evaluation", "every token sees the same number of tokens", True)
    eval_batch: int = _option("evaluation", "streams that the text is cut into", 10)

    def build(self, n_token: int) -> MemTransformerLM:
        """A new model for a vocabulary of n_token.

        Raises:
            ValueError: A size does not fit.
        """
        cutoffs = [cutoff for cutoff in self.cutoffs if cutoff < n_token]
        return MemTransformerLM(
            n_token,
            *(self.n_layer, self.n_head, self.d_model, self.d_head, self.d_inner, self.dropout, self.dropatt),
            div_val=self.div_val,
            tie_projs=[False] + [self.tie_projs] * len(cutoffs),
            tgt_len=self.tgt_len,
            ext_len=0,
            mem_len=self.mem_len,
            cutoffs=cutoffs,
            attn_type=self.attn_type,
            clamp_len=self.clamp_len,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    def resumed_with(self, given: Mapping[str, Any]) -> Configuration:
        """This configuration with the options given anew.

        Raises:
            ValueError: One of them would change the model or the order of the text.
        """
        for name, value in given.items():
            if FIELDS[name].metadata["fixed"] and value != getattr(self, name):
                raise ValueError(
                    f"--{name.replace('_', '-')}: the run was started with {getattr(self, name)}, got {value}; "
                    "to change it, start a new run"
                )
        return replace(self, **given)

    def __post_init__(self) -> None:
        training = ("batch", "steps", "accumulate", "log_every", "valid_every", "save_every")
        for name in (*training, "eval_tgt_len", "eval_batch"):
            _check(name, getattr(self, name) >= 1, ">= 1", getattr(self, name))
        least = int(self.eval_same_length)
        _check("eval_mem_len", self.eval_mem_len >= least, f">= {least}", self.eval_mem_len)
        _check("warmup", 0 <= self.warmup < self.steps, f"0 to steps - 1 = {self.steps - 1}", self.warmup)
        _check("lr", 0 <= self.min_lr <= self.lr, f">= min_lr >= 0, here {self.min_lr}", self.lr)
        _check("clip", self.clip > 0, "> 0", self.clip)
        _check("weight_decay", self.weight_decay >= 0, ">= 0", self.weight_decay)
        for name in ("dropout", "dropatt"):
            _check(name, 0 <= getattr(self, name) < 1, "0 <= p < 1", getattr(self, name))
        _check("amp", self.amp in AMP, f"one of {', '.join(AMP)}", self.amp)


FIELDS: dict[str, Field] = {x.name: x for x in fields(Configuration)}


def _check(name: str, good: bool, wanted: str, got: Any) -> None:
    if not good:
        raise ValueError(f"--{name.replace('_', '-')}: expected {wanted}, got {got}")


def _named(sizes: tuple[int, ...], train: tuple[int, ...], evaluation: tuple[int, ...], **more: Any) -> Configuration:
    shape = dict(zip(("n_layer", "n_head", "d_model", "d_head", "d_inner"), sizes, strict=True))
    shape |= dict(zip(("tgt_len", "mem_len", "batch", "steps"), train, strict=True))
    shape |= dict(zip(("eval_tgt_len", "eval_mem_len", "eval_clamp_len"), evaluation, strict=True))
    return Configuration(**shape, **more)


_WT103 = {"cutoffs": (20_000, 40_000, 200_000), "tie_projs": True}
_LM1B = {"cutoffs": (60_000, 100_000, 640_000), "div_val": 4}
_LARGE = {"dropout": 0.15, "dropatt": 0.15, "warmup": 4_000}

# Layers, heads, width, head size, inner width; training T, M, batch, steps; evaluation T, M, clamp_len.
# Those of the original: pytorch/run_*.sh of kimiyoung/transformer-xl; text8-large from its TensorFlow script.
CONFIGURATIONS: dict[str, Configuration] = {
    "small": _named(
        (4, 4, 160, 40, 640),
        (128, 128, 8, 3_500),
        (128, 256, 192),
        **_WT103,
        lr=2e-3,
        min_lr=2e-5,
        warmup=200,
        log_every=25,
        valid_every=250,
        save_every=250,
    ),
    "enwik8-base": _named((12, 8, 512, 64, 2048), (512, 512, 22, 400_000), (80, 2100, 820)),
    "enwik8-large": _named((24, 8, 1024, 128, 3072), (768, 768, 64, 400_000), (128, 3800, 1000), **_LARGE),
    "text8-base": _named((12, 8, 512, 64, 2048), (512, 512, 22, 400_000), (80, 2100, 820)),
    "text8-large": _named((24, 8, 1024, 128, 3072), (768, 768, 64, 400_000), (128, 3800, 1000), **_LARGE),
    "wt103-base": _named((16, 10, 410, 41, 2100), (150, 150, 60, 200_000), (64, 640, 400), **_WT103),
    "wt103-large": _named(
        (18, 16, 1024, 64, 4096),
        (384, 384, 128, 4_000_000),
        (128, 1600, 1000),
        **_WT103,
        dropout=0.2,
        dropatt=0.2,
        warmup=16_000,
        div_val=4,
    ),
    "lm1b-base": _named(
        (18, 8, 1024, 128, 4096),
        (32, 32, 224, 500_000),
        (32, 128, -1),
        **_LM1B,
        dropout=0.0,
        warmup=20_000,
        eval_batch=64,
    ),
    "lm1b-large": _named(
        (24, 16, 1280, 80, 8192),
        (32, 32, 512, 1_200_000),
        (32, 128, -1),
        **_LM1B,
        dropout=0.05,
        dropatt=0.05,
        warmup=30_000,
        eval_batch=8,
    ),
}
