"""The format of torch.save before PyTorch 1.6, read without running anything that a file holds.

One after the other: pickles of a magic number, of a version and of facts about the machine; the pickle of the object;
a pickled list of storage keys; and for each key the storage, an int64 with the number of its elements and then the
elements, all little-endian. In the object's pickle a persistent id stands for a storage or, with its source code, for
a class. While that pickle is read only records are made; tensors come from them afterwards.
"""

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from txl_kernels.models.checkpoints.files import CheckpointError

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ByteStorage": torch.uint8,
}


class Storage(NamedTuple):
    """What the pickle says of a storage, and its bytes, which follow the pickle."""

    dtype: torch.dtype
    numel: int
    content: bytearray


class LazyTensor(NamedTuple):
    """What the pickle says of a tensor."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def load(self) -> Tensor:
        """The tensor, a view of the bytes of its storage.

        Raises:
            CheckpointError: It reaches beyond its storage, or the parts of its description are not what they should be.
        """
        try:
            dtype, numel, content = self.storage
            flat = torch.frombuffer(content, dtype=dtype) if numel else torch.empty(0, dtype=dtype)
            return flat.as_strided(self.size, self.stride, self.offset)
        except (TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"a tensor does not fit its storage: {error}") from error


def read_legacy(path: Path, classes: Mapping[str, type]) -> Any:
    """The object in a file of this format, with a `LazyTensor` for each tensor.

    Args:
        path: The file.
        classes: What stands for each class that the file may name, by dotted name; a pickle can set attributes of
            what it gets, so they should serve for one file only.

    Raises:
        CheckpointError: The file asks for something else, is truncated, or has another format.
    """
    storages: dict[str, Storage] = {}
    rebuilders = {
        "torch._utils._rebuild_tensor_v2": lambda *parts: LazyTensor(*parts[:4]),
        "torch._utils._rebuild_parameter": lambda data, *_: data,
        "torch.device": lambda *parts: parts,
        "torch.Size": tuple,
        "builtins.set": set,
        "__builtin__.set": set,  # its name in Python 2, which pickles still write
        "collections.OrderedDict": OrderedDict,
    }
    with path.open("rb") as file:
        if _unpickle(file) != MAGIC or _unpickle(file) != VERSION:
            raise CheckpointError("expected a file written by torch.save, got something else")
        _unpickle(file)
        content = _unpickle(file, {**classes, **DTYPES, **rebuilders}, storages)
        keys = _unpickle(file)
        if not isinstance(keys, list) or {type(key) for key in keys} - {str} or sorted(keys) != sorted(storages):
            raise CheckpointError("damaged: the storages are not those that its tensors need")
        for key in keys:
            _fill(storages[key], file, path.stat().st_size)
    return content


# the one in Python, as that in C takes gigabytes where a damaged file names a high index of its memo
class _Unpickler(pickle._Unpickler):
    def __init__(self, file: BinaryIO, allowed: Mapping[str, Any], storages: dict[str, Storage]) -> None:
        super().__init__(file, encoding="utf-8")
        self.allowed, self.storages = allowed, storages

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.allowed:
            raise CheckpointError(f"refused, its pickle asks for the forbidden global {module}.{name}")
        return self.allowed[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("module", type() as cls, *_):
                return cls
            case ("storage", torch.dtype() as dtype, str() as key, _, int() as numel, None) if numel >= 0:
                storage = self.storages.setdefault(key, Storage(dtype, numel, bytearray()))
                if storage[:2] == (dtype, numel):
                    return storage
        raise CheckpointError("refused, its pickle has a persistent id that is neither a class nor a whole storage")


def _unpickle(file: BinaryIO, allowed: Mapping[str, Any] | None = None, storages: dict | None = None) -> Any:
    try:
        return _Unpickler(file, allowed or {}, {} if storages is None else storages).load()
    except CheckpointError:
        raise
    except Exception as error:  # damaged pickles raise nearly anything
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"damaged, truncated, or not written by torch.save: {reason}") from error


def _fill(storage: Storage, file: BinaryIO, file_size: int) -> None:
    numel = int.from_bytes(file.read(8), "little", signed=True)
    nbytes = storage.numel * storage.dtype.itemsize
    if numel != storage.numel or file.tell() + nbytes > file_size:
        raise CheckpointError("damaged or truncated: a storage has another length than it should")
    storage.content[:] = file.read(nbytes)
