"""Translates the PTX of a kernel to a Python function that runs one block, all threads of it at once.

A register is a NumPy array with an element for each thread, or a scalar where all threads have the same. Threads may go
different ways through arithmetic alone (libdevice's functions do).
"""

import functools
from collections.abc import Callable

import numpy as np

from tests.emulator import arithmetic
from tests.emulator.instructions import Instructions
from tests.emulator.ptx import Instruction, Kernel, parse
from tests.emulator.registers import STORED, name_of

# What threads may do apart from each other.
ARITHMETIC = {
    "abs", "add", "and", "bfe", "bra", "cvt", "div", "ex2", "fma", "lg2", "mad", "max", "min", "mov", "mul", "neg",
    "not", "or", "prmt", "rcp", "rem", "selp", "setp", "shl", "shr", "sub", "xor",
}  # fmt: skip


@functools.lru_cache
def translated(text: str) -> tuple[Kernel, Callable]:
    """The kernel and its function of (block, parameters by name, addresses of parameters by name)."""
    kernel = parse(text)
    draft = _Translator(kernel, {})
    draft.source()
    kinds = {name: max(kinds, key=lambda kind: (kinds[kind], kind)) for name, kinds in draft.defined.items()}
    kinds = draft.read | kinds  # what nothing is written to is read as well
    source = _Translator(kernel, kinds).source()
    names = {name: getattr(arithmetic, name) for name in dir(arithmetic) if not name.startswith("_")}
    names |= {kind: np.dtype(kind) for kind in STORED}
    exec(compile(source, f"<{kernel.name}>", "exec"), names)
    return kernel, names["run"]


class _Translator(Instructions):
    def source(self) -> str:
        blocks = _basic_blocks(self.kernel.body)
        self.places = {label: k for k, (labels, _) in enumerate(blocks) for label in labels}
        lines = ["def run(block, parameter, address):"]
        for kind in set(self.stored.values()):
            names = [name_of(x) for x, stored in self.stored.items() if stored == kind]
            lines += [f"  {' = '.join(names[k : k + 50])} = undefined({kind!r})" for k in range(0, len(names), 50)]
        apart = {k for k, (_, body) in enumerate(blocks) if all(x.parts[0] in ARITHMETIC for x in body)}
        lines += [f"  block.apart = frozenset({sorted(apart)})", "  place, some = 0, None", "  while True:"]
        for k, (_, instructions) in enumerate(blocks):
            lines += [f"    if place == {k}:", f"      block.executed += {len(instructions)}"]
            if k in apart:
                lines += ["      if some is not None:", *(f"        {x}" for x in self.run_of(instructions, k, True))]
            else:
                lines += ["      if some is not None: block.together()"]
            lines += [f"      {x}" for x in self.run_of(instructions, k, False)]
        return "\n".join([*lines, "    raise AssertionError(place)"])

    def run_of(self, instructions: list[Instruction], k: int, by_some: bool) -> list[str]:
        """The lines of basic block k, by all threads or by some, and the way to the next."""
        self.lines, self.by_some, self.fenced = [], by_some, False
        for instruction in instructions:
            if instruction.parts[0] != "bra":
                self.emit(instruction)
        last = instructions[-1] if instructions else None
        if last is not None and last.parts[0] == "bra" and last.guard is not None:
            target = self.places[last.operands[0]]
            way = f"place, some = block.branch(some, {self.guard(last)}, {target}, {k + 1}); continue"
        elif last is not None and last.parts[0] == "ret":
            way = "return"
        else:
            target = self.places[last.operands[0]] if last is not None and last.parts[0] == "bra" else k + 1
            way = f"place, some = block.go(some, {target}); continue" if by_some else f"place = {target}; continue"
        return [*self.lines, way]


def _basic_blocks(body: list) -> list[tuple[list[str], list[Instruction]]]:
    """(labels, instructions) of each; a block ends behind a branch or before a label that is branched to."""
    targets = {x.operands[0] for x in body if isinstance(x, Instruction) and x.parts[0] == "bra"}
    blocks: list[tuple[list[str], list[Instruction]]] = [([], [])]
    for x in body:
        if isinstance(x, str):
            if x in targets:
                if blocks[-1][1]:
                    blocks.append(([], []))
                blocks[-1][0].append(x)
        else:
            blocks[-1][1].append(x)
            if x.parts[0] in ("bra", "ret"):
                blocks.append(([], []))
    return blocks[:-1] if not blocks[-1][1] else blocks
