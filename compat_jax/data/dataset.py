"""Images and labels, whatever they came from."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from compat_jax.data.class_register import check_once
from compat_jax.data.pictures import Preparation
from compat_jax.errors import UserError

_BLOCK = 4096


class Images(Protocol):
    """Images of a `Dataset`: an array uint8[n, height, width, channels], or what is read like one."""

    @property
    def shape(self) -> tuple[Any, ...]:
        """Return (n, height, width, channels)."""

    @property
    def ndim(self) -> int:
        """Return 4."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return uint8."""

    def __len__(self) -> int:
        """Return the number of images."""

    def __getitem__(self, index: Any, /) -> Any:
        """Return an image, or of some rows or a slice what is again like an array."""

    def __array__(self) -> np.ndarray:
        """Return all of them."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images, and labels where there are any.

    Attributes:
      images: uint8[n, height, width, channels], values 0..255; an array, or a view of files such as
        `reading.FileImages`.
      labels: int32[n], values 0..num_classes-1; None for images without labels.
      class_names: one name per class.
      preparation: what was done to the pictures; None for images that came as they are.
      files: the file of each image.
      digests: BLAKE2b-16 of the bytes of each image's file; they stand for the pixels in fingerprints.
      complete: whether every class must have an image.

    Raises:
      UserError: float images, labels out of range, lengths that differ, a class name twice, a class
        without an image.
    """

    images: Images
    labels: np.ndarray | Any = None  # | Any rather than | None: see `need_labels`
    class_names: tuple[str, ...] = ()
    preparation: Preparation | None = None
    files: tuple[str, ...] | None = None
    digests: tuple[bytes, ...] | None = None
    complete: bool = True

    def __post_init__(self):
        if self.images.dtype != np.uint8:
            scale = "" if np.issubdtype(self.images.dtype, np.integer) else "multiply by 255 and "
            raise UserError(
                f"images must be uint8 in 0..255, got {self.images.dtype}: "
                f"{scale}convert with .astype('uint8')"
            )
        if self.images.ndim != 4:
            raise UserError(
                f"images must be [n, height, width, channels], got shape {self.images.shape}"
            )
        for name in ("labels", "files", "digests"):
            values = getattr(self, name)
            if values is not None and len(self.images) != len(values):
                raise UserError(f"{len(self.images)} images but {len(values)} {name}")
        if self.labels is not None:
            check_once(self.class_names)
            numbers = _whole_numbers(self.labels)
            named = len(self.class_names)
            check_range(numbers, named, f"but there are {named} class names")
            object.__setattr__(self, "labels", numbers.astype(np.int32))
            self._check_complete()
        elif self.class_names:
            raise UserError(f"{len(self.class_names)} class names but no labels: give both or none")

    def _check_complete(self):
        empty = np.flatnonzero(self.counts() == 0)
        if self.complete and len(empty):
            raise UserError(
                f"class {self.class_names[empty[0]]!r} has no image: add some or leave the class out"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.images.shape[1:]))
        classes = f"{self.num_classes} classes" if self.labels is not None else "no labels"
        return f"Dataset({len(self)} images of {shape}, {classes})"

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        return len(self.class_names)

    @functools.cached_property
    def pixel_digests(self) -> tuple[bytes, ...]:
        """BLAKE2b-16 of the pixels of every image; reads all of them."""
        return tuple(
            hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()
            for start in range(0, len(self.images), _BLOCK)
            for image in np.asarray(self.images[start : start + _BLOCK])
        )

    def counts(self) -> np.ndarray:
        """Count the images of each class: int[num_classes].

        Raises:
          UserError: no labels.
        """
        return np.bincount(self.need_labels(), minlength=self.num_classes)

    def need_labels(self) -> np.ndarray:
        """Return the labels, int32[n].

        Raises:
          UserError: there are none.
        """
        if self.labels is None:
            raise UserError(
                "the images have no labels: give class folders, a table with a column of labels, or "
                "arrays with labels"
            )
        return self.labels

    def take(self, rows: Sequence[int] | np.ndarray) -> "Dataset":
        """Take images by their positions, int[m], or by a mask, bool[n].

        Classes may lose all their images.

        Raises:
          UserError: positions out of range, a mask of another length, or neither of both.
        """
        rows = self._positions(np.asarray(rows))
        if len(rows) and not -len(self) <= rows.min() <= rows.max() < len(self):
            raise UserError(f"rows {rows.min()}..{rows.max()} asked for, but there are {len(self)}")
        labels = None if self.labels is None else self.labels[rows]
        lost = labels is not None and len(np.unique(labels)) < self.num_classes
        return dataclasses.replace(
            self,
            images=self.images[rows],
            labels=labels,
            files=self.files and tuple(self.files[row] for row in rows),
            digests=self.digests and tuple(self.digests[row] for row in rows),
            complete=self.complete and not lost,
        )

    def _positions(self, rows: np.ndarray) -> np.ndarray:
        """Return positions, of a mask those that it marks."""
        if rows.dtype == bool:
            if rows.shape != (len(self),):
                raise UserError(
                    f"a mask of {rows.size} for {len(self)} images: give one value for each"
                )
            return np.flatnonzero(rows)
        if rows.size and not np.issubdtype(rows.dtype, np.integer):
            raise UserError(f"positions of images must be whole numbers, got {rows.dtype}")
        return rows.astype(np.int64).reshape(-1)

    def select(self, classes: Sequence[int]) -> "Dataset":
        """Select the images of some classes and relabel them 0, 1, … in the order given.

        Raises:
          UserError: no classes, one that the data set does not have, or no labels.
        """
        labels = self.need_labels()
        if isinstance(classes, range) and len(classes) and classes[-1] >= self.num_classes:
            raise UserError(  # before a range of any length becomes an array
                f"classes {classes[0]}..{classes[-1]} asked for, "
                f"but the data set has classes 0..{self.num_classes - 1}",
                "classes",
            )
        chosen = np.asarray(classes, np.int64)
        if not len(chosen):
            raise UserError("no classes asked for: name at least one", "classes")
        if chosen.min() < 0 or chosen.max() >= self.num_classes:
            raise UserError(
                f"classes {chosen.min()}..{chosen.max()} asked for, "
                f"but the data set has classes 0..{self.num_classes - 1}",
                "classes",
            )
        new_label = np.full(self.num_classes, -1, np.int32)
        new_label[chosen] = np.arange(len(chosen))
        keep = np.flatnonzero(new_label[labels] >= 0)
        names = tuple(self.class_names[c] for c in chosen)
        return self._relabelled(keep, new_label[labels[keep]], names)

    def per_class(self, count: int | None) -> "Dataset":
        """Keep the first `count` images of each class, in class order (all of them for None)."""
        if count is None:
            return self
        labels = self.need_labels()
        order = np.argsort(labels, kind="stable")
        sizes = np.bincount(labels, minlength=self.num_classes)
        rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        keep = order[rank < count]
        return self._relabelled(keep, labels[keep], self.class_names)

    def _relabelled(self, rows, labels, names):
        taken = dataclasses.replace(self, complete=False).take(rows)
        return dataclasses.replace(taken, labels=labels, class_names=names, complete=self.complete)

    @functools.cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        if self.digests is not None:  # the pixels follow from files and preparation
            prepared = self.preparation and self.preparation.describe()
            digest.update(json.dumps([prepared, self.images.shape], sort_keys=True).encode())
            digest.update(b"".join(self.digests))
        for part in (None if self.digests is not None else self.images, self.labels):
            if part is None:
                continue
            digest.update(f"{part.dtype}{part.shape}".encode())
            for start in range(0, len(part), _BLOCK):  # they need not fit into memory
                digest.update(np.ascontiguousarray(part[start : start + _BLOCK]).data)
        digest.update("\0".join(self.class_names).encode())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Return a SHA-256 as a hexadecimal string: of images, labels and names.

        Of pictures read from files, the digests of the files and the preparation stand for the images:
        no picture is decoded, and it is the same in memory and in files.
        """
        return self._digest


def from_arrays(
    images: npt.ArrayLike,
    labels: npt.ArrayLike | None = None,
    class_names: Sequence[str] | None = None,
) -> Dataset:
    """Make a data set of arrays.

    Args:
      images: uint8[n, height, width, channels], values 0..255.
      labels: int[n], values 0..num_classes-1; None for images without labels.
      class_names: one a class; "0", "1", … by default.

    Raises:
      UserError: see `Dataset`; labels that are not whole numbers.
    """
    if labels is None:
        return Dataset(_array(images), None, tuple(class_names or ()))
    numbers = _whole_numbers(labels)
    if class_names is None:
        remedy = (
            "but must number classes 0, 1, … without a gap, as np.unique(…, return_inverse=True)"
        )
        check_range(numbers, len(numbers), remedy)
        class_names = [str(c) for c in range(max(map(int, numbers), default=-1) + 1)]
    return Dataset(_array(images), numbers, tuple(class_names))


def _array(images):
    """Return images as an array; pictures of one size only."""
    try:
        return np.asarray(images)
    except ValueError as error:
        raise UserError(
            "the pictures are of unequal sizes: bring them to one, or read their files by "
            "data.from_folder(path, size=...)",
            "images",
        ) from error


def _whole_numbers(labels):
    """The labels as an integer array [n], in the type that they have."""
    numbers = np.asarray(labels)
    if numbers.shape == (0,):
        return numbers.astype(np.int32)
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise UserError(
            f"labels must be whole numbers [n], got {numbers.dtype} of shape {numbers.shape}: give "
            "class names as class_names"
        )
    return numbers


def check_range(numbers: np.ndarray, count: int, reason: str, argument: str | None = None) -> None:
    """Refuse labels outside of 0..count-1, before they are cast or counted.

    Args:
      numbers: whole numbers of any type, [n].
      count: of classes.
      reason: ends the message.
      argument: see `UserError`.

    Raises:
      UserError: a label that lies outside.
    """
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < count:
        raise UserError(f"labels run from {numbers.min()} to {numbers.max()}, {reason}", argument)
