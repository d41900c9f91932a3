"""The original Transformer-XL's decoder with its masks, on the eager layers of `reference.layer`: it is no package."""

import functools

import torch
from torch import Tensor, nn

from benchmarks.families import Case, shape_of
from benchmarks.measure import with_larger_weights
from reference.layer import RelPartialLearnableMultiHeadAttn
from txl_kernels.models.decoder import PositionalEmbedding, PositionwiseFF


class _Decoder(nn.Module):
    def __init__(self, n_head: int, d_model: int, d_inner: int, n_layer: int) -> None:
        super().__init__()
        d_head = d_model // n_head
        self.pos_emb = PositionalEmbedding(d_model)
        self.attention = nn.ModuleList(
            RelPartialLearnableMultiHeadAttn(n_head, d_model, d_head, dropout=0.0) for _ in range(n_layer)
        )
        self.feed_forward = nn.ModuleList(PositionwiseFF(d_model, d_inner, dropout=0.0) for _ in range(n_layer))
        self.r_w_bias = nn.Parameter(torch.randn(n_head, d_head))
        self.r_r_bias = nn.Parameter(torch.randn(n_head, d_head))

    def forward(self, states: Tensor, mems: Tensor) -> Tensor:
        T, M = states.shape[0], mems.shape[1]
        mask = torch.triu(states.new_ones(T, M + T), diagonal=1 + M).bool()[:, :, None]
        r = self.pos_emb(torch.arange(M + T - 1, -1, -1.0, device=states.device))
        for attention, feed_forward, memory in zip(self.attention, self.feed_forward, mems, strict=True):
            states = feed_forward(attention(states, r, self.r_w_bias, self.r_r_bias, mask, memory))
        return states


def _build(T: int, M: int, B: int, layers: int, smoke: bool):
    n_head, d_model, d_inner = 4, 256, 1024
    if smoke:
        T, M, n_head, d_model, d_inner = 8, 6, 2, 16, 16
    torch.manual_seed(0)
    model = with_larger_weights(_Decoder(n_head, d_model, d_inner, layers)).eval()
    states, mems = torch.randn(T, B, d_model), torch.randn(layers, M, B, d_model)

    def run(model: nn.Module) -> Tensor:
        device = model.r_w_bias.device
        return model(states.to(device), mems.to(device))

    return model, run


CASES = [
    Case(
        "Transformer-XL (original)",
        shape_of(f"{T} + {M}", n, T=T, M=M, B=B),
        functools.partial(_build, T, M, B, n),
    )
    for T, M, B, n in ((512, 512, 4, 2),)
]
