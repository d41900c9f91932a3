"""Shared by the tests of the layers: golden cases, layers, inputs, the original masks, gradients by name."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.accuracy import GRADIENT_FACTOR, OUTPUT_FACTOR, assert_close_to_truth
from txl_kernels.layer import RelPartialLearnableMultiHeadAttn

H, D, C = 2, 5, 12  # H * D != C and an odd head size, so that no two sizes can be mistaken for each other
INPUTS = ("w", "r", "r_w_bias", "r_r_bias", "mems")
LEARNED_INPUTS = ("w", "r_emb", "r_w_bias", "r_bias", "mems")

GOLDEN = np.load(Path(__file__).parent / "golden" / "original_attention.npz")
GOLDEN_CASES = sorted({key.split("/")[0] for key in GOLDEN.files if "/" in key})


def golden(case: str, module) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """One golden case: the layer of module with its parameters, its inputs as leaves, and all of its numbers."""
    numbers = {
        key.removeprefix(f"{case}/"): torch.from_numpy(GOLDEN[key])
        for key in GOLDEN.files
        if key.startswith(f"{case}/") and GOLDEN[key].dtype.kind in "fb"
    }
    cfg = json.loads(str(GOLDEN[f"{case}/cfg"]))
    learned = case.startswith("learnable")
    cls = module.RelLearnableMultiHeadAttn if learned else module.RelPartialLearnableMultiHeadAttn
    layer = cls(
        cfg["n_head"], cfg["d_model"], cfg["d_head"], dropout=0.0, pre_lnorm=cfg.get("pre_lnorm", False)
    ).double()
    layer.load_state_dict({k.removeprefix("param/"): x for k, x in numbers.items() if k.startswith("param/")})
    names = LEARNED_INPUTS if learned else INPUTS
    return layer, {n: numbers[f"in/{n}"].requires_grad_() for n in names if f"in/{n}" in numbers}, numbers


def assert_golden(got: dict[str, Tensor], numbers: dict[str, Tensor]) -> None:
    """Holds what run() returns against the numbers of a golden case."""
    for name, x in got.items():
        kind = "out/output" if name == "out" else f"gin/{name}" if f"gin/{name}" in numbers else f"gparam/{name}"
        # the golden scores went through float32 to be masked
        torch.testing.assert_close(x, numbers[kind], rtol=1e-6, atol=2e-6, msg=lambda m, kind=kind: f"{kind}: {m}")


class CountOps(TorchDispatchMode):
    """Counts the operators that run, by name; what runs inside rel_attention is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def original_mask(T: int, M: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """The causal mask (T, S, 1) as the original builds it in every forward, True or 1 = hidden."""
    return torch.ones(T, M + T).triu(1 + M).to(dtype)[:, :, None]


def same_length_mask(T: int, M: int, mem_len: int, dtype: torch.dtype = torch.bool) -> Tensor:
    """The mask (T, S, 1) of the original's same_length, as it builds it."""
    shift = T - max(M + T - mem_len, 0)
    return (torch.ones(T, M + T).triu(1 + M) + torch.ones(T, M + T).tril(-shift)).to(dtype)[:, :, None]


def make_layer(
    cls: type[nn.Module] = RelPartialLearnableMultiHeadAttn, dtype: torch.dtype = torch.float32, **options
) -> nn.Module:
    """A layer of the sizes above, without dropout unless options say so; the same numbers each time."""
    torch.manual_seed(0)
    return cls(H, C, D, **({"dropout": 0.0} | options)).to(dtype)


def make_inputs(
    T: int,
    M: int,
    B: int = 3,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    sizes: tuple[int, int, int] = (H, D, C),
    learned: int | None = None,
) -> dict[str, Tensor]:
    """The inputs of the layer, with learned rows the ones of attn_type 1; the same numbers each time."""
    generator = torch.Generator().manual_seed(1)
    n_head, d_head, width = sizes
    bias, states, memory = (n_head, d_head), (T, B, width), (M, B, width)
    if learned is None:
        shapes = dict(zip(INPUTS, (states, (M + T, 1, width), bias, bias, memory), strict=True))
    else:
        shapes = dict(zip(LEARNED_INPUTS, (states, (learned, *bias), bias, (learned, n_head), memory), strict=True))
    return {
        name: torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def run(
    layer: nn.Module,
    inputs: dict[str, Tensor],
    gout: Tensor,
    attn_mask: Tensor | None = None,
    autocast: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The output ("out") and the gradients of all inputs and parameters for the cotangent gout, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    with torch.autocast(gout.device.type, autocast, enabled=autocast is not None):
        out = layer(**leaves, attn_mask=attn_mask)
    leaves |= dict(layer.named_parameters())
    gradients = torch.autograd.grad(
        out, list(leaves.values()), gout.to(out.dtype), materialize_grads=True
    )  # without memory nothing depends on the empty mems
    return {"out": out.detach()} | dict(zip(leaves, gradients, strict=True))


def assert_as_accurate(
    got: dict[str, Tensor], wanted: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """The error policy for what run() returns, dtype being that of the products.

    Autocast hands its 16-bit numbers out as float32, so they are held to the policy in the 16-bit dtype.
    """
    for name in truth:
        assert got[name].dtype == wanted[name].dtype, f"{name}: {got[name].dtype}, not {wanted[name].dtype}"
        factor = OUTPUT_FACTOR if name == "out" else GRADIENT_FACTOR
        assert_close_to_truth(name, got[name].to(dtype), truth[name], wanted[name].to(dtype), factor)
