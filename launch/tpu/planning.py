"""Compile the programs of a configuration for chips that are not there; print what they cost."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from compat_jax import Run, Session, experiment, hlo, models, slice_cost, topology
from compat_jax import config as configs
from compat_jax import mesh as meshes
from compat_jax.errors import UserError
from compat_jax.files import absolute, write_json
from compat_jax.models import Backbone
from compat_jax.retrieval.exact import lower as lower_search
from compat_jax.training import make_trainer
from compat_jax.training.sequence import adopted, check_replacements
from compat_jax.training.step import DeviceData, Feed
from compat_jax.training.task import longest_plan, lower_step


def sizes_of_data(
    config: ConfigDict, images: int | None, classes: int | None
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Return the labels and the image shape of the training data.

    Args:
      config: the configuration.
      images: number of images, or None to read the data.
      classes: number of classes, all of the same size, or None to read the data.

    Returns:
      int[n] labels and (height, width, channels).

    Raises:
      UserError: only some of images, classes and the size of the images are given.
    """
    if images is None and classes is None:
        data = experiment.load_role(config, "train", Session())
        return data.labels, data.images.shape[1:]
    size = config.data.train.size
    if images is None or classes is None or size is None:
        raise UserError("--images, --classes and --config.data.train.size go together: give all")
    return np.arange(images) * classes // images, (size, size, 3)


def programs(
    config: ConfigDict,
    mesh: Mesh,
    *,
    labels: np.ndarray,
    image_shape: tuple[int, int, int],
    gallery: int,
    k: int,
    batch_size: int,
) -> dict[str, jax.stages.Lowered]:
    """Lower the programs that a run of the configuration compiles.

    Args:
      config: the configuration.
      mesh: devices; may belong to a compile-only topology.
      labels: labels of the training data, int[n].
      image_shape: (height, width, channels).
      gallery: rows of the gallery in a search.
      k: neighbours of the search.
      batch_size: images in a batch of the feature extraction.

    Returns:
      {name: lowered program}; also the step of a first task that learns by cross-entropy alone
      (tasks.first_loss), and those of the network of tasks.fresh_at, where it is another: its step is
      that of the first such task.

    Raises:
      UserError: training would refuse the configuration.
    """
    run, num_classes = configs.run_of(config), int(labels.max()) + 1
    sequence = run.tasks.sequence(num_classes)
    fresh_at = configs.own_field(config, "tasks.fresh_at")
    fresh = configs.fresh_backbone(config, run) if fresh_at else run.given_backbone
    with configs.located():
        run.check(sequence, labels, mesh)
        check_replacements(run, sequence, dict.fromkeys(fresh_at, fresh), image_shape)

    def features_of(embedder):
        return slice_cost.lower_features(
            embedder, run.preprocess, mesh, batch_size=batch_size, image_shape=image_shape
        )

    embedder = make_trainer(run, num_classes, mesh).embedder
    features = features_of(embedder)
    found = {
        "training step": lower_step(run, labels, image_shape, mesh=mesh),
        "features": features,
    }
    first = adopted(run, None)
    if first != run and 0 not in configs.own_field(config, "tasks.replace_at"):
        found["training step (first task)"] = lower_step(first, labels, image_shape, mesh=mesh)
    if fresh != run.given_backbone:
        begun = dataclasses.replace(run, backbone=fresh)
        teacher = None if 0 in fresh_at or run.given_method.fresh_start else run.given_backbone
        step = _lower_fresh_step(begun, teacher, mesh, labels=labels, image_shape=image_shape)
        found[f"training step ({fresh.name})"] = step
        other = make_trainer(begun, num_classes, mesh).embedder
        found[f"features ({fresh.name})"] = features_of(other)
    size = embedder.projection_size or features.out_info.shape[1]
    return found | {"search": lower_search(gallery, size, k, mesh=mesh)}


