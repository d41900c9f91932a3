"""What the fused operator is held against: its definition, the original algorithm and the original layer.

Nothing here imports `txl_kernels`, and `txl_kernels` never imports this package.
"""

from reference.definition import rel_attention_definition
from reference.eager import rel_attention_eager, rel_attention_original
from reference.layer import RelLearnableMultiHeadAttn, RelPartialLearnableMultiHeadAttn

__all__ = [
    "RelLearnableMultiHeadAttn",
    "RelPartialLearnableMultiHeadAttn",
    "rel_attention_definition",
    "rel_attention_eager",
    "rel_attention_original",
]
