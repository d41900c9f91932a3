"""The audio encoders of Gemma 3n and Gemma 4 of Hugging Face with their subsampling by 4, on a padded batch."""

import functools

import torch
import transformers
from torch import Tensor, nn
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nAudioEncoder
from transformers.models.gemma4.modeling_gemma4 import Gemma4AudioModel

from benchmarks.families import AUDIO, Encoder
from benchmarks.measure import with_larger_weights

MELS = 32  # of 128, or the subsampling would be all there is to measure


def _gemma3n(width: int, heads: int, layers: int) -> nn.Module:
    sizes = {"hidden_size": width, "conf_num_attention_heads": heads, "conf_num_hidden_layers": layers}
    config = transformers.Gemma3nAudioConfig(**sizes, input_feat_size=MELS, sscp_conv_channel_size=(32, 16))
    return Gemma3nAudioEncoder(config)


def _gemma4(width: int, heads: int, layers: int) -> nn.Module:
    sizes = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers}
    config = transformers.Gemma4AudioConfig(**sizes, subsampling_conv_channels=(MELS, 16), output_proj_dims=width)
    return Gemma4AudioModel(config)


def _build(make, T: int, B: int, layers: int, smoke: bool):
    if smoke:
        T, width, heads, layers = 8, 16, 2, 1
    else:
        width, heads = 256, 4
    torch.manual_seed(0)
    model = with_larger_weights(make(width, heads, layers)).eval()
    features, valid = torch.randn(B, 4 * T, MELS), torch.ones(B, 4 * T, dtype=torch.bool)
    valid[1:, 3 * T :] = False
    mask = valid if make is _gemma4 else ~valid

    def run(model: nn.Module) -> Tensor:
        device = next(model.parameters()).device
        return model(features.to(device), mask.to(device)).last_hidden_state

    return model, run


ENCODERS = [
    Encoder("Gemma 3n audio", "Gemma3nAudioAttention", functools.partial(_build, _gemma3n)),
    Encoder("Gemma 4 audio", "Gemma4AudioAttention", functools.partial(_build, _gemma4)),
]
# 25 frames a second
CASES = [encoder.case(length, 2 * T, B, n) for encoder in ENCODERS for length, T, B, n in AUDIO[:2]]
