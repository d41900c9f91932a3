"""Reads the PTX that Triton writes: parameters, labels and instructions of its one kernel."""

import re
from dataclasses import dataclass, field

# An operand: a register, number or symbol as it is written, a vector (list), a memory operand or a coordinate vector.
Operand = "str | list | Address"


@dataclass
class Address:
    """[base + offset], or [base, {coordinates}] of a tensor map."""

    base: str
    offset: int
    coordinates: list[str] = field(default_factory=list)


@dataclass
class Instruction:
    """`opcode` in its parts, e.g. ["ld", "global", "b32"]; `guard` is a predicate and whether it is negated."""

    parts: list[str]
    operands: list
    guard: tuple[str, bool] | None
    text: str


@dataclass
class Parameter:
    """Size in bytes, and the dtype of the number or None for a tensor map."""

    name: str
    size: int
    kind: str | None


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter]
    registers: dict[str, str]  # prefix -> type, such as "%rd" -> "b64"
    body: list[Instruction | str]  # labels are strings


def parse(text: str) -> Kernel:
    """The kernel of a PTX file."""
    head, body = re.search(r"\.entry\s+(.*?)^\{\n(.*?)^\$L__func_end0:", text, re.S | re.M).groups()
    name = re.match(r"\w+", head)[0]
    statements = _statements(body)
    registers = {}
    for statement in statements:
        if match := re.fullmatch(r"\.reg \.(\w+)\s+(%\w+)<\d+>", statement):
            registers[match[2]] = match[1]
    return Kernel(name, _parameters(head), registers, _instructions(statements))


def parameter_sizes(text: str) -> list[int]:
    """Bytes of each parameter, in order."""
    return [x.size for x in _parameters(text)]


def _parameters(text: str) -> list[Parameter]:
    parameters = []
    for line in re.findall(r"^\s*\.param\s.*", text, re.MULTILINE):
        name = re.search(r"\w+_param_\d+", line)[0]
        if "[128]" in line:
            parameters.append(Parameter(name, 128, None))
        else:
            kind = re.match(r"\s*\.param\s+\.(\w+)", line)[1]
            parameters.append(Parameter(name, int(kind[1:]) // 8, kind))
    return parameters


def _statements(body: str) -> list[str]:
    """Statements, labels (with their colon) and the braces of scopes."""
    body = re.sub(r"//.*", "", body)
    body = re.sub(r"^\s*\.(loc|pragma)\b.*$", "", body, flags=re.MULTILINE)
    statements, current, depth = [], "", 0
    for c in body:
        if not current.strip() and c in "{}":
            statements.append(c)
            current = ""
        elif c == ";" or (c == ":" and re.fullmatch(r"\s*[$\w]+", current)):
            statements.append(" ".join(current.split()) + (":" if c == ":" else ""))
            current = ""
        else:
            current += c
            depth += (c == "{") - (c == "}")
    return statements


def _instructions(statements: list[str]) -> list[Instruction | str]:
    result, scopes, count = [], [], 0
    for k, statement in enumerate(statements):
        if statement == "{":
            count += 1
            scopes.append((count, _declared(statements[k + 1 :])))
        elif statement == "}":
            scopes.pop()
        elif not statement.startswith("."):
            for number, names in scopes:
                for name in names:
                    statement = re.sub(rf"(?<![\w%]){re.escape(name)}\b", f"%local{number}{name}", statement)
            result.append(statement[:-1] if statement.endswith(":") else _instruction(statement))
    return result


def _declared(statements: list[str]) -> list[str]:
    """Names of registers and labels of the scope that begins here."""
    names, depth = [], 0
    for statement in statements:
        depth += (statement == "{") - (statement == "}")
        if depth < 0:
            break
        if match := re.fullmatch(r"\.reg \.\w+ (\w+)", statement):
            names.append(match[1])
        elif statement.endswith(":"):
            names.append(statement[:-1])
    return names


def _instruction(statement: str) -> Instruction:
    guard, opcode, rest = re.fullmatch(r"(@!?\S+\s+)?(\S+)\s*(.*)", statement).groups()
    if guard:
        guard = guard.strip(" @")
        guard = (guard.lstrip("!"), guard.startswith("!"))
    return Instruction(re.split(r"(?<!:)\.", opcode), [_operand(x) for x in _split(rest)], guard, statement)


def _split(text: str) -> list[str]:
    """At the commas outside of braces and brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "{[") - (c in "}]")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [x.strip() for x in parts if x.strip()]


def _operand(text: str):
    if text.startswith("{"):
        return _split(text[1:-1])
    if text.startswith("["):
        base, *rest = _split(text[1:-1])
        match = re.fullmatch(r"(\S+?)\s*(?:\+\s*(-?\d+))?", base)
        return Address(match[1], int(match[2] or 0), _split(rest[0][1:-1]) if rest else [])
    return text
