"""Registers and operands of PTX as Python expressions.

A register is a NumPy array with an element for each thread, or a scalar where all threads have the same.
"""

import re
from collections import Counter

import numpy as np

from tests.emulator.ptx import Address, Instruction, Kernel

# PTX type -> dtype of its numbers. bfloat16 and float16 are kept as bits.
KINDS = {
    "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "bf16": "u2", "f16": "u2",
    "b32": "i4", "u32": "u4", "s32": "i4", "f32": "f4", "bf16x2": "i4", "f16x2": "i4",
    "b64": "i8", "u64": "u8", "s64": "i8", "f64": "f8", "pred": "?",
}  # fmt: skip
# Registers keep integers of a size in one dtype.
STORED = {
    "u1": "u2",
    "i1": "u2",
    "u2": "u2",
    "i2": "u2",
    "u4": "i4",
    "i4": "i4",
    "u8": "i8",
    "i8": "i8",
    "f4": "f4",
    "f8": "f8",
    "?": "?",
}


class NotEmulatedError(NotImplementedError):
    """An instruction, or a form of one, that no kernel had when this was written."""


class Registers:
    """Writes lines of Python that read and define registers, of the dtypes in `stored`."""

    def __init__(self, kernel: Kernel, stored: dict[str, str]) -> None:
        self.kernel = kernel
        self.stored = stored
        self.defined: dict[str, Counter] = {}
        self.read: dict[str, str] = {}
        self.fenced = False  # whether the basic block has had a wgmma.fence
        self.lines: list[str] = []
        self.by_some = False

    def value(self, operand: str, kind: str) -> str:
        """The expression of an operand as numbers of a dtype."""
        if operand.startswith("%tid.x"):
            return "block.threads"
        if match := re.fullmatch(r"%(n?ctaid)\.([xyz])", operand):
            return f"i4.type({'block.grid' if match[1] == 'nctaid' else 'block.index'}[{'xyz'.index(match[2])}])"
        if operand.startswith("%"):
            stored = self.stored.get(operand, STORED[kind])
            self.read[operand] = stored
            if stored[1:] < kind[1:]:
                raise NotEmulatedError(f"{operand}, {stored}, as {kind}")
            if stored[1:] > kind[1:]:  # the low bits of a wider register
                return f"{name_of(operand)}.view(u{stored[1:]}).astype(u{kind[1:]}).view({kind})"
            return name_of(operand) if stored == kind else f"{name_of(operand)}.view({kind})"
        if operand.startswith(("0f", "0d")):
            dtype = np.uint32 if operand[1] == "f" else np.uint64
            number = dtype(int(operand[2:], 16))
            return f"np.{dtype.__name__}({number}).view({kind})"
        if operand == "global_smem":
            return f"{kind}.type(block.shared.first)"
        if operand.endswith(tuple("0123456789")) and "_param_" in operand:
            return f"i8.type(address[{operand!r}])"
        if kind == "?":
            return f"np.bool_({bool(int(operand, 0))})"
        if kind in ("f4", "f8"):
            raise NotEmulatedError(operand)
        dtype = np.dtype(kind)
        number = np.array(int(operand, 0) % 2 ** (8 * dtype.itemsize), f"u{dtype.itemsize}").view(dtype)
        return f"np.{dtype.type.__name__}({number})"

    def guard(self, instruction: Instruction) -> str:
        """The expression of a guard, None where there is none."""
        if instruction.guard is None:
            return "None"
        name, negated = instruction.guard
        return f"~{self.value(name, '?')}" if negated else self.value(name, "?")

    def location(self, address: Address, kind: str) -> str:
        base = self.value(address.base, kind)
        return f"{base} + {kind}.type({address.offset})" if address.offset else base

    def define(self, register: str, expression: str, kind: str) -> None:
        """register = expression, which is of a dtype."""
        stored = STORED[kind]
        declared = self.kernel.registers.get(register.rstrip("0123456789"), "")
        if stored[0] == "u" and declared[1:] in ("32", "64"):
            stored = f"i{int(declared[1:]) // 8}"
        self.defined.setdefault(register, Counter())[stored] += 1
        wanted = self.stored.get(register, stored)
        if kind[1:] < wanted[1:]:  # into a wider register, with zeros or its sign
            expression = f"({expression}).astype({kind[0]}{wanted[1:]})"
        expression = expression if wanted == kind else f"({expression}).view({wanted})"
        name = name_of(register)
        self.lines.append(f"{name} = {f'np.where(some, {expression}, {name})' if self.by_some else expression}")

    def define_all(self, registers: list[str], expression: str, kind: str) -> None:
        """Several registers, from a tuple."""
        temporaries = [f"t{k}" for k in range(len(registers))]
        self.lines.append(f"{', '.join(temporaries)}, = {expression}")
        for register, temporary in zip(registers, temporaries, strict=True):
            if register != "_":
                self.define(register, temporary, kind)


def name_of(register: str) -> str:
    return "r_" + register.strip("%")
