"""XLNet of Hugging Face: two segments of a padded batch, the second with the memory of the first."""

import functools

import torch
import transformers
from torch import Tensor, nn

from benchmarks.families import Case, shape_of
from benchmarks.measure import with_larger_weights


def _build(T: int, M: int, B: int, layers: int, smoke: bool):
    sizes = {"d_model": 256, "n_head": 4, "d_inner": 1024, "n_layer": layers, "vocab_size": 1000}
    if smoke:
        T, M = 8, 6
        sizes = {"d_model": 16, "n_head": 2, "d_inner": 16, "n_layer": 1, "vocab_size": 10}
    config = transformers.XLNetConfig(**sizes, mem_len=M, dropout=0.0)
    torch.manual_seed(0)
    model = with_larger_weights(transformers.XLNetModel(config)).eval()
    ids = torch.randint(sizes["vocab_size"], (B, T))
    lengths = torch.linspace(T, 3 * T // 4, B).long()
    inputs = {
        "input_ids": ids,
        "attention_mask": (torch.arange(T) < lengths[:, None]).long(),
        "token_type_ids": (torch.arange(T) >= T // 2).long().expand(B, T),
        "mems": [torch.randn(M, B, sizes["d_model"]) for _ in range(sizes["n_layer"])],
    }

    def run(model: nn.Module) -> Tensor:
        device = next(model.parameters()).device
        mems = [memory.to(device) for memory in inputs["mems"]]
        return model(**{name: x.to(device) for name, x in inputs.items() if name != "mems"}, mems=mems)[0]

    return model, run


CASES = [
    Case(
        "XLNet",
        shape_of(f"{T} + {M}", n, T=T, M=M, B=B),
        functools.partial(_build, T, M, B, n),
    )
    for T, M, B, n in ((512, 384, 4, 2),)
]
