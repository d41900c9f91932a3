"""The whole Transformer-XL (Dai et al. 2019, arXiv 1901.02860) on the fused attention.

Class names, parameters and state_dict keys are those of the original PyTorch code, so its checkpoints load.
"""

from txl_kernels.models.adaptive import AdaptiveEmbedding, ProjectedAdaptiveLogSoftmax
from txl_kernels.models.cache import Cache
from txl_kernels.models.decoder import (
    DecoderLayer,
    MultiHeadAttn,
    PositionalEmbedding,
    PositionwiseFF,
    RelLearnableDecoderLayer,
    RelPartialLearnableDecoderLayer,
)
from txl_kernels.models.language_model import MemTransformerLM

__all__ = [
    "AdaptiveEmbedding",
    "Cache",
    "DecoderLayer",
    "MemTransformerLM",
    "MultiHeadAttn",
    "PositionalEmbedding",
    "PositionwiseFF",
    "ProjectedAdaptiveLogSoftmax",
    "RelLearnableDecoderLayer",
    "RelPartialLearnableDecoderLayer",
]
