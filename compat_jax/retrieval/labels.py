"""Labels: one function brings those of two sets to one form, in which equal ones are equal."""

import numpy as np
import numpy.typing as npt

from compat_jax.data.dataset import check_range
from compat_jax.errors import UserError
from compat_jax.retrieval.blocks import check_finite


def in_one_form(
    query_labels: npt.ArrayLike, gallery_labels: npt.ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """Return two sets of labels in one form, exactly.

    Whole numbers of two types become int64 where all fit, else uint64, else numbers of the classes:
    NumPy would compare int64 with uint64 as float64, in which neighbours above 2**53 are equal.

    Args:
      query_labels: whole numbers or texts, [q].
      gallery_labels: likewise, [n].

    Returns:
      Both, of one kind.

    Raises:
      UserError: not whole numbers or texts, or numbers in one and texts in the other.
    """
    sets = np.asarray(query_labels), np.asarray(gallery_labels)
    kinds = [_kind(name, part) for name, part in zip(("query", "gallery"), sets, strict=True)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"query labels are {kinds[0]}, gallery labels {kinds[1]}: give both in one kind"
        )
    if sets[0].dtype == sets[1].dtype or kinds[0] != "whole numbers":
        return sets
    for form in (np.int64, np.uint64):
        if all(_fits(part, form) for part in sets):
            return sets[0].astype(form), sets[1].astype(form)
    flat = np.concatenate([part.astype(object).reshape(-1) for part in sets])
    codes = np.unique(flat, return_inverse=True)[1]
    first, second = np.split(codes, [sets[0].size])
    return first.reshape(sets[0].shape), second.reshape(sets[1].shape)


def labelled(
    name: str, features: npt.ArrayLike, labels: npt.ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """Return features as float32[n, d] and their labels, [n].

    Args:
      name: of the set, for messages.
      features: float[n, d].
      labels: [n].

    Raises:
      UserError: labels of another length, none, or values that are not finite.
    """
    features, labels = np.asarray(features, np.float32), np.asarray(labels)
    if not len(features) or labels.shape != features.shape[:1]:
        raise UserError(
            f"{name}: {len(features)} features need as many labels (at least one), got labels of "
            f"shape {labels.shape}"
        )
    check_finite(name, features)
    return features, labels


def check_rows(labels: np.ndarray, count: int, rows: str, argument: str | None = None) -> None:
    """Refuse labels that are not numbers of rows.

    Args:
      labels: at least one.
      count: number of rows.
      rows: says whose they are, e.g. "there are 4 prototypes".
      argument: see `UserError`.

    Raises:
      UserError: texts, or numbers outside 0..count-1.
    """
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"labels must be whole numbers, since each is the number of a row ({rows}), got "
            f"{labels.dtype}",
            "labels",
        )
    check_range(labels, count, f"but {rows}", argument)


def _kind(name: str, labels: np.ndarray) -> str:
    if np.issubdtype(labels.dtype, np.integer):
        return "whole numbers"
    if labels.dtype.kind in "US":  # NumPy never finds a text equal to bytes
        return "texts" if labels.dtype.kind == "U" else "bytes"
    raise UserError(f"{name} labels must be whole numbers or texts, got {labels.dtype}")


def _fits(labels: np.ndarray, form: type[np.integer]) -> bool:
    limits = np.iinfo(form)
    return not labels.size or (limits.min <= int(labels.min()) and int(labels.max()) <= limits.max)
