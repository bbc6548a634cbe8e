"""Images and labels in memory, whatever they came from."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from compat_jax.errors import UserError

_BLOCK = 4096


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Labelled images.

    Attributes:
      images: uint8[n, height, width, channels], values 0..255.
      labels: int32[n], values 0..num_classes-1.
      class_names: one name a class.

    Raises:
      UserError: float images, labels out of range, lengths that differ, a class without an image.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __post_init__(self):
        if self.images.dtype != np.uint8:
            raise UserError(
                f"images must be uint8 in 0..255, got {self.images.dtype}: "
                "multiply by 255 and convert with .astype('uint8')"
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
        """How many classes there are."""
        return len(self.class_names)

    def select(self, classes: Sequence[int]) -> "Dataset":
        """The images of some classes, relabelled 0, 1, … in the order given."""
        classes = np.asarray(classes, np.int64)
        if not len(classes):
            raise UserError("no classes asked for: name at least one")
        if classes.min() < 0 or classes.max() >= self.num_classes:
            raise UserError(
                f"classes {classes.min()}..{classes.max()} asked for, "
                f"but the data set has classes 0..{self.num_classes - 1}"
            )
        new_label = np.full(self.num_classes, -1, np.int32)
        new_label[classes] = np.arange(len(classes))
        keep = np.flatnonzero(new_label[self.labels] >= 0)
        return Dataset(
            self.images[keep],
            new_label[self.labels[keep]],
            tuple(self.class_names[c] for c in classes),
        )

    def per_class(self, count: int | None) -> "Dataset":
        """The first `count` images of each class, in class order (all of them for None)."""
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
                digest.update(np.ascontiguousarray(part[start : start + _BLOCK]))
        digest.update("\0".join(self.class_names).encode())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 of images, labels and names, as a hexadecimal string."""
        return self._digest
