"""The Nemotron ASR streaming encoder of Hugging Face: whole recordings, padded, and a stream of chunks with caches."""

import functools

import torch
import transformers
from torch import Tensor, nn

from benchmarks.families import AUDIO, Case, Encoder, shape_of
from benchmarks.measure import with_larger_weights

LOOKAHEAD = 13  # frames: chunks of 14, five of which are seen beside a frame's own


def _encoder(C: int, H: int, layers: int, smoke: bool) -> nn.Module:
    if smoke:
        C, H, layers = 16, 2, 1
    sizes = {"hidden_size": C, "num_attention_heads": H, "intermediate_size": 4 * C, "num_hidden_layers": layers}
    config = transformers.NemotronAsrStreamingEncoderConfig(**sizes, subsampling_conv_channels=32, layerdrop=0.0)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return with_larger_weights(transformers.NemotronAsrStreamingEncoder(config)).eval()


def _build(T: int, B: int, layers: int, smoke: bool):
    T, model = 8 if smoke else T, _encoder(256, 4, layers, smoke)
    features, mask = torch.randn(B, 8 * T, 80), torch.ones(B, 8 * T, dtype=torch.bool)
    mask[1:, 6 * T :] = False

    def run(model: nn.Module) -> Tensor:
        inputs = {"input_features": features, "attention_mask": mask}
        device = next(model.parameters()).device
        inputs = {name: x.to(device) for name, x in inputs.items()}
        return model(**inputs, num_lookahead_tokens=LOOKAHEAD).last_hidden_state

    return model, run


def _build_stream(chunks: int, layers: int, smoke: bool):
    chunks, model = 2 if smoke else chunks, _encoder(1024, 8, layers, smoke)  # as wide as the checkpoint
    features = torch.randn(chunks, 1, 8 * (LOOKAHEAD + 1), 80)

    def run(model: nn.Module) -> Tensor:
        states, caches = [], {}
        for chunk in features.to(next(model.parameters()).device):
            out = model(chunk, use_cache=True, num_lookahead_tokens=LOOKAHEAD, **caches)
            caches = {"past_key_values": out.past_key_values, "padding_cache": out.padding_cache}
            states.append(out.last_hidden_state)
        return torch.cat(states, dim=1)

    return model, run


ENCODERS = [Encoder("Nemotron streaming", "NemotronAsrStreamingEncoderAttention", _build)]
CASES = [encoder.case(*sizes) for encoder in ENCODERS for sizes in AUDIO[:2]]  # its positions end at 5000
CASES.append(
    Case(
        "Nemotron streaming",
        shape_of("27 chunks", 2, "8 heads x 128", T=14, B=1),
        functools.partial(_build_stream, 27, 2),
    )
)
