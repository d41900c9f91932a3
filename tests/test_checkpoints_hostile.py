"""Files that are no checkpoint, or more than one: refused with the reason, and nothing in them is run."""

import contextlib
import io
import json
import os
import pickle
import struct
import tarfile
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.checkpoint_tools import (
    FORMATS,
    crafted,
    golden_arguments,
    golden_state,
    original_model,
    original_names,
    saved,
)
from txl_kernels.models import CheckpointError, load, load_huggingface, load_original
from txl_kernels.models.checkpoints import legacy, pickles


@pytest.fixture(params=FORMATS)
def kind(request):
    return request.param


@pytest.fixture(autouse=True)
def names():
    with original_names(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Couldn't retrieve source code")
        warnings.filterwarnings("ignore", "Detected pickle protocol")
        yield


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


class Built:
    """Pickles as an OrderedDict with a state."""

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return OrderedDict, (), self.state


class Persistent:
    """Pickles as a persistent id."""

    def __init__(self, pid):
        self.pid = pid


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, Persistent) else None


def pickled(content):
    file = io.BytesIO()
    Pickler(file, 2).dump(content)
    return file.getvalue()


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


def tensor_pickle(storage=(torch.FloatStorage, "0", "cpu", 4, None), offset=0, size=(4,), stride=(1,)):
    parts = Persistent(("storage", *storage)), offset, size, stride, False, OrderedDict()
    return pickled({"r_w_bias": Call(torch._utils._rebuild_tensor_v2, *parts)})


BYTES = struct.pack("<q4f", 4, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"size": (5,)}, "does not fit its storage"),
        ({"offset": 1}, "does not fit its storage"),
        ({"offset": -1}, "does not fit its storage"),
        ({"stride": (2,)}, "does not fit its storage"),
        ({"stride": (-1,)}, "does not fit its storage"),
        ({"size": (-1,)}, "does not fit its storage"),
        ({"size": ("a",)}, "does not fit its storage"),
        ({"size": None}, "does not fit its storage"),
        ({"size": (2, 2)}, "does not fit its storage"),
        ({"storage": (torch.FloatStorage, "0", "cpu", 5, None)}, "a storage has another length"),
        ({"storage": (torch.FloatStorage, "0", "cpu", 3, None), "size": (3,)}, "a storage has another length"),
        ({"storage": (torch.FloatStorage, "0", "cpu", 2**61, None)}, "a storage has another length"),
        ({"storage": (torch.FloatStorage, "0", "cpu", -4, None)}, "persistent id"),
        ({"storage": (torch.FloatStorage, "1", "cpu", 4, None)}, "not those that its tensors need"),
        ({"storage": (torch.FloatStorage, "0", "cpu", 4, ("1", 0, 2))}, "persistent id"),
        ({"storage": (torch.BoolStorage, "0", "cpu", 4, None)}, "forbidden global torch.BoolStorage"),
        ({"storage": (torch.FloatStorage,)}, "persistent id"),
    ],
)
def test_tensors_stay_inside_their_storage(parts, message, tmp_path):
    path = crafted(tmp_path / "state.pt", tensor_pickle(**parts), "legacy", keys=["0"])
    path.write_bytes(path.read_bytes() + BYTES)
    with pytest.raises(CheckpointError, match=message):
        load_original(path, **golden_arguments("attn0"))


def test_a_storage_as_long_as_no_file(tmp_path):
    content = tensor_pickle(storage=(torch.FloatStorage, "0", "cpu", 2**62, None))
    path = crafted(tmp_path / "state.pt", content, "legacy", keys=["0"])
    path.write_bytes(path.read_bytes() + struct.pack("<q4f", 2**62, 1, 2, 3, 4))
    with pytest.raises(CheckpointError, match="a storage has another length"):
        load_original(path, **golden_arguments("attn0"))


def test_the_same_file_with_nothing_wrong(tmp_path):
    path = crafted(tmp_path / "state.pt", tensor_pickle(), "legacy", keys=["0"])
    path.write_bytes(path.read_bytes() + BYTES)
    with pytest.raises(CheckpointError, match="expected the tensors of this model, missing crit"):
        load_original(path, **golden_arguments("attn0"))


