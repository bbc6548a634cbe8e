"""Pictures to ask with, and galleries of images that lie in memory."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from compat_jax.chain import Chain
from compat_jax.data.dataset import Dataset
from compat_jax.data.listing import Picture
from compat_jax.data.pictures import Preparation
from compat_jax.gallery.gallery import Gallery
from compat_jax.gallery.memory import MemoryStore
from compat_jax.gallery.opened import DEFAULT_WORK
from compat_jax.gallery.originals import Work
from compat_jax.gallery.store import LABEL

PICKS = 24  # pictures to ask with, where none are given


class Pick(NamedTuple):
    """A picture to ask with.

    Attributes:
      picture: path, or pixels, see `data.pictures.decode`.
      label: name of its class; None where it is not known.
    """

    picture: Any
    label: str | None = None


def in_memory(
    chain: Chain, data: Dataset, *, version: int = 0, sample: int = 2000, work: Work = DEFAULT_WORK
) -> Gallery:
    """Make a gallery of images in the memory of this process.

    Args:
      chain: of the versions.
      data: whose images become rows.
      version: number of the one that embeds them.
      sample: images to take, drawn at random; 0 for all.
      work: how they are embedded.

    Raises:
      UserError: see `Gallery.create` and `Gallery.index`.
    """
    chosen = data.take(draw(len(data), sample))
    labels = _names(chosen)
    record = chain.record(version)
    prepared = None if record.preparation else data.preparation or _squares(record.image_shape)
    store = MemoryStore(record.feature_size)
    given: Any = None
    if chosen.files is None:
        names = [f"{label or 'image'} {i}" for i, label in enumerate(labels)]
        given = {name: np.asarray(chosen.images[i]) for i, name in enumerate(names)}
    gallery = Gallery.create(
        store, chain, version=version, preparation=prepared, root=given, work=work
    )
    if chosen.files is not None:
        gallery.index([Picture(*one) for one in zip(chosen.files, labels, strict=True)])
        return gallery
    known = dict(zip(given, labels, strict=True))
    gallery.index(given, payload=lambda key: {LABEL: known[key]} if known[key] else {})
    return gallery


def picks_of(data: Dataset, count: int = PICKS) -> tuple[Pick, ...]:
    """Draw pictures to ask with, of as many classes as there are.

    Args:
      data: to draw from.
      count: of the pictures.
    """
    shuffled = draw(len(data), 0, seed=1)
    chosen = spread(_names(data.take(shuffled)), count)
    drawn = data.take(shuffled[chosen])
    pictures = drawn.files or list(np.asarray(drawn.images))
    return tuple(Pick(*one) for one in zip(pictures, _names(drawn), strict=True))


def draw(total: int, count: int, seed: int = 0) -> np.ndarray:
    """Draw numbers below a total without repetition, int64[count]: all, shuffled, for count 0."""
    return np.random.default_rng(seed).permutation(total)[: count or total]


def _names(data: Dataset) -> list[str | None]:
    if data.labels is None:
        return [None] * len(data)
    return [data.class_names[label] for label in data.labels]


def spread(labels: Sequence[str | None], count: int) -> list[int]:
    """Choose positions, of every class one before any has two."""
    seen: dict[str | None, int] = {}
    turns = []
    for label in labels:
        turns.append(seen.get(label, 0))
        seen[label] = turns[-1] + 1
    return sorted(range(len(labels)), key=lambda i: (turns[i], i))[:count]


def _squares(shape: Sequence[int]) -> Preparation | None:
    """Bring pictures to the size of drawn images: nobody says how, since those were drawn at it."""
    height, width, channels = shape
    return Preparation(height) if height == width and channels == 3 else None
