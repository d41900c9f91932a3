"""What ends later than it begins: copies by threads, the barriers of the copy engine, products of Hopper.

Sources: PTX ISA (cp.async, mbarrier, wgmma).
"""

from typing import TYPE_CHECKING

import numpy as np

from tests.emulator import matrices
from tests.emulator.memory import WARP, Error, bytes_of, same_in_all

if TYPE_CHECKING:
    from tests.emulator.machine import Block

_MARK = np.frombuffer(b"mbarrier", np.uint8)  # what lies where a barrier is


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
        place, parity = int(same_in_all(address)), int(same_in_all(parity))
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
        accumulate = bool(same_in_all(accumulate))
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
