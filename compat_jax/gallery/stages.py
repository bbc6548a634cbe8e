"""Measure every stage of an upgrade: who asks, which rows answer, and what is found."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from compat_jax import evaluation
from compat_jax.data.dataset import Dataset
from compat_jax.data.same_pictures import same_pictures
from compat_jax.definition_1 import definition_1
from compat_jax.errors import UserError
from compat_jax.gallery.rule import Terms
from compat_jax.gallery.verdict import STAGES, AtThreshold, ClassFlips, Figure, Measured, Stage
from compat_jax.means import leveled, mean_score
from compat_jax.retrieval import metric as metrics
from compat_jax.retrieval.exact import search
from compat_jax.retrieval.metric import Metric, Queries
from compat_jax.retrieval.metrics import check_others, drop_self
from compat_jax.retrieval.verification import QueryPairs, accept_below, query_pairs
from compat_jax.session import Session
from compat_jax.statistics import flips, flips_by_class, interval, resampled_means

PAIRS = 100_000  # pairs of each kind for Definition 1
SAMPLE = 2000  # queries whose pairs meet the threshold
_BLOCK = 256
# Of the rows, what the new version embedded.
_SHARES = {"old": 0, "fiftieth": 0.02, "tenth": 0.1, "half": 0.5, "new": 1}
MIXED = ("fiftieth", "tenth", "half")
# Number of the version that asks, and which rows it meets, by stage.
_ASKING = {
    "today": (0, "old"),
    "switched": (1, "old"),
    "first": (1, "fiftieth"),
    "begun": (1, "tenth"),
    "half": (1, "half"),
    "finished": (1, "new"),
    "half back": (0, "half"),
    "back": (0, "new"),
}


class Asked(NamedTuple):
    """Queries and rows of both versions.

    `queries` and the rows "old" and "new" are float32 features; the rows of `MIXED` are the new
    version's where `is_new` is true, bool[n], and the old one's elsewhere.
    """

    queries: tuple[np.ndarray, np.ndarray]
    rows: Mapping[str, np.ndarray]
    is_new: Mapping[str, np.ndarray]
    data: tuple[Dataset, Dataset]
    own: np.ndarray | None
    mesh: Mesh

    @classmethod
    def embedded(
        cls, versions, query: Dataset, gallery: Dataset, *, terms: Terms, session: Session
    ):
        """Embed query and gallery with both versions, or read what was embedded before."""
        if not len(query) or not len(gallery):
            raise UserError("a check needs pictures that ask and pictures that answer")
        features = [
            [
                evaluation.features(version, data, dtype=terms.dtype, session=session)
                for version in versions
            ]
            for data in (query, gallery)
        ]
        old, new = features[1]
        place = np.empty(len(gallery), int)
        place[np.random.default_rng(0).permutation(len(gallery))] = np.arange(len(gallery))
        is_new = {name: place < int(share * len(gallery)) for name, share in _SHARES.items()}
        mixed = {name: np.where(is_new[name][:, None], new, old) for name in MIXED}
        rows = {"old": old, **mixed, "new": new}
        own = same_pictures(query, gallery)
        if own is not None:
            check_others(len(gallery))
        return cls(
            (features[0][0], features[0][1]),
            rows,
            is_new,
            data=(query, gallery),
            own=own,
            mesh=session.devices(),
        )

    def answers(self, k: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return the best score, float32[q], and the k nearest rows, int64[q, k], of every stage."""
        found = {}
        for stage, (asking, rows) in _ASKING.items():
            scores, near = search(
                self.queries[asking], self.rows[rows], k + (self.own is not None), mesh=self.mesh
            )
            best = scores[:, 0]
            if self.own is not None:
                best = np.where(near[:, 0] == self.own, scores[:, 1], best)
                near = drop_self(near, self.own)
            found[stage] = (best, near)
        return found


def measure(asked: Asked, metric: Metric | None, terms: Terms) -> Measured:
    """Measure all stages of an upgrade.

    Args:
      asked: features of both versions.
      metric: of the quality, for data with labels; None for agreement with the new version's answers.
      terms: see `Terms`.
    """
    query, gallery = asked.data
    k = min(terms.k, len(gallery) - (asked.own is not None))
    answers = asked.answers(k)
    nearest = {stage: near for stage, (_, near) in answers.items()}
    kept = {stage: overlap(near, nearest["today"]) for stage, near in nearest.items()}
    if metric is None:
        quality = {stage: overlap(near, nearest["finished"]) for stage, near in nearest.items()}
        name, unit = f"agreement@{k}", "% of the new version's own answers that are found"
        threshold, at = _best_answers({s: best for s, (best, _) in answers.items()}, terms)
    else:
        quality, (name, unit) = _scores(asked, metric), (metric.name, metric.unit)
        threshold, at = _pair_scores(asked, terms)
    new_rows = {
        stage: asked.is_new[_ASKING[stage][1]][near].mean() for stage, near in nearest.items()
    }
    found = Measured(
        name,
        unit,
        labelled=metric is not None,
        queries=len(query),
        gallery=len(gallery),
        k=k,
        stages=_stages(quality, kept, new_rows),
        threshold=threshold,
        at_threshold=at,
    )
    if metric is None:
        return found
    every, classes = _class_flips(quality, query)
    held = definition_1(asked.rows["new"], asked.rows["old"], gallery.need_labels(), sample=PAIRS)
    return dataclasses.replace(found, flips=every, classes=classes, definition_1=held)


