"""Fused Transformer-XL relative attention: one function, two layers and `patch`, on GPU (Triton) and CPU (PyTorch)."""

from txl_kernels.functional import rel_attention
from txl_kernels.layer import RelLearnableMultiHeadAttn, RelPartialLearnableMultiHeadAttn
from txl_kernels.patching import PatchError, Report, patch, unpatch
from txl_kernels.version import __version__

__all__ = [
    "PatchError",
    "RelLearnableMultiHeadAttn",
    "RelPartialLearnableMultiHeadAttn",
    "Report",
    "__version__",
    "patch",
    "rel_attention",
    "unpatch",
]
