"""The model against a plain definition, query by query, for what the golden cases do not cover."""

import pytest
import torch

from tests.models.tools import make_model, make_segments


def plain_forward(model, data, mems):
    """Hidden states and new memory as MemTransformerLM._forward, from the formulas."""
    T, M, C, kind = data.shape[0], mems[0].shape[0], model.d_model, model.attn_type
    far = model.clamp_len if model.clamp_len > 0 else M + T
    frequency = (1 / 10000 ** (torch.arange(0, C, 2) / C)).double()  # a float32 buffer in the original
    angle = torch.arange(M + T).clamp(max=far)[:, None] * frequency  # by distance
    sinusoid = torch.cat([angle.sin(), angle.cos()], 1)
    h, mems, hids = model.word_emb(data), list(mems), []
    for n, layer in enumerate(model.layers):
        if kind == 3 or (kind == 2 and n == 0):
            rows = sinusoid.flip(0) if kind == 2 else by_distance(model.r_emb[n], M + T).flip(0).flatten(1)
            h, mems[n] = h + rows[M:, None], mems[n] + rows[:M, None] if M else mems[n]
        hids.append(h)
        att, x = layer.dec_attn, torch.cat([mems[n], h])
        norm = att.layer_norm if att.pre_lnorm else lambda x: x
        heads = (-1, data.shape[1], att.n_head, att.d_head)
        if kind < 2:
            q, k, v = (x.reshape(heads) for x in att.qkv_net(norm(x)).chunk(3, -1))
            q = q[M:]
        else:
            q, k, v = (x.reshape(heads) for x in (att.q_net(h), *att.kv_net(norm(x)).chunk(2, -1)))
        u = v_pos = r_bias = r = 0
        if kind == 0:
            u, v_pos = (b if b.ndim == 2 else b[n] for b in (model.r_w_bias, model.r_r_bias))
            r = att.r_net(sinusoid).reshape(-1, *heads[2:])
        if kind == 1:
            u = model.r_w_bias[n]
            r, r_bias = (by_distance(x[n][-far:], M + T) for x in (model.r_emb, model.r_bias))
        outs = []
        for i in range(T):
            first = max(0, i + M - model.mem_len + 1) if model.same_length else 0
            keys = torch.arange(first, i + M + 1)
            score = torch.einsum("bnd,jbnd->jbn", q[i] + u, k[keys])
            if kind < 2:
                distance = i + M - keys
                score = score + torch.einsum("bnd,jnd->jbn", q[i] + v_pos, r[distance])
                score = score + (r_bias[distance][:, None] if kind == 1 else 0)
            prob = torch.softmax(score / att.d_head**0.5, 0)
            outs.append(torch.einsum("jbn,jbnd->bnd", prob, v[keys]).flatten(1))
        out = h + att.o_net(torch.stack(outs))
        out = out if att.pre_lnorm else att.layer_norm(out)
        net = layer.pos_ff
        h = out + net.CoreNet(net.layer_norm(out)) if net.pre_lnorm else net.layer_norm(out + net.CoreNet(out))
    hids.append(h)
    end = T + max(0, M - model.ext_len)
    new = [torch.cat([m, x])[max(0, end - model.mem_len) : end].detach() for m, x in zip(mems, hids, strict=True)]
    return h, new


def by_distance(rows, n):
    """Rows for distances 0 ... n - 1 of rows whose last stands for 0; the first stands for all beyond it."""
    return rows.flip(0)[torch.arange(n).clamp(max=rows.shape[0] - 1)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pre_lnorm": True},
        {"same_length": True},
        {"same_length": True, "mem_len": 3},  # a window shorter than the segment
        {"clamp_len": 4},
        {"same_length": True, "clamp_len": 3, "pre_lnorm": True},
        {"ext_len": 2},
        {"mem_len": 0},
        {"mem_len": 2},
        {"mem_len": 40, "tgt_len": 1},
    ],
    ids=lambda options: " ".join(f"{k}={x}" for k, x in options.items()) or "plain",
)
@pytest.mark.parametrize("attn_type", [0, 1, 2, 3])
def test_the_plain_definition(attn_type, options):
    model = make_model(attn_type=attn_type, **options)
    ours, plain, got, wanted = model.init_mems(), [torch.empty(0, 3, 12).double()] * 3, [], []
    for data, _ in make_segments():
        hidden, ours = model._forward(data, ours)
        plain_hidden, plain = plain_forward(model, data, plain)
        got.append(hidden)
        wanted.append(plain_hidden)
        for x, y in zip(ours or [], plain if ours else [], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    got, wanted = torch.stack(got), torch.stack(wanted)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    gout = torch.randn(got.shape, generator=torch.Generator().manual_seed(2)).double()
    grads = [torch.autograd.grad(out, list(model.parameters()), gout, materialize_grads=True) for out in (got, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)
