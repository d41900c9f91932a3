"""Checkpoints of the original code: pickled modules and state_dicts, new and old, give the original's numbers."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.checkpoint_tools import (
    CASES,
    DROPOUT,
    FORMATS,
    _module,
    aged,
    assert_golden,
    golden_arguments,
    golden_state,
    original_model,
    original_names,
    saved,
)
from txl_kernels.models import CheckpointError, MemTransformerLM, load_original

# no golden case has these; together with the golden ones every branch of what a pickle can say
OTHERS = {
    "absolute": {"attn_type": 2},
    "learned_absolute": {"attn_type": 3},
    "shared_table": {"cutoffs": [10, 20], "d_embed": 8, "tie_projs": [False, True, False]},
    "untied": {"cutoffs": [10, 20], "div_val": 2, "tie_projs": [True, False, False], "tie_weight": False},
    "odd": {"ext_len": 2, "n_layer": 3, "d_head": 4, "mem_len": 9, "clamp_len": 3, "same_length": True},
}


@pytest.fixture(autouse=True)
def names():
    with original_names():
        yield


@pytest.fixture(params=FORMATS)
def kind(request):
    return request.param


@pytest.mark.parametrize("case", CASES)
def test_a_pickled_model_gives_the_original_s_numbers(case, kind, tmp_path):
    path = saved(tmp_path / "model.pt", original_model(golden_arguments(case), golden_state(case)), kind)
    state = torch.get_rng_state()
    model = load_original(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert_golden(model, case)


@pytest.mark.parametrize("case", CASES)
def test_a_model_of_2019_gives_the_original_s_numbers(case, tmp_path):
    path = saved(tmp_path / "model.pt", aged(original_model(golden_arguments(case), golden_state(case))), "legacy")
    assert b"torch.nn.backends.thnn" in path.read_bytes()
    assert_golden(load_original(path), case)


@pytest.mark.parametrize("case", [*CASES, *OTHERS])
def test_a_pickled_model_says_how_it_was_made(case, kind, tmp_path):
    arguments = golden_arguments(CASES[0] if case in OTHERS else case) | OTHERS.get(case, {})
    ours = MemTransformerLM(**arguments).double()
    path = saved(tmp_path / "model.pt", original_model(arguments, ours.state_dict()), kind)
    model = load_original(path)
    # ties that make no difference are not in the file
    tie_projs = arguments["tie_projs"] if case not in ("attn0", "absolute") else model.config["tie_projs"]
    assert {name: model.config[name] for name in arguments} == arguments | {
        "tie_projs": [*tie_projs, *[False] * (len(arguments["cutoffs"]) + 1 - len(tie_projs))]
    }
    assert shared(model) == shared(ours)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def shared(model):
    groups = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def test_lengths_set_after_the_positions_were_made(kind, tmp_path):
    case = next(case for case in CASES if golden_arguments(case)["attn_type"] == 1)
    original = original_model(golden_arguments(case), golden_state(case))
    original.tgt_len, original.mem_len = 2, 3
    model = load_original(saved(tmp_path / "model.pt", original, kind))
    assert (model.tgt_len, model.ext_len, model.mem_len) == (2, 0, 3)
    model.reset_length(5, 0, 6)
    assert_golden(model, case)


def test_arguments_go_before_those_in_the_file(kind, tmp_path):
    path = saved(tmp_path / "model.pt", original_model(golden_arguments("attn0"), golden_state("attn0")), kind)
    model = load_original(path, dropout=0.0, mem_len=11, gradient_checkpointing=True)
    assert (model.drop.p, model.mem_len, model.gradient_checkpointing) == (0.0, 11, True)
    assert model.layers[1].dec_attn.dropatt.p == DROPOUT["dropatt"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_dtype_of_the_file_stays(dtype, kind, tmp_path):
    original = original_model(golden_arguments("attn0"), golden_state("attn0")).to(dtype)
    model = load_original(saved(tmp_path / "model.pt", original, kind))
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}


@pytest.mark.parametrize(
    "wrapper", ["torch.nn.parallel.data_parallel.DataParallel", "utils.data_parallel.BalancedDataParallel"]
)
def test_inside_data_parallel(wrapper, kind, tmp_path):
    original = original_model(golden_arguments("attn0"), golden_state("attn0"))
    if wrapper.startswith("torch"):
        outer = nn.DataParallel(original, dim=1)
    else:
        outer = _module(*wrapper.rsplit(".", 1), dim=1, gpu0_bsz=4, module=original)
    outer.src_device_obj = torch.device("cuda:0")
    path = saved(tmp_path / "model.pt", outer, kind)
    assert_golden(load_original(path), "attn0")
    path = saved(tmp_path / "state.pt", outer.state_dict(), kind)
    assert_golden(load_original(path, **golden_arguments("attn0")), "attn0")


@pytest.mark.parametrize("case", CASES)
def test_a_state_dict(case, kind, tmp_path):
    original = original_model(golden_arguments(case), golden_state(case))
    path = saved(tmp_path / "state.pt", original.state_dict(), kind)
    assert_golden(load_original(path, **golden_arguments(case)), case)


def test_a_state_dict_needs_the_arguments(kind, tmp_path):
    path = saved(tmp_path / "state.pt", golden_state("attn0"), kind)
    with pytest.raises(CheckpointError, match=r"state.pt: a state_dict does not say .* n_head, .*, ext_len, mem_len"):
        load_original(path, n_token=30, n_layer=2)
    with pytest.raises(CheckpointError, match="unexpected keyword argument 'heads'"):
        load_original(path, **golden_arguments("attn0"), heads=2)


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


BIAS, TABLE, OUT = "r_w_bias", "word_emb.emb_layers.0.weight", "crit.out_layers.0.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, BIAS), "missing r_w_bias, unknown none"),
        (lambda s: s | {"more": s[BIAS]}, "missing none, unknown more"),
        (lambda s: {}, "expected a state_dict"),
        (lambda s: {"model": s, "epoch": 3}, "model: expected a tensor, got dict"),
        (lambda s: dict(enumerate(s.values())), "expected a state_dict"),
        (lambda s: [*s.values()], "expected a MemTransformerLM or its state_dict, got list"),
        (lambda s: s | {BIAS: s[BIAS][:1]}, r"r_w_bias: expected shape \(2, 6\), got \(1, 6\)"),
        (lambda s: s | {BIAS: s[BIAS].long()}, "r_w_bias: expected a dense floating-point tensor"),
        (lambda s: s | {BIAS: 3}, "r_w_bias: expected a tensor, got int"),
        (lambda s: s | {"r_emb": s[BIAS][0]}, "unknown r_emb"),
        (lambda s: torch.optim.Adam([s[BIAS]]).state_dict(), "state: expected a tensor, got dict"),
        (lambda s: s | {OUT: s[OUT] + 1}, f"{TABLE} and {OUT}: expected the same values"),
    ],
)
def test_a_state_dict_that_does_not_fit(change, message, kind, tmp_path):
    path = saved(tmp_path / "state.pt", change(golden_state("attn0")), kind)
    with pytest.raises(CheckpointError, match=message):
        load_original(path, **golden_arguments("attn0"))


@pytest.mark.parametrize("tensor", [torch.ones(2, 6).to_sparse(), torch.ones(2, 6, device="meta")])
def test_tensors_without_plain_numbers(tensor, tmp_path):
    path = saved(tmp_path / "state.pt", golden_state("attn0") | {BIAS: tensor}, "zip")
    with pytest.raises(CheckpointError, match="r_w_bias: expected a dense floating-point tensor"):
        load_original(path, **golden_arguments("attn0"))


def test_overlapping_tensors_come_apart(kind, tmp_path):
    state = golden_state("attn0")
    both = torch.stack([state["r_w_bias"], state["r_r_bias"]])
    path = saved(tmp_path / "state.pt", state | {"r_w_bias": both[0], "r_r_bias": both[1].t().contiguous().t()}, kind)
    model = load_original(path, **golden_arguments("attn0"))
    assert_golden(model, "attn0")
    assert all(p.is_contiguous() and p.untyped_storage().nbytes() == p.numel() * 8 for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: vars(m).pop("n_head"), "expected n_head of a MemTransformerLM, got NoneType"),
        (lambda m: setattr(m, "d_head", 7.0), "expected d_head of a MemTransformerLM, got float"),
        (lambda m: setattr(m, "d_head", 7), r"expected shape \(2, 7\), got \(2, 6\)"),
        (lambda m: setattr(m, "attn_type", 5), "attn_type: expected 0, 1, 2 or 3, got 5"),
        (lambda m: setattr(m, "tgt_len", 0), "tgt_len: expected an int >= 1"),
        (lambda m: setattr(m.word_emb, "cutoffs", ["a", 30]), "do not fit"),
        (lambda m: m._modules.pop("crit"), "expected a module named crit, found none"),
        (lambda m: m._modules.update(layers=nn.ModuleList()), "expected a module named 0"),
        (
            lambda m: m.layers._modules.update({"1": m.layers[0]}),
            "damaged: the module layers",
        ),
        (lambda m: m.layers[1]._modules.update(round=m.layers), "is also somewhere else"),
        (lambda m: vars(m.word_emb).update(_parameters=None), "expected _parameters of a AdaptiveEmbedding"),
    ],
)
def test_a_pickled_model_that_does_not_fit(change, message, kind, tmp_path):
    original = original_model(golden_arguments("attn0"), golden_state("attn0"))
    change(original)
    path = saved(tmp_path / "model.pt", original, kind)
    with pytest.raises(CheckpointError, match=message):
        load_original(path)


def test_classes_that_the_user_allowed_do_no_harm(tmp_path):
    original = original_model(golden_arguments("attn0"), golden_state("attn0"))
    path = saved(tmp_path / "model.pt", original, "zip")
    with torch.serialization.safe_globals([nn.Linear, nn.ModuleList, type(original)]):
        before = set(torch.serialization.get_safe_globals())
        for _ in range(4):
            assert_golden(load_original(path), "attn0")
        assert set(torch.serialization.get_safe_globals()) == before


def test_another_process_with_no_such_classes(tmp_path):
    original = original_model(golden_arguments("attn0"), golden_state("attn0"))
    paths = [str(saved(tmp_path / f"{kind}.pt", original, kind)) for kind in FORMATS]
    program = (
        "import sys; from txl_kernels.models import load_original\n"
        f"print(*(load_original(path).config['d_inner'] for path in {paths}), 'mem_transformer' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.split() == [*[str(golden_arguments("attn0")["d_inner"])] * 2, "False"]
