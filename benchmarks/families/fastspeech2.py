"""The decoder of FastSpeech2-Conformer of Hugging Face, at the sizes of its checkpoint, on a padded batch of frames."""

import torch
from torch import Tensor, nn
from transformers import FastSpeech2ConformerConfig
from transformers.models.fastspeech2_conformer.modeling_fastspeech2_conformer import FastSpeech2ConformerEncoder

from benchmarks.families import Encoder
from benchmarks.measure import with_larger_weights


def _build(T: int, B: int, layers: int, smoke: bool):
    sizes = {"hidden_size": 384, "decoder_num_attention_heads": 2, "decoder_linear_units": 1536}
    if smoke:
        T, layers, sizes = 8, 1, {"hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_linear_units": 16}
    config = FastSpeech2ConformerConfig(**sizes, decoder_layers=layers)
    torch.manual_seed(0)
    model = FastSpeech2ConformerEncoder(config, config.decoder_config)
    for parameter in model.parameters():
        if parameter.ndim == 2:  # biases of attention are made without values
            nn.init.xavier_uniform_(parameter)
    model = with_larger_weights(model).eval()
    frames, mask = torch.randn(B, T, config.hidden_size), torch.ones(B, 1, T, dtype=torch.bool)
    mask[1:, :, 3 * T // 4 :] = False

    def run(model: nn.Module) -> Tensor:
        device = next(model.parameters()).device
        return model(frames.to(device), mask.to(device), return_dict=True).last_hidden_state

    return model, run


ENCODERS = [Encoder("FastSpeech2-Conformer", "FastSpeech2ConformerAttention", _build, "2 heads x 192")]
# 86 frames a second
CASES = [encoder.case(*sizes) for encoder in ENCODERS for sizes in (("4 s", 375, 4, 2), ("17 s", 1500, 2, 2))]
