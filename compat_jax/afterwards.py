"""Ways to bring an old gallery to a new version, measured on one chain with what each of them costs.

    found = afterwards.compare(chain, query, gallery, metrics=["identification", "recall@1"])
    for way in found.ways:
        print(way.name, way.curves["recall@1"].area, way.cost)

A chain that was trained for compatibility needs only the first of them, the `naive` swap; the others
stand beside it on the same pictures.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np

from compat_jax import align, evaluation
from compat_jax.backfill import SHARES, Curve, Gallery, backfill
from compat_jax.chain import Chain, Version
from compat_jax.data.dataset import Dataset
from compat_jax.data.roles import check_same_classes
from compat_jax.errors import Stopped, UserError, unknown
from compat_jax.evaluation import Cache, Maps
from compat_jax.fields import Rule, check_fields
from compat_jax.retrieval import embed, mixed
from compat_jax.retrieval import metric as metrics_by_name
from compat_jax.retrieval.metric import Metric, Queries
from compat_jax.retrieval.mixed import Both
from compat_jax.session import Session
from compat_jax.statistics import Interval, interval, resampled_means

NAIVE, RESCORING, REINDEX = "naive", "rescoring", "reindex"
WAYS = (NAIVE, *align.KINDS, RESCORING, REINDEX)
METRICS = ("identification", "recall@1")  # one by classes, one by images
SAMPLE = 2000  # queries: every way searches the gallery once a share and metric
_TIMED = 256  # images by which the time to embed one is measured
_FLOAT = 4  # bytes


class Cost(NamedTuple):
    """What a way takes.

    Attributes:
      pairs: images that a map was fitted on, embedded by both versions.
      images: images to embed before the first query is answered.
      images_a_query: gallery images that a query has embedded on demand while nothing else was.
      networks: versions that embed each query until all of the gallery is embedded again.
      fit_seconds: measured, to fit the map; the first of its kind also compiles.
      seconds: fit_seconds and the images at the measured rate.
      bytes: kept beside one vector an image: the map, the vectors made on demand, the second index.
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
    """What one way comes to.

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
      ways: in the order of `WAYS`; naive is missing where the feature sizes differ.
      gallery_size: number of gallery images.
      queries: number of queries asked.
      candidates: images that rescoring proposes to a query.
      from_gallery: whether maps were fitted on gallery images; else on the images that were given.
      seconds_an_image: measured, to read and embed one by the new version, in batches.
    """

    versions: tuple[int, int]
    ways: tuple[Way, ...]
    gallery_size: int
    queries: int
    candidates: int
    from_gallery: bool
    seconds_an_image: float

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, the main one first."""
        return tuple(dict.fromkeys(name for way in self.ways for name in way.curves))

    def way(self, name: str) -> Way:
        """Return a way by its name.

        Raises:
          UserError: it was not measured.
        """
        found = {way.name: way for way in self.ways}
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
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What to compare.

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


class Spaces(NamedTuple):
    """What the ways are measured on.

    Attributes:
      queries: by both versions.
      gallery: by both versions.
      pairs: to fit maps on.
      mesh: devices.
    """

    queries: Both
    gallery: Both
    pairs: align.Pairs
    mesh: Any = None


def compare(
    chain: Chain,
    query: Dataset,
    gallery: Dataset,
    *,
    metrics: Sequence[Metric | str] = METRICS,
    plan: Plan = Plan(),
    dtype: str = "float32",
    session: Session | None = None,
) -> Comparison:
    """Measure all ways between two versions of a chain, on at most 2,000 queries.

    Args:
      chain: with at least two versions.
      query: labelled images that ask.
      gallery: labelled images that answer.
      metrics: names or `Metric` objects.
      plan: the versions, and what maps are fitted on.
      dtype: of the networks' computation.
      session: devices and the cache: what an evaluation with it has embedded is not embedded again, and
        a second comparison computes nothing.

    Raises:
      Stopped: the session asked to stop.
      UserError: a chain of one version, versions out of order, unknown metrics, classes of query and
        gallery that differ, too few images to fit on.
    """
    session = session or Session()
    found = [metrics_by_name.get(m) for m in metrics]
    check_same_classes(query, gallery)
    old, new = _versions(chain, plan)
    settings = f"{dtype} {query.fingerprint()} {gallery.fingerprint()}"
    made_of = [f"{v.sha256} {v.record}" for v in (old, new)]
    made_of += [plan.address(), *(metric.name for metric in found)]

    def features(data):
        if session.should_stop():
            raise Stopped
        return [evaluation.features(v, data, dtype=dtype, session=session) for v in (old, new)]

    def compute():
        spaces = _spaces((query, gallery), plan, features, mesh=session.devices())
        seconds = _seconds_an_image(new, gallery, dtype=dtype, session=session)
        ways = tuple(measure(spaces, found, plan, seconds_an_image=seconds))
        return _packed(
            Comparison(
                (old.number, new.number),
                ways,
                gallery_size=len(gallery),
                queries=len(spaces.queries.labels),
                candidates=plan.candidates,
                from_gallery=plan.pictures is None,
                seconds_an_image=seconds,
            )
        )

    return _unpacked(Cache(session.cache, settings).get("ways", made_of, compute))


def measure(
    spaces: Spaces, metrics: Sequence[Metric], plan: Plan, *, seconds_an_image: float = 0.0
) -> Iterator[Way]:
    """Measure all ways on features.

    Args:
      spaces: queries and gallery by both versions, and pairs to fit maps on.
      metrics: to measure.
      plan: shares, order and candidates.
      seconds_an_image: to embed one by the new version.

    Yields:
      A `Way` each, in the order of `WAYS`.
    """
    queries, gallery, pairs, _ = spaces
    count, run = len(gallery.labels), functools.partial(_swapped, spaces, metrics, plan)
    if NAIVE in plan.ways and queries.old.shape[1] == queries.new.shape[1]:
        yield Way(NAIVE, run(None), Cost())
    # Gallery images have their old features already.
    images = len(pairs.new) * (1 if plan.pictures is None else 2)
    for kind in filter(plan.ways.__contains__, align.KINDS):
        began = time.perf_counter()
        found = align.fit(pairs.old, pairs.new, kind, labels=pairs.labels)
        fitting = time.perf_counter() - began
        needs_old = align.needs_old(kind)
        mapped = found.map(queries.new, queries.old if needs_old else None)
        cost = Cost(
            pairs=len(pairs.new),
            images=images,
            networks=2 if needs_old else 1,
            fit_seconds=fitting,
            seconds=fitting + images * seconds_an_image,
            bytes=sum(array.nbytes for array in found.arrays.values()),
        )
        yield Way(kind, run(mapped), cost, dict(found.settings))
    if RESCORING in plan.ways:
        yield _rescoring(spaces, metrics, plan)
    if REINDEX in plan.ways:
        bytes_ = gallery.new.size * _FLOAT
        cost = Cost(images=count, seconds=count * seconds_an_image, bytes=bytes_)
        yield Way(REINDEX, _reindexed(spaces, metrics, plan), cost)


def sampled(count: int) -> np.ndarray:
    """Return the rows of at most 2,000 of `count` queries, drawn with seed 0, ascending."""
    if count <= SAMPLE:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, SAMPLE, replace=False))


def _versions(chain: Chain, plan: Plan) -> tuple[Version, Version]:
    numbers = chain.require_whole().numbers()
    if len(numbers) < 2:
        raise UserError(f"{chain.path} has one version: there is nothing to upgrade", "chain")
    try:
        old, new = numbers[plan.old], numbers[plan.new]
    except IndexError as error:
        raise UserError(
            f"{chain.path} has {len(numbers)} versions: there is no {plan.old} or no {plan.new}"
        ) from error
    if old >= new:
        raise UserError(
            f"the gallery's version must be older than that of the queries, got {old} and {new}"
        )
    return chain.open(old), chain.open(new)


def _spaces(data: tuple[Dataset, Dataset], plan: Plan, features: Callable, *, mesh) -> Spaces:
    query, gallery = data
    asked, own = sampled(len(query)), evaluation.same_pictures(query, gallery)
    old, new = features(gallery)
    answering = Both(old, new, gallery.need_labels())
    old, new = features(query)
    rows = None if own is None else own[asked]
    asking = Both(old[asked], new[asked], query.need_labels()[asked], rows)
    return Spaces(asking, answering, _pairs(plan, answering, features), mesh)


def _pairs(plan: Plan, gallery: Both, features: Callable) -> align.Pairs:
    """The pairs to fit maps on: the first gallery images of the order, or the pictures of the plan."""
    if plan.pictures is None:
        rows = Maps(pairs=plan.pairs, seed=plan.seed).rows(len(gallery.labels))
        return align.Pairs(gallery.old[rows], gallery.new[rows], gallery.labels[rows])
    order = np.random.default_rng(plan.seed).permutation(len(plan.pictures))
    chosen = plan.pictures.take(np.sort(order[: plan.pairs]))
    old, new = features(chosen)
    return align.Pairs(old, new, chosen.need_labels())


def _seconds_an_image(version, data, *, dtype, session) -> float:
    """Time a second pass over some images: the first one compiles."""
    rows = np.arange(min(_TIMED, len(data)))
    options = {"mesh": session.devices(), "batch_size": session.batch_size, "dtype": dtype}
    some = data.take(rows)
    for _ in range(2):
        began = time.perf_counter()
        embed(version, some, **options)
        seconds = (time.perf_counter() - began) / len(rows)
    return seconds


def _swapped(spaces: Spaces, metrics, plan: Plan, mapped: np.ndarray | None) -> dict[str, Curve]:
    """Measure old rows with mapped queries, and rows embedded again with new ones."""
    queries, gallery, *_ = spaces
    asking = queries._replace(old=queries.new if mapped is None else mapped)
    searcher = mixed.Swap(asking, gallery, one_space=mapped is None)
    curves = _searched(searcher, metrics, plan)
    others = [metric for metric in metrics if metric.name not in curves]
    return {**curves, **_concatenated(spaces, others, plan, mapped)}


def _searched(searcher: mixed.Searcher, metrics, plan: Plan) -> dict[str, Curve]:
    """Curves of the metrics that judge scores."""
    judging = list(filter(mixed.judges_scores, metrics))
    order = np.random.default_rng(plan.seed).permutation(len(searcher.gallery.labels))
    found = mixed.measure(searcher, judging, order, plan.shares)
    return {m.name: _curve(m.name, plan.shares, *found[m.name]) for m in judging}


def _concatenated(spaces: Spaces, metrics, plan: Plan, mapped) -> dict[str, Curve]:
    """Curves of any metric: queries [mapped, new] and rows [old, 0] or [0, new] have the inner products
    of `Swap.images`, but for a factor that all share."""
    queries, gallery, _, mesh = spaces
    rows, new = Gallery(*gallery[:3]), queries.new
    if mapped is not None:
        wide = gallery.old.shape[1], gallery.new.shape[1]
        rows = Gallery(
            np.pad(gallery.old, ((0, 0), (0, wide[1]))),
            np.pad(gallery.new, ((0, 0), (wide[0], 0))),
            gallery.labels,
        )
        new = (np.hstack([mapped, new]) / np.sqrt(2)).astype(np.float32)
    asking = Queries(new, queries.labels, queries.own, mesh)
    return {
        metric.name: backfill(asking, rows, metric=metric, shares=plan.shares, seed=plan.seed)
        for metric in metrics
    }


def _rescoring(spaces: Spaces, metrics, plan: Plan) -> Way:
    queries, gallery, *_ = spaces
    searcher = mixed.Rescoring(queries, gallery, plan.candidates)
    curves = _searched(searcher, metrics, plan)
    cost = Cost(
        images_a_query=min(plan.candidates, len(gallery.labels)),
        networks=2,
        bytes=int(searcher.proposed.sum()) * gallery.new.shape[1] * _FLOAT,
    )
    return Way(RESCORING, curves, cost)


def _reindexed(spaces: Spaces, metrics, plan: Plan) -> dict[str, Curve]:
    """The old version answers until all is embedded again."""
    queries, gallery, _, mesh = spaces
    shares = [*plan.shares, 1.0]
    curves = {}
    for metric in metrics:
        prepare = metric.prepare if queries.own is None else metrics_by_name.everything
        ends = [
            metric.score(
                Queries(asking, queries.labels, queries.own, mesh),
                [prepare(answering, gallery.labels)],
            )[0]
            for asking, answering in ((queries.old, gallery.old), (queries.new, gallery.new))
        ]
        scores = [ends[0]] * len(plan.shares) + [ends[1]]
        answers = [0.0] * len(plan.shares) + [1.0]
        curves[metric.name] = _curve(metric.name, shares, np.stack(scores), np.array(answers))
    return curves


def _curve(metric: str, shares, scores: np.ndarray, answers: np.ndarray) -> Curve:
    return Curve(
        "random",
        metric,
        shares=np.asarray(shares, np.float64),
        values=np.array([cell[~np.isnan(cell)].mean() for cell in scores]),
        new_answers=answers,
        scores=scores,
    )


def _area_interval(curve: Curve) -> Interval:
    areas = np.trapezoid(curve.scores, curve.shares, axis=0)
    found = interval(resampled_means(areas[None])[:, 0])
    return Interval(float(found.low), float(found.high))


def _packed(found: Comparison) -> tuple[np.ndarray, ...]:
    """Arrays for a cache: everything as JSON, and the scores."""
    curves = [curve for way in found.ways for curve in way.curves.values()]
    text = json.dumps(found.summary()).encode()
    return (np.frombuffer(text, np.uint8), *(curve.scores for curve in curves))


def _unpacked(parts: tuple[np.ndarray, ...]) -> Comparison:
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
