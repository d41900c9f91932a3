"""What a block of threads has: memory with its owners, barriers, copies and products that end later than they begin.

Everything asynchronous ends as late as its wait allows, and until then its results are NaN, as is what nobody wrote.
What a GPU may do wrong only now and then is an `Error` here each time: accesses outside of the tensors given or in
another thread's way, a wait too few, a missing fence between ordinary writes to shared memory and Hopper's copy engine
and asynchronous products.

Sources: PTX ISA (memory consistency model, async proxy, mbarrier, cp.async, tensor copies, swizzling modes).
"""

import ctypes

import numpy as np

from tests.emulator import matrices

WARP, GROUP = 32, 128
SHARED_FIRST = 1024  # address of the first byte of shared memory that a kernel has
_MARK = np.frombuffer(b"mbarrier", np.uint8)  # what lies where one is


class Error(RuntimeError):
    """What a GPU need not get right."""


class GlobalMemory:
    """The host's memory, where the tensors given to a launch are. Keeps which block wrote what."""

    def __init__(self, extents: list[tuple[int, int]]) -> None:
        merged: list[list[int]] = []
        for first, last in sorted(extents):
            if merged and first <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], last)
            else:
                merged.append([first, last])
        self.first = np.array([first for first, _ in merged], np.int64)
        self.last = np.array([last for _, last in merged], np.int64)
        self._bytes, self._writer, self._reader = [], [], []
        for first, last in merged:
            base = first & ~15
            self._bytes.append(
                (base, np.ctypeslib.as_array((ctypes.c_uint8 * (-(base - last) + 15 & ~15)).from_address(base)))
            )
            for blocks in (self._writer, self._reader):  # of every two bytes; -1 is none, -2 several
                blocks.append(np.full((last - base) // 2 + 8, -1, np.int32))
        self.block = 0
        self.n_threads = 0

    def load(self, address, kind, count, guard, old):
        lanes, groups = self._lanes(address, kind.itemsize * count, guard)
        results = [np.broadcast_to(x, self.n_threads).copy() for x in old] or [
            np.zeros(self.n_threads, kind) for _ in range(count)
        ]
        for extent, chosen, place in groups:
            self._on_read(extent, bytes_of(place // 2, max(1, kind.itemsize * count // 2)))
            numbers = self._numbers(extent, kind)
            for k in range(count):
                results[k][lanes[chosen]] = numbers[place // kind.itemsize + k]
        return results

    def store(self, address, values, guard):
        kind = values[0].dtype
        lanes, groups = self._lanes(address, kind.itemsize * len(values), guard)
        for extent, chosen, place in groups:
            numbers, writer = self._numbers(extent, kind), self._writer[extent]
            for k, value in enumerate(values):
                where = place + k * kind.itemsize
                for half in range(max(1, kind.itemsize // 2)):
                    writers = writer[where // 2 + half]
                    if ((writers >= 0) & (writers != self.block)).any():
                        raise Error("two blocks of a launch write the same place of global memory")
                    writer[where // 2 + half] = self.block
                numbers[where // kind.itemsize] = np.broadcast_to(value, self.n_threads)[lanes[chosen]]

    def read(self, address: int, size: int) -> np.ndarray:
        """Bytes of one place, for the copy engine."""
        (extent,) = self._extents(np.array([address]), size)
        base, data = self._bytes[extent]
        self._on_read(extent, slice((address - base) // 2, (address - base + size) // 2))
        return data[address - base : address - base + size]

    def finish(self) -> None:
        """After the last block: none may have read what a later one wrote."""
        for writer, reader in zip(self._writer, self._reader, strict=True):
            if ((writer != -1) & (reader != -1) & (reader != writer)).any():
                raise Error("a block writes to global memory what another block of the launch reads")

    def _on_read(self, extent, halves):
        writers, readers = self._writer[extent][halves], self._reader[extent][halves]
        if ((writers != -1) & (writers != self.block)).any():
            raise Error("a block reads from global memory what another block of the launch writes")
        self._reader[extent][halves] = np.where((readers == -1) | (readers == self.block), self.block, -2)

    def _lanes(self, address, size, guard):
        """The lanes that take part, and for every tensor which of them and where."""
        address = np.broadcast_to(address, self.n_threads)
        lanes = np.arange(self.n_threads) if guard is None else np.flatnonzero(np.broadcast_to(guard, self.n_threads))
        address = address[lanes]
        if (address % size).any():
            raise Error(f"an access to global memory of {size} bytes at {address[address % size != 0][0]:#x}")
        extents = self._extents(address, size)
        return lanes, [
            (extent, chosen := np.flatnonzero(extents == extent), address[chosen] - self._bytes[extent][0])
            for extent in np.unique(extents)
        ]

    def _extents(self, address, size):
        extents = np.searchsorted(self.first, address, side="right") - 1
        outside = (extents < 0) | (address + size > self.last[extents])
        if outside.any():
            raise Error(f"an access of {size} bytes outside of the tensors, at {address[outside][0]:#x}")
        return extents

    def _numbers(self, extent, kind):
        return self._bytes[extent][1].view(kind)


class SharedMemory:
    """Shared memory of a block, by 32-bit address, and who touched which byte of it since the last barrier."""

    def __init__(self, size: int, n_threads: int) -> None:
        self.first, self.size = SHARED_FIRST, size
        self.n_threads, self.warps = n_threads, np.arange(n_threads) // WARP
        self.bytes = np.full(SHARED_FIRST + size + 15 & ~15, 0xFF, np.uint8)
        n_bytes = len(self.bytes)
        self._written = np.full(n_bytes, -1, np.int32)  # the interval between barriers in which it was
        self._writer = np.zeros(n_bytes, np.int32)  # a warp
        self._read = np.full((n_threads // WARP, n_bytes), -1, np.int32)
        self.unfenced = np.zeros(n_bytes, bool)  # written by threads, which asynchronous products do not see yet
        self.arriving = np.zeros(n_bytes, bool)  # copied to, not waited for
        self.in_flight = np.zeros(n_bytes, np.int32)  # products that read it have not been waited for
        self._multiplied = np.full((n_threads // GROUP, n_bytes), -1, np.int32)  # the interval, by each group of warps
        self.interval = 0

    def load(self, address, kind, count, guard, old):
        lanes, places = self._lanes(address, kind.itemsize * count, guard)
        self.on_read(bytes_of(places, kind.itemsize * count), self.warps[lanes])
        results = [np.broadcast_to(x, self.n_threads).copy() for x in old] or [
            np.zeros(self.n_threads, kind) for _ in range(count)
        ]
        numbers = self.bytes.view(kind)
        for k, result in enumerate(results):
            result[lanes] = numbers[places // kind.itemsize + k]
        return results

    def store(self, address, values, guard):
        kind = values[0].dtype
        size = kind.itemsize * len(values)
        lanes, places = self._lanes(address, size, guard)
        self.on_write(bytes_of(places, size), self.warps[lanes])
        numbers = self.bytes.view(kind)
        for k, value in enumerate(values):
            numbers[places // kind.itemsize + k] = np.broadcast_to(value, self.n_threads)[lanes]

    def load_matrices(self, address, n, transposed):
        rows = self._rows(address, n)
        self.on_read(bytes_of(rows.ravel(), 16), np.repeat(np.arange(len(rows)), 8 * n))
        halves = self.bytes.view(np.uint16)[rows[..., None] // 2 + np.arange(8)]  # (warps, n, 8 rows, 8 columns)
        return matrices.to_threads(halves, transposed)

    def store_matrices(self, address, values, transposed):
        rows = self._rows(address, len(values))
        self.on_write(bytes_of(rows.ravel(), 16), np.repeat(np.arange(len(rows)), 8 * len(values)))
        values = [np.broadcast_to(x, self.n_threads) for x in values]
        halves = matrices.from_threads(values, transposed)
        self.bytes.view(np.uint16)[rows[..., None] // 2 + np.arange(8)] = halves

    def fence(self) -> None:
        """fence.proxy.async of all threads."""
        self.unfenced[:] = False

    def on_write(self, touched, warps, by_thread=True) -> None:
        """Accesses as from `bytes_of`, by a warp each. Not `by_thread`: no fence is needed."""
        warps = warps[:, None]
        if self.arriving[touched].any():
            raise Error("a write to shared memory that a copy not yet waited for writes")
        others = (self._written[touched] == self.interval) & (self._writer[touched] != warps)
        if others.any():
            raise Error("two warps write the same place of shared memory with no barrier between")
        for warp in range(len(self._read)):
            if ((self._read[warp, touched] == self.interval) & (warps != warp)).any():
                raise Error("a warp writes to shared memory what another reads, with no barrier between")
        if self.in_flight[touched].any():
            raise Error("a write to shared memory that a product not yet waited for reads")
        for group, interval in enumerate(self._multiplied):
            if len(self._multiplied) > 1 and ((interval[touched] == self.interval) & (warps // 4 != group)).any():
                raise Error("a write to shared memory that other warps may not have multiplied yet")
        self._written[touched] = self.interval
        self._writer[touched] = warps
        self.unfenced[touched] = by_thread

    def on_read(self, touched, warps) -> None:
        warps = warps[:, None]
        if self.arriving[touched].any():
            raise Error("a read from shared memory that a copy not yet waited for writes")
        if ((self._written[touched] == self.interval) & (self._writer[touched] != warps)).any():
            raise Error("a warp reads from shared memory what another wrote, with no barrier between")
        self._read[np.broadcast_to(warps, touched.shape), touched] = self.interval

    def begin_product(self, elements) -> None:
        """A product of all warps begins to read elements of 16 bits, (groups of warps, ...)."""
        touched = 2 * elements
        if self.arriving[touched].any():
            raise Error("an asynchronous product reads what a copy not yet waited for writes")
        if self.unfenced[touched].any():
            raise Error("an asynchronous product reads what threads wrote, with no fence between")
        if (self._written[touched] == self.interval).any() and len(self._read) > 1:
            raise Error("an asynchronous product reads what one warp wrote, with no barrier between")
        self._count_product(touched, 1)

    def end_product(self, elements) -> None:
        self._count_product(2 * elements, -1)

    def _count_product(self, touched, n: int) -> None:
        for x in (touched, touched + 1):
            np.add.at(self.in_flight, x, n)
            for group, places in enumerate(x):
                self._multiplied[group, places] = self.interval

    def _rows(self, address, n):
        """(warps, n, 8) addresses of rows of 16 bytes, from those that threads give."""
        rows = np.broadcast_to(address, self.n_threads).reshape(-1, WARP)[:, : 8 * n].reshape(-1, n, 8)
        self._check(rows.ravel(), 16)
        return rows

    def _lanes(self, address, size, guard):
        address = np.broadcast_to(address, self.n_threads)
        lanes = np.arange(self.n_threads) if guard is None else np.flatnonzero(np.broadcast_to(guard, self.n_threads))
        self._check(address[lanes], size)
        return lanes, address[lanes]

    def _check(self, address, size):
        if (address % size).any():
            raise Error(f"an access to shared memory of {size} bytes at {address[address % size != 0][0]}")
        if ((address < self.first) | (address + size > self.first + self.size)).any():
            raise Error(f"an access outside of the {self.size} bytes of shared memory")


class Copies:
    """cp.async: threads copy from global to shared memory; done when their group has been waited for."""

    def __init__(self, block: "Block") -> None:
        self.block = block
        self._open: list = []
        self._groups: list[list] = []

    def issue(self, target, source, size, given, guard):
        shared, n_threads = self.block.shared, self.block.n_threads
        lanes, places = shared._lanes(target, size, guard)
        given = np.broadcast_to(given, n_threads)[lanes]
        source = np.broadcast_to(source, n_threads)
        if not np.isin(given, (0, size)).all():
            raise Error("cp.async of a part of its size")
        wanted = np.zeros(n_threads, bool)
        wanted[lanes] = given > 0
        kind = np.dtype(np.uint32)
        words = self.block.memory.load(source, kind, size // 4, wanted, (np.zeros(n_threads, kind),) * (size // 4))
        touched = bytes_of(places, size)
        warps = shared.warps[lanes]
        shared.on_write(touched, warps)
        numbers = shared.bytes.view(kind)
        for k in range(size // 4):
            numbers[places // 4 + k] = 0xFFFFFFFF  # NaN, until it is waited for
        shared.arriving[touched] = True
        self._open.append((places, [x[lanes] for x in words], touched, warps))

    def commit(self):
        self._groups.append(self._open)
        self._open = []

    def wait(self, n: int):
        shared = self.block.shared
        for _ in range(len(self._groups) - n):
            for places, words, touched, warps in self._groups.pop(0):
                shared.arriving[touched] = False
                shared.on_write(touched, warps)
                for k, word in enumerate(words):
                    shared.bytes.view(np.uint32)[places // 4 + k] = word

    def finish(self):
        if self._open or any(self._groups):
            raise Error("a kernel ends before its copies")


class Barriers:
    """mbarrier: a phase ends when its arrivals and bytes have come. The engine's copies come when waited for."""

    def __init__(self, block: "Block") -> None:
        self.block = block
        self._states: dict[int, dict] = {}

    def init(self, address, count, guard):
        for place, warp in self._places(address, guard):
            self.block.shared.on_write(*self._touched(place, warp), by_thread=False)
            self._states[place] = {"count": count, "missing": count, "bytes": 0, "phase": 0, "copies": [], "seen": -1}
            self._mark(place)[:] = _MARK

    def inval(self, address, guard):
        for place, warp in self._places(address, guard):
            self._state(place, warp)
            self.block.shared.on_write(*self._touched(place, warp), by_thread=False)
            if self._states.pop(place)["copies"]:
                raise Error("a barrier ends before its copies")

    def expect(self, address, n_bytes, guard):
        for place, warp in self._places(address, guard):
            state = self._state(place, warp)
            if state["seen"] == self.block.shared.interval and self.block.n_threads > WARP:
                raise Error("a next phase of a barrier begins before all warps need have seen the end of this one")
            state["missing"] -= 1
            state["bytes"] += n_bytes
            self._turn(state)

    def add_copy(self, place: int, warp: int, copy) -> None:
        self._state(place, warp)["copies"].append(copy)

    def test(self, address, parity):
        place, parity = int(_same(address)), int(_same(parity))
        state = self._state(place, *range(self.block.n_threads // WARP))
        while state["phase"] & 1 == parity:
            if not state["copies"]:
                raise Error("a barrier is waited for that nothing will complete")
            n_bytes, write = state["copies"].pop(0)
            write()
            state["bytes"] -= n_bytes
            self._turn(state)
        state["seen"] = self.block.shared.interval
        return np.bool_(True)

    def finish(self):
        if any(state["copies"] for state in self._states.values()):
            raise Error("a kernel ends before its copies")

    def _turn(self, state):
        if state["missing"] == 0 and state["bytes"] == 0:
            state["phase"] += 1
            state["missing"] = state["count"]

    def _state(self, place, *warps):
        """What a barrier is in, for these warps."""
        if place not in self._states or (self._mark(place) != _MARK).any():
            raise Error("an operation on a barrier that is none")
        self.block.shared.on_read(*self._touched(place, *warps))
        return self._states[place]

    def _mark(self, place):
        return self.block.shared.bytes[place : place + 8]

    def _touched(self, place, *warps):
        return bytes_of(np.full(len(warps), place), 8), np.array(warps)

    def _places(self, address, guard):
        lanes, places = self.block.shared._lanes(address, 8, guard)
        return [(int(x), int(lane) // WARP) for x, lane in zip(places, lanes, strict=True)]


class Products:
    """wgmma: products of four warps, done when their group has been waited for."""

    def __init__(self, block: "Block") -> None:
        self.block = block
        self._open: list = []
        self._groups: list[list] = []

    def issue(self, accumulators, left, right, accumulate, shape, dtype, transposed_left, transposed_right, fenced):
        """New accumulators, NaN until the wait. `fenced`: behind a wgmma.fence; what is written later ptxas orders."""
        if not fenced:
            raise Error("an asynchronous product with no wgmma.fence in front")
        block, n_threads = self.block, self.block.n_threads
        m, n, k = matrices.shape_of(shape)
        inputs = [np.broadcast_to(x, n_threads) for x in accumulators]
        results = tuple(np.full(n_threads, np.nan, np.float32) for _ in accumulators)
        accumulate = bool(_same(accumulate))
        read = []
        if isinstance(left, tuple):
            left = [np.broadcast_to(x, n_threads).copy() for x in left]
        else:
            left = matrices.described(left, n_threads, m, k, bool(transposed_left))
            read.append(left)
        right = matrices.described(right, n_threads, n, k, bool(transposed_right))
        read.append(right)
        for places in read:
            block.shared.begin_product(places)

        def finish():
            numbers = block.shared.bytes.view(np.uint16)
            a = matrices.left_operand(left) if isinstance(left, list) else numbers[left]
            for places in read:
                block.shared.end_product(places)
            matrices.multiply_groups(results, inputs if accumulate else None, a, numbers[right], dtype)

        self._open.append(finish)
        return results

    def commit(self):
        self._groups.append(self._open)
        self._open = []

    def wait(self, n: int):
        for _ in range(len(self._groups) - n):
            for finish in self._groups.pop(0):
                finish()

    def finish(self):
        if self._open or any(self._groups):
            raise Error("a kernel ends before its products")


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
        return self._shuffle(x, np.arange(WARP) ^ _same(lane))

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


def bytes_of(places, size):
    """(n places, size): what each access touches."""
    return places[:, None] + np.arange(size)


def _same(x):
    """The value that all threads have."""
    x = np.asarray(x)
    if x.ndim == 0:
        return x
    if (x != x[0]).any():
        raise Error("threads of a block go different ways")
    return x[0]
