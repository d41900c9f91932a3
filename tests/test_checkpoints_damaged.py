"""Files that are truncated, damaged or something else: a clear error, and nothing read out of bounds."""

import pickle
import struct
import tarfile
import tracemalloc
from collections import OrderedDict

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
from txl_kernels.models import CheckpointError, load, load_huggingface, load_original


@pytest.fixture(params=FORMATS)
def kind(request):
    return request.param


@pytest.fixture(autouse=True)
def names():
    with original_names():
        yield


def a_tensor(storage=(torch.FloatStorage, "0", "cpu", 4, None), offset=0, size=(4,), stride=(1,)):
    parts = Persistent(("storage", *storage)), offset, size, stride, False, OrderedDict()
    return Call(torch._utils._rebuild_tensor_v2, *parts)


def tensor_pickle(**parts):
    return pickled({"r_w_bias": a_tensor(**parts)})


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


@pytest.mark.parametrize(
    "other", [(torch.DoubleStorage, "0", "cpu", 4, None), (torch.FloatStorage, "0", "cpu", 3, None)]
)
def test_a_storage_described_twice(other, tmp_path):
    content = pickled({"r_w_bias": a_tensor(), "r_r_bias": a_tensor(storage=other)})
    path = crafted(tmp_path / "state.pt", content, "legacy", keys=["0"])
    path.write_bytes(path.read_bytes() + BYTES)
    with pytest.raises(CheckpointError, match="persistent id"):
        load_original(path, **golden_arguments("attn0"))


def test_the_same_file_with_nothing_wrong(tmp_path):
    path = crafted(tmp_path / "state.pt", tensor_pickle(), "legacy", keys=["0"])
    path.write_bytes(path.read_bytes() + BYTES)
    with pytest.raises(CheckpointError, match="expected the tensors of this model, missing crit"):
        load_original(path, **golden_arguments("attn0"))


def test_a_high_index_of_the_memo_takes_no_memory(tmp_path):
    path = crafted(tmp_path / "state.pt", b"\x80\x02}r\xff\xff\xff\x00.", "legacy")
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="expected a state_dict, got dict"):
        load_original(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


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
        reason = r"cut\.pt: .*[^: ]$" if length else r"cut\.pt: expected a file of torch\.save, got an empty one"
        with pytest.raises(CheckpointError, match=reason):
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


@pytest.mark.parametrize("checksums", [True, False])
def test_a_flipped_bit_of_a_number(checksums, tmp_path):
    """Told by the checksums of torch.save, unless it was told to write none; such a file is read all the same."""
    path, state = tmp_path / "модель.pt", golden_state("attn0")
    torch.serialization.set_crc32_options(checksums)
    try:
        torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(True)
    load_original(path, **golden_arguments("attn0"))
    whole = path.read_bytes()
    place = whole.index(state["layers.1.dec_attn.qkv_net.weight"].numpy().tobytes())
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    if checksums:
        with pytest.raises(CheckpointError, match=r"модель\.pt: damaged, .*: Bad CRC-32 for file"):
            load_original(path, **golden_arguments("attn0"))
    else:
        load_original(path, **golden_arguments("attn0"))


@pytest.mark.parametrize("keys", [[1, "0"], ["0", "0"], [], "0", [["0"]], None, {"0": 1}])
def test_a_list_of_storages_that_is_none(keys, tmp_path):
    path = crafted(tmp_path / "state.pt", tensor_pickle(), "legacy")
    path.write_bytes(path.read_bytes().removesuffix(pickle.dumps([], 2)) + pickle.dumps(keys, 2) + BYTES)
    with pytest.raises(CheckpointError, match="the storages are not those"):
        load_original(path)


def tar(path):
    (path.parent / "storages").write_bytes(b"0" * 600)
    with tarfile.open(path, "w") as archive:
        archive.add(path.parent / "storages", "storages")


def module_of_torchscript(path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.write_bytes(b""), "got an empty one"),
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
