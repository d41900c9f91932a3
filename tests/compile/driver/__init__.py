"""Triton's own way from a call to the GPU's driver, without a GPU: behind it stands a driver that launches nothing.

What runs is Triton's choice of a variant, its compilation for sm_90 and its C code that packs the arguments and encodes
tensor descriptors; libcuda.c checks the limits of the driver.
"""

import contextlib
import ctypes
import functools
import gc
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.runtime import JITFunction

from txl_kernels import functional
from txl_kernels.triton_backend import call
from txl_kernels.triton_backend.plans import PLANS

# Why there can be none, or None.
MISSING = None
if torch.cuda.is_available():
    MISSING = "there is a real driver"
elif shutil.which("cc") is None:
    MISSING = "needs a C compiler, as Triton does"


class _Driver(nvidia.CudaDriver):
    """A GPU whose memory is the host's."""

    def __init__(self, launches: list[tuple], generation: str, after: Callable[..., None]) -> None:
        class Launcher(nvidia.CudaLauncher):
            def __call__(self, *args):
                launches.append(args)
                super().__call__(*args)
                after(*args)

        self.utils, self.launcher_cls = _utils(), Launcher
        self.get_device_capability = lambda device=0: divmod(int(generation.removeprefix("sm_")), 10)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


@functools.cache
def _utils() -> nvidia.CudaUtils:
    """Once a process: launchers that Triton 3.6 has loaded know no other's tensor maps."""
    return nvidia.CudaUtils()


@contextlib.contextmanager
def driver_that_launches_nothing(
    folder: Path, generation: str = "sm_90", after: Callable[..., None] = lambda *_: None
) -> Iterator[list[tuple]]:
    """Builds it in a folder, with Triton's part beside it. Until the end Triton takes CPU tensors to it.

    Yields the launches, to which each adds what Triton's launcher is called with; then `after` is called with the same.
    """
    include, library = Path(nvidia.__file__).parent / "include", folder / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-O1", f"-Wl,-soname,{library.name}", f"-I{include}"]
    subprocess.run(["cc", *options, Path(__file__).parent / "libcuda.c", "-o", library], check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # is found by its name from now on
    launches: list[tuple] = []
    with knobs.nvidia.scope(), knobs.cache.scope():
        knobs.nvidia.libcuda_path, knobs.cache.dir = str(folder), str(folder / "cache")
        active = _Driver(launches, generation, after)
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (triton.runtime.driver, "_active", active),
            (call, "generation_of", lambda device: generation),
            (functional, "check_backend", lambda *_: None),
            (PLANS, "_plans", {}),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        _forget_compiled()
        yield launches
        _forget_compiled()


def _forget_compiled() -> None:
    """Variants loaded by one driver are not launched by the next, which may be of another generation."""
    for x in gc.get_objects():
        if type(x) is JITFunction:
            x.device_caches.clear()
