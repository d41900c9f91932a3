"""The README's snippets for other models, run as they stand, against the formulas of those models."""

import re
from pathlib import Path

import pytest
import torch

import txl_kernels
from txl_kernels import patching, rel_attention

B, H, T, M, D = 2, 3, 5, 4, 8
S = M + T
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
REQUIREMENTS = "\n".join(x.read_text() for x in [*(ROOT / "tests" / "patching").glob("*.txt"), ROOT / "pyproject.toml"])


def snippets(section):
    """The Python of a section, in order."""
    return re.findall(r"```python\n(.*?)```", README.split(f"## {section}\n")[1].split("\n## ")[0], re.S)


SNIPPETS = dict(zip(("Transformer-XL", "XLNet", "Conformer"), snippets("How the arguments map"), strict=True))


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def run(name, **variables):
    exec(SNIPPETS[name], {"torch": torch, "rel_attention": rel_attention}, variables)
    return variables["out"]


def shifted(bd, n, first):
    """bd (B, H, T, P) by pairs (B, H, T, n), where row 0 holds the distance `first`."""
    distance = torch.arange(bd.shape[2])[:, None] + n - bd.shape[2] - torch.arange(n)
    rows = first - distance
    inside = (rows >= 0) & (rows < bd.shape[3])
    return bd.gather(3, rows.clamp(0, bd.shape[3] - 1).expand(*bd.shape[:2], -1, -1)) * inside, distance


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_transformer_xl():
    q, k, v, r, u, w = draw(T, B, H, D), draw(S, B, H, D), draw(S, B, H, D), draw(S, H, D), draw(H, D), draw(H, D)
    out = run(
        "Transformer-XL", w_head_q=q, w_head_k=k, w_head_v=v, r_head_k=r, r_w_bias=u, r_r_bias=w, mem_len=M, dropatt=0.0
    )
    bd, distance = shifted(torch.einsum("ibnd,jnd->bnij", q + w, r), S, S - 1)
    score = (torch.einsum("ibnd,jbnd->bnij", q + u, k) + bd) / D**0.5
    score = score.masked_fill((distance < 0) | (distance >= M), -torch.inf)
    torch.testing.assert_close(out, torch.einsum("bnij,jbnd->bnid", score.softmax(-1), v))


def test_xlnet():
    q, k, v, r = draw(T, B, H, D), draw(S, B, H, D), draw(S, B, H, D), draw(S + T, B, H, D)
    u, w, s, seg_embed = draw(H, D), draw(H, D), draw(H, D), draw(2, H, D)
    q_ids = torch.randint(2, (B, T))
    k_ids = torch.cat([torch.zeros(B, M, dtype=torch.long), q_ids], 1)
    mask = (torch.rand(T, S, B, 1) < 0.3).double()
    mask[:, 0] = 0
    out = run(
        "XLNet", q_head=q, k_head_h=k, v_head_h=v, k_head_r=r, r_w_bias=u, r_r_bias=w, r_s_bias=s, seg_embed=seg_embed,
        attn_mask=mask, q_ids=q_ids, k_ids=k_ids,
    )  # fmt: skip
    bd, _ = shifted(torch.einsum("ibnd,jbnd->bnij", q + w, r), S, S)
    other = (q_ids[:, :, None] != k_ids[:, None]).long()
    ef = torch.einsum("ibnd,bijnd->bnij", q + s, seg_embed[other])
    score = (torch.einsum("ibnd,jbnd->bnij", q + u, k) + bd + ef) / D**0.5 - 1e30 * mask.permute(2, 3, 0, 1)
    torch.testing.assert_close(out, torch.einsum("bnij,jbnd->bnid", score.softmax(-1), v))


def test_conformer():
    q, k, v, p, u, w = (
        draw(B, T, H, D),
        draw(B, T, H, D),
        draw(B, T, H, D),
        draw(1, 2 * T - 1, H * D),
        draw(H, D),
        draw(H, D),
    )
    lengths = torch.tensor([T, 3])
    out = run("Conformer", q=q, k=k, v=v, p=p, H=H, D=D, pos_bias_u=u, pos_bias_v=w, lengths=lengths)
    bd, _ = shifted(torch.einsum("bihd,phd->bhip", q + w, p.view(-1, H, D)), T, T - 1)
    score = (torch.einsum("bihd,bjhd->bhij", q + u, k) + bd) / D**0.5
    score = score.masked_fill((torch.arange(T) >= lengths[:, None])[:, None, None], -torch.inf)
    torch.testing.assert_close(out, torch.einsum("bhij,bjhd->bhid", score.softmax(-1), v))


def test_language_model():
    tokens = torch.randint(256, (3 * 128 + 1, 1))
    segments = [(tokens[i : i + 128], tokens[i + 1 : i + 129]) for i in range(0, 384, 128)]
    variables = {"segments": segments, "prompt": tokens[:130]}
    exec(snippets("The whole Transformer-XL")[0], variables)
    assert variables["losses"].shape == (129, 1)
    wanted, *_ = variables["model"](tokens[:130], tokens[1:131])
    picked = variables["log_probs"][0, tokens[130, 0]]
    torch.testing.assert_close(-picked, wanted[-1, 0].detach())


def test_families():
    """Every class that `patch` knows is in the table, and the versions are those that the tests install."""
    rows = README.split("| models | package")[1].split("\n\n")[0]
    for name in patching.table.known_classes():
        assert f"`{name}`" in rows or name.endswith("Encoder"), name
    for pinned in re.findall(r"^([\w-]+)==(\S+)$", REQUIREMENTS, re.M):
        package, version = pinned
        if package in {family.package for family in patching.table.FAMILIES.values()}:
            assert re.search(rf"{package}.*\({version}", rows), pinned


def test_a_class_of_one_s_own():
    class MyAttention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkvr, self.output = torch.nn.Linear(H * D, 3 * H * D), torch.nn.Linear(H * D, H * D)
            self.r, self.u, self.v = (torch.nn.Parameter(draw(*n).float()) for n in ((H, 2 * T - 1, D), (H, D), (H, D)))

        def project(self, x):
            return *self.qkvr(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4), self.r

        def forward(self, x, mask=None, return_weights=False):
            q, k, v, r = self.project(x)
            bd, _ = shifted(torch.einsum("bhid,hpd->bhip", q + self.v[:, None], r), T, T - 1)
            p = (((q + self.u[:, None]) @ k.mT + bd) / D**0.5).softmax(-1)
            return self.output((p @ v).transpose(1, 2).flatten(2)), p if return_weights else None

    model, x = MyAttention(), draw(B, T, H * D).float()
    wanted, weights = model(x, return_weights=True)
    first, own = snippets("Models that people already have")
    exec(own, {"txl_kernels": txl_kernels, "MyAttention": MyAttention})
    variables = {"model": model}
    exec(first, variables)
    assert "MyAttention[txl_kernels]" in str(model)
    torch.testing.assert_close(model(x)[0], wanted)
    torch.testing.assert_close(model(x, return_weights=True)[1], weights)
    del patching.table._registered[MyAttention]
