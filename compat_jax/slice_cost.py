"""Memory, work and collectives of a run's programs, compiled for chips that nobody rented."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from compat_jax import mesh as meshes
from compat_jax import models
from compat_jax.data.augment import Preprocess
from compat_jax.features import Extractor
from compat_jax.hlo import Chip, Program, bound, duration, read
from compat_jax.models.fold import fold_batch_norm


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one program on each device.

    Attributes:
      name: of the program.
      arguments: bytes of its inputs: weights, momentum, images, ...
      outputs: bytes of its results, without those that reuse donated arguments.
      temporary: bytes of activations and other scratch.
      program: what one step launches.
      too_large: the compiler's reason, where it refused for lack of memory.
    """

    name: str
    arguments: int = 0
    outputs: int = 0
    temporary: int = 0
    program: Program = dataclasses.field(default_factory=Program)
    too_large: str | None = None

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.arguments + self.outputs + self.temporary


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
    return Cost(
        name,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        program=read(compiled.as_text() or ""),
    )


def table(costs: Sequence[Cost], hbm: float) -> str:
    """Write the memory as text, a program a line.

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
                f"{sum(cost.program.flops.values()) / 1e9:.2f}",
                ", ".join(
                    f"{count} {operation} ({size / 2**20:.2f} MiB)"
                    for operation, (count, size) in sorted(cost.program.collectives.items())
                ),
            )
        )
    return _aligned(rows)


def bounds(costs: Sequence[Cost], chip: Chip) -> str:
    """Write the lower bounds of one step as text, a program that fits a line.

    Args:
      costs: of the programs.
      chip: with known rates.
    """
    rows: list[tuple[str, ...]] = [
        ("one step", "kernels", "FLOP", "memory", "links", "at least", "one by one", "of peak", "")
    ]
    for cost in costs:
        if cost.too_large:
            continue
        least = bound(cost.program, chip)
        times = (least.compute, least.memory, least.links, least.seconds, least.kernels)
        share = 100 * least.compute / least.kernels if least.kernels else 0.0
        launches = sum(k.times for k in cost.program.kernels if k.kind != "prefetch")
        rows.append(
            (
                cost.name,
                str(launches),
                *map(duration, times),
                f"{share:.1f} %",
                "",
            )
        )
    return _aligned(rows)


def _aligned(rows):
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
