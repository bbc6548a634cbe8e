"""Features of a version: the one expensive part of evaluation, done once for query and gallery."""

import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from compat_jax import hosts
from compat_jax import mesh as meshes
from compat_jax.chain import Version
from compat_jax.data.augment import Preprocess
from compat_jax.errors import UserError
from compat_jax.losses import normalize
from compat_jax.models.fold import fold_batch_norm


@functools.lru_cache(maxsize=64)
def features_program(embedder: nn.Module, preprocess: Preprocess, mesh: Mesh, structure: Any):
    """The jitted function that `extract` calls; versions of one architecture share it.

    Args:
      embedder: the network, with a projection that the model axis divides (`mesh.fitted`).
      preprocess: normalisation.
      mesh: devices.
      structure: `jax.tree.structure` of the variables, in `extract` those of `fold_batch_norm`.

    Returns:
      (variables, uint8[batch, h, w, c]) -> float32[batch, feature_size], normalised; the batch is
      split over the data axis and, with a projection, the columns over the model axis.
    """
    variables = jax.tree.unflatten(structure, range(structure.num_leaves))
    rows = meshes.along_data(mesh)

    def features(variables, images):
        images = jax.lax.with_sharding_constraint(images, meshes.over_all(mesh, len(images)))
        outputs = embedder.apply(variables, preprocess.normalize(images), train=False)
        return normalize(outputs.features)

    return jax.jit(
        features,
        in_shardings=(meshes.shardings(mesh, variables), rows),
        out_shardings=rows if embedder.projection is None else meshes.along_features(mesh),
    )


def extract(
    version: Version,
    images: np.ndarray,
    mesh: Mesh | None = None,
    batch_size: int = 256,
    dtype: str = "float32",
    progress: str | None = None,
) -> np.ndarray:
    """L2-normalised features of images, in evaluation mode.

    Args:
      version: an opened entry of a chain.
      images: uint8[n, height, width, channels] of the size that the version was trained on.
      mesh: devices to spread each batch over; one device by default.
      batch_size: images a batch; the last one is padded, so that one compilation serves all.
      dtype: of the network's computation.
      progress: label of a progress bar; None for none.

    Returns:
      float32[n, feature_size], rows of norm 1 (a zero feature stays zero).

    Raises:
      UserError: images that are not uint8 or of another size.

    Source: `extract_features` in `src/iamcl2r/models/__init__.py`.
    """
    record = version.record
    if images.dtype != np.uint8 or images.shape[1:] != record.image_shape:
        raise UserError(
            f"version {version.number} embeds uint8 images of shape {record.image_shape}, got "
            f"{images.dtype} {images.shape[1:]}: convert or resize them"
        )
    mesh = mesh or meshes.make_mesh("data:1", jax.devices()[:1])
    batch_size = meshes.round_up(mesh, min(batch_size, len(images)))
    preprocess = Preprocess(record.mean, record.std)
    network = meshes.fitted(version.embedder(dtype), mesh)
    folded = fold_batch_norm(network, version.variables, record.image_shape)
    variables = meshes.place(folded, mesh, network.projection)
    apply = features_program(network, preprocess, mesh, jax.tree.structure(variables))
    batches = range(0, len(images), batch_size)
    pending: list[Any] = []
    for start in tqdm(batches, progress, disable=progress is None, leave=False):
        batch = np.asarray(images[start : start + batch_size])
        missing = batch_size - len(batch)
        if missing:
            batch = np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0)))
        pending.append(apply(variables, meshes.feed(batch, mesh)))
    features = np.concatenate([hosts.whole(x) for x in pending])
    return features[: len(images), : record.feature_size]
