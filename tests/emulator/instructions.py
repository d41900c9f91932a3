"""What each instruction of PTX does, as lines of Python: a method for each, by the first part of its name."""

import numpy as np

from tests.emulator.ptx import Instruction
from tests.emulator.registers import KINDS, NotEmulatedError, Registers

COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
# What these may have between their name and their type.
MODIFIERS = {
    **{name: {"rn", "ftz", "lo", "wide"} for name in ("add", "sub", "mul", "mad", "fma", "neg", "abs")},
    **{name: {"rn", "ftz", "approx", "full"} for name in ("div", "rcp", "ex2", "lg2")},
    **{name: {"ftz", "NaN", "relu"} for name in ("min", "max")},
}


class Instructions(Registers):
    def emit(self, instruction: Instruction) -> None:
        parts, guard = instruction.parts, instruction.guard
        method = getattr(self, f"_{parts[0]}", None)
        guarded = {"ld", "st", "cp", "mbarrier"}
        if method is None or (guard is not None and parts[0] not in guarded):
            raise NotEmulatedError(instruction.text)
        if parts[0] in MODIFIERS and set(parts[1:-1]) - MODIFIERS[parts[0]]:
            raise NotEmulatedError(instruction.text)
        try:
            method(instruction)
        except (KeyError, IndexError, ValueError) as error:
            raise NotEmulatedError(instruction.text) from error

    def _arithmetic(self, instruction: Instruction, template: str, kind: str, result: str | None = None) -> None:
        target, *operands = instruction.operands
        values = [self.value(x, kind) for x in operands]
        self.define(target, template.format(*values), result or kind)

    def _computed(self, instruction: Instruction, template: str) -> None:
        """Floating-point and integer arithmetic alike; 16-bit floats by way of float64, rounded once."""
        type_ = instruction.parts[-1]
        if type_.removesuffix("x2") not in ("bf16", "f16"):
            self._arithmetic(instruction, template, KINDS[type_])
            return
        target, *operands = instruction.operands
        values = [self.value(x, KINDS[type_]) for x in operands]
        letters = "abc"[: len(values)]
        function = f"lambda {', '.join(letters)}: {template.format(*letters)}"
        self.define(target, f"small_floats({type_!r}, {function}, {', '.join(values)})", KINDS[type_])

    def _add(self, x):
        self._computed(x, "{0} + {1}")

    def _sub(self, x):
        self._computed(x, "{0} - {1}")

    def _mul(self, x):
        if "wide" in x.parts:
            kind = KINDS[x.parts[-1]]
            wide = f"{kind[0]}8"
            self._arithmetic(x, f"np.multiply({{0}}, {{1}}, dtype={wide})", kind, wide)
        elif "hi" in x.parts:
            raise NotEmulatedError(x.text)
        else:
            self._computed(x, "{0} * {1}")

    def _mad(self, x):
        if x.parts[1] == "wide":
            target, a, b, c = x.operands
            kind = KINDS[x.parts[-1]]
            wide = f"{kind[0]}8"
            product = f"np.multiply({self.value(a, kind)}, {self.value(b, kind)}, dtype={wide})"
            self.define(target, f"{product} + {self.value(c, wide)}", wide)
        elif x.parts[1] == "lo":
            self._computed(x, "{0} * {1} + {2}")
        else:
            raise NotEmulatedError(x.text)

    def _fma(self, x):
        template = "{0} * {1} + {2}" if x.parts[-1] in ("bf16", "f16", "f64") else "fma({0}, {1}, {2})"
        self._computed(x, template)

    def _div(self, x):
        self._arithmetic(x, "{0} / {1}" if x.parts[-1] in ("f32", "f64") else "divide({0}, {1})", KINDS[x.parts[-1]])

    def _rem(self, x):
        self._arithmetic(x, "remainder({0}, {1})", KINDS[x.parts[-1]])

    def _rcp(self, x):
        self._arithmetic(x, "1 / {0}", KINDS[x.parts[-1]])

    def _min(self, x, function="fmin"):
        if "NaN" in x.parts:
            function = {"fmin": "minimum", "fmax": "maximum"}[function]
        smallest = f"np.{function}({{0}}, {{1}})"
        self._computed(x, f"np.maximum({smallest}, 0)" if "relu" in x.parts else smallest)

    def _max(self, x):
        self._min(x, "fmax")

    def _neg(self, x):
        self._computed(x, "-{0}")

    def _abs(self, x):
        self._computed(x, "np.abs({0})")

    def _ex2(self, x):
        self._arithmetic(x, "np.exp2({0})", "f4")

    def _lg2(self, x):
        self._arithmetic(x, "np.log2({0})", "f4")

    def _and(self, x):
        self._arithmetic(x, "{0} & {1}", KINDS[x.parts[-1]])

    def _or(self, x):
        self._arithmetic(x, "{0} | {1}", KINDS[x.parts[-1]])

    def _xor(self, x):
        self._arithmetic(x, "{0} ^ {1}", KINDS[x.parts[-1]])

    def _not(self, x):
        self._arithmetic(x, "~{0}", KINDS[x.parts[-1]])

    def _shl(self, x, function="shift_left"):
        target, a, b = x.operands
        kind = KINDS[x.parts[-1]]
        self.define(target, f"{function}({self.value(a, kind)}, {self.value(b, 'u4')})", kind)

    def _shr(self, x):
        self._shl(x, "shift_right")

    def _bfe(self, x):
        kind, bits = KINDS[x.parts[-1]], 8 * np.dtype(KINDS[x.parts[-1]]).itemsize
        target, a, first, length = x.operands
        up = bits - int(first) - int(length)
        self.define(target, f"{self.value(a, kind)} << {up} >> {up + int(first)}", kind)

    def _prmt(self, x):
        target, a, b, selector = x.operands
        a, b = self.value(a, "u4"), self.value(b, "u4")
        self.define(target, f"permuted({a}, {b}, {int(selector.rstrip('U'), 0)})", "u4")

    def _setp(self, x):
        comparison, type_ = x.parts[1], x.parts[-1]
        target, a, b = x.operands
        if type_ in ("bf16x2", "f16x2"):
            values = [f"unpacked({self.value(y, 'i4')}, u2)" for y in (a, b)]
            for half, one in enumerate(target.split("|")):
                floats = (f"from_{type_[:-2]}({y}[{half}])" for y in values)
                self.define(one, _compared(comparison, *floats, "f4"), "?")
            return
        a, b = (self.value(y, KINDS[type_]) for y in (a, b))
        if type_ in ("bf16", "f16"):
            a, b = f"from_{type_}({a})", f"from_{type_}({b})"
        self.define(target, _compared(comparison, a, b, "f4" if "f" in type_ else KINDS[type_]), "?")

    def _selp(self, x):
        target, a, b, p = x.operands
        kind = KINDS[x.parts[-1]]
        self.define(target, f"np.where({self.value(p, '?')}, {self.value(a, kind)}, {self.value(b, kind)})", kind)

    def _cvt(self, x):
        target, *operands = x.operands
        *rounding, to, of = x.parts[1:]
        source = self.value(operands[0], KINDS[of])
        rounding = [y for y in rounding if y != "ftz"]
        if of in ("bf16", "f16") and to in ("f32", "f64"):
            self.define(target, f"from_{of}({source}).astype({KINDS[to]})", KINDS[to])
        elif to in ("bf16", "f16") and of in ("f32", "f64") and rounding == ["rn"]:
            self.define(target, f"to_{to}({source})", "u2")
        elif to in ("bf16x2", "f16x2") and rounding == ["rn"]:
            high, low = (f"to_{to[:-2]}({self.value(y, 'f4')})" for y in operands)
            self.define(target, f"packed({low}, {high})", "i4")
        elif rounding == ["rmi"] and to == of == "f32":
            self.define(target, f"np.floor({source})", "f4")
        elif rounding == ["rn"] and to[0] == "f":
            self.define(target, f"({source}).astype({KINDS[to]})", KINDS[to])
        elif not rounding and (to[0] in "us" or (to, of) == ("f64", "f32")):
            if of[0] not in "us" and to != "f64":
                raise NotEmulatedError(x.text)
            self.define(target, f"({source}).astype({KINDS[to]})", KINDS[to])
        else:
            raise NotEmulatedError(x.text)

    def _cvta(self, x):
        self.define(x.operands[0], self.value(x.operands[1], "i8"), "i8")

    def _mov(self, x):
        target, source = x.operands
        kind = KINDS[x.parts[-1]]
        if isinstance(target, list):
            half = f"u{np.dtype(kind).itemsize // 2}"
            self.define_all(target, f"unpacked({self.value(source, kind)}, {half})", half)
        elif isinstance(source, list):
            half = f"u{np.dtype(kind).itemsize // 2}"
            self.define(target, f"packed({', '.join(self.value(y, half) for y in source)})", kind)
        else:
            if source.startswith("%") and source in self.stored:
                kind = self.stored[source]  # numbers stay what they are
            elif source.startswith("0f"):
                kind = "f4"
            elif source.startswith("0d"):
                kind = "f8"
            # Another name, so that what an asynchronous product still has to write arrives there, too: Triton moves
            # accumulators in front of the wait, and ptxas lets both be one register.
            self.define(target, self.value(source, kind), kind)

    # Memory

    def _ld(self, x):
        space, type_ = x.parts[1], x.parts[-1]
        targets, address = x.operands
        if space == "param":
            kind = KINDS[type_]
            value = f"parameter[{address.base!r}]"
            if "64" in self.kernel.registers[targets.rstrip("0123456789")] and kind == "i4":
                kind, value = "i8", f"{value}.astype(i8)"  # with its sign
            self.define(targets, value, kind)
            return
        targets = targets if isinstance(targets, list) else [targets]
        kind = f"u{KINDS[type_][1]}"
        old = ", ".join(self.value(y, kind) for y in targets) if x.guard else ""
        where = f"block.{'memory' if space == 'global' else 'shared'}"
        location = self.location(address, "i8" if space == "global" else "i4")
        if space not in ("global", "shared"):
            raise NotEmulatedError(x.text)
        self.define_all(
            targets,
            f"{where}.load({location}, {kind}, {len(targets)}, {self.guard(x)}, ({old}{',' * bool(old)}))",
            kind,
        )

    def _st(self, x):
        space = x.parts[1]
        address, values = x.operands
        values = values if isinstance(values, list) else [values]
        kind = f"u{KINDS[x.parts[-1]][1]}"
        where = f"block.{'memory' if space == 'global' else 'shared'}"
        location = self.location(address, "i8" if space == "global" else "i4")
        values = ", ".join(self.value(y, kind) for y in values)
        if space not in ("global", "shared"):
            raise NotEmulatedError(x.text)
        self.lines.append(f"{where}.store({location}, ({values},), {self.guard(x)})")

    def _cp(self, x):
        if x.parts[1:] == ["async", "commit_group"]:
            self.lines.append("block.copies.commit()")
        elif x.parts[1:] == ["async", "wait_group"]:
            self.lines.append(f"block.copies.wait({x.operands[0]})")
        elif x.parts[1:3] == ["async", "bulk"]:
            target, (source), barrier = x.operands
            coordinates = ", ".join(self.value(y, "i4") for y in source.coordinates)
            places = self.location(target, "i4"), self.value(source.base, "i8"), f"({coordinates},)"
            self.lines.append(
                f"block.tensor_copy({', '.join(places)}, {self.location(barrier, 'i4')}, {self.guard(x)})"
            )
        elif x.parts[1] == "async" and x.parts[3:] == ["shared", "global"]:
            target, source, size, *rest = x.operands
            given = self.value(rest[0], "i4") if rest else size
            places = self.location(target, "i4"), self.location(source, "i8"), size, given, self.guard(x)
            self.lines.append(f"block.copies.issue({', '.join(places)})")
        else:
            raise NotEmulatedError(x.text)

    def _mbarrier(self, x):
        operation = x.parts[1]
        if operation == "try_wait" and x.parts[2] == "parity":
            target, address, parity = x.operands
            self.define(target, f"block.barriers.test({self.location(address, 'i4')}, {self.value(parity, 'i4')})", "?")
        elif operation == "init":
            place, count = self.location(x.operands[0], "i4"), x.operands[1]
            self.lines.append(f"block.barriers.init({place}, {count}, {self.guard(x)})")
        elif operation == "inval":
            self.lines.append(f"block.barriers.inval({self.location(x.operands[0], 'i4')}, {self.guard(x)})")
        elif x.parts[1:3] == ["arrive", "expect_tx"]:
            place, count = self.location(x.operands[1], "i4"), x.operands[2]
            self.lines.append(f"block.barriers.expect({place}, {count}, {self.guard(x)})")
        else:
            raise NotEmulatedError(x.text)

    def _ldmatrix(self, x):
        targets, address = x.operands
        n = int(x.parts[4][1:])
        call = f"block.shared.load_matrices({self.location(address, 'i4')}, {n}, {'trans' in x.parts})"
        self.define_all(targets, call, "i4")

    def _stmatrix(self, x):
        address, values = x.operands
        values = ", ".join(self.value(y, "i4") for y in values)
        self.lines.append(
            f"block.shared.store_matrices({self.location(address, 'i4')}, ({values},), {'trans' in x.parts})"
        )

    # Matrix products

    def _mma(self, x):
        result, a, b, c = x.operands
        shape = "m16n8k8" if x.parts[7] == "tf32" else "m16n8k16"
        if x.parts[3:6] != [shape, "row", "col"] or (x.parts[6], x.parts[9]) != ("f32", "f32"):
            raise NotEmulatedError(x.text)
        groups = (
            f"({', '.join(self.value(y, kind) for y in group)})" for group, kind in ((a, "i4"), (b, "i4"), (c, "f4"))
        )
        self.define_all(result, f"block.product({', '.join(groups)}, {x.parts[7]!r})", "f4")

    def _wgmma(self, x):
        if x.parts[1] == "fence":
            self.fenced = True
            return
        if x.parts[1] == "commit_group":
            self.lines.append("block.products.commit()")
            return
        if x.parts[1] == "wait_group":
            self.lines.append(f"block.products.wait({x.operands[0]})")
            return
        result, a, b, accumulate, scale_a, scale_b, *transposed = x.operands
        if (scale_a, scale_b) != ("1", "1") or x.parts[5] != "f32":
            raise NotEmulatedError(x.text)
        if isinstance(a, list):
            left, transposed_a = f"({', '.join(self.value(y, 'i4') for y in a)})", "0"
        else:
            left, transposed_a = self.value(a, "i8"), transposed[0]
        accumulators = ", ".join(self.value(y, "f4") for y in result)
        self.define_all(
            result,
            f"block.products.issue(({accumulators}), {left}, {self.value(b, 'i8')}, {self.value(accumulate, '?')}, "
            f"{x.parts[4]!r}, {x.parts[6]!r}, {transposed_a}, {transposed[-1]}, {self.fenced})",
            "f4",
        )

    # Threads

    def _bar(self, x):
        if x.parts[1:] == ["warp", "sync"]:
            return
        if x.parts[1:] != ["sync"] or x.operands != ["0"]:
            raise NotEmulatedError(x.text)
        self.lines.append("block.synchronize()")

    def _fence(self, x):
        if x.parts[1:3] != ["proxy", "async"]:
            raise NotEmulatedError(x.text)
        self.lines.append("block.shared.fence()")

    def _elect(self, x):
        _, predicate = x.operands[0].split("|")
        self.define(predicate, "block.elected", "?")

    def _shfl(self, x):
        target, source, lane, clamp, members = x.operands
        if x.parts[2] not in ("bfly", "idx") or clamp != "31" or members != "-1":
            raise NotEmulatedError(x.text)
        self.define(target, f"block.{x.parts[2]}({self.value(source, 'i4')}, {self.value(lane, 'i4')})", "i4")

    def _ret(self, x):
        pass


def _compared(comparison: str, a: str, b: str, kind: str) -> str:
    """The expression of a comparison of numbers; one with NaN fails, but for those that end with u."""
    comparison = UNSIGNED.get(comparison, comparison)
    if comparison == "nan":
        return f"np.isnan({a}) | np.isnan({b})"
    if comparison == "num":
        return f"~(np.isnan({a}) | np.isnan({b}))"
    if comparison.endswith("u") and comparison[:-1] in COMPARISONS:
        return f"({a} {COMPARISONS[comparison[:-1]]} {b}) | np.isnan({a}) | np.isnan({b})"
    if comparison == "ne" and kind[0] == "f":
        return f"({a} != {b}) & ~np.isnan({a}) & ~np.isnan({b})"
    return f"{a} {COMPARISONS[comparison]} {b}"
