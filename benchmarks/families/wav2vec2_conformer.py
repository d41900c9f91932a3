"""The encoders of Wav2Vec2-Conformer, Wav2Vec2-BERT and SeamlessM4T, of Hugging Face, on padded batches of frames."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import SeamlessM4TConfig, Wav2Vec2BertConfig, Wav2Vec2ConformerConfig
from transformers.models.seamless_m4t.modeling_seamless_m4t import SeamlessM4TConformerEncoder
from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertEncoder
from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import Wav2Vec2ConformerEncoder

from benchmarks.families import AUDIO, Encoder
from benchmarks.measure import with_larger_weights


def _wav2vec2(config: type, encoder: type, C: int, H: int, layers: int) -> nn.Module:
    sizes = {"hidden_size": C, "num_attention_heads": H, "num_hidden_layers": layers, "intermediate_size": 4 * C}
    config = config(**sizes, position_embeddings_type="relative", layerdrop=0.0)
    config._attn_implementation = "sdpa"
    return encoder(config)


def _seamless(C: int, H: int, layers: int) -> nn.Module:
    config = SeamlessM4TConfig(
        hidden_size=C,
        speech_encoder_attention_heads=H,
        speech_encoder_layers=layers,
        speech_encoder_intermediate_size=4 * C,
        speech_encoder_layerdrop=0.0,
    )
    config._attn_implementation = "sdpa"
    return SeamlessM4TConformerEncoder(config)


def _build(make: Callable[[int, int, int], nn.Module], T: int, B: int, layers: int, smoke: bool):
    if smoke:
        T, layers = 8, 1
    C, H = (16, 2) if smoke else (256, 4)
    torch.manual_seed(0)
    model = with_larger_weights(make(C, H, layers)).eval()
    frames, valid = torch.randn(B, T, C), torch.ones(B, T, dtype=torch.bool)
    valid[1:, 3 * T // 4 :] = False

    def run(model: nn.Module) -> Tensor:
        device = next(model.parameters()).device
        out = model(frames.to(device, copy=True), attention_mask=valid.to(device))  # some edit frames in place
        return getattr(out, "last_hidden_state", out)

    return model, run


_CONFORMER = functools.partial(_wav2vec2, Wav2Vec2ConformerConfig, Wav2Vec2ConformerEncoder)
_BERT = functools.partial(_wav2vec2, Wav2Vec2BertConfig, Wav2Vec2BertEncoder)
ENCODERS = [
    Encoder("Wav2Vec2-Conformer", "Wav2Vec2ConformerSelfAttention", functools.partial(_build, _CONFORMER)),
    Encoder("Wav2Vec2-BERT", "Wav2Vec2BertSelfAttention", functools.partial(_build, _BERT)),
    Encoder("SeamlessM4T", "SeamlessM4TConformerSelfAttention", functools.partial(_build, _seamless)),
]
CASES = [encoder.case(*sizes) for encoder in ENCODERS for sizes in AUDIO[:2]]
