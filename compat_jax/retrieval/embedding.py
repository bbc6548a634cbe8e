"""Features of a version: the expensive part of evaluation, done once for query and gallery."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from compat_jax import mesh as meshes
from compat_jax.chain import Version
from compat_jax.data.augment import Preprocess
from compat_jax.errors import UserError
from compat_jax.features import Extractor
from compat_jax.models.fold import fold_batch_norm


def embed(
    version: Version,
    images: Any,
    *,
    mesh: Mesh | None = None,
    batch_size: int = 256,
    dtype: str = "float32",
    progress: str | None = None,
) -> np.ndarray:
    """Embed images with a version, in evaluation mode.

    Args:
      version: an opened entry of a chain.
      images: uint8[n, height, width, channels] of the size that the version was trained on, or a
        `Dataset` of such.
      mesh: devices to spread each batch over; one device by default.
      batch_size: images per batch; the last one is padded, so that one compilation serves all.
      dtype: of the network's computation.
      progress: label of a progress bar; None for none.

    Returns:
      float32[n, feature_size], rows of norm 1 (a zero feature stays zero).

    Raises:
      UserError: images that are not uint8, or of another size.

    Source: `extract_features` in `src/iamcl2r/models/__init__.py`.
    """
    record, images = version.record, getattr(images, "images", images)
    shape, kind = getattr(images, "shape", ()), getattr(images, "dtype", type(images).__name__)
    if kind != np.uint8 or len(shape) != 4 or shape[1:] != record.image_shape:
        raise UserError(
            f"version {version.number} embeds uint8 images of shape [n, "
            f"{', '.join(map(str, record.image_shape))}], got {kind} {list(shape)}: convert or "
            "resize them (data.pictures.decode and resized read a file)"
        )
    if not len(images):
        return np.zeros((0, record.feature_size), np.float32)
    mesh = mesh or meshes.make_mesh("data:1", jax.devices()[:1])
    network: Any = meshes.pad_projection(version.embedder(dtype), mesh)
    folded = fold_batch_norm(network, version.variables, record.image_shape)
    variables = meshes.shard(folded, mesh, network.projection_size)
    preprocess = Preprocess(record.mean, record.std, crop_padding=0, flip=False)
    extractor = Extractor(network, preprocess, mesh)
    features = extractor(variables, images, batch_size, progress=progress)
    return features[:, : record.feature_size]
