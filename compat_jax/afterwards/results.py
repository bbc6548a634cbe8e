"""Results of the ways to upgrade: curves and costs."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from compat_jax.afterwards.plan import REINDEX
from compat_jax.backfill import Curve
from compat_jax.errors import UserError, unknown
from compat_jax.statistics import Interval, interval, resampled_means


class Cost(NamedTuple):
    """The costs of a way.

    Attributes:
      pairs: images that a map was fitted on, embedded by both versions.
      images: images to embed before the first query is answered.
      images_a_query: gallery images that a query has embedded on demand while nothing else was.
      networks: versions that embed each query until all of the gallery is embedded again.
      fit_seconds: measured, to fit the map; the first of its kind also compiles.
      seconds: fit_seconds and the images at the measured rate.
      bytes: kept beside one vector an image, or written in its place: the map, the vectors made on
        demand, the second index, the rows that were mapped.
    """

    pairs: int = 0
    images: int = 0
    images_a_query: int = 0
    networks: int = 1
    fit_seconds: float = 0.0
    seconds: float = 0.0
    bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Way:
    """The results of one way.

    Attributes:
      name: of `WAYS`.
      curves: by metric, retrieval against the share of the gallery that was embedded again; a metric
        that the way does not define is missing.
      cost: of it.
      settings: of the map, JSON values.
    """

    name: str
    curves: Mapping[str, Curve]
    cost: Cost
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def intervals(self) -> Mapping[str, Interval]:
        """95 % intervals of the areas, by metric: a paired bootstrap over the queries."""
        return {name: _area_interval(curve) for name, curve in self.curves.items()}

    def embedded(self, gallery: int, metric: str, from_gallery: bool = True) -> np.ndarray:
        """Return how many images were embedded at each share of a curve, float64[s].

        Args:
          gallery: number of its images.
          metric: of the curve.
          from_gallery: whether the map was fitted on gallery images: these are the first of the order
            in which the gallery is embedded again, so that none is embedded twice.
        """
        renewed = self.curves[metric].shares * gallery
        if self.name == REINDEX:
            return np.full(len(renewed), float(gallery)) * (renewed > 0)
        return np.maximum(renewed, self.cost.images) if from_gallery else renewed + self.cost.images

    def summary(self) -> dict[str, Any]:
        """Return everything but the scores as JSON values."""
        ends = self.intervals
        return {
            "name": self.name,
            "cost": self.cost._asdict(),
            "settings": dict(self.settings),
            "curves": {
                name: {**curve.summary(), "area_interval": [float(end) for end in ends[name]]}
                for name, curve in self.curves.items()
            },
        }


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All ways between one pair of versions.

    Attributes:
      versions: numbers of the old version and of the new one.
      ways: in the order of `WAYS`; those that are `left_out` are missing.
      gallery_size: number of gallery images.
      queries: number of queries asked.
      candidates: images that rescoring proposes to a query.
      from_gallery: whether maps were fitted on gallery images; else on the images that were given.
      seconds_an_image: measured, to read and embed one by the new version, in batches.
      left_out: {name of a way that could not be measured on these data: why}.
    """

    versions: tuple[int, int]
    ways: tuple[Way, ...]
    gallery_size: int
    queries: int
    candidates: int
    from_gallery: bool
    seconds_an_image: float
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, the main one first."""
        return tuple(dict.fromkeys(name for way in self.ways for name in way.curves))

    def way(self, name: str) -> Way:
        """Return a way by its name.

        Raises:
          UserError: it was not measured; says why, where it was left out.
        """
        found = {way.name: way for way in self.ways}
        if name in self.left_out:
            raise UserError(f"{name} was left out: {self.left_out[name]}", "name")
        if name not in found:
            raise unknown("way", name, found, "name")
        return found[name]

    def summary(self) -> dict[str, Any]:
        """Return everything but the scores as JSON values."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            **fields,
            "versions": list(self.versions),
            "ways": [way.summary() for way in self.ways],
            "left_out": dict(self.left_out),
        }


def packed(found: Comparison) -> tuple[np.ndarray, ...]:
    """Return a comparison as arrays for a cache: everything as JSON, and the scores."""
    curves = [curve for way in found.ways for curve in way.curves.values()]
    text = json.dumps(found.summary()).encode()
    return (np.frombuffer(text, np.uint8), *(curve.scores for curve in curves))


def unpacked(parts: tuple[np.ndarray, ...]) -> Comparison:
    """Return the comparison that `packed` made arrays of."""
    about, scores = json.loads(parts[0].tobytes()), iter(parts[1:])
    ways = []
    for way in about.pop("ways"):
        curves = {
            name: Curve(
                curve["order"],
                name,
                shares=np.array(curve["shares"]),
                values=np.array(curve["values"]),
                new_answers=np.array(curve["new_answers"]),
                scores=next(scores),
            )
            for name, curve in way["curves"].items()
        }
        ways.append(Way(way["name"], curves, Cost(**way["cost"]), way["settings"]))
    return Comparison(versions=tuple(about.pop("versions")), ways=tuple(ways), **about)


def _area_interval(curve: Curve) -> Interval:
    areas = np.trapezoid(curve.scores, curve.shares, axis=0)
    found = interval(resampled_means(areas[None])[:, 0])
    return Interval(float(found.low), float(found.high))
