"""Findings on a chain: its matrices, a backfill, answers, drift, and how it was trained."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from compat_jax import drift, evaluation, methods, simplex
from compat_jax.afterwards import Comparison, sampled
from compat_jax.backfill import Curve, Gallery, backfill
from compat_jax.chain import Chain, Record, Version
from compat_jax.data.class_register import Register
from compat_jax.data.dataset import Dataset
from compat_jax.data.same_pictures import same_pictures
from compat_jax.drift import Collapse
from compat_jax.errors import Stopped
from compat_jax.matrix import Evaluation, Evaluations
from compat_jax.retrieval import ExactIndex, Metric, Queries
from compat_jax.retrieval import metric as metrics_by_name
from compat_jax.retrieval.metrics import nearest_others
from compat_jax.session import Session
from compat_jax.statistics import without_nan

ANSWERS = 5  # gallery images shown for a query
SHOWN = 8  # queries of the wall
ORDERS = ("random", "farthest", "oracle")


class Answers(NamedTuple):
    """Answers to queries of the newest version in the gallery of the oldest one.

    Attributes:
      rows: int[w], queries to show, of different classes where there are enough.
      found: int[w, 5], rows of their nearest gallery images, the nearest first.
      queries: number of queries that the shares are of.
      first: share of queries whose nearest image is of their class.
      among: mean share of images of the query's class among the five.
    """

    rows: np.ndarray
    found: np.ndarray
    queries: int
    first: float
    among: float


class Geometry(NamedTuple):
    """Where a version puts the classes of the gallery.

    Attributes:
      collapse: of its features, which have length 1; None with fewer than two classes.
      prototype_angle: mean angle between a class's mean and its prototype, in degrees; NaN where the
        version was trained on none of the classes, or has no prototypes.
    """

    collapse: Collapse | None
    prototype_angle: float


@dataclasses.dataclass(frozen=True)
class Findings:
    """Everything that a page shows of a chain.

    Attributes:
      name: of the chain, for titles.
      path: of the chain.
      numbers: of its versions.
      records: of its versions.
      sha256: of its versions' variables.
      evaluations: by metric, the main one first.
      gallery_size: number of gallery images, n.
      backfills: of the oldest gallery by the newest version, a curve an order; () for one version, or
        where the feature sizes differ.
      answers: None likewise.
      turns: float64[T, T], see `drift.drift_matrix`, on the gallery's classes.
      others: float64[T], mean angle between the mean of a class in each version and those of the other
        classes in the first, in degrees; NaN for one class, or where the feature sizes differ.
      geometry: of each version.
      log: lines of the training log; () without one.
      notes: sentences about what is missing.
      ways: of upgrading the oldest gallery, maps afterwards among them, see `afterwards.compare`; None
        where they were not measured.
    """

    name: str
    path: str
    numbers: tuple[int, ...]
    records: tuple[Record, ...]
    sha256: tuple[str, ...]
    evaluations: Evaluations
    gallery_size: int
    backfills: tuple[Curve, ...]
    answers: Answers | None
    turns: np.ndarray
    others: np.ndarray
    geometry: tuple[Geometry, ...]
    log: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    ways: Comparison | None = None

    @property
    def main(self) -> Evaluation:
        """The evaluation of the first metric."""
        return self.evaluations.main

    def summary(self) -> dict[str, Any]:
        """Return everything but the log as JSON values."""
        return {
            "name": self.name,
            "chain": self.path,
            "versions": [
                {"number": n, "sha256": sha, "method": r.method, "task": r.task, "seed": r.seed}
                for n, sha, r in zip(self.numbers, self.sha256, self.records, strict=True)
            ],
            "evaluations": self.evaluations.summary(),
            "gallery_size": self.gallery_size,
            "backfills": [curve.summary() for curve in self.backfills],
            "answers": self.answers
            and {k: np.asarray(v).tolist() for k, v in self.answers._asdict().items()},
            "turns": without_nan(self.turns),
            "others": without_nan(self.others),
            "collapse": [
                g.collapse and {k: without_nan(v) for k, v in g.collapse._asdict().items()}
                for g in self.geometry
            ],
            "prototype_angles": without_nan([g.prototype_angle for g in self.geometry]),
            "notes": list(self.notes),
            "ways": self.ways and self.ways.summary(),
        }


def collect(
    chain: Chain,
    query: Dataset,
    gallery: Dataset,
    *,
    name: str = "",
    metrics: Sequence[Metric | str] = ("identification",),
    dtype: str = "float32",
    session: Session | None = None,
) -> Findings:
    """Evaluate a chain and collect what a report shows of it.

    Args:
      chain: to report on.
      query: images that ask.
      gallery: images that answer.
      name: for titles; the method's title by default.
      metrics: names or `Metric` objects; the first is the main one.
      dtype: of the networks' computation.
      session: devices and the cache: what an evaluation with it has embedded is not embedded again.

    Raises:
      Stopped: the session asked to stop.
      UserError: see `evaluation.evaluate`.
    """
    session, chosen = session or Session(), metrics_by_name.chosen(metrics)
    results = evaluation.evaluate(
        chain, query, gallery, metrics=chosen, dtype=dtype, session=session
    )
    versions = _Versions(chain, query, gallery, dtype=dtype, session=session)
    means, geometry, digests = [], [], []
    for number in chain.numbers():
        if session.should_stop():
            raise Stopped
        version = chain.open(number)
        found = versions.features(version, gallery)
        means.append(drift.class_means(found, gallery.need_labels()).means)
        geometry.append(_geometry(version.record, gallery, found, means=means[-1]))
        digests.append(version.sha256)
    curves, answers, notes = versions.old_gallery(chosen[0])
    records = tuple(chain.record(number) for number in chain.numbers())
    return Findings(
        name or methods.title(records[-1].method),
        str(chain.path),
        numbers=tuple(chain.numbers()),
        records=records,
        sha256=tuple(digests),
        evaluations=results,
        gallery_size=len(gallery),
        backfills=curves,
        answers=answers,
        turns=drift.drift_matrix(means, np.arange(len(means[0]))),
        others=np.array([_to_others(each, means[0]) for each in means]),
        geometry=tuple(geometry),
        log=read_log(chain.path.parent / "log.jsonl"),
        notes=notes,
    )


class _Versions:
    """A chain's versions, and the features that an evaluation has kept of them."""

    def __init__(self, chain: Chain, query: Dataset, gallery: Dataset, *, dtype, session: Session):
        self.chain, self.query, self.gallery = chain, query, gallery
        self.dtype, self.session = dtype, session

    def features(self, version: Version, data: Dataset) -> np.ndarray:
        """float32[n, d]."""
        return evaluation.features(version, data, dtype=self.dtype, session=self.session)

    def old_gallery(
        self, metric: Metric
    ) -> tuple[tuple[Curve, ...], Answers | None, tuple[str, ...]]:
        """The newest version's queries in the oldest gallery: a backfill an order, and answers."""
        numbers = self.chain.numbers()
        if len(numbers) < 2:
            return (), None, ("One version alone has no older gallery to search.",)
        oldest, newest = self.chain.open(numbers[0]), self.chain.open(numbers[-1])
        old = self.features(oldest, self.gallery)
        new, asking = (self.features(newest, data) for data in (self.gallery, self.query))
        if old.shape != new.shape:
            return (
                (),
                None,
                (
                    f"Version {numbers[-1]} has features of {new.shape[1]} numbers, version "
                    f"{numbers[0]} of {old.shape[1]}: the old gallery cannot be searched with it.",
                ),
            )
        rows, own = sampled(len(asking)), same_pictures(self.query, self.gallery)
        queries = Queries(
            asking[rows],
            self.query.need_labels()[rows],
            None if own is None else own[rows],
            self.session.devices(),
        )
        labels = self.gallery.need_labels()
        curves = tuple(
            backfill(queries, Gallery(old, new, labels), order=order, metric=metric)
            for order in ORDERS
        )
        notes: tuple[str, ...] = ()
        if len(rows) < len(asking):
            notes = (f"Backfill and answers: a sample of {len(rows)} of {len(asking)} queries.",)
        return curves, _answers(queries, rows, old, labels=labels), notes


