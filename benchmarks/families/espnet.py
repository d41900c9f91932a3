"""ESPnet's Conformer encoder on a padded batch, with both kinds of relative positions.

It gets frames that are subsampled already, as from a pretrained front end: its own convolutions would take most of the
time of so few layers.
"""

import functools

import torch
from espnet2.asr.encoder.conformer_encoder import ConformerEncoder
from torch import Tensor, nn

from benchmarks.families import AUDIO, Encoder
from benchmarks.measure import with_larger_weights


def _build(kind: str, T: int, B: int, layers: int, smoke: bool):
    sizes = {"output_size": 256, "attention_heads": 4, "linear_units": 1024, "num_blocks": layers}
    if smoke:
        T, sizes = 8, {"output_size": 16, "attention_heads": 2, "linear_units": 16, "num_blocks": 1}
    torch.manual_seed(0)
    model = ConformerEncoder(80, **sizes, input_layer="linear", rel_pos_type=kind, macaron_style=True)
    model = with_larger_weights(model).eval()
    features, lengths = torch.randn(B, T, 80), torch.full((B,), T)
    lengths[1:] = 3 * T // 4

    def run(model: nn.Module) -> Tensor:
        device = next(model.parameters()).device
        return model(features.to(device), lengths.to(device))[0]

    return model, run


ENCODERS = [
    Encoder("ESPnet", "RelPositionMultiHeadedAttention", functools.partial(_build, "latest")),
    Encoder("ESPnet, legacy positions", "LegacyRelPositionMultiHeadedAttention", functools.partial(_build, "legacy")),
]
CASES = [encoder.case(*sizes) for encoder in ENCODERS for sizes in AUDIO[:2]]
