"""Labels: one function decides whether those of two sets can be compared."""

import numpy as np
import numpy.typing as npt

from compat_jax.errors import UserError


def check_labels(query_labels: npt.ArrayLike, gallery_labels: npt.ArrayLike) -> None:
    """Refuse labels of different kinds, which would never be equal.

    Raises:
      UserError: not whole numbers or texts, or numbers in one and texts in the other.
    """
    kinds = [
        _kind(name, labels)
        for name, labels in (("query", query_labels), ("gallery", gallery_labels))
    ]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"query labels are {kinds[0]}, gallery labels {kinds[1]}: give both in one kind"
        )


def _kind(name, labels):
    dtype = np.asarray(labels).dtype
    if np.issubdtype(dtype, np.integer):
        return "whole numbers"
    if dtype.kind in "US":  # NumPy never finds a text equal to bytes
        return "texts" if dtype.kind == "U" else "bytes"
    raise UserError(f"{name} labels must be whole numbers or texts, got {dtype}")
