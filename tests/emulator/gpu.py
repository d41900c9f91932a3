"""A GPU in Python: Triton compiles for it and launches on it, and what is run is the PTX, on CPU tensors."""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.compile.driver import driver_that_launches_nothing
from tests.emulator.machine import Block
from tests.emulator.memory import WARP, GlobalMemory
from tests.emulator.ptx import Kernel, parameter_sizes
from tests.emulator.translate import translated
from txl_kernels.triton_backend.plans import Buffer

_ON_LAUNCH = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))


@contextlib.contextmanager
def emulated_gpu(folder: Path, generation: str) -> Iterator[list[tuple]]:
    """Until the end, `rel_attention(..., backend="triton")` on CPU tensors runs what a GPU would. Yields the launches.

    Args:
        folder: where the stand-in for the driver is built.
        generation: sm_80 or sm_90.
    """
    compiled: dict[int, CompiledKernel] = {}
    given: list[tuple[int, list[bytes]]] = []
    load = CompiledKernel._init_handles

    def load_and_remember(kernel):
        load(kernel)
        compiled[kernel.function] = kernel

    def on_launch(function, parameters):  # what is raised here, nobody would see
        sizes = parameter_sizes(compiled[function].asm["ptx"])
        given.append((function, [ctypes.string_at(parameters[k], size) for k, size in enumerate(sizes)]))

    def run(*args):
        function, parameters = given.pop()
        _run_grid(compiled[function], args[:2], parameters, args[9:])

    callback = _ON_LAUNCH(on_launch)
    with driver_that_launches_nothing(folder, generation, run) as launches:
        hook = ctypes.c_void_p.in_dll(ctypes.CDLL("libcuda.so.1"), "on_launch")
        hook.value = ctypes.cast(callback, ctypes.c_void_p).value
        try:
            with (
                mock.patch.object(CompiledKernel, "_init_handles", load_and_remember),
                mock.patch.object(Buffer, "allocate", _allocated),
            ):
                yield launches
        finally:
            hook.value = None


def _allocated(buffer: Buffer, device: torch.device, allocate=Buffer.allocate) -> torch.Tensor:
    """What a kernel has not written is NaN."""
    x = allocate(buffer, device)
    return x if buffer._zeros else x.fill_(torch.nan)


def _run_grid(compiled: CompiledKernel, grid: tuple[int, int], raw: list[bytes], arguments: tuple) -> None:
    kernel, run = translated(compiled.asm["ptx"])
    numbers, addresses, _alive = _parameters(kernel, raw)
    tensors = [x.base if isinstance(x, TensorDescriptor) else x for x in arguments]
    memory = GlobalMemory([_extent(x) for x in tensors if isinstance(x, torch.Tensor) and x.numel()])
    n_threads = compiled.metadata.num_warps * WARP
    memory.n_threads = n_threads
    with np.errstate(all="ignore"):
        for y in range(grid[1]):
            for x in range(grid[0]):
                memory.block = y * grid[0] + x
                block = Block(memory, (x, y), grid, n_threads, compiled.metadata.shared)
                run(block, numbers, addresses)
                block.finish()
    memory.finish()


def _parameters(kernel: Kernel, raw: list[bytes]) -> tuple[dict, dict, list]:
    """Numbers by name, addresses of tensor maps by name, and what must live as long as they are used."""
    numbers, addresses, alive = {}, {}, []
    for parameter, content in zip(kernel.parameters, raw, strict=True):
        if parameter.kind is None:
            buffer = ctypes.create_string_buffer(content, len(content))
            alive.append(buffer)
            addresses[parameter.name] = ctypes.addressof(buffer)
        else:
            size = parameter.size
            dtype = np.dtype("f4" if parameter.kind == "f32" else f"i{size}")
            numbers[parameter.name] = np.frombuffer(content, dtype)[0]
    return numbers, addresses, alive


def _extent(x: torch.Tensor) -> tuple[int, int]:
    """Addresses of the first byte of a tensor and behind its last."""
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
