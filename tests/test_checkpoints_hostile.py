"""Checkpoints that are more than data: refused with the reason, and nothing in them is run."""

import contextlib
import io
import json
import os
import pickle
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.checkpoint_tools import (
    FORMATS,
    Call,
    Persistent,
    crafted,
    golden_arguments,
    golden_state,
    original_model,
    original_names,
    pickled,
    saved,
)
from txl_kernels.models import CheckpointError, load_huggingface, load_original
from txl_kernels.models.checkpoints import legacy, pickles


@pytest.fixture(params=FORMATS)
def kind(request):
    return request.param


@pytest.fixture(autouse=True)
def names():
    with original_names():
        yield


class Built:
    """Pickles as an OrderedDict with a state."""

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return OrderedDict, (), self.state


def load_unguarded(content):
    unpickler = pickle.Unpickler(io.BytesIO(content))
    unpickler.persistent_load = lambda pid: pid
    with contextlib.suppress(Exception):
        unpickler.load()


ATTACKS = {
    "alone": lambda evil: evil,
    "among the weights": lambda evil: OrderedDict(r_w_bias=torch.zeros(2).tolist(), r_r_bias=evil),
    "as a name": lambda evil: {(evil,): 1},
    "in a state": lambda evil: Built({"hook": evil}),
    "in a call that is allowed": lambda evil: Call(torch._utils._rebuild_tensor_v2, evil, 0, (1,), (1,)),
    "as a storage": lambda evil: Persistent(("storage", evil, "0", "cpu", 1, None)),
    "as a device": lambda evil: Persistent(("storage", torch.FloatStorage, "0", evil, 1, None)),
    "as a class": lambda evil: Persistent(("module", evil, "file.py", "source")),
    "as a persistent id": lambda evil: Persistent(evil),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_call_is_made(attack, kind, tmp_path):
    mark = tmp_path / "mark"
    content = pickled(ATTACKS[attack](Call(os.system, f"touch {mark}")))
    load_unguarded(content)
    assert mark.exists(), "the attack does not work"
    mark.unlink()
    with pytest.raises(CheckpointError, match=r"forbidden global (os|posix|nt)\.system") as caught:
        load_original(crafted(tmp_path / "model.pt", content, kind))
    assert not mark.exists()
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("where", ["magic", "version", "system", "keys"])
def test_no_call_is_made_around_the_object(where, tmp_path):
    mark = tmp_path / "mark"
    evil = pickled(Call(os.system, f"touch {mark}"))
    parts = {"magic": 0x1950A86A20F9469CFC6C, "version": 1001, "system": {}, "object": {}, "keys": []}
    parts = {name: pickle.dumps(part, 2) for name, part in parts.items()} | {where: evil}
    (tmp_path / "model.pt").write_bytes(b"".join(parts.values()))
    with pytest.raises(CheckpointError, match=r"forbidden global (os|posix|nt)\.system"):
        load_original(tmp_path / "model.pt")
    assert not mark.exists()


# of each format and in its own way: opcodes that name a global, and attributes of what is allowed
@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",  # STACK_GLOBAL
        b"(S'true'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'true'\no.",  # OBJ
        b"\x80\x04\x8c\x0bcollections\x8c\x1cOrderedDict.__init__.__call__\x93)R.",  # dots
        b"ctorch\nload\n(S'model.pt'\ntR.",
        b"ctorch._utils\n_import_dotted_name\n(S'os'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"c__builtin__\ngetattr\n(ccollections\nOrderedDict\nS'clear'\ntR.",
        b"cmem_transformer\nos\n.",
        b"ctxl_kernels.models.language_model\nMemTransformerLM\n.",
        b"ccopyreg\n_reconstructor\n.",
        b"cfunctools\npartial\n.",
        b"\x82\x01.",  # EXT1
        b"Pmodule\n.",  # PERSID, text
        b"\x80\x02}r\xff\xff\xff\x7f.",  # LONG_BINPUT, far up in the memo
    ],
)
def test_no_way_around_the_table(content, kind, tmp_path):
    with pytest.raises(CheckpointError):
        load_original(crafted(tmp_path / "model.pt", content, kind))


def attributes():
    things = [torch._utils._rebuild_tensor_v2, torch._utils._rebuild_parameter, torch.FloatStorage, torch.Size]
    things += [torch.device, torch.float32, OrderedDict, legacy.LazyTensor, legacy.Storage, pickles.PickledModule]
    return [getattr(thing, name, None) for thing in things for name in ("stain", "__defaults__")]


@pytest.mark.parametrize(
    "target",
    [
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        "torch FloatStorage",
        "torch Size",
        "torch device",
        "collections OrderedDict",
        "mem_transformer MemTransformerLM",
    ],
)
@pytest.mark.parametrize("slots", [False, True])
def test_what_is_allowed_cannot_be_changed(target, slots, kind, tmp_path):
    """BUILD sets attributes of any object, here of the functions and classes themselves."""
    module, name = target.encode().split()
    state = b"(N}X\x0c\x00\x00\x00__defaults__(K\x01tst" if slots else b"}X\x05\x00\x00\x00stainK\x01s"
    content = b"\x80\x02}X\x01\x00\x00\x00wc" + module + b"\n" + name + b"\n" + state + b"bs."
    before = attributes()
    with pytest.raises(CheckpointError):
        load_original(crafted(tmp_path / "model.pt", content, kind))
    assert attributes() == before


def laughs():
    joke = ("ha",)
    for _ in range(100):
        joke = (joke, joke)
    return joke


class Shadowed:
    """Pickles as an OrderedDict whose attributes stand in place of its methods."""

    def __init__(self, content):
        self.content = content

    def __reduce__(self):
        shadows = dict.fromkeys(("items", "keys", "values", "get", "__iter__", "__len__"), torch.Size)
        return OrderedDict, (), shadows, None, iter(self.content.items())


def test_methods_in_a_pickle_are_not_called(kind, tmp_path):
    path = crafted(tmp_path / "state.pt", pickled(Shadowed({"w": 1.0})), kind)
    with pytest.raises(CheckpointError, match="w: expected a tensor, got float"):
        load_original(path)


def test_deep_and_repeated_content_is_refused_at_once(kind, tmp_path):
    path = crafted(tmp_path / "model.pt", pickled(Persistent(("laughs", laughs()))), kind)
    with pytest.raises(CheckpointError):
        load_original(path)


def test_two_threads(tmp_path):
    path = saved(tmp_path / "model.pt", original_model(golden_arguments("attn0"), golden_state("attn0")), "zip")
    with ThreadPoolExecutor(4) as pool:
        for model in [pool.submit(load_original, path) for _ in range(40)]:
            assert model.result().n_layer == 2


def test_hugging_face_weights_are_read_with_the_same_care(kind, tmp_path):
    mark = tmp_path / "mark"
    crafted(tmp_path / "pytorch_model.bin", pickled({"w": Call(os.system, f"touch {mark}")}), kind)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "transfo-xl"}))
    with pytest.raises(CheckpointError, match=r"forbidden global (os|posix|nt)\.system"):
        load_huggingface(tmp_path)
    assert not mark.exists()
