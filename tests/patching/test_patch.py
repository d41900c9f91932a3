"""`patch` and `unpatch` themselves, on a class of one's own: what instances keep, and what is reported."""

import copy
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import txl_kernels
from tests.patching.tools import assert_alike
from tests.patching.toy import (
    Inherits,
    SelfAttention,
    calls,
    is_fused,
)
from txl_kernels import PatchError

pytestmark = pytest.mark.usefixtures("registered")


def test_patch_and_unpatch(model, x):
    other, wanted, state = SelfAttention(), model(x), model.state_dict()
    report = txl_kernels.patch(model)
    assert report.patched == ("0",)
    assert report.left_alone == ()
    assert_alike("out", model(x), wanted, 1e-6)
    assert calls == [model[0]]
    assert not is_fused(other, x)
    assert model.state_dict().keys() == state.keys()
    assert all(a.data_ptr() == state[name].data_ptr() for name, a in model.state_dict().items())
    assert isinstance(model[0], SelfAttention)
    txl_kernels.unpatch(model)
    assert type(model[0]) is SelfAttention
    assert "forward" not in vars(model[0])
    assert torch.equal(model(x), wanted)


def test_twice_is_once(model, x):
    txl_kernels.patch(model)
    patched = type(model[0])
    report = txl_kernels.patch(model, strict=True)
    assert type(model[0]) is patched
    assert [entry.action for entry in report.entries] == ["already patched"]
    model(x)
    assert len(calls) == 1
    txl_kernels.unpatch(model)
    txl_kernels.unpatch(model)
    assert type(model[0]) is SelfAttention


def test_printing_shows_it(model):
    txl_kernels.patch(model)
    assert "(0): SelfAttention[txl_kernels](" in str(model)
    assert model[0].forward.__doc__ == "Attends."
    txl_kernels.unpatch(model)
    assert "txl_kernels" not in str(model)


def test_report_in_words(model):
    model.append(SelfAttention(window=3))
    text = str(txl_kernels.patch(model))
    assert "1 of 2 modules" in text
    assert "1 x SelfAttention (0): patched; its own method serves attention weights" in text
    assert "1 x SelfAttention (2): left alone: a window" in text


def test_hooks_training_mode_and_device_moves_stay(model, x):
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    model[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    model.eval()
    txl_kernels.patch(model)
    assert not model[0].training
    model(x.requires_grad_()).sum().backward()
    assert seen == ["forward", "backward"]
    assert model.double()[0].project.weight.dtype is torch.float64
    assert model.to("meta")[0].r.is_meta


@pytest.mark.parametrize(
    "again",
    [
        copy.deepcopy,
        copy.copy,
        lambda module: pickle.loads(pickle.dumps(module)),
        lambda module: torch.load(_saved(module), weights_only=False),
        lambda module: _replica(module),
    ],
)
def test_copies_are_patched_and_run_on_their_own(model, x, again):
    txl_kernels.patch(model)
    attention = again(model[0])
    assert attention is not model[0]
    attention(x)
    assert calls == [attention]
    txl_kernels.unpatch(attention)
    assert type(attention) is SelfAttention
    assert is_fused(model, x)


def _replica(module) -> nn.Module:
    """As DataParallel makes one for each GPU."""
    replica = module._replicate_for_data_parallel()
    replica._parameters = dict(module._parameters)
    return replica


def _saved(module) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return buffer


def test_a_pickle_is_loaded_by_a_process_that_has_not_patched(tmp_path):
    """The class derived for a patched instance is made again where the pickle is read."""
    program = (
        "import pickle, sys, torch, txl_kernels\n"
        "from txl_kernels.layer import RelPartialLearnableMultiHeadAttn as Layer\n"
        "from txl_kernels.patching import Replacement, register\n"
        "names = ('w', 'r', 'r_w_bias', 'r_r_bias', 'attn_mask', 'mems', 'window')\n"
        "register(Layer, Replacement('forward', len, names))\n"
        "if sys.argv[1] == 'w':\n"
        "    layer = Layer(2, 8, 4, 0.0)\n"
        "    txl_kernels.patch(layer, strict=True)\n"
        "    pickle.dump(layer, open(sys.argv[2], 'wb'))\n"
        "else:\n"
        "    print(pickle.load(open(sys.argv[2], 'rb'))._get_name())\n"
    )
    for mode in "wr":
        command = [sys.executable, "-c", program, mode, str(tmp_path / "layer.pickle")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "RelPartialLearnableMultiHeadAttn[txl_kernels]"


def test_a_class_before_construction(x):
    own = SelfAttention.forward
    before = SelfAttention()
    assert txl_kernels.patch(SelfAttention, strict=True).patched == ("",)
    assert is_fused(before, x)
    assert is_fused(SelfAttention(), x)
    assert is_fused(Inherits(), x)
    assert txl_kernels.patch(SelfAttention).entries[0].action == "already patched"
    assert txl_kernels.patch(before).entries[0].action == "already patched"
    assert type(before) is SelfAttention
    txl_kernels.unpatch(SelfAttention)
    assert SelfAttention.forward is own
    assert not is_fused(before, x)


def test_a_class_that_inherits_its_method(x):
    txl_kernels.patch(Inherits, strict=True)
    assert is_fused(Inherits(), x)
    assert not is_fused(SelfAttention(), x)
    txl_kernels.unpatch(Inherits)
    assert "forward" not in vars(Inherits)
    assert not is_fused(Inherits(), x)


def test_own_method_warns_once(model, x):
    wanted = model[0](x, weights=True)
    txl_kernels.patch(model)
    with pytest.warns(UserWarning, match="SelfAttention: attention weights: no fused kernel serves that"):
        assert torch.equal(model[0](x, weights=True), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model[0](x, weights=True)


def test_compiled_and_checkpointed(model, x):
    wanted = model(x)
    txl_kernels.patch(model)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    assert_alike("compiled", compiled(x), wanted, 1e-6)
    out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    assert_alike("checkpointed", out, wanted, 1e-6)
    out.sum().backward()
    assert model[0].r.grad is not None


@pytest.fixture
def process_group():
    """Of this process alone. What a test wraps in it is freed before it is destroyed: else both may wait forever."""
    pytest.importorskip("torch.distributed.fsdp", reason="this torch has no distributed package")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("patched_first", [True, False])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_distributed_wrappers(process_group, model, x, patched_first, wrapper):
    """One process is enough to see that classes derived here and there get along."""
    wanted = model(x)
    if patched_first:
        txl_kernels.patch(model, strict=True)
    if wrapper == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        torch.distributed.fsdp.fully_shard(model[0], mesh=mesh)
    if not patched_first:
        txl_kernels.patch(model, strict=True)
    calls.clear()
    out = model(x)
    assert len(calls) == 1
    assert_alike("out", out, wanted, 1e-6)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    if wrapper == "fsdp" and patched_first:
        with pytest.raises(PatchError, match="model: expected 0 as patch left it, got a class of FSDPModule"):
            txl_kernels.unpatch(model)
    else:
        txl_kernels.unpatch(model)
        assert is_fused(model, x) is False
