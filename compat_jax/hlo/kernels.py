"""List what a compiled program launches, with the FLOP and the memory traffic of each kernel."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Literal

from compat_jax.hlo import flops as flop_counts
from compat_jax.hlo import traffic
from compat_jax.hlo.text import Array, Computation, Instruction, Module, parse

Kind = Literal["product", "collective", "host", "transpose", "convert", "copy", "prefetch", "other"]
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"),
    *("partition-id", "replica-id", "domain", "add-dependency", "get-dimension-size"),
)
_ON_HOST = ("infeed", "outfeed", "send", "recv")
_PREFETCHES = ("copy-start", "slice-start", "dynamic-slice-start")
_HOST_SPACE = 5
# What moves or rounds numbers and computes none.
_MOVES = {
    *(
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "bitcast-convert",
        "reshape",
    ),
    *("broadcast", "iota", "copy", "transpose", "convert", "slice", "dynamic-slice", "pad"),
    *("concatenate", "reverse"),
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """An operation between devices.

    Attributes:
      operation: e.g. "all-reduce".
      size: bytes of its result.
      devices: in a group; 1 where the text does not say.
      hides: kernels that run between its start and its end.
    """

    operation: str
    size: int
    devices: int
    hides: tuple["Kernel", ...] = ()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch, on each device.

    Attributes:
      name: of its instruction.
      kind: "product" for matrix products and convolutions; "transpose", "convert" and "copy" for
        kernels that only move numbers, of which the first changes their order and the second their
        type; "prefetch" for what a TPU moves between its memories beside its kernels; "collective";
        "host" for a transfer; "other".
      place: where the traced program asks for it, e.g. "jit(f)/conv1/conv_general_dilated".
      flops: {type of the factors: FLOP}, see `flops.count`.
      inputs: bytes of arguments of the step that no kernel before it has read.
      results: bytes of its results that the step returns.
      sizes: bytes of all other arrays that it reads or writes.
      times: how often a step launches it.
      collective: that it is, or that runs inside it.
      repeats: whether it computes the same in every step, from arguments that no step changes.
      feeds: whether a product reads its result, or it reads the result of one.
    """

    name: str
    kind: Kind
    place: str = ""
    flops: Mapping[str, float] = dataclasses.field(default_factory=dict)
    inputs: int = 0
    results: int = 0
    sizes: tuple[int, ...] = ()
    times: int = 1
    collective: Collective | None = None
    repeats: bool = False
    feeds: bool = False

    @property
    def size(self) -> int:
        """Return the bytes that one launch reads and writes."""
        return self.inputs + self.results + sum(self.sizes)


@dataclasses.dataclass(frozen=True)
class Program:
    """The kernels that a program launches.

    Attributes:
      kernels: of one step, in order: of one pass through the loop whose number of passes the
        compiler does not know, or of the whole program without such a loop.
      loops: whether there is such a loop.
    """

    kernels: tuple[Kernel, ...] = ()
    loops: bool = False

    @property
    def flops(self) -> dict[str, float]:
        """Return {type of the factors: FLOP} of a step."""
        total: dict[str, float] = {}
        for kernel in self.kernels:
            flop_counts.add(total, kernel.flops, kernel.times)
        return total

    @property
    def collectives(self) -> dict[str, tuple[int, int]]:
        """Return {operation: (how many, bytes of their results)} of a step."""
        found: dict[str, tuple[int, int]] = {}
        for kernel in self.kernels:
            if kernel.collective:
                count, size = found.get(kernel.collective.operation, (0, 0))
                size += kernel.times * kernel.collective.size
                found[kernel.collective.operation] = (count + kernel.times, size)
        return found


def read(text: str) -> Program:
    """List the kernels of a compiled program.

    Args:
      text: of the compiled program, see `jax.stages.Compiled.as_text`.

    Raises:
      ValueError: the text is not a program.
    """
    module = parse(text)
    entry = module.computations[module.entry]
    loops = [i for i in entry.instructions.values() if i.opcode == "while" and not _passes(i)]
    if not loops:
        return Program(tuple(_Walk(module, entry).kernels(entry)))
    steps = []
    for loop in loops:
        body = module.computations[loop.called[0]]
        steps.append(tuple(_Walk(module, body, repeated=True).kernels(body)))
    return Program(max(steps, key=_traffic), loops=True)


def _traffic(kernels: Iterable[Kernel]) -> int:
    return sum(kernel.size * kernel.times for kernel in kernels)


def _passes(loop: Instruction) -> int | None:
    """Return how often a loop runs, None where the compiler does not know."""
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    return int(found[1]) if found else None


