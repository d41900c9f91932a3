"""Fused Transformer-XL relative attention: one function and two layers, on GPU (Triton) and CPU (PyTorch)."""

from txl_kernels.functional import rel_attention
from txl_kernels.layer import RelLearnableMultiHeadAttn, RelPartialLearnableMultiHeadAttn
from txl_kernels.version import __version__

__all__ = ["RelLearnableMultiHeadAttn", "RelPartialLearnableMultiHeadAttn", "__version__", "rel_attention"]
