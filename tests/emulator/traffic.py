"""What kernels do when they run on the emulated GPU: instructions, shared memory's passes, global memory's sectors."""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from unittest import mock

import numpy as np

from tests.emulator import gpu
from tests.emulator.machine import Block
from tests.emulator.memory import WARP, GlobalMemory, SharedMemory

BANKS, SECTOR = 32, 32


@contextlib.contextmanager
def counted() -> Iterator[dict[str, Counter]]:
    """Counts by kernel, inside of an `emulated_gpu`.

    Keys: "instructions" of threads; "barriers" of blocks; "accesses" of warps to shared memory (ld and st), the
    "passes" that they take with bank conflicts, and the "fewest passes" that so many bytes take; "loads" of warps from
    global memory, the "sectors" of 32 bytes that they touch, and the "fewest sectors" that so many bytes fill.
    """
    counts: dict[str, Counter] = defaultdict(Counter)
    kernel = [""]
    run_grid, finish, synchronize = gpu._run_grid, Block.finish, Block.synchronize
    shared_lanes, global_load, global_lanes = SharedMemory._lanes, GlobalMemory.load, GlobalMemory._lanes

    def named_grid(compiled, *rest):
        kernel[0] = compiled.name
        run_grid(compiled, *rest)

    def finished(block):
        counts[kernel[0]]["instructions"] += block.executed * block.n_threads
        finish(block)

    def synchronized(block):
        counts[kernel[0]]["barriers"] += 1
        synchronize(block)

    def shared_access(memory, address, size, guard):
        lanes, places = shared_lanes(memory, address, size, guard)
        for warp in np.unique(lanes // WARP):
            passes, fewest = _passes(places[lanes // WARP == warp], size)
            counts[kernel[0]].update({"accesses": 1, "passes": passes, "fewest passes": fewest})
        return lanes, places

    def load(memory, address, kind, count, guard, old):
        lanes = global_lanes(memory, address, kind.itemsize * count, guard)[0]
        places = np.broadcast_to(address, memory.n_threads)[lanes]
        for warp in np.unique(lanes // WARP):
            touched = places[lanes // WARP == warp, None] + np.arange(kind.itemsize * count)
            sectors = len(np.unique(touched // SECTOR))
            counts[kernel[0]].update({"loads": 1, "sectors": sectors, "fewest sectors": -(-touched.size // SECTOR)})
        return global_load(memory, address, kind, count, guard, old)

    with contextlib.ExitStack() as stack:
        for owner, name, function in (
            (gpu, "_run_grid", named_grid),
            (Block, "finish", finished),
            (Block, "synchronize", synchronized),
            (SharedMemory, "_lanes", shared_access),
            (GlobalMemory, "load", load),
        ):
            stack.enter_context(mock.patch.object(owner, name, function))
        yield counts


def _passes(places: np.ndarray, size: int) -> tuple[int, int]:
    """How often the 32 banks are read for one access of a warp, and how often they must be at least."""
    together = WARP * 4 // max(size, 4)  # lanes that are served at once
    passes = 0
    for k in range(0, len(places), together):
        words = np.unique(places[k : k + together, None] // 4 + np.arange(max(1, size // 4)))
        passes += np.bincount(words % BANKS).max()
    return passes, -(-len(places) // together)
