"""fairseq's speech-to-text Conformer encoder with its subsampling, on a padded batch."""

import argparse

import torch
from torch import Tensor, nn

from benchmarks.families import AUDIO, Encoder
from benchmarks.measure import with_larger_weights
from tests.patching.fairseq_package import S2TConformerEncoder


def _build(T: int, B: int, layers: int, smoke: bool):
    C, heads, ffn = 256, 4, 1024
    if smoke:
        T, layers, C, heads, ffn = 8, 1, 16, 2, 16
    sizes = {"encoder_embed_dim": C, "encoder_ffn_embed_dim": ffn, "encoder_attention_heads": heads}
    sizes |= {"encoder_layers": layers, "input_feat_per_channel": 80, "input_channels": 1, "conv_channels": 64}
    options = {"conv_kernel_sizes": "5", "no_scale_embedding": False, "max_source_positions": T, "dropout": 0.0}
    options |= {"depthwise_conv_kernel_size": 31, "attn_type": "espnet", "pos_enc_type": "rel_pos", "fp16": False}
    torch.manual_seed(0)
    model = with_larger_weights(S2TConformerEncoder(argparse.Namespace(**sizes, **options))).eval()
    features, lengths = torch.randn(B, 2 * T, 80), torch.full((B,), 2 * T)
    lengths[1:] = 3 * T // 2

    def run(model: nn.Module) -> Tensor:
        device = next(model.parameters()).device
        return model(features.to(device), lengths.to(device))["encoder_out"][0]

    return model, run


ENCODERS = [Encoder("fairseq", "RelPositionMultiHeadedAttention", _build)]
CASES = [encoder.case(*sizes) for encoder in ENCODERS for sizes in AUDIO[:2]]
