"""Images and labels, whatever they came from."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from compat_jax.errors import UserError

_BLOCK = 4096


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Labelled images.

    Attributes:
      images: uint8[n, height, width, channels], values 0..255; an array, or a view of files such as
        `streaming.RecordImages`.
      labels: int32[n], values 0..num_classes-1.
      class_names: one name per class.

    Raises:
      UserError: float images, labels out of range, lengths that differ, a class without an image.
    """

    images: Any
    labels: np.ndarray
    class_names: tuple[str, ...]

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
        if len(self.images) != len(self.labels):
            raise UserError(f"{len(self.images)} images but {len(self.labels)} labels")
        object.__setattr__(self, "labels", np.asarray(self.labels, np.int32))
        counts = np.bincount(np.clip(self.labels, 0, None), minlength=len(self.class_names))
        if len(self.labels) and (self.labels.min() < 0 or len(counts) > len(self.class_names)):
            raise UserError(
                f"labels run from {self.labels.min()} to {self.labels.max()}, "
                f"but there are {len(self.class_names)} class names"
            )
        empty = np.flatnonzero(counts == 0)
        if len(empty):
            raise UserError(
                f"class {self.class_names[empty[0]]!r} has no image: add some or leave the class out"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        return len(self.class_names)

    @functools.cached_property
    def picture_digests(self) -> tuple[bytes, ...]:
        """The BLAKE2 digest of every image, to find the same picture in another data set."""
        return tuple(
            hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()
            for start in range(0, len(self.images), _BLOCK)
            for image in np.asarray(self.images[start : start + _BLOCK])
        )

    def counts(self) -> np.ndarray:
        """Count the images of each class: int[num_classes]."""
        return np.bincount(self.labels, minlength=self.num_classes)

    def select(self, classes: Sequence[int]) -> "Dataset":
        """Select the images of some classes and relabel them 0, 1, … in the order given.

        Raises:
          UserError: no classes, or one that the data set does not have.
        """
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
        keep = np.flatnonzero(new_label[self.labels] >= 0)
        return Dataset(
            self.images[keep],
            new_label[self.labels[keep]],
            tuple(self.class_names[c] for c in chosen),
        )

    def per_class(self, count: int | None) -> "Dataset":
        """Keep the first `count` images of each class, in class order (all of them for None)."""
        if count is None:
            return self
        order = np.argsort(self.labels, kind="stable")
        sizes = np.bincount(self.labels, minlength=self.num_classes)
        rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        keep = order[rank < count]
        return Dataset(self.images[keep], self.labels[keep], self.class_names)

    @functools.cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for part in (self.images, self.labels):
            digest.update(f"{part.dtype}{part.shape}".encode())
            for start in range(0, len(part), _BLOCK):  # they need not fit into memory
                digest.update(np.ascontiguousarray(part[start : start + _BLOCK]).data)
        digest.update("\0".join(self.class_names).encode())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Return the SHA-256 of images, labels and names, as a hexadecimal string."""
        return self._digest


def from_arrays(
    images: npt.ArrayLike, labels: npt.ArrayLike, class_names: Sequence[str] | None = None
) -> Dataset:
    """Make a data set of arrays.

    Args:
      images: uint8[n, height, width, channels], values 0..255.
      labels: int[n], values 0..num_classes-1.
      class_names: one a class; "0", "1", … by default.

    Raises:
      UserError: see `Dataset`; labels that are not whole numbers.
    """
    numbers = np.asarray(labels)
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise UserError(
            f"labels must be whole numbers [n], got {numbers.dtype} of shape {numbers.shape}: give "
            "class names as class_names"
        )
    if class_names is None:
        class_names = [str(c) for c in range(int(numbers.max(initial=-1)) + 1)]
    return Dataset(np.asarray(images), numbers, tuple(class_names))
