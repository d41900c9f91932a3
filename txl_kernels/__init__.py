"""Fused Transformer-XL relative attention: one function and one layer, on GPU (Triton) and CPU (PyTorch)."""

from txl_kernels.functional import rel_attention
from txl_kernels.layer import RelPartialLearnableMultiHeadAttn
from txl_kernels.version import __version__

__all__ = ["RelPartialLearnableMultiHeadAttn", "__version__", "rel_attention"]
