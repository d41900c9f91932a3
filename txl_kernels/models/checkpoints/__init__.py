"""Checkpoints of `MemTransformerLM`: the original's, Hugging Face's and our own format.

Nothing that a file holds is run, and a model is returned whole or not at all: what does not fit is a `CheckpointError`.
A hostile file can still cost time and memory.
"""

from txl_kernels.models.checkpoints.files import CheckpointError
from txl_kernels.models.checkpoints.huggingface import load_huggingface
from txl_kernels.models.checkpoints.original import load_original
from txl_kernels.models.checkpoints.own import load, save

__all__ = ["CheckpointError", "load", "load_huggingface", "load_original", "save"]
