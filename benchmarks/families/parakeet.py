"""The Parakeet encoder of Hugging Face with its subsampling, on a padded batch."""

import torch
import transformers
from torch import Tensor, nn

from benchmarks.families import AUDIO, Encoder
from benchmarks.measure import with_larger_weights


def build(T: int, B: int, layers: int, smoke: bool):
    """A padded batch of T frames after subsampling."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "num_hidden_layers": layers}
    if smoke:
        T, sizes = 8, {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.ParakeetEncoderConfig(**sizes, num_mel_bins=80, subsampling_conv_channels=8, layerdrop=0.0)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = with_larger_weights(transformers.ParakeetEncoder(config)).eval()
    features, mask = torch.randn(B, 8 * T, 80), torch.ones(B, 8 * T, dtype=torch.bool)
    mask[1:, 6 * T :] = False

    def run(model: nn.Module) -> Tensor:
        device = next(model.parameters()).device
        return model(features.to(device), attention_mask=mask.to(device)).last_hidden_state

    return model, run


ENCODERS = [Encoder("Parakeet", "ParakeetEncoderAttention", build)]
CASES = [encoder.case(*sizes) for encoder in ENCODERS for sizes in AUDIO]
