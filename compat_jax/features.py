"""Features of images by a network: the program, and the loop over batches."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from compat_jax import hosts
from compat_jax import mesh as meshes
from compat_jax.data.augment import Preprocess
from compat_jax.fields import check_value
from compat_jax.losses import normalize
from compat_jax.meter import track
from compat_jax.models import Embedder
from compat_jax.session import Session

# Pixels of pictures that a CPU embeds at once. From there on a picture takes no less time, and the
# network's arrays grow: ResNet-50 at 224 px embedded 256 pictures at once as fast as 8 (on one
# core), in 5.2 GB instead of 0.8.
_PIXELS_ON_CPU = 1 << 19


def at_once(mesh: Mesh, batch_size: int, image_shape: Sequence[int]) -> int:
    """Limit a batch of extraction to what is worth its memory: on CPUs large pictures go in fewer.

    Args:
      mesh: devices; those of a process share its memory.
      batch_size: images that were asked for.
      image_shape: height, width and channels.

    Returns:
      At most `batch_size`, a power of two where it is less.

    Raises:
      UserError: a batch size that is no whole number of at least 1.
    """
    batch_size = check_value(Session, "batch_size", batch_size)
    devices = mesh.devices.flat
    if devices[0].platform != "cpu":
        return batch_size
    pixels = _PIXELS_ON_CPU * len({device.process_index for device in devices})
    most = max(1, pixels // (image_shape[0] * image_shape[1]))
    return min(batch_size, 1 << (most.bit_length() - 1))


@dataclasses.dataclass(frozen=True)
class Extractor:
    """Embeds images in evaluation mode; extractors of one architecture share their programs.

    Attributes:
      embedder: the network, its projection padded to the model axis (`mesh.pad_projection`).
      preprocess: normalisation.
      mesh: devices.
      normalized: whether features are L2-normalised.
    """

    embedder: nn.Module
    preprocess: Preprocess
    mesh: Mesh
    normalized: bool = True

    def program(self, structure: Any) -> Any:
        """Return the jitted function that embeds a batch.

        Args:
          structure: `jax.tree.structure` of the variables.

        Returns:
          (variables, uint8[batch, h, w, c]) -> float32[batch, feature_size]; the batch is split over
          the data axis and, with a projection, the columns over the model axis.
        """
        return _program(self, structure)

    def __call__(
        self, variables: Any, images: Any, batch_size: int = 256, progress: str | None = None
    ) -> np.ndarray:
        """Embed images.

        Args:
          variables: on the mesh.
          images: uint8[n, h, w, c], n >= 1, an array or a view that is read batch by batch.
          batch_size: images per batch, see `at_once`; the last one is padded, so that one compilation
            serves all.
          progress: label of a progress bar; None for none.

        Returns:
          float32[n, columns], with the columns that padding added.
        """
        batch_size = at_once(self.mesh, batch_size, images.shape[1:])
        batch_size = meshes.round_up(self.mesh, min(batch_size, len(images)))
        apply = self.program(jax.tree.structure(variables))
        batches = range(0, len(images), batch_size)
        pending: list[jax.Array] = []
        for start in track(batches, progress, "batches"):
            batch = np.asarray(images[start : start + batch_size])
            missing = batch_size - len(batch)
            if missing:
                batch = np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0)))
            pending.append(apply(variables, meshes.shard_batch(batch, self.mesh)))
        return np.concatenate([hosts.gather(x) for x in pending])[: len(images)]


@functools.lru_cache(maxsize=64)
def _program(extractor: Extractor, structure: Any):
    mesh, embedder = extractor.mesh, extractor.embedder
    variables = jax.tree.unflatten(structure, range(structure.num_leaves))
    rows = meshes.along_data(mesh)

    def features(variables, images):
        images = jax.lax.with_sharding_constraint(images, meshes.over_all(mesh, len(images)))
        outputs = embedder.apply(variables, extractor.preprocess.normalize(images), train=False)
        found = outputs.features  # type: ignore[union-attr]
        return normalize(found) if extractor.normalized else found.astype(np.float32)

    has_projection = isinstance(embedder, Embedder) and embedder.projection_size is not None
    return jax.jit(
        features,
        in_shardings=(meshes.shardings(mesh, variables), rows),
        out_shardings=meshes.along_features(mesh) if has_projection else rows,
    )


def mean_features(
    extractor: Extractor, variables: Any, images: Any, *, labels: np.ndarray
) -> np.ndarray:
    """Average the features of each class.

    Args:
      extractor: of the network.
      variables: on the mesh.
      images: uint8[n, h, w, c].
      labels: int[n], values 0..max.

    Returns:
      float32[max + 1, columns]; zeros for a class without an image.
    """
    found = extractor(variables, images).astype(np.float64)
    sums = np.zeros((int(labels.max()) + 1, found.shape[1]))
    np.add.at(sums, labels, found)
    counts = np.maximum(np.bincount(labels), 1)
    return (sums / counts[:, None]).astype(np.float32)
