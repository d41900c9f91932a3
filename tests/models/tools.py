"""Shared by the tests of the models: a small model, segments, a training step by name, the shapes a call makes."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from txl_kernels.models import MemTransformerLM

# no two sizes alike, and H * D != C where the attention type allows it
SIZES = {"n_token": 29, "n_layer": 2, "n_head": 2, "d_model": 12, "d_head": 5, "d_inner": 17}
LENGTHS = {"tgt_len": 5, "ext_len": 0, "mem_len": 7}
ADAPTIVE = {"cutoffs": [8, 19], "div_val": 2, "tie_projs": [False, True, True]}
STREAM = [5, 5, 1, 1, 1, 9, *[1] * 20, 3, 3, 3, 3, 20, 1, 2, 3]  # of segments


def make_model(dtype=torch.float64, **options):
    """A model without dropout unless options say so; the same numbers each time, none of them zero."""
    torch.manual_seed(0)
    if options.get("attn_type") == 3:
        options = {"d_head": SIZES["d_model"] // SIZES["n_head"]} | options
    model = MemTransformerLM(**(SIZES | LENGTHS | {"dropout": 0.0, "dropatt": 0.0} | options))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def make_segments(n=3, T=5, B=3):
    return make_stream([T] * n, B)


def run(model, segments):
    """Losses of all segments, the last memory, and the gradients of their mean, by name."""
    model.zero_grad()
    losses, mems = [], []
    for data, target in segments:
        loss, *mems = model(data, target, *mems)
        losses.append(loss)
    torch.cat(losses).mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"losses": torch.cat(losses).detach(), "mems": mems} | gradients


def make_stream(lengths=STREAM, B=3):
    """Segments of these lengths that follow each other, each with the tokens that follow its own."""
    stream = torch.randint(0, SIZES["n_token"], (sum(lengths) + 1, B), generator=torch.Generator().manual_seed(1))
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [(stream[end - T : end], stream[end - T + 1 : end + 1]) for T, end in zip(lengths, ends, strict=True)]


def through_forward(model, stream, mems=()):
    """Losses of all segments, without gradient."""
    losses = []
    with torch.no_grad():
        for data, target in stream:
            loss, *mems = model(data, target, *mems)
            losses.append(loss)
    return torch.cat(losses)


class Shapes(TorchDispatchMode):
    """Collects the shapes of all results outside of rel_attention."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(x.shape) for x in (out if isinstance(out, tuple | list) else [out]) if hasattr(x, "shape")}
        return out
