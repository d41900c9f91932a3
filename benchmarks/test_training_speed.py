"""A training step of the original's models, forward to optimizer: with our attention layer and with the original's.

On a CPU a model has a few of its layers, a batch that a step of seconds allows, and a small vocabulary in place of
its embeddings; on a GPU all of its layers and the whole batch.
"""

import functools

import pytest
import torch
from torch import Tensor, nn

from benchmarks.measure import CLOCK, Comparison, Stopwatch, rounds_within, with_larger_weights
from reference.layer import RelPartialLearnableMultiHeadAttn as ReferenceLayer
from tests.layer_tools import original_mask
from txl_kernels.models import MemTransformerLM

pytestmark = pytest.mark.benchmark(timer=CLOCK.now)

SECONDS = 20.0  # of timing for each model, both sides together
N_TOKEN, LEARNING_RATE = 1000, 2.5e-4
# Original training scripts: n_layer, n_head, d_model, d_head, d_inner, T = M, batch; on a CPU, layers and batch.
MODELS = {
    "wt103_base": ((16, 10, 410, 41, 2100), 150, 60, (2, 8)),
    "wt103_large": ((18, 16, 1024, 64, 4096), 384, 128, (1, 2)),
    "enwik8_base": ((12, 8, 512, 64, 2048), 512, 22, (2, 2)),
}
SMOKE = (1, 2, 16, 8, 16), 8, 2


class OriginalLayer(ReferenceLayer):
    """With a dense causal mask in place of what a model of ours leaves to the layer."""

    def forward(self, w: Tensor, *r: Tensor, **_: None) -> Tensor:
        *r, _, mems = r
        return super().forward(w, *r, causal_mask(w.shape[0], 0 if mems is None else len(mems), w.device), mems)


@functools.cache
def causal_mask(T: int, M: int, device: torch.device) -> Tensor:
    """Made once: the original makes it once for all layers of a step."""
    return original_mask(T, M).to(device)


@pytest.mark.parametrize("name", MODELS)
def test_training_speed(benchmark, settings, record, name):
    """The first losses agree, token by token, in float32: those of one step, and of the step after it with memory."""
    sizes, T, batch, on_cpu = MODELS[name]
    if settings.device.type == "cpu":
        sizes, batch = (on_cpu[0], *sizes[1:]), on_cpu[1]
    if settings.smoke:
        sizes, T, batch = SMOKE
    torch.manual_seed(0)
    lengths = {"tgt_len": T, "ext_len": 0, "mem_len": T}
    model = MemTransformerLM(N_TOKEN, *sizes, dropout=0.0, dropatt=0.0, **lengths)
    model = with_larger_weights(model).to(settings.device)
    original = MemTransformerLM(N_TOKEN, *sizes, dropout=0.0, dropatt=0.0, **lengths).to(settings.device)
    _, n_head, d_model, d_head, _ = sizes
    for layer in original.layers:
        layer.dec_attn = OriginalLayer(n_head, d_model, d_head, 0.0).to(settings.device)
    original.load_state_dict(model.state_dict())

    tokens = torch.randint(N_TOKEN, (T + 1, batch), device=settings.device)
    models = {"ours": model, "original": original}
    in_float = [Step(x, tokens, settings.device, torch.float32) for x in models.values()]
    for _ in range(2):
        torch.testing.assert_close(*(step() for step in in_float), rtol=1e-3, atol=1e-3)
    steps = {side: Step(x, tokens, settings.device, settings.dtype) for side, x in models.items()}

    stopwatch = Stopwatch(settings.device)
    comparison = Comparison(steps, stopwatch)
    rounds = 1 if settings.smoke else rounds_within(SECONDS, sum(map(stopwatch, steps.values())))
    benchmark.group = "training speed"
    comparison.run(benchmark, rounds)
    results = comparison.results()
    record(
        results
        | {
            "trained": name,
            "n_token": N_TOKEN,
            "sizes": dict(zip(("n_layer", "n_head", "d_model", "d_head", "d_inner"), sizes, strict=True))
            | {"T": T, "batch": batch},
            "dtype": str(settings.dtype).removeprefix("torch."),
            "tokens_per_second": {side: T * batch / seconds for side, seconds in results["seconds"].items()},
        }
    )


class Step:
    """A training step on the same tokens, with the memory of the step before."""

    def __init__(self, model: nn.Module, tokens: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        self._model, self._tokens = model, tokens
        self._autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        self._optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
        self._mems: list[Tensor] = []

    def __call__(self) -> Tensor:
        with self._autocast:
            losses, *self._mems = self._model(self._tokens[:-1], self._tokens[1:], *self._mems)
        loss = losses.mean()
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), 0.25)
        self._optimizer.step()
        return losses.detach()
