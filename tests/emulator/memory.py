"""Global and shared memory, and who has touched what of them: two who may do so in any order are an `Error`."""

import ctypes

import numpy as np

from tests.emulator import matrices

WARP, GROUP = 32, 128
SHARED_FIRST = 1024  # address of the first byte of shared memory that a kernel has


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


def bytes_of(places, size):
    """(n places, size): what each access touches."""
    return places[:, None] + np.arange(size)


def same_in_all(x):
    """The value that all threads have."""
    x = np.asarray(x)
    if x.ndim == 0:
        return x
    if (x != x[0]).any():
        raise Error("threads of a block go different ways")
    return x[0]
