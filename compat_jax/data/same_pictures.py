"""Pictures that are in query and gallery both, and would be their own answers."""

import collections

import numpy as np

from compat_jax.data.dataset import Dataset


def same_pictures(query: Dataset, gallery: Dataset) -> np.ndarray | None:
    """Find the query pictures that are in the gallery: the same files, or the same pixels.

    Pixels are compared where one of the two does not come from files.

    Returns:
      int[q], the first gallery row of the same picture, -1 for none; None if no picture is in both.
    """
    asking, answering = _digests(query, gallery)
    rows = {digest: row for row, digest in reversed(list(enumerate(answering)))}
    own = np.array([rows.get(digest, -1) for digest in asking])
    return own if (own >= 0).any() else None


def _digests(query: Dataset, gallery: Dataset) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """Digests of the pictures of both, of one kind."""
    if query.digests is not None and gallery.digests is not None:
        return query.digests, gallery.digests
    return query.pixel_digests, gallery.pixel_digests


def note_of(own: np.ndarray, query: Dataset, gallery: Dataset) -> str:
    """Say how many query pictures are in the gallery, and how many of them more than once.

    Args:
      own: of `same_pictures`.
      query: images that ask.
      gallery: images that answer.
    """
    digests = _digests(query, gallery)[1]
    copies, inside = collections.Counter(digests), own[own >= 0]
    several = sum(copies[digests[row]] > 1 for row in inside)
    note = f"{len(inside)} of {len(own)} query pictures are in the gallery: each leaves itself out"
    if several:
        note += f"; {several} of them have further copies there, which answer"
    return f"{note}."
