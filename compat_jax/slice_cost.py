"""Memory, FLOP and collectives of a run's programs, compiled for a TPU slice that nobody rented."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from compat_jax import mesh as meshes
from compat_jax import models
from compat_jax.data.augment import Preprocess
from compat_jax.errors import UserError, unknown
from compat_jax.features import Extractor
from compat_jax.models.fold import fold_batch_norm

# What the compiler lets a program use of one device, in GiB, a little less than the chip has: taken
# from its refusals (libtpu 0.0.50).
HBM_GIB = {
    "TPU v2": 7.48,
    "TPU v3": 15.48,
    "TPU v4": 30.75,
    "TPU v5": 95.73,
    "TPU v5 lite": 15.75,
    "TPU v6 lite": 31.24,
    "TPU7x": 94.74,
}
FAMILIES = ("v2", "v3", "v4", "v5e", "v5p", "v6e", "tpu7x")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_ELEMENT_BITS = {"pred": 8, "bf16": 16, "f16": 16}  # the others end in their number of bits


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one program on each device.

    Attributes:
      name: of the program.
      arguments: bytes of its inputs: weights, momentum, images, ...
      outputs: bytes of its results, without those that reuse donated arguments.
      temporary: bytes of activations and other scratch.
      flops: of one step; of the whole program where it has no loop.
      collectives: {operation: (how many, bytes of their results)} of one step.
      too_large: the compiler's reason, where it refused for lack of memory.
    """

    name: str
    arguments: int = 0
    outputs: int = 0
    temporary: int = 0
    flops: float = 0.0
    collectives: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    too_large: str | None = None

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.arguments + self.outputs + self.temporary


def topology_devices(name: str) -> list[jax.Device]:
    """Return the devices of a TPU slice by name, e.g. "v5e:4x4", to compile for.

    Raises:
      UserError: unknown family, or chips that make no slice.
    """
    family, _, chips = name.partition(":")
    if family not in FAMILIES:
        raise unknown("TPU", family, FAMILIES)
    if not re.fullmatch(r"\d+(x\d+)+", chips):
        raise UserError(f"topology {name!r} needs its chips, for example {family}:2x2")
    # v4 chips are one device of two cores by default, as they are on a Cloud TPU VM.
    options = {"chip_config_name": "megacore"} if family == "v4" else {}
    try:
        slice_ = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"no topology {name!r}: {str(error).splitlines()[0]}") from error
    return list(slice_.devices)


def lower_features(
    embedder: models.Embedder,
    preprocess: Preprocess,
    mesh: Mesh,
    batch_size: int,
    image_shape: tuple[int, int, int],
) -> jax.stages.Lowered:
    """Lower the program that `retrieval.embed` compiles."""
    network = meshes.pad_projection(embedder, mesh)

    def make(key):
        variables = models.init_variables(network, key, image_shape)
        return fold_batch_norm(network, variables, image_shape)

    variables = jax.eval_shape(make, jax.random.key(0))
    images = jax.ShapeDtypeStruct((meshes.round_up(mesh, batch_size), *image_shape), jnp.uint8)
    program = Extractor(network, preprocess, mesh).program(jax.tree.structure(variables))
    return program.lower(variables, images)


def measure(name: str, lowered: jax.stages.Lowered) -> Cost:
    """Compile a program and read off its cost.

    Args:
      name: of the program.
      lowered: the program.

    Returns:
      Its Cost; `too_large` is set where the compiler refuses for lack of memory.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = re.search(r"\((\S+)\) exceeds available HBM \((\S+)\)", str(error))
        said = "needs {}, the device has {}".format(*needed.groups()) if needed else str(error)
        return Cost(name, too_large=said.splitlines()[0])
    memory: Any = compiled.memory_analysis()
    text, cost = compiled.as_text() or "", compiled.cost_analysis() or {}
    return Cost(
        name,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        float(cost.get("flops", 0.0)),
        collectives(text),
    )


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Count collectives in a compiled program: {operation: (how many, bytes of their results)}."""
    found: dict[str, tuple[int, int]] = {}
    pattern = re.compile(rf" = (.*?) ({'|'.join(_COLLECTIVES)})(?:-start)?\((.*)")
    channels = set()
    for result, operation, rest in pattern.findall(text):
        # The TPU compiler may write one operation as a chain of pieces, which share its channel.
        channel = re.search(r"channel_id=\d+", rest)
        if channel and (operation, channel[0]) in channels:
            continue
        channels.add((operation, channel and channel[0]))
        size = sum(_bytes(*shape) for shape in re.findall(r"([a-z]\w*)\[([\d,]*)\]", result))
        count, total = found.get(operation, (0, 0))
        found[operation] = (count + 1, total + size)
    return found


def _bytes(element, dimensions):
    bits = _ELEMENT_BITS.get(element) or int(re.sub(r"\D.*", "", re.sub(r"^\D+", "", element)))
    for n in filter(None, dimensions.split(",")):
        bits *= int(n)
    return bits // 8


def table(costs: Sequence[Cost], hbm: float) -> str:
    """Write the costs as text, a program a line.

    Args:
      costs: of the programs.
      hbm: bytes of a device.
    """
    rows: list[tuple[str, ...]] = [
        ("each device", "arguments", "outputs", "scratch", "total", "of HBM", "GFLOP", "")
    ]
    for cost in costs:
        if cost.too_large:
            rows.append((cost.name, "", "", "", "", "> 100 %", "", cost.too_large))
            continue
        parts = (cost.arguments, cost.outputs, cost.temporary, cost.total)
        rows.append(
            (
                cost.name,
                *(f"{part / 2**20:.0f} MiB" for part in parts),
                f"{100 * cost.total / hbm:.1f} %",
                f"{cost.flops / 1e9:.2f}",
                ", ".join(
                    f"{count} {operation} ({size / 2**20:.2f} MiB)"
                    for operation, (count, size) in sorted(cost.collectives.items())
                ),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *map(str.rjust, row[1:-1], widths[1:]), row[-1]]
        ).strip()
        for row in rows
    )


def fits(cost: Cost, hbm: float) -> bool:
    """Return whether a program fits into `hbm` bytes."""
    return cost.too_large is None and cost.total <= hbm
