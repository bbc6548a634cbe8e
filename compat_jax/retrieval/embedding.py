"""Features of a version: the expensive part of evaluation, done once for query and gallery."""

from typing import Any

import numpy as np

from compat_jax.chain import Version


def embed(version: Version, images: Any, **options: Any) -> np.ndarray:
    """Embed images with a version, in evaluation mode.

    Args:
      version: an opened entry of a chain.
      images: pictures of any kind, one or many, see `Version.embed`.
      **options: preparation, mesh, batch_size, dtype and progress, see `Version.embed`.

    Returns:
      float32[n, feature_size], rows of norm 1 (a zero feature stays zero).

    Raises:
      UserError: see `Version.embed`.

    Source: `extract_features` in `src/iamcl2r/models/__init__.py`.
    """
    return version.embed(images, **options)
