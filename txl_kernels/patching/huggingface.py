"""What the models of Hugging Face transformers have in common."""

from torch import nn


def wants_weights(module: nn.Module, kwargs: dict) -> bool:
    """Whether a call with these keyword arguments asks for attention weights."""
    return bool(kwargs.get("output_attentions", getattr(module.config, "output_attentions", False)))
