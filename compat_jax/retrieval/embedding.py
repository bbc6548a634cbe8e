"""Features of a version: the expensive part of evaluation, done once for query and gallery."""

from typing import Any

import numpy as np
from jax.sharding import Mesh

from compat_jax.chain import Version
from compat_jax.data.pictures import Preparation


def embed(
    version: Version,
    images: Any,
    *,
    preparation: Preparation | None = None,
    mesh: Mesh | None = None,
    batch_size: int = 256,
    dtype: str = "float32",
    progress: str | None = None,
) -> np.ndarray:
    """Embed images with a version, in evaluation mode.

    Args:
      version: an opened entry of a chain.
      images: pictures of any kind, one or many: paths, PIL images, uint8 arrays, a `Dataset`; see
        `Version.embed`.
      preparation: how pictures are brought to the version's size; as its record says by default.
      mesh: devices to spread each batch over; one device by default.
      batch_size: images per batch; the last one is padded.
      dtype: of the network's computation.
      progress: label of a progress bar; None for none.

    Returns:
      float32[n, feature_size], rows of norm 1 (a zero feature stays zero).

    Raises:
      UserError: see `Version.embed`.

    Source: `extract_features` in `src/iamcl2r/models/__init__.py`.
    """
    return version.embed(
        images,
        preparation=preparation,
        mesh=mesh,
        batch_size=batch_size,
        dtype=dtype,
        progress=progress,
    )
