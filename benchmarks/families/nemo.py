"""NeMo's FastConformer encoder with its subsampling, on a padded batch: full and chunked context, Longformer."""

import functools

import torch
from torch import Tensor, nn

from benchmarks.families import AUDIO, Case, shape_of
from benchmarks.measure import with_larger_weights
from tests.patching.nemo_package import ConformerEncoder

CONTEXTS = {
    "NeMo": {},
    "NeMo, chunks of 14 with 70 behind": {"att_context_size": [70, 13], "att_context_style": "chunked_limited"},
    "NeMo, Longformer of 128": {"self_attention_model": "rel_pos_local_attn", "att_context_size": [128, 128]},
}


def _build(context: str, T: int, B: int, layers: int, smoke: bool):
    sizes = {"d_model": 256, "n_heads": 4, "n_layers": layers, "subsampling_conv_channels": 64, "conv_kernel_size": 9}
    if smoke:
        T, sizes = 8, {"d_model": 16, "n_heads": 2, "n_layers": 1, "subsampling_conv_channels": 8}
    subsampling = {"subsampling": "dw_striding", "subsampling_factor": 8}
    torch.manual_seed(0)
    model = with_larger_weights(ConformerEncoder(feat_in=80, **subsampling, **sizes, **CONTEXTS[context])).eval()
    features, lengths = torch.randn(B, 80, 8 * T), torch.full((B,), 8 * T)
    lengths[1:] = 6 * T

    def run(model: nn.Module) -> Tensor:
        device = next(model.parameters()).device
        return model(audio_signal=features.to(device), length=lengths.to(device))[0]

    return model, run


CASES = [
    Case(context, shape_of(length, n, T=T, B=B), functools.partial(_build, context, T, B, n))
    for context in CONTEXTS
    for length, T, B, n in AUDIO[:2]
    if context == "NeMo" or length == "2 min"
]