@pytest.mark.parametrize("what", ["model", "state"])
def test_truncated(what, kind, tmp_path):
    content = original_model(golden_arguments("attn0"), golden_state("attn0"))
    content = content.state_dict() if what == "state" else content
    whole = saved(tmp_path / "whole.pt", content, kind).read_bytes()
    arguments = golden_arguments("attn0") if what == "state" else {}
    load_original(tmp_path / "whole.pt", **arguments)
    lengths = {*range(64), *range(64, len(whole), 997), *range(len(whole) - 32, len(whole))}
    for length in sorted(lengths):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.pt: "):
            load_original(tmp_path / "cut.pt", **arguments)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's of what it reads
@pytest.mark.parametrize("what", ["model", "state"])
def test_damaged(what, kind, tmp_path):
    """Any byte changed: an error of ours, or a model (where the byte is part of a number, or of no meaning)."""
    content = original_model(golden_arguments("attn0"), golden_state("attn0"))
    content = content.state_dict() if what == "state" else content
    whole = saved(tmp_path / "whole.pt", content, kind).read_bytes()
    arguments = golden_arguments("attn0") if what == "state" else {}
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(150):
        position, value = (int(torch.randint(n, (), generator=generator)) for n in (min(len(whole), 6000), 256))
        (tmp_path / "damaged.pt").write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
        try:
            load_original(tmp_path / "damaged.pt", **arguments)
        except CheckpointError:
            refused += 1
    assert refused > 20


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


@pytest.mark.parametrize("keys", [[1, "0"], ["0", "0"], [], "0", [["0"]], None, {"0": 1}])
def test_a_list_of_storages_that_is_none(keys, tmp_path):
    path = crafted(tmp_path / "state.pt", tensor_pickle(), "legacy")
    path.write_bytes(path.read_bytes().removesuffix(pickle.dumps([], 2)) + pickle.dumps(keys, 2) + BYTES)
    with pytest.raises(CheckpointError, match="the storages are not those"):
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


def tar(path):
    (path.parent / "storages").write_bytes(b"0" * 600)
    with tarfile.open(path, "w") as archive:
        archive.add(path.parent / "storages", "storages")


def module_of_torchscript(path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.write_bytes(b""), "not written by torch.save"),
        (lambda p: p.write_text("A text about transformers.\n" * 40), "not written by torch.save"),
        (lambda p: p.write_text('{"model_type": "transfo-xl"}'), "not written by torch.save"),
        (lambda p: p.write_bytes(bytes(1000)), "not written by torch.save"),
        (lambda p: p.write_bytes(pickle.dumps({"weights": [1.0]})), "expected a file written by torch.save"),
        (lambda p: p.mkdir(), "expected a file, got a directory"),
        (tar, "the tar format"),
        (module_of_torchscript, "torchscript"),
        (lambda p: torch.save(torch.ones(3), p), "got Tensor"),
        (lambda p: torch.save(torch.nn.Linear(2, 2), p), "got Linear"),
        (lambda p: torch.save(torch.nn.GRU(2, 2), p), "forbidden global torch.nn.modules.rnn.GRU"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_something_else(write, message, tmp_path):
    write(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=rf"model\.pt: .*{message}"):
        load_original(tmp_path / "model.pt")


@pytest.mark.parametrize("loader", [load, load_huggingface, load_original])
def test_nothing_there(loader, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: expected a checkpoint"):
        loader(tmp_path / "nowhere")


def test_hugging_face_weights_are_read_with_the_same_care(kind, tmp_path):
    mark = tmp_path / "mark"
    crafted(tmp_path / "pytorch_model.bin", pickled({"w": Call(os.system, f"touch {mark}")}), kind)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "transfo-xl"}))
    with pytest.raises(CheckpointError, match=r"forbidden global (os|posix|nt)\.system"):
        load_huggingface(tmp_path)
    assert not mark.exists()