class _Walk:
    """A walk through the computations of one step, which knows what has been met.

    Attributes:
      returned: arrays that the step returns.
      unchanged: arrays that are the same in every step.
      inputs_read: arguments of the step that a kernel has read.
      channels: position of the first piece of each collective.
    """

    def __init__(self, module: Module, step: Computation, repeated: bool = False):
        self.module, self.step = module, step
        root = step.instructions[step.root]
        names = root.operands if root.opcode == "tuple" else (root.name,)
        sources = [traffic.source(step, name) for name in names]
        parameters = {i.name for i in step.instructions.values() if i.opcode == "parameter"}
        self.returned = set(sources)
        self.unchanged = {
            (name, index)
            for place, (name, index) in enumerate(sources)
            if repeated and name in parameters and index == place
        }
        self.inputs_read: set[traffic.Source] = set()
        self.channels: dict[str, int] = {}

    def kernels(self, computation: Computation, times: int = 1) -> list[Kernel]:
        """List the kernels of a computation and of what it calls.

        Args:
          computation: not one that is fused.
          times: how often it runs.
        """
        ends = {
            i.operands[0]: i.arrays
            for i in computation.instructions.values()
            if i.opcode.endswith("-done") and i.operands
        }
        found: list[Kernel] = []
        running: dict[str, int] = {}
        for instruction in computation.instructions.values():
            opcode, called = instruction.opcode, self._called(instruction)
            if opcode.endswith("-done"):
                place = running.pop(instruction.operands[0], None)
                if place is not None:
                    found[place] = _hiding(found[place], found[place + 1 :])
            elif opcode == "while":
                found += self.kernels(called[0], times * (_passes(instruction) or 1))
            elif opcode == "call":
                found += self.kernels(called[0], times)
            elif opcode == "conditional":
                found += min((self.kernels(branch, times) for branch in called), key=_traffic)
            elif not _is_free(computation, instruction):
                results = ends.get(instruction.name, instruction.arrays)
                kernel = self._kernel(computation, instruction, results)
                running[instruction.name] = len(found)
                self._append(found, dataclasses.replace(kernel, times=times), instruction)
        return self._with_neighbours(computation, found)

    def _called(self, instruction):
        return [self.module.computations[name] for name in instruction.called]

    def _append(self, found, kernel, instruction):
        """Append a kernel, unless it is only a further piece of a collective.

        The TPU compiler may write one collective as a chain of pieces, which share its channel; other
        work may be fused into them.
        """
        collective = self._collective(instruction)
        channel = collective and collective.attribute("channel_id")
        key = f"{collective and collective.opcode} {channel}"
        if channel and key in self.channels:
            if kernel.flops:
                found.append(dataclasses.replace(kernel, collective=None))
            first = self.channels[key]
            found[first] = _hiding(found[first], found[first + 1 :])
            return
        if channel:
            self.channels[key] = len(found)
        found.append(kernel)

    def _kernel(self, computation, instruction, results):
        """Describe a kernel."""
        in_step = computation is self.step
        inputs, returned, sizes, sources = 0, 0, [], []
        for source, size in traffic.reads(self.module, computation, instruction):
            sources.append(source)
            maker = computation.instructions[source[0]]
            if in_step and maker.opcode == "parameter" and source not in self.inputs_read:
                self.inputs_read.add(source)
                inputs += size
            else:
                sizes.append(size)
        repeats = in_step and bool(sources) and self.unchanged.issuperset(sources)
        written = traffic.written(self.module, computation, instruction, results)
        for index, size in enumerate(written):
            if repeats:
                self.unchanged.add((instruction.name, index))
            if in_step and (instruction.name, index) in self.returned:
                returned += size
            else:
                sizes.append(size)
        flops = flop_counts.count(self.module, computation, instruction)
        return Kernel(
            instruction.name,
            self._kind(computation, instruction, flops),
            self._place(computation, instruction),
            flops=flops,
            inputs=inputs,
            results=returned,
            sizes=tuple(size for size in sizes if size),
            collective=self._between(instruction, results),
            repeats=repeats,
        )

    def _between(self, instruction, results):
        found = self._collective(instruction)
        if found is None:
            return None
        arrays = results if found is instruction else found.arrays
        operation = found.opcode.removesuffix("-start")
        return Collective(operation, sum(array.size for array in arrays), _devices(found))

    def _collective(self, instruction):
        """Return the collective that an instruction is, or wraps."""
        if instruction.opcode.removesuffix("-start") in COLLECTIVES:
            return instruction
        if instruction.fuses:
            for computation in self._called(instruction):
                for inner in computation.instructions.values():
                    if found := self._collective(inner):
                        return found
        return None

    def _place(self, computation, instruction):
        """Return the first name of the traced program among a kernel's parts and its operand."""
        candidates = [instruction]
        for fused in self._called(instruction) if instruction.fuses else ():
            candidates += reversed(fused.instructions.values())
        if instruction.operands and instruction.operands[0] in computation.instructions:
            name = traffic.source(computation, instruction.operands[0])[0]
            candidates.append(computation.instructions[name])
        for candidate in candidates:
            if found := re.search(r'op_name="([^"]+)"', candidate.attributes):
                return found[1]
        return ""

    def _kind(self, computation, instruction, flops) -> Kind:
        if flops:
            return "product"
        if self._collective(instruction):
            return "collective"
        if _is_on_host(instruction):
            return "host"
        if instruction.opcode in _PREFETCHES:
            return "prefetch"
        parts = [(computation, instruction)]
        if instruction.fuses:
            fused = self._called(instruction)[0]
            parts = [(fused, inner) for inner in fused.instructions.values()]
        opcodes = {part.opcode for _, part in parts}
        if not opcodes <= _MOVES or not instruction.operands:
            return "other"
        if any(_changes_order(*part) for part in parts):
            return "transpose"
        return "convert" if "convert" in opcodes else "copy"

    def _with_neighbours(self, computation, kernels):
        """Mark the kernels whose results products read, and those that read products' results."""
        products = {kernel.name for kernel in kernels if kernel.flops}
        marked = set()
        for instruction in computation.instructions.values():
            for name in instruction.operands:
                if name in computation.instructions:
                    maker = traffic.source(computation, name)[0]
                    if instruction.name in products:
                        marked.add(maker)
                    if maker in products:
                        marked.add(instruction.name)
        return [dataclasses.replace(k, feeds=True) if k.name in marked else k for k in kernels]