def _lower_fresh_step(
    run: Run,
    teacher: Backbone | None,
    mesh: Mesh,
    *,
    labels: np.ndarray,
    image_shape: tuple[int, int, int],
) -> jax.stages.Lowered:
    """Lower the step of a task from fresh weights, against a model of another network or none."""
    if teacher is None:
        return lower_step(run, labels, image_shape, mesh=mesh)
    sequence, shape = run.tasks.sequence(int(labels.max()) + 1), jax.ShapeDtypeStruct
    images = shape((len(labels), *image_shape), np.uint8)
    data = DeviceData(images, shape((len(labels),), np.int32))
    plan = shape(longest_plan(run, sequence, labels), np.int32)
    trainer = make_trainer(run, sequence.num_classes, mesh, teacher=teacher)
    before = make_trainer(run, sequence.num_classes, mesh, backbone=teacher)
    (state, _), (_, frozen) = (one.shapes(image_shape) for one in (trainer, before))
    return trainer.lower(state, frozen, Feed(data, plan))


def remedies(
    config: ConfigDict, costs: Sequence[slice_cost.Cost], *, hbm: float, images: float
) -> list[str]:
    """Return advice for the programs that do not fit.

    Args:
      config: the configuration.
      costs: costs of all programs.
      hbm: memory of a device, in bytes.
      images: size of the training images, of which every device holds a copy, in bytes.
    """
    advice = []
    many_prototypes = config.method != "er" and config.num_prototypes > 10_000
    for cost in costs:
        if slice_cost.fits(cost, hbm):
            continue
        if cost.name == "search":
            rows = 2.0 ** max(0, math.floor(math.log2(hbm / 32 / config.num_prototypes)))
            rows = f"{rows:.0f}" if many_prototypes else "..."
            advice.append(f"search: a smaller block, SearchOptions(gallery_block={rows})")
            continue
        smaller = "--batch_size"
        is_step = cost.name.startswith("training step")
        if is_step:
            smaller = f"--config.batch_size={max(config.batch_size // 2, 1)}"
            if images > 0.3 * hbm:
                smaller = (
                    f"--config.data.train.per_class or .size, for fewer or smaller images: they "
                    f"take {images / 2**30:.1f} GiB of every device"
                )
        advice.append(f"{cost.name}: a smaller {smaller}; or more chips, or larger ones")
        if config.dtype == "float32":
            advice.append(f"{cost.name}: --config.dtype=bfloat16 halves the activations")
        if is_step and config.get("remat", "none") == "none":
            advice.append(
                f"{cost.name}: --config.remat=blocks keeps the results of blocks only, and computes "
                "their insides again"
            )
        if many_prototypes:
            advice.append(
                f"{cost.name}: a larger model axis splits the {config.num_prototypes} prototypes, "
                f"now --config.mesh={config.mesh}, for example --config.mesh=data:-1,model:8"
            )
    return advice


