"""The parts of the model, each against its formula."""

import copy
import math

import pytest
import torch
from torch import nn

from tests.layer_tools import original_mask, same_length_mask
from txl_kernels.models import AdaptiveEmbedding, MultiHeadAttn, PositionalEmbedding, ProjectedAdaptiveLogSoftmax


def test_positional_embedding():
    rows = PositionalEmbedding(6)(torch.tensor([3.0, 0.0]))
    angles = [3 / 10000 ** (2 * k / 6) for k in range(3)]
    wanted = [[math.sin(x) for x in angles] + [math.cos(x) for x in angles], [0.0] * 3 + [1.0] * 3]
    torch.testing.assert_close(rows, torch.tensor(wanted)[:, None])
    assert torch.equal(PositionalEmbedding(6)(torch.tensor([3.0, 0.0]), 4), rows.expand(2, 4, 6))


def test_positions_of_a_16_bit_model_are_told_apart():
    module, positions = PositionalEmbedding(8), torch.arange(3000, 0, -1)
    got = copy.deepcopy(module).bfloat16()(positions)
    assert torch.equal(got, module(positions).bfloat16())


@pytest.mark.parametrize("mask", ["none", "causal", "by element", "keys", "window", "no window"])
@pytest.mark.parametrize("pre_lnorm", [False, True])
@pytest.mark.parametrize(("T", "M"), [(4, 0), (4, 3), (1, 3)])
def test_multi_head_attention(T, M, pre_lnorm, mask):
    torch.manual_seed(0)
    layer = MultiHeadAttn(2, 12, 5, 0.0, pre_lnorm=pre_lnorm).double()
    h, mems = torch.randn(T, 3, 12).double(), torch.randn(M, 3, 12).double()
    hidden = original_mask(T, M)
    if mask == "by element":
        hidden = hidden | (torch.rand(T, M + T, 3) < 0.4) & ~torch.eye(T, M + T).roll(M, 1)[:, :, None].bool()
    if mask == "keys":
        hidden = torch.rand(M + T, 3) < 0.4
        hidden[0] = False
    window = {"window": (2, -1), "no window": (-1, -1)}.get(mask)
    if mask == "window":
        hidden = same_length_mask(T, M, 3)
    got = layer(h, None if window or mask == "none" else hidden.to(torch.uint8), mems, window=window)
    states = torch.cat([mems, h])
    q = layer.q_net(h).view(T, 3, 2, 5)
    k, v = (
        x.view(M + T, 3, 2, 5) for x in layer.kv_net(layer.layer_norm(states) if pre_lnorm else states).chunk(2, -1)
    )
    score = torch.einsum("ibnd,jbnd->ijbn", q, k) / 5**0.5
    prob = score.masked_fill(hidden.expand(T, M + T, 3)[..., None].bool(), -math.inf).softmax(1)
    out = h + layer.o_net(torch.einsum("ijbn,jbnd->ibnd", prob, v).flatten(2))
    torch.testing.assert_close(got, out if pre_lnorm else layer.layer_norm(out), rtol=1e-10, atol=1e-10)


CLUSTERS = [
    {"cutoffs": [], "div_val": 1},
    {"cutoffs": [8, 19], "div_val": 1},
    {"cutoffs": [8, 19], "div_val": 2},
    {"cutoffs": [1], "div_val": 4},
    {"cutoffs": [], "div_val": 2},
]


@pytest.mark.parametrize("d_embed", [12, 8])
@pytest.mark.parametrize("clusters", CLUSTERS, ids=str)
def test_adaptive_embedding_token_by_token(clusters, d_embed):
    module = AdaptiveEmbedding(29, d_embed, 12, **clusters)
    ends, got = [0, *clusters["cutoffs"], 29], module(torch.arange(29).flip(0).view(29, 1))
    for token in range(29):
        i = max(n for n, left in enumerate(ends) if token >= left)
        first = ends[i] if clusters["div_val"] != 1 else 0
        layer = i if clusters["div_val"] != 1 else 0
        wanted = module.emb_layers[layer].weight[token - first]
        if len(module.emb_projs):
            wanted = module.emb_projs[layer] @ wanted
        torch.testing.assert_close(got[28 - token, 0], wanted * 12**0.5)
    assert got.shape == (29, 1, 12)
    assert len(module.emb_projs) == (0 if clusters["div_val"] == 1 and d_embed == 12 else len(module.emb_layers))


@pytest.mark.parametrize("d_embed", [12, 8])
@pytest.mark.parametrize("clusters", CLUSTERS, ids=str)
def test_adaptive_softmax_is_a_distribution_in_token_order(clusters, d_embed):
    torch.manual_seed(0)
    module = ProjectedAdaptiveLogSoftmax(29, d_embed, 12, **clusters).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    hidden = torch.randn(12).double()
    losses = module(hidden.expand(29, 12), torch.arange(29))
    torch.testing.assert_close((-losses).exp().sum(), torch.tensor(1.0).double())
    order = torch.randperm(29)
    torch.testing.assert_close(module(hidden.expand(29, 12), order), losses[order])
    alone = [module(hidden[None], torch.tensor([token])) for token in range(29)]  # all other clusters empty
    torch.testing.assert_close(torch.cat(alone), losses)
    assert {module(hidden[None], torch.tensor([t])).dtype for t in (0, 28)} == {torch.float64}
    torch.testing.assert_close(module.log_probs(hidden.expand(2, 12)), -losses.expand(2, 29))
    assert module.bfloat16().log_probs(hidden[None].bfloat16()).dtype == torch.float32
