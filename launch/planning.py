"""The programs of a configuration compiled for a TPU topology: what `launch.plan` prints."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from compat_jax import mesh as meshes
from compat_jax import methods, models
from compat_jax import plan as costing
from compat_jax.data.tasks import TaskSequence
from compat_jax.errors import UserError
from compat_jax.retrieval.search import lower as lower_search
from compat_jax.train import loop
from launch import build


def sizes_of_data(
    config: ConfigDict, images: int | None, classes: int | None
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """int[n] labels and the shape of an image: as if all classes had as many, or of the data.

    Raises:
      UserError: one of the two numbers without the other, or without the size of the images.
    """
    if images is None and classes is None:
        (data,) = build.load_data(config, "train")
        return data.labels, data.images.shape[1:]
    size = config.data.train.size
    if images is None or classes is None or size is None:
        raise UserError("--images, --classes and --config.data.train.size go together: give all")
    return np.arange(images) * classes // images, (size, size, 3)


def programs(
    config: ConfigDict,
    mesh: Mesh,
    labels: np.ndarray,
    image_shape: tuple[int, int, int],
    gallery: int,
    k: int,
    batch_size: int,
) -> dict[str, jax.stages.Lowered]:
    """{name: lowered program} of what the configuration's run compiles.

    Args:
      config: the configuration.
      mesh: devices, also such that are not there.
      labels: int[n] of the training data.
      image_shape: (height, width, channels).
      gallery: rows of the search.
      k: its neighbours.
      batch_size: images a batch of the feature extraction.

    Raises:
      UserError: what training would refuse.
    """
    num_classes = int(labels.max()) + 1
    sequence = TaskSequence(num_classes, config.tasks.initial, config.tasks.increment)
    run = build.build_run(config, sequence, config.tasks.rehearsal)
    run.check(mesh, labels)
    backbone = models.create_backbone(run.backbone.name, run.backbone.arguments, run.dtype)
    embedder = methods.build_embedder(
        run.method, backbone, run.num_prototypes, num_classes, models.DTYPES[run.dtype]
    )
    features = costing.lower_features(embedder, run.preprocess, mesh, batch_size, image_shape)
    size = embedder.projection or features.out_info.shape[1]
    return {
        "training step": loop.lower(run, labels, image_shape, mesh),
        "features": features,
        "search": lower_search(gallery, size, k, mesh),
    }


def remedies(
    config: ConfigDict, costs: Sequence[costing.Cost], hbm: float, images: float
) -> list[str]:
    """What to change for the programs that do not fit.

    Args:
      config: the configuration.
      costs: of all programs.
      hbm: bytes of a device.
      images: bytes of the training images, which are on every device.
    """
    advice = []
    many_prototypes = config.method != "er" and config.num_prototypes > 10_000
    for cost in costs:
        if costing.fits(cost, hbm):
            continue
        if cost.name == "search":
            rows = 2.0 ** max(0, math.floor(math.log2(hbm / 32 / config.num_prototypes)))
            block = f", for example gallery_block={rows:.0f}" if many_prototypes else ""
            advice.append(f"search: a smaller gallery_block of compat_jax.retrieval.search{block}")
            continue
        smaller = "--batch_size"
        if cost.name == "training step":
            smaller = f"--config.batch_size={max(config.batch_size // 2, 1)}"
            if images > 0.3 * hbm:
                smaller = (
                    f"--config.data.train.per_class or .size, for fewer or smaller images: they "
                    f"take {images / 2**30:.1f} GiB of every device"
                )
        advice.append(f"{cost.name}: a smaller {smaller}; or more chips, or larger ones")
        if config.dtype == "float32":
            advice.append(f"{cost.name}: --config.dtype=bfloat16 halves the activations")
        if many_prototypes:
            advice.append(
                f"{cost.name}: a larger model axis splits the {config.num_prototypes} prototypes, "
                f"now --config.mesh={config.mesh}, for example --config.mesh=data:-1,model:8"
            )
    return advice


def plan(
    config: ConfigDict,
    topology: str,
    images: int | None = None,
    classes: int | None = None,
    gallery: int = 1_000_000,
    k: int = 10,
    batch_size: int = 256,
) -> bool:
    """Compile for a topology; print the table and the advice; whether everything fits."""
    devices = costing.topology_devices(topology)
    mesh = meshes.make_mesh(config.mesh, devices)
    labels, shape = sizes_of_data(config, images, classes)
    kind, hosts = devices[0].device_kind, len({d.process_index for d in devices})
    hbm = costing.HBM_GIB[kind] * 2**30
    sizes = ",".join(f"{axis}:{size}" for axis, size in mesh.shape.items())
    print(
        f"{topology}: {len(devices)} devices ({kind}, {costing.HBM_GIB[kind]} GiB usable), "
        f"{hosts} host{'s' * (hosts > 1)}; mesh {sizes}\n"
        f"{config.method}, {config.backbone.name}, {len(labels)} images of "
        f"{'x'.join(map(str, shape))}, K={config.num_prototypes}, batch {config.batch_size}, "
        f"{config.dtype}\n",
        flush=True,
    )
    lowered = programs(config, mesh, labels, shape, gallery, k, batch_size)
    costs = [costing.measure(name, program) for name, program in lowered.items()]
    print(costing.table(costs, hbm))
    print("\nFLOP and collectives are those of one step on one device; compiled, not run.")
    too_large = [cost.name for cost in costs if not costing.fits(cost, hbm)]
    if not too_large:
        print("Everything fits.")
    else:
        print(f"Does not fit: {', '.join(too_large)}. What helps:")
    for line in remedies(config, costs, hbm, float(len(labels)) * math.prod(shape)):
        print(f"- {line}")
    return not too_large
