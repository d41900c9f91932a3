"""NeMo's FastConformer encoder with its subsampling, on a padded batch: full and chunked context, Longformer."""

import functools

import torch
from torch import Tensor, nn

from benchmarks.families import AUDIO, Encoder
from benchmarks.measure import with_larger_weights
from tests.patching.nemo_package import ConformerEncoder

FULL = {}
CHUNKED = {"att_context_size": [70, 13], "att_context_style": "chunked_limited"}
LONGFORMER = {"self_attention_model": "rel_pos_local_attn", "att_context_size": [128, 128]}


def _build(context: dict, T: int, B: int, layers: int, smoke: bool):
    sizes = {"d_model": 256, "n_heads": 4, "n_layers": layers, "subsampling_conv_channels": 64, "conv_kernel_size": 9}
    if smoke:
        T, sizes = 8, {"d_model": 16, "n_heads": 2, "n_layers": 1, "subsampling_conv_channels": 8}
    subsampling = {"subsampling": "dw_striding", "subsampling_factor": 8}
    torch.manual_seed(0)
    model = with_larger_weights(ConformerEncoder(feat_in=80, **subsampling, **sizes, **context)).eval()
    features, lengths = torch.randn(B, 80, 8 * T), torch.full((B,), 8 * T)
    lengths[1:] = 6 * T

    def run(model: nn.Module) -> Tensor:
        device = next(model.parameters()).device
        return model(audio_signal=features.to(device), length=lengths.to(device))[0]

    return model, run


_ATTENTION = "RelPositionMultiHeadAttention"
ENCODERS = [
    Encoder("NeMo", _ATTENTION, functools.partial(_build, FULL)),
    Encoder("NeMo, chunks of 14 with 70 behind", _ATTENTION, functools.partial(_build, CHUNKED)),
    Encoder("NeMo, Longformer of 128", f"{_ATTENTION}Longformer", functools.partial(_build, LONGFORMER)),
]
CASES = [
    encoder.case(*sizes)
    for encoder in ENCODERS
    for sizes in AUDIO[:2]
    if encoder.family == "NeMo" or sizes[0] == "2 min"
]
