"""The ways to upgrade an old gallery, and what to compare of them."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

from compat_jax import align
from compat_jax.backfill import SHARES
from compat_jax.data.dataset import Dataset
from compat_jax.errors import unknown
from compat_jax.fields import Rule, check_fields

NAIVE, FORWARD, RESCORING, REINDEX = "naive", "forward", "rescoring", "reindex"
WAYS = (NAIVE, *align.KINDS, FORWARD, RESCORING, REINDEX)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a comparison.

    Attributes:
      old: position of the gallery's version in the chain.
      new: position of the queries' version, a later one.
      pairs: gallery images to fit maps on, at most half of them; of `pictures`, as many at most.
      pictures: labelled images to fit maps on instead, of the training side; None for the gallery's.
      candidates: images that rescoring proposes to a query.
      shares: of the gallery, ascending from 0 to 1.
      ways: names of `WAYS`.
      seed: of the order in which the gallery is embedded again; its first images are the pairs.

    Raises:
      UserError: a value out of range, an unknown way, or pictures without labels.
    """

    old: int = 0
    new: int = -1
    pairs: Annotated[int, Rule("images to fit maps on", low=2)] = 1000
    pictures: Dataset | None = None
    candidates: Annotated[int, Rule("images proposed to a query", low=1)] = 100
    shares: Sequence[float] = SHARES
    ways: tuple[str, ...] = WAYS
    seed: Annotated[int, Rule("of the order", low=0, high=2**32 - 1)] = 0

    def __post_init__(self):
        check_fields(self)
        for way in self.ways:
            if way not in WAYS:
                raise unknown("way", way, WAYS, "ways")
        if self.pictures is not None:
            self.pictures.need_labels()

    def address(self) -> str:
        """Return what the numbers depend on, for a cache."""
        pictures = "" if self.pictures is None else self.pictures.fingerprint()
        return f"{dataclasses.replace(self, pictures=None)} {pictures}"