def report(costs: Sequence[slice_cost.Cost], chip: hlo.Chip, *, low_precision: bool) -> str:
    """Write the lower bounds of the programs' steps, and what they waste.

    Args:
      costs: costs of all programs.
      chip: that they are compiled for.
      low_precision: whether the network computes in bfloat16.
    """
    if not chip.peaks:
        return f"The rates of the {chip.name} are not known here: no bounds of the time."
    lines = [
        slice_cost.bounds(costs, chip),
        "",
        f"At least: the products at the peak of the {chip.name}, memory and links at their full rate, "
        "all\nside by side. One by one: every kernel alone, all its data in main memory. Neither counts "
        "launches and\nlatencies. Of peak: the FLOP in the time one by one.",
    ]
    for cost in costs:
        if cost.too_large is None:
            networks = low_precision and cost.name != "search"  # which is exact, in float32
            found = hlo.findings(cost.program, chip, low_precision=networks)
            lines += ["", cost.name, *(f"- {line}" for line in found)]
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The compiled programs of a configuration.

    Attributes:
      topology: its name, e.g. "h100:8".
      devices: of the topology.
      chip: each of them.
      run: that was compiled.
      image_shape: (height, width, channels).
      batches: {program: images of one step on all devices}.
      costs: of the programs.
    """

    topology: str
    devices: int
    chip: hlo.Chip
    run: Run
    image_shape: tuple[int, int, int]
    batches: dict[str, int]
    costs: Sequence[slice_cost.Cost]

    @property
    def too_large(self) -> list[str]:
        """Names of the programs that do not fit."""
        return [cost.name for cost in self.costs if not slice_cost.fits(cost, self.chip.memory)]

    def write(self, path: str) -> None:
        """Write the bounds of each program's step as JSON, for `launch.benchmark --numbers`.

        Raises:
          UserError: the path is none, or the file cannot be written.
        """
        place = absolute(path)
        try:
            write_json(place, self.content())
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}", "json") from error

    def content(self) -> dict[str, Any]:
        """Return what `write` writes: times in seconds, memory in bytes on each device."""
        return {
            "plan": {"topology": self.topology, "devices": self.devices, "chip": self.chip.name},
            "run": {
                "method": self.run.method.name,
                "backbone": self.run.backbone.name,
                "image": self.image_shape[0],
                "dtype": self.run.dtype,
                "num_prototypes": self.run.num_prototypes,
                "batch_size": self.run.batch_size,
            },
            "programs": [self._program(cost) for cost in self.costs],
        }

    def _program(self, cost):
        found = {"name": cost.name, "fits": cost.name not in self.too_large, "bytes": cost.total}
        if cost.name in self.batches:
            found["batch"] = self.batches[cost.name]
        if cost.too_large is None and self.chip.peaks:
            least = hlo.bound(cost.program, self.chip)
            found |= {"at_least": least.seconds, "one_by_one": least.kernels, "limit": least.limit}
        return found


def for_chips(config: ConfigDict) -> ConfigDict:
    """Return a copy of a configuration with the dtype that "auto" stands for on all of these chips.

    On its own it would ask this machine.
    """
    found = config.copy_and_resolve_references()
    if found.get("dtype") == models.AUTO:
        found.dtype = "bfloat16"
    return found


def plan(
    config: ConfigDict,
    name: str,
    *,
    images: int | None = None,
    classes: int | None = None,
    gallery: int = 1_000_000,
    k: int = 10,
    batch_size: int = 256,
) -> Plan:
    """Compile for a topology, print tables, findings and advice.

    Args:
      config: the configuration.
      name: of the topology, e.g. "v5e:4x4" or "h100:8".
      images: see `sizes_of_data`.
      classes: see `sizes_of_data`.
      gallery: see `programs`.
      k: see `programs`.
      batch_size: see `programs`.
    """
    config = for_chips(config)
    devices, run = topology.devices(name), configs.run_of(config)
    mesh = meshes.make_mesh(config.mesh, devices)
    labels, shape = sizes_of_data(config, images, classes)
    chip, hosts = hlo.CHIPS[devices[0].device_kind], len({d.process_index for d in devices})
    axes = ",".join(f"{axis}:{size}" for axis, size in mesh.shape.items())
    print(
        f"{name}: {len(devices)} device{'s' * (len(devices) > 1)} ({devices[0].device_kind}, "
        f"{chip.memory / 2**30:.2f} GiB usable), {hosts} host{'s' * (hosts > 1)}; mesh {axes}\n"
        f"{config.method}, {config.backbone.name}, {len(labels)} images of "
        f"{'x'.join(map(str, shape))}, K={config.num_prototypes}, batch {config.batch_size}, "
        f"{run.dtype}\n",
        flush=True,
    )
    sizes = {"gallery": gallery, "k": k, "batch_size": batch_size}
    lowered = programs(config, mesh, labels=labels, image_shape=shape, **sizes)
    costs = [slice_cost.measure(name, program) for name, program in lowered.items()]
    print(slice_cost.table(costs, chip.memory))
    print("\nFLOP and collectives are those of one step on one device; compiled, not run.\n")
    print(report(costs, chip, low_precision=run.dtype != "float32"), end="\n\n")
    found = Plan(
        topology=name,
        devices=len(devices),
        chip=chip,
        run=run,
        image_shape=shape,
        batches={
            name: run.batch_size if "step" in name else meshes.round_up(mesh, batch_size)
            for name in lowered
            if name != "search"
        },
        costs=costs,
    )
    if not found.too_large:
        print("Everything fits.")
    else:
        print(f"Does not fit: {', '.join(found.too_large)}. Change one of these:")
    size = float(len(labels)) * math.prod(shape)
    for line in remedies(config, costs, hbm=chip.memory, images=size):
        print(f"- {line}")
    return found
