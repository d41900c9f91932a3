"""Our own format, and what it rests on: the config of a model and the zeros that its memory may start from."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.checkpoint_tools import GOLDEN, assert_golden, golden_arguments, golden_state
from tests.test_checkpoints_huggingface import assert_golden as assert_huggingface_golden
from tests.test_checkpoints_huggingface import config_of, state_of, write
from txl_kernels.models import CheckpointError, MemTransformerLM, load, save

SIZES = {"n_token": 29, "n_layer": 2, "n_head": 2, "d_model": 12, "d_head": 6, "d_inner": 17}
LENGTHS = {"tgt_len": 5, "ext_len": 1, "mem_len": 7}
OPTIONS = {
    "default": {},
    "shared_biases": {"same_length": True, "clamp_len": 4, "zero_memory": True},
    "own_biases": {"untie_r": True, "pre_lnorm": True, "gradient_checkpointing": True, "d_embed": 8},
    "adaptive": {"cutoffs": (8, 19), "div_val": 2, "tie_projs": (False, True, True)},
    "shared_table": {"cutoffs": [8, 19], "d_embed": 8, "tie_projs": [False, True, True]},
    "untied": {"cutoffs": [8, 19], "div_val": 2, "tie_weight": False},
    "learned": {"attn_type": 1},
    "absolute": {"attn_type": 2},
    "learned_absolute": {"attn_type": 3},
}


def make_model(options="default", dtype=torch.float32):
    torch.manual_seed(0)
    model = MemTransformerLM(**SIZES, **LENGTHS, dropout=0.1, dropatt=0.2, **OPTIONS[options]).to(dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def run(model):
    generator = torch.Generator().manual_seed(1)
    stream = torch.randint(0, SIZES["n_token"], (16, 2), generator=generator)
    losses, mems = [], []
    for i in range(0, 15, 5):
        loss, *mems = model(stream[i : i + 5], stream[i + 1 : i + 6], *mems)
        losses.append(loss)
    return torch.cat(losses), *mems


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_round_trip(options, dtype, tmp_path):
    model = make_model(options, dtype)
    save(model, tmp_path / "deep" / "directory")
    state = torch.get_rng_state()
    again = load(tmp_path / "deep" / "directory")
    assert torch.equal(torch.get_rng_state(), state)
    assert not again.training
    assert again.config == model.config
    assert list(again.state_dict()) == list(model.state_dict())
    assert len(list(again.parameters())) == len(list(model.parameters()))
    assert all(p.requires_grad for p in again.parameters())
    for got, wanted in zip(run(again), run(model), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_files(options, tmp_path):
    model = make_model(options)
    save(model, str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert sum(x.numel() for x in stored.values()) == sum(x.numel() for x in {*model.parameters(), *model.buffers()})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["arguments"]["n_head"] == 2
    assert MemTransformerLM(**config["arguments"]).config == model.config


def test_the_files_of_numpy_sizes_and_who_may_read_them(tmp_path):
    sizes = SIZES | {"clamp_len": np.int64(3), "cutoffs": np.array([8, 19]), "dropout": np.float32(0.5)}
    model = MemTransformerLM(**(LENGTHS | {"dropatt": 0.0} | sizes))
    save(model, tmp_path)
    assert load(tmp_path).config == model.config
    assert model.config["cutoffs"] == [8, 19]
    modes = {(tmp_path / name).stat().st_mode for name in ("model.safetensors", "config.json")}
    assert len(modes) == 1


def test_a_loaded_model_learns_like_the_one_saved(tmp_path):
    model = make_model("adaptive")
    save(model, tmp_path)
    both = [model, load(tmp_path)]
    for each in both:
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            run(each)[0].mean().backward()
            optimizer.step()
    assert torch.equal(*(run(each)[0] for each in both))


def test_what_was_set_since_is_saved(tmp_path):
    model = make_model("learned")
    model.reset_length(2, 0, 3)
    model.same_length, model.clamp_len, model.drop.p = True, 2, 0.5
    save(model, tmp_path)
    again = load(tmp_path)
    assert (again.tgt_len, again.ext_len, again.mem_len) == (2, 0, 3)
    assert (again.same_length, again.clamp_len, again.drop.p) == (True, 2, 0.5)
    assert again.r_emb.shape == model.r_emb.shape
    assert torch.equal(run(again)[0], run(model)[0])
    save(again, tmp_path)
    assert load(tmp_path).config == again.config


def test_a_golden_model(tmp_path):
    model = MemTransformerLM(**golden_arguments("attn0")).double().eval()
    model.load_state_dict(golden_state("attn0"))
    save(model, tmp_path)
    assert_golden(load(tmp_path), "attn0")
    assert GOLDEN["attn0/out/nll0"].dtype == "float64"


def test_a_model_changed_by_hand_is_not_saved(tmp_path):
    for change in (
        lambda m: setattr(m.crit.out_layers[0], "weight", torch.nn.Parameter(m.crit.out_layers[0].weight.clone())),
        lambda m: setattr(m.layers[0], "dec_attn", make_model("absolute").layers[0].dec_attn),
        lambda m: setattr(m, "r_w_bias", torch.nn.Parameter(torch.zeros(3, 6))),
        lambda m: setattr(m, "more", torch.nn.Linear(2, 2)),
    ):
        model = make_model()
        change(model)
        with pytest.raises(ValueError, match="model: expected the tensors"):
            save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(TypeError, match="model: expected a MemTransformerLM, got Linear"):
        save(torch.nn.Linear(2, 2), tmp_path)


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    save(make_model(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save(make_model("adaptive"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="other"), r"config\.json: expected .*txl_kernels\.MemTransformerLM.*, got .*other"),
        (lambda c: c.update(version=2), "'version': 2"),
        (lambda c: c.update(model_type="transfo-xl") or c.pop("format"), "'format': None"),
        (lambda c: c.pop("arguments"), "expected an object named arguments"),
        (lambda c: c["arguments"].pop("n_head"), "do not fit: .*n_head"),
        (lambda c: c["arguments"].update(more=1), "do not fit: .*more"),
        (lambda c: c["arguments"].update(n_head=3), "expected shape"),
        (lambda c: c["arguments"].update(n_head=None), "n_head: expected an int >= 1"),
        (lambda c: c["arguments"].update(n_layer=3), r"missing layers\.2.* and 8 more, unknown none"),
        (lambda c: c["arguments"].update(tie_weight=False), "missing crit.out_layers.0.weight"),
        (lambda c: c["arguments"].update(mem_len=-1), "mem_len: expected an int >= 0"),
    ],
)
def test_a_config_that_does_not_fit(change, message, tmp_path):
    save(make_model(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_truncated_or_missing(tmp_path):
    save(make_model(), tmp_path)
    for name, steps in (("config.json", 20), ("model.safetensors", 601)):
        whole = (tmp_path / name).read_bytes()
        for length in range(0, len(whole) - 1, steps):
            (tmp_path / name).write_bytes(whole[:length])
            with pytest.raises(CheckpointError, match=str(tmp_path)):
                load(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(CheckpointError, match=f"expected the file {name}"):
            load(tmp_path)
        (tmp_path / name).write_bytes(whole)
    load(tmp_path)
    with pytest.raises(CheckpointError, match="expected a directory, got a file"):
        load(tmp_path / "config.json")


def test_weights_of_another_model(tmp_path):
    save(make_model(), tmp_path)
    safetensors.torch.save_file({"bert.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing crit.* more, unknown bert\.weight"):
        load(tmp_path)


def test_without_safetensors(tmp_path):
    """Everything else works; saving names what is to be installed and writes nothing."""
    program = (
        "import sys, pathlib; sys.modules['safetensors'] = None\n"
        "from txl_kernels.models import MemTransformerLM, save\n"
        f"model = MemTransformerLM(**{SIZES | LENGTHS}, dropout=0.0, dropatt=0.0)\n"
        f"directory = pathlib.Path({str(tmp_path)!r}, 'new')\n"
        "try: save(model, directory)\n"
        "except ImportError as error: print(error, directory.exists())\n"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.strip().endswith("pip install 'safetensors[torch]' False")


def test_the_example_of_the_readme(tmp_path, monkeypatch):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", readme.split("### Checkpoints")[1].split("\n## ")[0], re.S)
    monkeypatch.chdir(tmp_path)
    torch.save(make_model().state_dict(), "model.pt")
    Path("transfo-xl-wt103").mkdir()
    write(Path("transfo-xl-wt103"), config_of("plain"), state_of("plain"))
    arguments = make_model().config
    variables = {}
    exec(snippet.replace('"model.pt")', '"model.pt", **arguments)'), {"arguments": arguments}, variables)
    assert_huggingface_golden(variables["model"], "plain")


# Zeros to start from


def test_memory_that_starts_as_zeros():
    model, plain = make_model("shared_biases"), make_model()
    zeros = model.init_mems(2)
    assert [tuple(m.shape) for m in zeros] == [(7, 2, 12)] * 3
    assert not any(m.any() for m in zeros)
    data, target = torch.randint(0, 29, (2, 5, 2))
    for got, wanted in zip(model(data, target), model(data, target, *zeros), strict=True):
        assert torch.equal(got, wanted)
    # they are attended to
    plain.load_state_dict(model.state_dict())
    plain.same_length, plain.clamp_len = model.same_length, model.clamp_len
    assert not torch.allclose(model(data, target)[0], plain(data, target)[0])
    assert torch.equal(model(data, target)[0], plain(data, target, *zeros)[0])


def test_memory_that_starts_as_zeros_needs_the_batch_size():
    model = make_model("shared_biases")
    with pytest.raises(ValueError, match="bsz: expected the batch size"):
        model.init_mems()
    model.reset_length(5, 0, 0)
    assert model.init_mems() is None
    assert model.init_mems(2) is None
