"""Count the bytes that each kernel of a compiled program reads and writes."""

from collections.abc import Iterator

from compat_jax.hlo.text import Array, Computation, Instruction, Module

Source = tuple[str, int]  # an instruction, and which of its results
_PARTS = ("slice", "dynamic-slice", "gather")
_SAME = ("bitcast", "opt-barrier", "reshape")


def reads(
    module: Module, computation: Computation, instruction: Instruction
) -> Iterator[tuple[Source, int]]:
    """List what a kernel reads from main memory: where each array comes from, and the bytes.

    Of an array of which only slices or single rows are used, these count.

    Args:
      module: the program.
      computation: that the instruction belongs to.
      instruction: the kernel.
    """
    for place, name in enumerate(instruction.operands):
        operand = computation.instructions.get(name)
        if operand is None or not operand.arrays or operand.arrays[0].space:
            continue
        size = operand.arrays[0].size
        if instruction.fuses:
            size = _used(module.computations[instruction.called[0]], place, size)
        elif instruction.opcode in _PARTS and not place:
            size = min(size, instruction.arrays[0].size)
        elif instruction.opcode == "dynamic-update-slice" and not place:
            size = 0
        if size:
            yield source(computation, name), size


def written(
    module: Module, computation: Computation, instruction: Instruction, arrays: tuple[Array, ...]
) -> list[int]:
    """List the bytes that a kernel writes to main memory, for each of its results.

    Args:
      module: the program.
      computation: that the instruction belongs to.
      instruction: the kernel.
      arrays: its results; those of its end, where it runs beside others.
    """
    sizes = [0 if array.space else array.size for array in arrays]
    if instruction.opcode == "dynamic-update-slice":
        return [_size(computation, instruction.operands[1])]
    if instruction.fuses:
        fused = module.computations[instruction.called[0]]
        root = fused.instructions[fused.root]
        names = root.operands if root.opcode == "tuple" else (root.name,)
        for index, name in enumerate(names[: len(sizes)]):
            made = fused.instructions[source(fused, name)[0]]
            if made.opcode == "dynamic-update-slice":  # it writes into its operand
                sizes[index] = min(sizes[index], _size(fused, made.operands[1]))
    return sizes


def source(computation: Computation, name: str) -> Source:
    """Return the instruction that made an array, and which of its results the array is."""
    index = 0
    while True:
        instruction = computation.instructions[name]
        if instruction.opcode == "get-tuple-element":
            index = int(instruction.attribute("index") or 0)
        elif instruction.opcode not in _SAME and not instruction.opcode.endswith("-done"):
            return name, index
        above = instruction.operands[0]
        if above not in computation.instructions:
            return name, index
        name = above


def _size(computation, name):
    return sum(array.size for array in computation.instructions[name].arrays)


def _used(fused, place, size):
    """Return the bytes of a fusion's operand that it uses."""
    names = {
        i.name
        for i in fused.instructions.values()
        if i.opcode == "parameter" and i.operands == (str(place),)
    }
    total = 0
    for user in fused.instructions.values():  # operands come before their users
        if not names.intersection(user.operands):
            continue
        if user.opcode in _SAME:
            names.add(user.name)
        elif user.opcode in _PARTS and user.operands[0] in names:
            total += user.arrays[0].size
        elif user.opcode != "dynamic-update-slice" or user.operands[0] not in names:
            return size
    return min(total, size)