def overlap(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the share of wanted answers that were found.

    Args:
      found: int[q, k], rows of the gallery, none twice in a line.
      wanted: int[q, k], likewise.

    Returns:
      float64[q] in 0..1.
    """
    return (wanted[:, :, None] == found[:, None, :]).any(axis=2).mean(axis=1)


def _scores(asked: Asked, metric: Metric) -> dict[str, np.ndarray]:
    """Return the metric's score of each query, float64[q], at every stage."""
    query, gallery = asked.data
    prepare = metric.prepare if asked.own is None else metrics.everything
    rows = [prepare(features, gallery.need_labels()) for features in asked.rows.values()]
    found = [
        metric.checked(Queries(features, query.need_labels(), asked.own, asked.mesh), rows)
        for features in asked.queries
    ]
    places = list(asked.rows)
    return {
        stage: np.asarray(found[asking][places.index(name)], np.float64)
        for stage, (asking, name) in _ASKING.items()
    }


def _stages(quality, kept, new_rows) -> dict[str, Stage]:
    """Return means and intervals; all stages share the draws of the bootstrap."""
    names = list(STAGES)
    scores = np.stack([part[name] for part in (quality, kept) for name in names])
    count = len(names)  # of each kind the first is today's, the others are compared with it
    means = resampled_means(scores)
    means[:, :count] = leveled(means[:, :count], means[:, :1])

    def figure(values: np.ndarray, draws: np.ndarray) -> Figure:
        low, high = interval(draws)
        return Figure(float(values), float(low), float(high))

    whole = np.array([mean_score(row) for row in scores])
    whole[:count] = leveled(whole[:count], whole[0])
    return {
        name: Stage(
            figure(whole[i], means[:, i]),
            figure(whole[i] - whole[0], means[:, i] - means[:, 0]),
            figure(whole[count + i], means[:, count + i]),
            float(new_rows[name]),
        )
        for i, name in enumerate(names)
    }


def _class_flips(quality: Mapping[str, np.ndarray], query: Dataset):
    """Return flips of the switch: of all queries, and by class, the greatest net loss first."""
    scores = {(0, 0): quality["today"], (1, 0): quality["switched"]}
    labels, count = query.need_labels(), query.num_classes
    gained, lost = (part[1, 0] for part in flips(scores, 2))
    by_class = flips_by_class(scores, 2, labels=labels, num_classes=count)
    numbers = np.bincount(labels, minlength=count)
    found = [
        ClassFlips(name, int(numbers[c]), float(up), float(down))
        for c, (name, up, down) in enumerate(
            zip(query.class_names, by_class.positive[1, 0], by_class.negative[1, 0], strict=True)
        )
        if not np.isnan(up)
    ]
    found.sort(key=lambda each: (each.gained - each.lost, each.name))
    return ClassFlips("", len(labels), float(gained), float(lost)), tuple(found)


def _pair_scores(asked: Asked, terms: Terms) -> tuple[float, dict[str, AtThreshold]]:
    """Measure which pairs of one class and of different ones pass a fixed score, at every stage."""
    query, gallery = asked.data
    drawn = query_pairs(query.need_labels(), gallery.need_labels(), asked.own)
    pairs = QueryPairs(*(part[:SAMPLE] for part in drawn))
    scores = {
        stage: _cosines(asked.queries[asking], asked.rows[rows], pairs)
        for stage, (asking, rows) in _ASKING.items()
    }
    threshold = terms.threshold
    if threshold is None:
        threshold = _passing(scores["today"][1], terms.far)
    falsely = float((scores["today"][1] >= threshold).mean())
    return threshold, {
        stage: AtThreshold(
            float(genuine.mean()),
            float((genuine >= threshold).mean()),
            float((impostor >= threshold).mean()),
            _passing(impostor, falsely),
        )
        for stage, (genuine, impostor) in scores.items()
    }


def _cosines(query, gallery, pairs: QueryPairs) -> tuple[np.ndarray, np.ndarray]:
    """Return the cosines of pairs of one class, and of different classes, float32[m] each."""
    found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for start in range(0, len(pairs.queries), _BLOCK):
        part = slice(start, start + _BLOCK)
        asking = query[pairs.queries[part]]
        for scores, rows in zip(found, (pairs.genuine, pairs.impostor), strict=True):
            scores.append(np.einsum("qd,qpd->qp", asking, gallery[rows[part]]).reshape(-1))
    return np.concatenate(found[0]), np.concatenate(found[1])


def _passing(scores: np.ndarray, share: float) -> float:
    """Return the lowest threshold that lets at most a share of the scores pass."""
    # The loosest distance below which that many lie; scores pass at the threshold or above it.
    bound = -accept_below(-scores.astype(np.float64), [share])[0]
    above = scores[scores > bound]
    return float(above.min()) if len(above) else float(np.nextafter(scores.max(), np.float32(2)))


def _best_answers(best: Mapping[str, np.ndarray], terms: Terms):
    """Measure which queries' best answers pass a fixed score, at every stage."""
    threshold = terms.threshold
    if threshold is None:
        threshold = _passing(best["today"], 0.9)
    share = float((best["today"] >= threshold).mean())
    return threshold, {
        stage: AtThreshold(
            float(scores.mean()),
            float((scores >= threshold).mean()),
            float("nan"),
            _passing(scores, share),
        )
        for stage, scores in best.items()
    }
