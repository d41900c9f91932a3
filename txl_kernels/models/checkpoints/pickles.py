"""Pickled checkpoints, whatever wrote them, as data: modules are read as records of their attributes."""

import zipfile
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from txl_kernels.models.checkpoints.files import CheckpointError
from txl_kernels.models.checkpoints.legacy import LazyTensor, read_legacy

_MODULES = {
    "mem_transformer": (
        *("MemTransformerLM", "AdaptiveEmbedding", "PositionalEmbedding", "PositionwiseFF", "MultiHeadAttn"),
        *("RelPartialLearnableMultiHeadAttn", "RelLearnableMultiHeadAttn"),
        *("RelPartialLearnableDecoderLayer", "RelLearnableDecoderLayer", "DecoderLayer"),
    ),
    "proj_adaptive_softmax": ("ProjectedAdaptiveLogSoftmax",),
    "utils.proj_adaptive_softmax": ("ProjectedAdaptiveLogSoftmax",),
    "data_parallel": ("BalancedDataParallel",),
    "utils.data_parallel": ("BalancedDataParallel",),
    "torch.nn.parallel.data_parallel": ("DataParallel",),
    "torch.nn.modules.activation": ("ReLU",),
    "torch.nn.modules.container": ("ModuleList", "ParameterList", "Sequential"),
    "torch.nn.modules.dropout": ("Dropout",),
    "torch.nn.modules.linear": ("Linear",),
    "torch.nn.modules.normalization": ("LayerNorm",),
    "torch.nn.modules.sparse": ("Embedding",),
    # an attribute of every module until PyTorch 1.4, of no meaning here
    "torch.nn.backends.thnn": ("_get_thnn_function_backend",),
}
# what torch allows to be read is the same for all threads
_ONE_AT_A_TIME = Lock()


class PickledModule:
    """The attributes of a module, without its code."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        if type(state) is not dict or not all(type(name) is str for name in state):
            raise CheckpointError(f"expected the attributes of a module, got {type(state).__name__}")
        self.__dict__.update(state)


def read_pickle(path: Path) -> Any:
    """The object in a file of torch.save: `PickledModule` for modules; tensors, or `LazyTensor` for them.

    Raises:
        CheckpointError: The file asks for anything but modules of the original and tensors, is damaged, or is
            something else.
    """
    if not path.is_file():
        raise CheckpointError("expected a file, got a directory")
    classes = {
        f"{module}.{name}": type(name, (PickledModule,), {}) for module, names in _MODULES.items() for name in names
    }
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise CheckpointError("expected a file of torch.save, got an empty one")
    if head[257:262] == b"ustar":
        raise CheckpointError("expected a file of PyTorch 0.4 or newer, got the tar format of PyTorch 0.1")
    return _read_zip(path, classes) if head.startswith(b"PK\x03\x04") else read_legacy(path, classes)


def load_tensors(content: Any) -> dict[str, Tensor]:
    """The tensors of a state_dict from `read_pickle`, without the prefix that DataParallel gives their names.

    Raises:
        CheckpointError: It is no state_dict, or a tensor does not fit its storage.
    """
    if not isinstance(content, dict) or not content or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"expected a state_dict, got {type(content).__name__} without names")
    wrapped = all(name.startswith("module.") for name in content)
    tensors = {}
    for name, tensor in plain(content).items():
        tensor = tensor.load() if isinstance(tensor, LazyTensor) else tensor
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        tensors[name.removeprefix("module.") if wrapped else name] = tensor
    return tensors


def plain(content: dict) -> dict:
    """A copy of a dict from a pickle, which may be an OrderedDict with attributes in place of its methods."""
    return dict(list(dict.items(content)))


def _read_zip(path: Path, classes: dict[str, type]) -> Any:
    """By torch's loader that runs nothing but what it knows, with classes in place of those of these names."""
    with _ONE_AT_A_TIME, torch.serialization.safe_globals([(cls, name) for name, cls in classes.items()]):
        try:
            _check_sums(path)
            forbidden = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if not forbidden:
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            # torch's whole message recommends to load without restrictions
            reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
            raise CheckpointError(f"damaged, truncated, or not written by torch.save: {reason}") from None
    raise CheckpointError(f"refused, its pickle asks for the forbidden global {', '.join(sorted(forbidden))}")


def _check_sums(path: Path) -> None:
    """Raises zipfile's error where a part has another checksum than it was written with; torch does not look."""
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            if part.CRC:  # 0: torch was told to write none
                with archive.open(part) as content:
                    while content.read(1 << 20):
                        pass
