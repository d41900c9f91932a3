"""The whole Transformer-XL (Dai et al. 2019, arXiv 1901.02860) on the fused attention.

Class names, parameters and state_dict keys are those of the original PyTorch code. `load_original` reads its
checkpoints, `load_huggingface` those of Hugging Face's implementation; `save` and `load` have a format of their own.
"""

from txl_kernels.models.adaptive import AdaptiveEmbedding, ProjectedAdaptiveLogSoftmax
from txl_kernels.models.cache import Cache
from txl_kernels.models.checkpoints import CheckpointError, load, load_huggingface, load_original, save
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
    "CheckpointError",
    "DecoderLayer",
    "MemTransformerLM",
    "MultiHeadAttn",
    "PositionalEmbedding",
    "PositionwiseFF",
    "ProjectedAdaptiveLogSoftmax",
    "RelLearnableDecoderLayer",
    "RelPartialLearnableDecoderLayer",
    "load",
    "load_huggingface",
    "load_original",
    "save",
]
