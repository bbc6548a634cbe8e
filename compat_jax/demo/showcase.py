"""A gallery to show: its rows' features before and after a backfill, both known beforehand.

With both at hand any share of the gallery can be shown as embedded again, at once and without a write:
the rows are in the order in which a backfill takes them, and those before a cut count as done.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from compat_jax.demo.picks import Pick
from compat_jax.gallery.gallery import Gallery
from compat_jax.gallery.originals import content_of
from compat_jax.gallery.store import LABEL, Rows, label_text

SHARES = tuple(percent / 100 for percent in range(101))
NEAREST = 10  # answers to a picture


class Answer(NamedTuple):
    """Answers of a version, at every share of `SHARES`.

    Attributes:
      version: number of the version that embedded the picture.
      rows: int64[s, k], the nearest row first; -1 where there are fewer.
      scores: float32[s, k], cosines; -inf there.
      embed_seconds: to prepare and embed the picture.
      search_seconds: to compare it with all rows and to find the nearest, once.
    """

    version: int
    rows: np.ndarray
    scores: np.ndarray
    embed_seconds: float
    search_seconds: float


class Quality(NamedTuple):
    """Share of queries whose nearest row is of their class, at every share of `SHARES`.

    Attributes:
      queries: how many rows asked; each leaves itself out.
      old: float64[s], the old version asks.
      new: float64[s], the new version asks.
    """

    queries: int
    old: np.ndarray
    new: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Showcase:
    """Rows of a gallery in the order of a backfill, with both features; `prepare` makes one.

    Attributes:
      gallery: of the rows.
      old: number of the version that the gallery comes from.
      new: number of the version that a backfill would embed rows by.
      asking: numbers of the versions that embed a picture.
      rows: with the versions that embedded them before the backfill.
      before: float32[n, d], their features by these.
      after: float32[n, d], their features by the new version.
      renewed: how many of the rows the store itself has by the new version: the first ones.
      total: rows of the store, of which these are a sample.
      left_out: rows of the sample whose pictures are gone, unreadable or others than the rows'.
      picks: pictures to ask with.
      quality: None without labels.
    """

    gallery: Gallery
    old: int
    new: int
    asking: tuple[int, ...]
    rows: Rows
    before: np.ndarray
    after: np.ndarray
    renewed: int
    total: int
    left_out: int
    picks: tuple[Pick, ...]
    quality: Quality | None = None

    @property
    def cuts(self) -> list[int]:
        """Return how many rows are embedded again at every share of `SHARES`."""
        return [round(share * len(self.rows)) for share in SHARES]

    def label(self, row: int) -> str | None:
        """Return the class of a row, as JSON if it is no text; None where it is not known."""
        payload = self.rows.payloads[row]
        label = payload.get(LABEL)
        return label if label is None or isinstance(label, str) else label_text(payload)

    def picture(self, row: int) -> Any:
        """Return the picture of a row, see `Originals.find`."""
        return self.gallery.originals.find(self.rows.keys[row])

    def ask(self, picture: Any, content: str | None = None) -> list[Answer]:
        """Let every version ask; rows of the very same picture are left out of the answers.

        Args:
          picture: path, or pixels.
          content: digest, see `originals.content_of`; of the picture by default.

        Raises:
          UserError: what is no picture, or one of another size where nobody says how it is prepared.
        """
        content = content_of(picture) if content is None else content
        own = np.array([one == content for one in self.rows.contents])
        manifest = self.gallery.manifest()
        found = []
        for number in self.asking:
            began = time.perf_counter()
            [feature] = self.gallery.embed([picture], number, manifest)
            embedded = time.perf_counter()
            self._search(feature, own, [self.renewed])
            searched = time.perf_counter()
            rows, scores = self._search(feature, own, self.cuts)
            seconds = (embedded - began, searched - embedded)
            found.append(Answer(number, rows, scores, *seconds))
        return found

    def _search(self, feature, own, cuts):
        before, after = self.before @ feature, self.after @ feature
        before[own] = after[own] = -np.inf
        return nearest(before, after, cuts, NEAREST)


def nearest(
    before: np.ndarray, after: np.ndarray, cuts: Sequence[int], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find the rows of largest score when those before each cut have their score after, others before.

    Args:
      before: float32[n]; -inf for a row that is no answer.
      after: float32[n], likewise.
      cuts: int[s] in 0..n.
      k: answers.

    Returns:
      int64[s, k] rows, the largest score first, of equal ones the first row; -1 where there are fewer.
      float32[s, k] scores, -inf there.
    """
    rows = np.full((len(cuts), k), -1, np.int64)
    scores = np.full((len(cuts), k), -np.inf, np.float32)
    most = min(k, len(before))
    for place, cut in enumerate(cuts):
        mixed = np.concatenate([after[:cut], before[cut:]])
        chosen = np.sort(np.argpartition(-mixed, most - 1)[:most])
        chosen = chosen[np.argsort(-mixed[chosen], kind="stable")]
        chosen = chosen[np.isfinite(mixed[chosen])]
        rows[place, : len(chosen)], scores[place, : len(chosen)] = chosen, mixed[chosen]
    return rows, scores
