"""SpeechBrain's Conformer encoder on a padded batch."""

import torch
from torch import Tensor, nn

from benchmarks.families import AUDIO, Encoder
from benchmarks.measure import with_larger_weights
from tests.patching.speechbrain_package import ConformerEncoder, RelPosEncXL


def _build(T: int, B: int, layers: int, smoke: bool):
    C, heads, ffn = 256, 4, 1024
    if smoke:
        T, layers, C, heads, ffn = 8, 1, 16, 2, 16
    torch.manual_seed(0)
    model = with_larger_weights(ConformerEncoder(layers, C, ffn, heads)).eval()
    x, padding = torch.randn(B, T, C), torch.zeros(B, T, dtype=torch.bool)
    padding[1:, 3 * T // 4 :] = True
    positions = RelPosEncXL(C).make_pe(T)

    def run(model: nn.Module) -> Tensor:
        device = next(model.parameters()).device
        masks = {"src_key_padding_mask": padding.to(device)}
        return model(x.to(device), pos_embs=positions.to(device), **masks)[0]

    return model, run


ENCODERS = [Encoder("SpeechBrain", "RelPosMHAXL", _build)]
CASES = [encoder.case(*sizes) for encoder in ENCODERS for sizes in AUDIO[:2]]
