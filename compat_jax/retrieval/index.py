"""Indexes: the protocol of a gallery of features, our exact one, and one that embeds pictures."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, Unpack

import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from compat_jax.align import Map, needs_old
from compat_jax.chain import Version
from compat_jax.data.pictures import Preparation
from compat_jax.errors import UserError
from compat_jax.retrieval import exact
from compat_jax.retrieval.blocks import as_features, check_finite, check_sizes
from compat_jax.retrieval.embedding import EmbedOptions, check_embedding, embed
from compat_jax.spaces import differences

_LARGEST_ID, _RANGE = 2**63 - 1, "ids must lie in -2**63..2**63-1"


class VectorIndex(Protocol):
    """A gallery of features with ids, searched by inner product."""

    def __len__(self) -> int:
        """Return the number of rows."""

    @property
    def ids(self) -> np.ndarray:
        """Return the ids of all rows, int64[n], in the order in which they were added."""

    def add(self, features: np.ndarray, ids: npt.ArrayLike | None = None) -> None:
        """Append float[n, d] features; ids count on from the largest by default."""

    def remove(self, ids: npt.ArrayLike) -> None:
        """Remove rows by id."""

    def search(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scores float32[q, k], largest first, and ids int64[q, k]."""


class ExactIndex:
    """A `VectorIndex` in memory that compares with every row; see `exact.search`.

    The first search after a change places the rows on the devices, where they stay for the next ones
    (see `exact.Prepared`).

    Args:
      mesh: devices to spread the search over; one by default.
      options: of `exact.search`.
    """

    def __init__(
        self, mesh: Mesh | None = None, options: exact.SearchOptions = exact.DEFAULT_OPTIONS
    ):
        self._mesh, self._options = mesh, options
        self._features: np.ndarray | None = None
        self._ids = np.zeros(0, np.int64)
        self._placed: exact.Prepared | None = None  # all rows, for searches until one changes

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_placed": None}

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def ids(self) -> np.ndarray:
        """Return the ids of all rows, int64[n], in the order in which they were added."""
        return self._ids.copy()

    def add(self, features: np.ndarray, ids: npt.ArrayLike | None = None) -> None:
        """Append features.

        Args:
          features: float[n, d]; float32 is kept without a copy, and must not change afterwards.
          ids: int[n], none of them present; they count on from the largest by default.

        Raises:
          UserError: another feature size than the rows before, values that are not finite, or ids
            that are present, repeated or of another length.
        """
        features = np.asarray(as_features("gallery", features), np.float32)
        check_sizes(features, features if self._features is None else self._features)
        check_finite("gallery", features)
        added = self._next_ids(len(features)) if ids is None else _whole_numbers(ids)
        if len(added) != len(features):
            raise UserError(f"{len(features)} features need as many ids, got {len(added)}")
        taken = np.intersect1d(added, self._ids)
        if len(taken) or len(np.unique(added)) < len(added):
            raise UserError(
                f"ids must be new and different: {taken[:3].tolist()} are present already"
                if len(taken)
                else "ids must be different from one another"
            )
        self._ids = np.concatenate([self._ids, added])
        old = [] if self._features is None else [self._features]
        self._features = np.concatenate([*old, features]) if old else features
        self._placed = None

    def _next_ids(self, count):
        first = int(self._ids.max(initial=-1)) + 1
        if first + count > _LARGEST_ID:
            raise UserError(f"{_RANGE}: give some, since none is left above the largest")
        return np.arange(first, first + count)

    def remove(self, ids: npt.ArrayLike) -> None:
        """Remove rows by id.

        Raises:
          UserError: an id that is not present.
        """
        gone = _whole_numbers(ids)
        missing = np.setdiff1d(gone, self._ids)
        if len(missing):
            raise UserError(f"no row with id {missing[:3].tolist()}")
        if self._features is not None:
            keep = ~np.isin(self._ids, gone)
            self._features, self._ids = self._features[keep], self._ids[keep]
            self._placed = None

    def search(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the k rows of largest inner product with each query, largest first.

        Args:
          query: float[q, d].
          k: 1..len(self).

        Returns:
          float32[q, k] scores and int64[q, k] ids; of equal scores the row added first comes first.

        Raises:
          UserError: see `exact.search`.
        """
        if self._features is None or not len(self):
            raise UserError("the index is empty: add features first")
        if self._placed is None:
            self._placed = exact.Prepared(self._features, mesh=self._mesh, options=self._options)
        scores, rows = self._placed.search(query, k)
        return scores, self._ids[rows]


class Index:
    """A gallery of pictures embedded by one version, searched with queries of any later version.

        index = Index(chain[0], gallery.images)
        scores, ids = index.search(chain[-1], query.images, k=10)

    Args:
      version: that embeds the gallery.
      images: uint8[n, h, w, c] to begin with; None for an empty gallery.
      ids: int[n] of the pictures; 0, 1, … by default.
      engine: holds the features; an `ExactIndex` by default.
      options: keywords of `embed`: preparation, mesh, batch_size, dtype, progress.

    Raises:
      UserError: no version, an unknown option, or see `add`.
    """

    def __init__(
        self,
        version: Version,
        images: Any = None,
        ids: npt.ArrayLike | None = None,
        *,
        engine: VectorIndex | None = None,
        **options: Unpack[EmbedOptions],
    ):
        check_embedding(version, options)
        self.version, self._options = version, options
        self.engine: VectorIndex = engine if engine is not None else ExactIndex(options.get("mesh"))
        if images is not None:
            self.add(images, ids)

    def __len__(self) -> int:
        return len(self.engine)

    @property
    def ids(self) -> np.ndarray:
        """Return the ids of all pictures, in the order in which they were added."""
        return self.engine.ids

    def add(self, images: Any, ids: npt.ArrayLike | None = None) -> None:
        """Embed pictures with the gallery's version and append them.

        Args:
          images: uint8[n, h, w, c].
          ids: int[n]; they count on from the largest by default.

        Raises:
          UserError: see `embed` and the engine's `add`.
        """
        self.engine.add(embed(self.version, images, **self._options), ids)

    def remove(self, ids: npt.ArrayLike) -> None:
        """Remove pictures by id."""
        self.engine.remove(ids)

    def search(
        self, version: Version, images: Any, *, k: int = 10, map: Map | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embed queries with a version and find their nearest pictures.

        Args:
          version: that embeds the queries; the gallery's own or a later one of its chain, or any at
            all with a map.
          images: uint8[q, h, w, c].
          k: neighbours, 1..len(self).
          map: takes the queries' features into the space of the gallery's version, see `align.fit`;
            None for features that compare as they are.

        Returns:
          float32[q, k] scores, largest first, and int64[q, k] ids.

        Raises:
          UserError: versions that cannot be compared, see `spaces.differences`; a map between other
            sizes; a k that is no whole number; or see `embed` and the engine's `search`.
        """
        check_embedding(version, self._options)
        k = exact.neighbours(k)
        if map is None:
            check_comparable(version, self.version, self._options.get("preparation"))
            return self.engine.search(embed(version, images, **self._options), k)
        check_map(map, version, self.version)
        old = None
        if needs_old(map.kind):
            images = list(images) if isinstance(images, Iterator) else images  # they are read twice
            old = embed(self.version, images, **self._options)
        found = map.map(embed(version, images, **self._options), old)
        return self.engine.search(found, k)


def check_map(found: Map, query: Version, gallery: Version) -> None:
    """Refuse a map between features of other sizes than those of two versions.

    Raises:
      UserError: another size.
    """
    sizes = found.new_size, found.old_size
    wanted = query.record.feature_size, gallery.record.feature_size
    if sizes != wanted:
        raise UserError(
            f"the map takes features of size {sizes[0]} to {sizes[1]}, but those of version "
            f"{query.number} have {wanted[0]} and those of the gallery's version {gallery.number} have "
            f"{wanted[1]}: fit it on features of these two versions",
            "map",
        )


def check_comparable(
    query: Version, gallery: Version, preparation: Preparation | None = None
) -> None:
    """Refuse to compare versions whose features live in different spaces.

    Args:
      query: version that asks.
      gallery: version that embedded the gallery.
      preparation: that the pictures of both get; as their records say by default.

    Raises:
      UserError: naming all that differs, see `spaces.differences`.
    """
    if found := differences(gallery, query, preparation):
        raise UserError(
            f"queries of version {query.number} cannot be compared with the gallery of version "
            f"{gallery.number}: {'; '.join(found)}. Embed the gallery with a version that shares the "
            "queries' space, or fit a map (`align.fit`)",
            "version",
        )


def _whole_numbers(ids: npt.ArrayLike | Sequence[int]) -> np.ndarray:
    found = np.atleast_1d(np.asarray(ids))
    if found.ndim != 1 or not (np.issubdtype(found.dtype, np.integer) or not len(found)):
        raise UserError(f"ids must be whole numbers [n], got {found.dtype} of shape {found.shape}")
    if found.dtype == np.uint64 and found.max(initial=0) > _LARGEST_ID:
        raise UserError(f"{_RANGE}, got {found.max()}")
    return found.astype(np.int64)
