"""GTrXL of DI-engine: segments of 64 with a memory of 64, as an agent learns."""

import torch
from torch import Tensor, nn

from benchmarks.families import Case
from benchmarks.measure import with_larger_weights
from tests.patching.ding_package import GTrXL


def _build(smoke: bool):
    T, B, C, D, layers = (4, 2, 16, 8, 1) if smoke else (64, 32, 256, 128, 3)
    torch.manual_seed(0)
    model = with_larger_weights(GTrXL(C, D, C, 2, layer_num=layers, memory_len=T)).eval()
    x, memory = torch.randn(T, B, C), torch.randn(layers + 1, T, B, C)

    def run(model: nn.Module) -> Tensor:
        device = next(model.parameters()).device
        model.reset_memory(state=memory.to(device))
        return model(x.to(device))["logit"]

    return model, run


CASES = [Case("DI-engine GTrXL", "64 + 64: T = M = 64, B = 32, 3 layers, 2 heads x 128", _build)]
