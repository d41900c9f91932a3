"""Where the elements of matrices are, in threads, in shared memory and in tensors.

Sources: PTX ISA, "Matrix fragments for mma.m16n8k16", ldmatrix, wgmma ("Register fragments", "Shared memory matrix
layout", "Matrix descriptor"), tensor maps and swizzling modes.
"""

import ctypes
import re
import struct
from dataclasses import dataclass

import numpy as np

from tests.emulator import arithmetic

WARP = 32
_LANE = np.arange(WARP)
_ROW, _COLUMN = _LANE // 4, _LANE % 4 * 2  # of the pair of elements that a thread has of 8 x 8


def to_threads(halves: np.ndarray, transposed: bool) -> list[np.ndarray]:
    """ldmatrix: (warps, n, 8, 8) elements of 16 bits -> n registers of two elements."""
    if transposed:
        halves = halves.swapaxes(2, 3)
    low, high = (halves[:, :, _ROW, _COLUMN + k] for k in (0, 1))  # (warps, n, 32)
    both = arithmetic.packed(low, high)
    return [both[:, k].ravel() for k in range(both.shape[1])]


def from_threads(registers: list[np.ndarray], transposed: bool) -> np.ndarray:
    """stmatrix: the inverse of to_threads."""
    result = np.empty((len(registers[0]) // WARP, len(registers), 8, 8), np.uint16)
    for k, register in enumerate(registers):
        for half, x in enumerate(arithmetic.unpacked(register, np.dtype(np.uint16))):
            result[:, k, _ROW, _COLUMN + half] = x.reshape(-1, WARP)
    return result.swapaxes(2, 3) if transposed else result


def left_operand(registers: list[np.ndarray]) -> np.ndarray:
    """(warps, 16, 16) elements of 16 bits from the four registers of each thread."""
    parts = from_threads(registers, False)  # (warps, 4, 8, 8)
    return np.block([[parts[:, 0], parts[:, 2]], [parts[:, 1], parts[:, 3]]])


def _numbers(bits: np.ndarray, dtype: str) -> np.ndarray:
    return {"bf16": arithmetic.from_bf16, "f16": arithmetic.from_f16}[dtype](bits)


def _tf32_operand(registers: list[np.ndarray]) -> np.ndarray:
    """(warps, n, 8, 4) numbers, of which a thread has one a register; their last 13 bits are not read."""
    bits = np.stack([x.view(np.uint32).reshape(-1, 8, 4) for x in registers], axis=1)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def multiply_warps(a, b, c, dtype: str) -> list[np.ndarray]:
    """mma.m16n8k16, of tf32 m16n8k8: four new accumulators."""
    if dtype == "tf32":
        parts, right = _tf32_operand(a), _tf32_operand(b)  # right: (warps, 2, 8 columns of the result, 4)
        left = np.block([[parts[:, 0], parts[:, 2]], [parts[:, 1], parts[:, 3]]])
    else:
        left = _numbers(left_operand(a), dtype)
        right = _numbers(from_threads(b, False), dtype)  # (warps, 2, 8 columns of the result, 8)
    right = np.concatenate([right[:, 0], right[:, 1]], axis=2)  # (warps, 8, k)
    product = left @ right.swapaxes(1, 2)  # (warps, 16, 8)
    return [x + y for x, y in zip(c, _accumulators(product), strict=True)]


def _accumulators(product: np.ndarray) -> list[np.ndarray]:
    """(warps, 16, N) -> N / 2 registers."""
    result = []
    for column in range(0, product.shape[2], 8):
        for row in (0, 8):
            for half in (0, 1):
                result.append(product[:, row + _ROW, column + _COLUMN + half].ravel())
    return result


def shape_of(text: str) -> tuple[int, int, int]:
    return tuple(map(int, re.fullmatch(r"m(\d+)n(\d+)k(\d+)", text).groups()))


def multiply_groups(results, inputs, a, b, dtype: str) -> None:
    """wgmma: fills results. a (warps, 16, k) or (groups, 64, k), b (groups, N, k), elements of 16 bits."""
    groups = len(b)
    left, right = _numbers(a, dtype).reshape(groups, 64, -1), _numbers(b, dtype)
    product = (left @ right.swapaxes(1, 2)).reshape(groups * 4, 16, -1)
    for k, x in enumerate(_accumulators(product)):
        results[k][:] = x if inputs is None else x + inputs[k]


def described(descriptor: np.ndarray, n_threads: int, rows: int, columns: int, transposed: bool) -> np.ndarray:
    """(groups, rows, columns): where in shared memory, in units of 16 bits, a descriptor has a matrix's elements.

    rows are those of M or N, columns those of K. transposed: neighbours in memory are neighbours in M or N.
    """
    descriptor = np.broadcast_to(descriptor, n_threads).reshape(-1, 4 * WARP)
    if (descriptor != descriptor[:, :1]).any():
        raise RuntimeError("threads of a group with different descriptors")
    x = descriptor[:, 0].astype(np.uint64)
    first, leading, stride = ((x >> np.uint64(k)) & np.uint64(0x3FFF) for k in (0, 16, 32))
    first, leading, stride = (16 * y.astype(np.int64)[:, None, None] for y in (first, leading, stride))
    mode, base = int(x[0] >> np.uint64(62)), int(x[0] >> np.uint64(49)) & 7
    if base:
        raise NotImplementedError("base offset of a descriptor")
    width = {0: 16, 1: 128, 2: 64, 3: 32}[mode]  # bytes of a row of the swizzled atom
    if mode and (first % (8 * width) >= width).any():
        raise NotImplementedError("a matrix that begins within its swizzling pattern")
    i, k = np.arange(rows)[:, None], np.arange(columns)[None, :]
    if transposed:
        atom = width // 2  # elements
        place = i % atom * 2 + k % 8 * width
        far, near = (leading, stride) if mode else (stride, leading)
        place = place + i // atom * far + k // 8 * near
    else:
        place = i % 8 * width + i // 8 * stride + k * 2
        if not mode:
            place = i % 8 * 16 + i // 8 * stride + k // 8 * leading + k % 8 * 2
    return swizzle(first + place, width) // 2


def swizzle(address: np.ndarray, width: int) -> np.ndarray:
    """The address with its 16-byte column exchanged by its row of 128 bytes."""
    return address ^ ((address >> 7) & (width // 16 - 1)) << 4


@dataclass
class TensorMap:
    """What `cuTensorMapEncodeTiled` of driver/libcuda.c writes down; sizes and box from the innermost dimension on."""

    address: int
    itemsize: int
    swizzle_width: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # bytes, of all dimensions but the innermost
    box: tuple[int, ...]

    @classmethod
    def read(cls, place: int) -> "TensorMap":
        raw = ctypes.string_at(place, 128)
        magic, rank, itemsize, width, address, *numbers = struct.unpack("<IIIIQ5Q4Q5H", raw[: 24 + 72 + 10])
        if magic != 0x74786C21:
            raise RuntimeError("not a tensor map")
        return cls(
            address,
            itemsize,
            width,
            tuple(numbers[:rank]),
            tuple(numbers[5 : 5 + rank - 1]),
            tuple(numbers[9 : 9 + rank]),
        )

    def fetch(self, memory, coordinates: list[int]) -> np.ndarray:
        """The bytes of a tile, (rows, bytes of a row), zeros outside of the tensor."""
        inner = self.box[0] * self.itemsize
        first, last = max(0, coordinates[0]), min(self.sizes[0], coordinates[0] + self.box[0])
        rows = []
        for index in np.ndindex(*reversed(self.box[1:])):
            place = [c + i for c, i in zip(coordinates[1:], reversed(index), strict=True)]
            row = np.zeros(inner, np.uint8)
            inside = all(0 <= p < size for p, size in zip(place, self.sizes[1:], strict=True))
            if inside and first < last:
                start = (
                    self.address + sum(p * s for p, s in zip(place, self.strides, strict=True)) + first * self.itemsize
                )
                begin = (first - coordinates[0]) * self.itemsize
                size = (last - first) * self.itemsize
                row[begin : begin + size] = memory.read(start, size)
            rows.append(row)
        return np.stack(rows)

    def swizzled(self, target: int) -> np.ndarray:
        """Where from its target on each byte of a tile goes."""
        inner = self.box[0] * self.itemsize
        rows = int(np.prod(self.box[1:]))
        plain = target + np.arange(rows)[:, None] * inner + np.arange(inner)[None, :]
        return (swizzle(plain, self.swizzle_width) if self.swizzle_width > 16 else plain) - target
