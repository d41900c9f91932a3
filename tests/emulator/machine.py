"""What a block of threads has: memory with its owners, barriers, copies and products that end later than they begin.

Everything asynchronous ends as late as its wait allows, and until then its results are NaN, as is what nobody wrote.
What a GPU may do wrong only now and then is an `Error` here each time: accesses outside of the tensors given or in
another thread's way, a wait too few, a missing fence between ordinary writes to shared memory and Hopper's copy engine
and asynchronous products.

Sources: PTX ISA (memory consistency model, async proxy, mbarrier, cp.async, tensor copies, swizzling modes).
"""

import numpy as np

from tests.emulator import matrices
from tests.emulator.asynchronous import Barriers, Copies, Products
from tests.emulator.memory import WARP, Error, GlobalMemory, SharedMemory, same_in_all


class Block:
    """One block of a launch, as translated kernels see it."""

    def __init__(self, memory: GlobalMemory, index, grid, n_threads: int, shared_bytes: int) -> None:
        self.memory, self.index, self.grid, self.n_threads = memory, (*index, 0), (*grid, 1), n_threads
        self.threads = np.arange(n_threads, dtype=np.int32)
        self.elected = self.threads % WARP == 0
        self.shared = SharedMemory(shared_bytes, n_threads)
        self.copies, self.barriers, self.products = Copies(self), Barriers(self), Products(self)
        self.executed = 0
        self.apart: frozenset[int] = frozenset()  # places where threads may be without the others
        self._waiting: dict[int, np.ndarray] = {}

    def finish(self) -> None:
        for part in (self.copies, self.barriers, self.products):
            part.finish()

    def synchronize(self) -> None:
        self.shared.interval += 1

    def branch(self, some, predicate, target: int, after: int):
        """(place, who goes on there) behind a branch. Of threads on different ways the furthest behind come first.

        At other places than those of `apart` they wait for the rest.
        """
        predicate = np.asarray(predicate)
        if some is None:
            if predicate.ndim == 0 or (predicate == predicate[0]).all():
                return (target if predicate.flat[0] else after), None
            some = np.ones(self.n_threads, bool)
        self._wait(target, some & predicate)
        return self.go(some & ~predicate, after)

    def go(self, some, place: int):
        """The same where nobody is asked."""
        self._wait(place, some)
        place = min(self._waiting.keys() & self.apart or self._waiting)
        some = self._waiting.pop(place)
        return place, None if some.all() else some

    def _wait(self, place: int, some) -> None:
        if some.any():
            self._waiting[place] = some | self._waiting.get(place, False)

    def together(self) -> None:
        raise Error("threads of a block go different ways to memory, a barrier or the end")

    def bfly(self, x, lane):
        return self._shuffle(x, np.arange(WARP) ^ same_in_all(lane))

    def idx(self, x, lane):
        lane = np.broadcast_to(lane, self.n_threads).reshape(-1, WARP) & 31
        return np.take_along_axis(np.broadcast_to(x, self.n_threads).reshape(-1, WARP), lane, axis=1).ravel()

    def _shuffle(self, x, lanes):
        return np.broadcast_to(x, self.n_threads).reshape(-1, WARP)[:, lanes].ravel()

    def product(self, a, b, c, dtype):
        a, b = ([np.broadcast_to(x, self.n_threads) for x in group] for group in (a, b))
        return matrices.multiply_warps(a, b, [np.broadcast_to(x, self.n_threads) for x in c], dtype)

    def tensor_copy(self, target, source, coordinates, barrier, guard) -> None:
        """A tile by the copy engine, of one thread."""
        lanes = np.flatnonzero(np.broadcast_to(guard, self.n_threads)) if guard is not None else [0]
        for lane in lanes:
            place, tensor_map, barrier_, *coords = (
                int(np.broadcast_to(x, self.n_threads)[lane]) for x in (target, source, barrier, *coordinates)
            )
            tile = matrices.TensorMap.read(tensor_map)
            content = tile.fetch(self.memory, coords)
            places = place + tile.swizzled(place)
            self.shared._check(np.array([places.min(), places.max()]), 1)
            if place % 128:
                raise Error("the copy engine writes to multiples of 128 bytes")
            touched = places.reshape(-1, 1)
            warps = np.full(len(touched), lane // WARP)
            if self.shared.unfenced[touched].any():
                raise Error("the copy engine writes where threads wrote, with no fence between")
            self.shared.on_write(touched, warps, by_thread=False)
            self.shared.bytes[places] = 0xFF  # NaN, until it is waited for
            self.shared.arriving[places] = True

            def write(places=places, content=content, touched=touched):
                self.shared.bytes[places] = content
                self.shared.arriving[places] = False
                self.shared._written[touched] = -1  # who waits for the barrier sees it

            self.barriers.add_copy(barrier_, lane // WARP, (content.size, write))
