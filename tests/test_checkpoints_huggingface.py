"""Checkpoints of Hugging Face's Transformer-XL give its losses and memory."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.golden import huggingface_lm
from txl_kernels.models import CheckpointError, load_huggingface

GOLDEN = np.load(huggingface_lm.PATH)
CASES = list(huggingface_lm.CASES)


def config_of(case):
    return json.loads(str(GOLDEN[f"{case}/config"]))


def state_of(case):
    prefix = f"{case}/param/"
    return {k.removeprefix(prefix): torch.from_numpy(GOLDEN[k]) for k in GOLDEN.files if k.startswith(prefix)}


def write(directory, config, state, kind="safetensors"):
    (directory / "config.json").write_text(json.dumps(config))
    if kind == "safetensors":
        safetensors.torch.save_file({name: x.clone() for name, x in state.items()}, directory / "model.safetensors")
    else:
        torch.save(state, directory / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "zip")
    return directory


def assert_golden(model, case, dtype=torch.float32):
    mems = []
    for n in range(3):
        data, target, nll = (torch.from_numpy(GOLDEN[f"{case}/{k}{n}"]) for k in ("in/data", "in/target", "out/nll"))
        losses, *mems = model(data, target, *mems)
        assert losses.dtype == dtype
        torch.testing.assert_close(losses.float(), nll, rtol=1e-5, atol=1e-5)
        *inputs, _ = mems  # there the last layer's output is not kept
        for i, memory in enumerate(inputs):
            wanted = torch.from_numpy(GOLDEN[f"{case}/out/mems{n}.{i}"])
            torch.testing.assert_close(memory.float(), wanted, rtol=1e-5, atol=1e-5)
        assert f"{case}/out/mems{n}.{len(inputs)}" not in GOLDEN


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("case", CASES)
def test_the_numbers_of_hugging_face(case, kind, tmp_path):
    model = load_huggingface(write(tmp_path, config_of(case), state_of(case), kind))
    assert not model.training
    assert_golden(model, case)
    assert_golden(model.double(), case, torch.float64)


def test_the_file_itself(tmp_path):
    write(tmp_path, config_of("plain"), state_of("untied"), "zip")
    write(tmp_path, config_of("plain"), state_of("plain"))
    assert_golden(load_huggingface(tmp_path / "model.safetensors"), "plain")
    assert_golden(load_huggingface(tmp_path), "plain")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: expected the tensors of this model"):
        load_huggingface(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("case", CASES)
def test_tensors_stored_once(case, tmp_path):
    """save_pretrained leaves out all names but one of a tensor; positions were not always stored."""
    config, state = config_of(case), state_of(case)
    left_out = {"transformer.pos_emb.inv_freq"}
    if config.get("tie_word_embeddings", True):
        left_out |= {name for name in state if name.startswith("crit.out_layers") and name.endswith("weight")}
    left_out |= {f"crit.out_projs.{i}" for i, tie in enumerate(config["tie_projs"]) if tie}
    if not config["untie_r"]:
        left_out |= {f"transformer.{bias}" for bias in ("r_w_bias", "r_r_bias")}
        left_out |= {name for name in state if "layers.1" in name and name.endswith(("r_w_bias", "r_r_bias"))}
    state = {name: tensor for name, tensor in state.items() if name not in left_out}
    assert_golden(load_huggingface(write(tmp_path, config, state)), case)


def test_names_of_old_configurations(tmp_path):
    config = config_of("plain")
    config |= {"n_token": config.pop("vocab_size"), "tgt_len": 64, "ext_len": 0}
    del config["model_type"], config["tie_projs"], config["layer_norm_epsilon"]
    model = load_huggingface(write(tmp_path, config, state_of("plain")))
    assert_golden(model, "plain")
    assert model.tgt_len == 64


def test_dropout_is_that_of_the_configuration(tmp_path):
    config = config_of("plain") | {"dropout": 0.25, "dropatt": 0}
    model = load_huggingface(write(tmp_path, config, state_of("plain")))
    assert (model.config["dropout"], model.config["dropatt"]) == (0.25, 0)


@pytest.mark.parametrize("frequencies", [torch.float16, torch.float32, None])
def test_a_half_precision_file(frequencies, tmp_path):
    state = {name: tensor.half() for name, tensor in state_of("plain").items()}
    if frequencies is None:
        del state["transformer.pos_emb.inv_freq"]
    else:
        state["transformer.pos_emb.inv_freq"] = state_of("plain")["transformer.pos_emb.inv_freq"].to(frequencies)
    model = load_huggingface(write(tmp_path, config_of("plain"), state))
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float16}


NAME = "transformer.layers.1.dec_attn.qkv_net.weight"
BIAS = "transformer.layers.1.dec_attn.r_w_bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, s: c.update(model_type="gpt2"), r"config\.json: expected model_type transfo-xl, got gpt2"),
        (lambda c, s: c.update(layer_norm_epsilon=1e-6), "expected layer_norm_epsilon 1e-05"),
        (lambda c, s: c.update(attn_type=1), "expected attn_type 0"),
        (lambda c, s: c.update(n_head="2"), "expected n_head like 16, got '2'"),
        (lambda c, s: c.update(cutoffs=7), "expected cutoffs like"),
        (lambda c, s: c.update(cutoffs=["a"]), "do not fit"),
        (lambda c, s: c.update(n_layer=3), r"expected layers\.0\.dec_attn\.r_w_bias and its like for every layer"),
        (lambda c, s: c.update(n_layer=1), r"unknown layers\.1"),
        (lambda c, s: c.update(d_model=14), r"missing crit\.out_projs\.0"),
        (lambda c, s: c.update(d_inner=16), "expected shape"),
        (lambda c, s: c.update(d_model=13), "expected an even width"),
        (lambda c, s: c.update(untie_r=False), r"expected the same r_w_bias in every layer, without untie_r"),
        (lambda c, s: s.pop(NAME), r"missing layers\.1\.dec_attn\.qkv_net\.weight, unknown none"),
        (lambda c, s: s.pop(BIAS), "and its like for every layer"),
        (lambda c, s: s.update({BIAS: s[BIAS][:1].clone()}), "in one shape"),
        (lambda c, s: s.update({"score.weight": s[NAME]}), r"missing none, unknown score\.weight"),
        (lambda c, s: s.update({NAME: s[NAME][:-1]}), r"expected shape \(30, 12\), got \(29, 12\)"),
        (lambda c, s: s.update({NAME: s[NAME].to(torch.int32)}), "expected a dense floating-point tensor"),
        (lambda c, s: s.clear(), "for every layer"),
    ],
)
@pytest.mark.parametrize("kind", ["safetensors", "zip"])
def test_what_does_not_fit(change, message, kind, tmp_path):
    config, state = config_of("plain"), state_of("plain")
    change(config, state)
    if not state and kind == "zip":
        message = "expected a state_dict"
    with pytest.raises(CheckpointError, match=message):
        load_huggingface(write(tmp_path, config, state, kind))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "\xff", '{"n_head": NaN}', "[" * 200_000],
    ids=["empty", "open", "list", "latin", "nan", "deep"],
)
def test_a_damaged_configuration(text, tmp_path):
    write(tmp_path, config_of("plain"), state_of("plain"))
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_huggingface(tmp_path)


def test_a_missing_part(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected the file config\.json"):
        load_huggingface(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_of("plain")))
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors or pytorch_model\.bin \(in one piece\)"):
        load_huggingface(tmp_path)


def test_truncated_safetensors(tmp_path):
    path = write(tmp_path, config_of("plain"), state_of("plain")) / "model.safetensors"
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 501), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            load_huggingface(tmp_path)


def transformers_or_skip():
    transformers = pytest.importorskip("transformers", reason="needs transformers 4.37.2, the last that runs its model")
    if transformers.__version__ != "4.37.2":
        pytest.skip(f"needs transformers 4.37.2, the last that runs its model, got {transformers.__version__}")


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_against_the_package_itself(case, safe, tmp_path):
    transformers_or_skip()
    numbers = huggingface_lm.numbers_of(case)
    theirs = huggingface_lm.model_of(case)
    theirs.save_pretrained(tmp_path, safe_serialization=safe)
    assert (tmp_path / ("model.safetensors" if safe else "pytorch_model.bin")).is_file()
    for name, array in numbers.items():
        if array.dtype.kind == "f":
            torch.testing.assert_close(torch.from_numpy(array), torch.from_numpy(GOLDEN[name]), rtol=1e-5, atol=1e-5)
    ours = load_huggingface(tmp_path)
    assert_golden(ours, case)
    # its own losses: labels are shifted, and with cutoffs grouped by cluster
    labels = torch.from_numpy(GOLDEN[f"{case}/in/data0"])
    wanted = theirs(labels.t(), labels=labels.t()).losses.detach()
    got = ours(labels[:-1], labels[1:])[0]
    torch.testing.assert_close(got.flatten().sort()[0], wanted.flatten().sort()[0], rtol=1e-5, atol=1e-5)
