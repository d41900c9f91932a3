"""The attention of RLlib's GTrXLNet with its gate: segments of 64 with a memory of 64."""

import torch
from torch import Tensor, nn

from benchmarks.families import Case
from benchmarks.measure import with_larger_weights
from tests.patching.rllib_package import GRUGate, RelativeMultiHeadAttention, SkipConnection


def _build(smoke: bool):
    T, B, C, D = (4, 2, 16, 8) if smoke else (64, 32, 256, 128)
    torch.manual_seed(0)
    options = {"input_layernorm": True, "output_activation": nn.ReLU}
    attention = RelativeMultiHeadAttention(C, C, 2, D, **options)
    model = with_larger_weights(SkipConnection(attention, fan_in_layer=GRUGate(C, 2.0))).eval()
    x, memory = torch.randn(B, T, C), torch.randn(B, T, C)

    def run(model: nn.Module) -> Tensor:
        device = next(model.parameters()).device
        return model(x.to(device), memory=memory.to(device))

    return model, run


CASES = [Case("RLlib GTrXL", "64 + 64: T = M = 64, B = 32, 1 unit, 2 heads x 128", _build)]
