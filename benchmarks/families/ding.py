"""GTrXL of DI-engine: segments of 64 with a memory of 64, as an agent learns."""

import torch
from torch import Tensor, nn

from benchmarks.families import Case
from tests.patching.ding_package import GTrXL


def _build(smoke: bool):
    T, B, C, D, layers = (4, 2, 16, 8, 1) if smoke else (64, 32, 256, 128, 3)
    torch.manual_seed(0)
    model = GTrXL(C, D, C, 2, layer_num=layers, memory_len=T).eval()
    with torch.no_grad():  # five times larger, as other models here get them, its gates would blow roundings up
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 2
    x, memory = torch.randn(T, B, C), torch.randn(layers + 1, T, B, C)

    def run(model: nn.Module) -> Tensor:
        device = next(model.parameters()).device
        model.reset_memory(state=memory.to(device))
        return model(x.to(device))["logit"]

    return model, run


CASES = [Case("DI-engine GTrXL", "64 + 64: T = M = 64, B = 32, 3 layers, 2 heads x 128", _build)]