def titles(chains: Sequence[Chain]) -> list[str]:
    """Name chains by their methods; chains of one method by their folders as well.

    Args:
      chains: with a version each.
    """
    plain = [methods.title(chain.record(-1).method) for chain in chains]
    found = plain
    for place in ([chain.path.parent.name for chain in chains], [str(c.path) for c in chains]):
        found = [
            f"{title} ({place[n]})" if found.count(found[n]) > 1 else found[n]
            for n, title in enumerate(plain)
        ]
    return found


def _answers(queries: Queries, rows: np.ndarray, gallery, *, labels: np.ndarray) -> Answers:
    index = ExactIndex(queries.mesh)
    index.add(gallery)
    kept = min(ANSWERS, len(gallery) - (queries.own is not None))
    found = nearest_others(index, queries.features, kept, queries.own)
    right = labels[found] == queries.labels[:, None]
    order = np.random.default_rng(0).permutation(len(rows))
    _, firsts = np.unique(queries.labels[order], return_index=True)
    one_each, others = order[np.sort(firsts)], np.delete(order, np.sort(firsts))
    shown = np.concatenate([one_each, others])[:SHOWN]
    return Answers(
        rows[shown], found[shown], len(rows), float(right[:, 0].mean()), float(right.mean())
    )


def _to_others(means: np.ndarray, first: np.ndarray) -> float:
    """Mean angle between each class's mean and the other classes' in the first version, degrees."""
    if means.shape != first.shape or len(means) < 2:
        return float("nan")
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (means, first))
    found = np.degrees(np.arccos(np.clip(a @ b.T, -1, 1)))
    return float(found[~np.eye(len(found), dtype=bool)].mean())


def _geometry(record: Record, data: Dataset, features, *, means) -> Geometry:
    collapse = None
    if len(means) > 1:
        collapse = drift.neural_collapse(features, data.need_labels())
    if not record.head.is_fixed:
        return Geometry(collapse, float("nan"))
    register = Register.of(record)
    classes = np.unique(data.need_labels())
    names = [data.class_names[c] for c in classes]
    known = np.flatnonzero([name in register for name in names])
    if not len(known):
        return Geometry(collapse, float("nan"))
    rows = record.head.targets(jnp.array([register.number(names[c]) for c in known], jnp.int32))
    unit = means[known] / np.linalg.norm(means[known], axis=1, keepdims=True)
    cosines = np.asarray(simplex.label_logit(jnp.asarray(unit, jnp.float32), rows))
    return Geometry(collapse, float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).mean()))


def read_log(path: epath.Path) -> tuple[dict[str, Any], ...]:
    """Read the lines of a training log that are whole; none where there is no log."""
    if not path.exists():
        return ()
    found = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # cut off in the middle
            continue
        if isinstance(line, dict) and {"task", "step"} <= line.keys():
            found.append(line)
    return tuple(found)
