"""What the translated instructions compute with."""

import numpy as np

__all__ = [
    "divide", "fma", "from_bf16", "from_f16", "np", "packed", "permuted", "remainder", "shift_left", "shift_right",
    "small_floats", "to_bf16", "to_f16", "undefined", "unpacked",
]  # fmt: skip


def undefined(kind):
    """What a register has before anything is written to it."""
    kind = np.dtype(kind)
    if kind.kind == "i":  # halves that are NaN as well
        return np.array(0x7FFF7FFF7FFF7FFF & np.iinfo(kind).max, kind)
    return np.array(np.nan if kind.kind == "f" else False if kind.kind == "b" else 0x7FFF, kind)


def fma(a, b, c):
    """a b + c in float32, rounded once: float64 holds the product."""
    return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)


def divide(a, b):
    """Towards zero, as PTX does."""
    dtype = np.result_type(a)
    if dtype.kind == "u":
        return a // b
    quotient = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(dtype)


def remainder(a, b):
    return a - divide(a, b) * b


def shift_left(a, count):
    """By 32 bits or more everything is shifted out."""
    bits = 8 * a.dtype.itemsize
    return np.where(count < bits, a << np.minimum(count, bits - 1).astype(a.dtype), np.zeros((), a.dtype))


def shift_right(a, count):
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count < bits, shifted, np.zeros((), a.dtype))


def from_bf16(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x):
    """To the nearest, to even between two. float64 is rounded to odd on the way, so that it is rounded once."""
    if x.dtype == np.float64:
        x = _rounded_to_odd(x)
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def _rounded_to_odd(x):
    near = x.astype(np.float32)
    toward_zero = np.where(np.abs(near.astype(np.float64)) > np.abs(x), np.nextafter(near, np.float32(0)), near)
    inexact = toward_zero.astype(np.float64) != x
    return (toward_zero.view(np.uint32) | (inexact & np.isfinite(x)).astype(np.uint32)).view(np.float32)


def from_f16(bits):
    return bits.view(np.float16).astype(np.float32)


def to_f16(x):
    return x.astype(np.float16).view(np.uint16)


def small_floats(type_, function, *operands):
    """A function of float64 on bits of 16-bit floats, or on pairs of them, rounded once."""
    if type_.endswith("x2"):
        halves = [unpacked(x, np.dtype(np.uint16)) for x in operands]
        return packed(*(small_floats(type_.removesuffix("x2"), function, *half) for half in zip(*halves, strict=True)))
    read, write = {"bf16": (from_bf16, to_bf16), "f16": (from_f16, to_f16)}[type_]
    return write(np.asarray(function(*(read(x).astype(np.float64) for x in operands))))


def packed(low, high):
    """Two halves as one signed integer."""
    half = 8 * np.result_type(low).itemsize
    wide = np.dtype(f"u{2 * half // 8}")
    value = np.asarray(low).astype(wide) | (np.asarray(high).astype(wide) << wide.type(half))
    return value.view(f"i{2 * half // 8}")


def permuted(a, b, selector: int):
    """prmt: four bytes of b and a, each by its number; with 8 more, its sign in all bits."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.uint64(0)
    for k in range(4):
        which = selector >> 4 * k & 15
        byte = both >> np.uint64(8 * (which & 7)) & np.uint64(0xFF)
        if which & 8:
            byte = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        result = result | byte << np.uint64(8 * k)
    return result.astype(np.uint32)


def unpacked(x, half):
    """The low and the high half."""
    wide = x.view(f"u{x.dtype.itemsize}")
    return wide.astype(half), (wide >> wide.dtype.type(8 * half.itemsize)).astype(half)