def _hiding(kernel: Kernel, others: list[Kernel]) -> Kernel:
    if kernel.collective is None:
        return kernel
    collective = dataclasses.replace(kernel.collective, hides=tuple(others))
    return dataclasses.replace(kernel, collective=collective)


def _is_free(computation: Computation, instruction: Instruction) -> bool:
    """Return whether an instruction launches nothing."""
    if instruction.opcode in _FREE or instruction.opcode.endswith("-update"):
        return True
    launched = (*COLLECTIVES, *_ON_HOST, "copy", "custom-call")
    if instruction.fuses or instruction.opcode.removesuffix("-start") in launched:
        return False
    # The scalar unit of a TPU computes single numbers beside its kernels.
    operands = map(computation.instructions.get, instruction.operands)
    arrays = [array for i in operands if i for array in i.arrays] + list(instruction.arrays)
    return all(array.elements == 1 for array in arrays)


def _devices(collective: Instruction) -> int:
    """Return the devices of a collective's group, from any of the three ways to write groups."""
    text = collective.attributes
    if found := re.search(r"replica_groups=mesh\['([^]]*)\] \{([^}]*)\}", text):
        sizes = dict(re.findall(r"'?(\w+)'=(\d+)", found[1]))
        total = 1
        for axis in re.findall(r"'(\w+)'", found[2]):
            total *= int(sizes.get(axis, 1))
        return total
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(found[1])
    found = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    return len(found[1].split(",")) if found else 1


def _is_on_host(instruction: Instruction) -> bool:
    spaces = {array.space for array in instruction.arrays}
    words = ("callback", "MoveToHost", "MoveToDevice")
    named = any(word in instruction.target for word in words)
    operation = instruction.opcode.removesuffix("-start")
    return operation in _ON_HOST or named or _HOST_SPACE in spaces


def _changes_order(computation: Computation, instruction: Instruction) -> bool:
    """Return whether a copy or a transpose puts the elements into another order in memory."""
    if instruction.opcode not in ("copy", "transpose") or not instruction.operands:
        return False
    operand = computation.instructions.get(instruction.operands[0])
    if operand is None or not operand.arrays:
        return False
    before, after = operand.arrays[0], instruction.arrays[0]
    permuted = re.search(r"dimensions=\{([\d,]+)\}", instruction.attributes)
    axes = [int(n) for n in permuted[1].split(",")] if permuted else range(len(after.dimensions))
    return _order(before) != [axes[axis] for axis in _order(after)]


def _order(array: Array) -> list[int]:
    """Return the dimensions from fastest to slowest, without those of size 1."""
    order = array.order or tuple(reversed(range(len(array.dimensions))))
    return [axis for axis in order if array.dimensions[axis] != 1]
