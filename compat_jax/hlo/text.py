"""Read the text of a compiled XLA program."""

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

_ELEMENT_BITS = {"pred": 8, "bf16": 16, "f16": 16, "token": 0, "opaque": 0}  # others end in theirs
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_OPCODE = re.compile(r" ?([a-z][\w\-]*)\(")


class Array(NamedTuple):
    """One array of a program.

    Attributes:
      element: its type, e.g. "bf16".
      dimensions: of the array.
      order: dimensions from the fastest to the slowest in memory; () where the text has none.
      space: memory space; 0 is the device's main memory.
    """

    element: str
    dimensions: tuple[int, ...]
    order: tuple[int, ...] = ()
    space: int = 0

    @property
    def elements(self) -> int:
        """Return how many there are."""
        total = 1
        for size in self.dimensions:
            total *= size
        return total

    @property
    def size(self) -> int:
        """Return the bytes, without padding."""
        bits = _ELEMENT_BITS.get(self.element)
        if bits is None:
            bits = int(re.sub(r"\D.*", "", re.sub(r"^\D+", "", self.element)))
        return bits * self.elements // 8


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
      name: of the instruction.
      arrays: its result, the leaves of a tuple in order.
      opcode: e.g. "fusion".
      operands: names of instructions; the text between the parentheses for "parameter" and
        "constant".
      attributes: text after the operands.
    """

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def attribute(self, name: str) -> str | None:
        """Return the word after `name=`: a number, a label or the name of a computation."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found and found[1]

    @property
    def called(self) -> tuple[str, ...]:
        """Return the names of the computations that a fusion, a call, a loop or a branch runs."""
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if branches:
            return tuple(re.findall(r"[\w.\-]+", branches[1]))
        names = ["calls", "body", "true_computation", "false_computation"]
        if self.opcode in ("call", "call-start"):
            names.append("to_apply")
        return tuple(name for name in map(self.attribute, names) if name)

    @property
    def fuses(self) -> bool:
        """Return whether it runs its computation as one kernel, or beside the kernels after it."""
        return self.opcode in ("fusion", "fusion-start", "call-start", "async-start")

    @property
    def target(self) -> str:
        """Return the target of a custom call, "" for other instructions."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order in which they run, and the name of the result."""

    instructions: Mapping[str, Instruction]
    root: str


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name, and the name of the one that is run."""

    computations: Mapping[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Parse the text of a compiled program (`jax.stages.Compiled.as_text`).

    Raises:
      ValueError: it has no entry.
    """
    computations: dict[str, Computation] = {}
    name, entry, root = "", "", ""
    found: dict[str, Instruction] = {}
    for line in text.splitlines():
        if name and line.startswith("}"):
            computations[name] = Computation(found, root)
            name, found, root = "", {}, ""
        elif not name and (head := _COMPUTATION.match(line)):
            name = head[2]
            entry = name if head[1] else entry
        elif name and (match := _INSTRUCTION.match(line)):
            instruction = _instruction(match[2], match[3])
            found[instruction.name] = instruction
            root = instruction.name if match[1] else root
    if not entry:
        raise ValueError("the text has no ENTRY computation")
    return Module(computations, entry)


def arrays(shape: str) -> tuple[Array, ...]:
    """Parse a shape, or a tuple of them: "(f32[8,4]{1,0}, s32[])"."""
    return tuple(_array(*leaf) for leaf in _ARRAY.findall(shape))


def _instruction(name, rest):
    rest = re.sub(r"/\*.*?\*/", "", rest)
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end)
    if opcode is None:
        raise ValueError(f"instruction {name} has no opcode")
    start = opcode.end()
    stop = _closing(rest, start - 1)
    inner = rest[start : stop - 1]
    literal = opcode[1] in ("parameter", "constant")
    operands = (inner,) if literal else tuple(re.findall(r"%([\w.\-]+)", inner))
    made = arrays(rest[:end])
    return Instruction(name, made, opcode[1], operands=operands, attributes=rest[stop:])


def _closing(text, start):
    """Return the position after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def _array(element, dimensions, layout):
    order, _, tiles = layout.partition(":")
    space = re.search(r"S\((\d+)\)", tiles)
    return Array(
        element,
        tuple(int(n.lstrip("<=")) for n in dimensions.split(",") if n),
        tuple(int(n) for n in order.split(",") if n),
        space=int(space[1]) if space else 0,
    )
