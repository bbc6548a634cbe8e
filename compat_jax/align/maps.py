"""A fitted map: arrays, how they apply, and its file."""

import dataclasses
import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from compat_jax.errors import UserError, unknown
from compat_jax.files import storage, write_bytes

# (arrays, new features float32[n, e], old features float32[n, d] or None) -> float[n, d]
Apply = Callable[[Mapping[str, np.ndarray], np.ndarray, np.ndarray | None], Any]
_APPLY: dict[str, Apply] = {}
_NEEDS_OLD: set[str] = set()
_UNFIT: dict[str, Callable[[Any], str]] = {}
_ABOUT = "about"
_FEWEST = 2  # pictures that a map is fitted on


def applies(
    kind: str,
    apply: Apply,
    *,
    needs_old: bool = False,
    unfit: Callable[[Any], str] = lambda labels: "",
) -> None:
    """Tell how the arrays of a kind of map apply to features; the result need not be normalised.

    Args:
      kind: its name.
      apply: the function.
      needs_old: whether it goes by the old version's features of a query as well.
      unfit: (labels of the pictures to fit on, or None) -> why its defaults cannot be fitted on them.
    """
    _APPLY[kind], _UNFIT[kind] = apply, unfit
    if needs_old:
        _NEEDS_OLD.add(kind)


def needs_old(kind: str) -> bool:
    """Return whether a kind of map takes each query's features by both versions."""
    return kind in _NEEDS_OLD


def unfit(kind: str, labels: Any) -> str:
    """Say why a kind of map, with its defaults, cannot be fitted on pictures; "" where it can.

    Args:
      kind: its name.
      labels: int[n], classes of the pictures.
    """
    if len(labels) < _FEWEST:
        return (
            f"a map is fitted on {_FEWEST} pictures at least, here on {len(labels)}: give more (of a "
            "gallery half counts)"
        )
    return _UNFIT[kind](labels)


class Pairs(NamedTuple):
    """Features of the same pictures by two versions, L2-normalised.

    Attributes:
      old: float64[n, d].
      new: float64[n, e].
      labels: int[n], classes of the pictures; None where unknown.
    """

    old: np.ndarray
    new: np.ndarray
    labels: np.ndarray | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """Return the columns of the new features and of the old ones."""
        return self.new.shape[1], self.old.shape[1]


@dataclasses.dataclass(frozen=True, eq=False)
class Map:
    """A map from a new version's features to an old version's space.

    Attributes:
      kind: name of the map, see `KINDS`.
      new_size: columns of the features that it takes.
      old_size: columns of the features that it returns.
      arrays: its numbers.
      settings: those that it was fitted with, JSON values.
    """

    kind: str
    new_size: int
    old_size: int
    arrays: Mapping[str, np.ndarray]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def map(self, features: Any, old: Any = None) -> np.ndarray:
        """Map features of new queries into the old space.

        Args:
          features: float[n, new_size] by the new version; they are normalised first.
          old: float[n, old_size], features of the same queries by the old version; `slerp` needs
            them, other kinds ignore them.

        Returns:
          float32[n, old_size], L2-normalised; zeros for a zero feature.

        Raises:
          UserError: features of another size.
        """
        new = normalized(_checked(features, "features", self.new_size))
        if old is not None:
            old = normalized(_checked(old, "old", self.old_size))
            if len(old) != len(new):
                raise UserError(
                    f"old has {len(old)} rows, features {len(new)}: give the same pictures", "old"
                )
            old = old.astype(np.float32)
        mapped = np.asarray(_APPLY[self.kind](self.arrays, new.astype(np.float32), old))
        mapped = np.where(np.any(new, axis=1, keepdims=True), mapped, 0.0)
        return normalized(mapped).astype(np.float32)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the map to an npz file, local or gs://."""
        about = {
            "kind": self.kind,
            "new_size": self.new_size,
            "old_size": self.old_size,
            "settings": dict(self.settings),
        }
        content = io.BytesIO()
        arrays: dict[str, Any] = {_ABOUT: np.array(json.dumps(about)), **self.arrays}
        np.savez(content, **arrays)
        write_bytes(storage(path), content.getvalue())


def load(path: str | os.PathLike[str]) -> Map:
    """Read a map that `Map.save` wrote.

    Raises:
      UserError: no such file, or not a map.
    """
    try:
        with np.load(io.BytesIO(storage(path).read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(str(arrays.pop(_ABOUT)))
        found = Map(**about, arrays=arrays)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}: fit a map and save it", "path") from error
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a map that Map.save wrote", "path") from error
    if found.kind not in _APPLY:
        raise unknown("kind of map", str(found.kind), _APPLY, "path")
    return found


def as_pairs(old: Any, new: Any, labels: Any = None) -> Pairs:
    """Check and normalise features of the same pictures.

    Raises:
      UserError: other shapes, fewer than two pictures, or values that are not finite.
    """
    old, new = _checked(old, "old"), _checked(new, "new")
    if len(old) != len(new) or len(old) < 2:
        raise UserError(
            f"old has {len(old)} rows and new {len(new)}: give features of the same pictures by both "
            "versions, at least two",
            "new",
        )
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != (len(old),) or not np.issubdtype(labels.dtype, np.integer):
            raise UserError(f"labels must be int[{len(old)}], one for each picture", "labels")
    return Pairs(normalized(old), normalized(new), labels)


def normalized(features: np.ndarray) -> np.ndarray:
    """Divide rows by their L2 norm, in float64; zero rows stay."""
    wide = np.asarray(features, np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.where(lengths < 1e-12, 1.0, lengths)


def _checked(features, name, size=None) -> np.ndarray:
    found = np.asarray(features)
    is_matrix = found.ndim == 2 and jnp.issubdtype(found.dtype, jnp.floating)  # bfloat16 as well
    if not is_matrix or (size is not None and found.shape[1] != size):
        raise UserError(
            f"{name} must be float[n, {size or 'size'}], got {found.dtype}{list(found.shape)}", name
        )
    if not np.isfinite(found).all():
        raise UserError(f"{name} has values that are not finite: leave those rows out", name)
    return found
