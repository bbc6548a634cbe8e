"""Features of a version: the expensive part of evaluation, done once for query and gallery."""

from collections.abc import Mapping
from typing import Any, TypedDict, Unpack

import numpy as np
from jax.sharding import Mesh

from compat_jax.chain import Version
from compat_jax.data.pictures import Preparation
from compat_jax.errors import unknown
from compat_jax.fields import check_types


class EmbedOptions(TypedDict, total=False):
    """Keywords of `Version.embed`."""

    preparation: Preparation | None
    mesh: Mesh | None
    batch_size: int
    dtype: str
    progress: str | None


def check_embedding(version: Version, options: Mapping[str, Any]) -> None:
    """Refuse what is no version, and options that `Version.embed` does not have.

    Raises:
      UserError: naming it.
    """
    check_types(version=(version, Version))
    for name in options:
        if name not in EmbedOptions.__annotations__:
            raise unknown("option of embed", name, EmbedOptions.__annotations__, name)


def embed(version: Version, images: Any, **options: Unpack[EmbedOptions]) -> np.ndarray:
    """Embed images with a version, in evaluation mode.

    Args:
      version: an opened entry of a chain.
      images: pictures of any kind, one or many, see `Version.embed`.
      **options: preparation, mesh, batch_size, dtype and progress, see `Version.embed`.

    Returns:
      float32[n, feature_size], rows of norm 1 (a zero feature stays zero).

    Raises:
      UserError: no version, an unknown option, or see `Version.embed`.

    Source: `extract_features` in `src/iamcl2r/models/__init__.py`.
    """
    check_embedding(version, options)
    return version.embed(images, **options)
