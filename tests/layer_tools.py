"""Shared by the tests of the layer: layers, inputs, the original mask, gradients by name, a count of operators."""

from collections import Counter

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.accuracy import GRADIENT_FACTOR, OUTPUT_FACTOR, assert_close_to_truth
from txl_kernels.layer import RelPartialLearnableMultiHeadAttn

H, D, C = 2, 5, 12  # H * D != C and an odd head size, so that no two sizes can be mistaken for each other
INPUTS = ("w", "r", "r_w_bias", "r_r_bias", "mems")


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
) -> dict[str, Tensor]:
    """The inputs of the layer by name, requiring grad; the same numbers each time."""
    generator = torch.Generator().manual_seed(1)
    n_head, d_head, width = sizes
    bias = (n_head, d_head)
    shapes = ((T, B, width), (M + T, 1, width), bias, bias, (M, B, width))
    return {
        name: torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        for name, shape in zip(INPUTS, shapes, strict=True)
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
