"""Check, by querying, whether a new version may answer in the gallery that an old one embedded."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, NamedTuple

import numpy as np
from jax.sharding import Mesh

from compat_jax import evaluation
from compat_jax.chain import Record, Version
from compat_jax.data.class_register import Register
from compat_jax.data.dataset import Dataset
from compat_jax.data.roles import check_same_classes
from compat_jax.definition_1 import definition_1
from compat_jax.errors import UserError
from compat_jax.fields import Rule, check_fields
from compat_jax.gallery.manifest import Preprocessing, order_of
from compat_jax.gallery.verdict import (
    GO,
    LOSS,
    NO_GO,
    STAGES,
    AtThreshold,
    ClassFlips,
    Figure,
    Measured,
    Stage,
    Verdict,
)
from compat_jax.models import DTYPES
from compat_jax.retrieval import metric as metrics
from compat_jax.retrieval.exact import search
from compat_jax.retrieval.metric import Metric, Queries
from compat_jax.retrieval.metrics import drop_self
from compat_jax.retrieval.verification import QueryPairs, accept_below, query_pairs
from compat_jax.session import Session
from compat_jax.statistics import flips, flips_by_class, interval, resampled_means

PAIRS = 100_000  # pairs of each kind for Definition 1
SAMPLE = 2000  # queries whose pairs meet the threshold
_BLOCK = 256
_SHARES = {"old": 0, "tenth": 0.1, "half": 0.5, "new": 1}  # of rows that the new version embedded
# Number of the version that asks, and which rows it meets, by stage.
_ASKING = {
    "today": (0, "old"),
    "switched": (1, "old"),
    "begun": (1, "tenth"),
    "half": (1, "half"),
    "finished": (1, "new"),
    "half back": (0, "half"),
    "back": (0, "new"),
}
_WHEN = {
    "switched": "the switch",
    "begun": "the beginning of a backfill",
    "half": "the middle of a backfill",
    "finished": "a finished backfill",
    "half back": "a rollback in the middle of a backfill",
    "back": "a rollback after a backfill",
}


@dataclasses.dataclass(frozen=True)
class Terms:
    """What a check tolerates and compares.

    Attributes:
      margin: loss of quality that counts as none.
      limit: loss of quality above which a switch is out of the question.
      k: answers of a query whose change is measured.
      far: share of pairs of different classes that today's threshold lets pass.
      threshold: score, a cosine, that your product compares with; by default the one of `far`, or
        without labels the one that nine tenths of today's best answers reach.
      dtype: of the networks' computation.
    """

    margin: Annotated[float, Rule("loss of quality that counts as none", low=0, high=1)] = 0.01
    limit: Annotated[float, Rule("loss of quality that forbids a switch", low=0, high=1)] = 0.05
    k: Annotated[int, Rule("answers of a query that are compared", low=1, high=1000)] = 10
    far: Annotated[float, Rule("false pairs that the threshold lets pass", above=0, below=1)] = 0.01
    threshold: Annotated[float | None, Rule("fixed score, a cosine", low=-1, high=1)] = None
    dtype: Annotated[str, Rule("of the computation", choices=tuple(sorted(DTYPES)))] = "float32"

    def __post_init__(self):
        check_fields(self)
        if self.limit < self.margin:
            raise UserError(
                f"limit must be at least the margin, {self.margin:g}, got {self.limit:g}", "limit"
            )


def check(
    old: Version,
    new: Version,
    *,
    query: Dataset,
    gallery: Dataset,
    metric: Metric | str = "recall@1",
    terms: Terms = Terms(),
    session: Session | None = None,
) -> Verdict:
    """Check whether a new version may answer in the gallery of an old one, and the way back.

    Versions that share no space (see `differences`) are a "no-go" without being measured. Of others the
    quality of the answers is measured at every stage of an upgrade (`verdict.STAGES`): today, after the
    switch, with a tenth and with half of the rows embedded again (drawn with seed 0), with all of them,
    and with the old version asking again at the last two, which is what a rollback meets. The verdict:

    - "go": no stage loses more than `terms.margin` against today, whatever the queries drawn: the 95 %
      intervals of all changes end above it.
    - "no-go": the switch loses more than `terms.limit`, and that it loses more than the margin is no
      chance of the draw.
    - "go with loss": all between, and whatever too few queries leave open. The reasons say what is lost
      at which stage.

    With labels the quality is the metric. Without labels in both data sets it is the share of the new
    version's own k answers, with every row embedded again, that are found: today's answers count by it
    as well, so it tells whether the switch brings the gallery nearer to a full re-index, and takes for
    granted that the new version is the better one.

    Query pictures that are in the gallery as well are not their own answers.

    Args:
      old: version that embedded the gallery and answers today.
      new: version that is to answer.
      query: images that ask.
      gallery: images that answer; a sample of the gallery will do.
      metric: name of a metric or a `Metric`, for data with labels.
      terms: see `Terms`.
      session: devices, batch size, progress bars, and the cache of features.

    Returns:
      `Verdict`. Intervals are of a paired bootstrap over the queries.

    Raises:
      UserError: unknown metric, no pictures, classes of query and gallery that differ.
    """
    session, metric = session or Session(), metrics.get(metric)
    numbers, digests = (old.number, new.number), (old.sha256, new.sha256)
    if refused := differences(old, new):
        return Verdict(NO_GO, refused, *numbers, sha256=digests)
    labelled = query.labels is not None and gallery.labels is not None
    if labelled:
        check_same_classes(query, gallery)
    asked = _Asked.embedded((old, new), query, gallery, terms=terms, session=session)
    found = _measure(asked, metric if labelled else None, terms)
    word, reasons = judge(found.stages, terms)
    unknown = _not_known(new, asked, found)
    return Verdict(word, reasons, *numbers, sha256=digests, not_known=unknown, measured=found)


def differences(old: Version, new: Version) -> tuple[str, ...]:
    """Say why features of two versions cannot be compared; () where they can.

    Compared are the feature size, K, the order of the prototypes, the classes' prototypes, and the
    preprocessing of pictures.
    """
    before, after = old.record, new.record
    found = []
    if before.feature_size != after.feature_size:
        found.append(_differ("features", after.feature_size, before.feature_size))
    if before.head.is_fixed != after.head.is_fixed:
        kinds = ["a learnable classifier", "a fixed simplex"]
        found.append(
            f"version {new.number} was trained with {kinds[after.head.is_fixed]}, version "
            f"{old.number} with {kinds[before.head.is_fixed]}: they share no space"
        )
    elif before.head.is_fixed:
        found += _simplex_differences(old, new)
    prepared = Preprocessing.of(after).differences(Preprocessing.of(before))
    if prepared:
        found.append(f"pictures are preprocessed in another way: {prepared}")
    for version, record in ((old, before), (new, after)):
        if record.fresh:
            found.append(
                f"version {version.number} has layers that were never trained "
                f"({', '.join(record.fresh[:3])}): train it before it answers"
            )
    return tuple(found)


def _simplex_differences(old: Version, new: Version) -> list[str]:
    before, after = old.record, new.record
    if before.num_prototypes != after.num_prototypes:
        return [
            _differ("prototypes (K)", after.num_prototypes, before.num_prototypes)
            + ": move the older one to the larger K first"
        ]
    if order_of(before) != order_of(after):
        return [_differ("orders of the prototypes", order_of(after), order_of(before))]
    if not _registered(before) or not _registered(after):
        return []
    older, newer = sorted((old, new), key=lambda version: version.number)
    try:
        Register.of(newer.record).check_continues(Register.of(older.record))
    except UserError as error:
        return [f"the classes have other prototypes: {error}"]
    return []


def _registered(record: Record) -> bool:
    """Whether a version knows the classes of its sequence; a pre-trained model has others."""
    return bool(record.class_names) and record.task is not None


def _differ(what: str, new, old) -> str:
    return f"{what} differ: {new} of the new version, {old} of the old one"


def judge(stages: Mapping[str, Stage], terms: Terms) -> tuple[str, tuple[str, ...]]:
    """Judge the stages of an upgrade by the rule in `check`.

    Args:
      stages: by name.
      terms: margin and limit.

    Returns:
      The verdict, and sentences that give the reason.
    """
    found = (_reason(name, stages[name].change, terms) for name in _WHEN)
    reasons = tuple(reason for reason in found if reason)
    switched = stages["switched"].change
    if switched.value < -terms.limit and switched.high < -terms.margin:
        return NO_GO, reasons
    if reasons:
        return LOSS, reasons
    return GO, (
        f"no stage of the upgrade loses more than {_size(terms.margin)}; the switch changes "
        f"the quality by {_points(switched)}",
    )


def _reason(name: str, change: Figure, terms: Terms) -> str:
    """Say what is lost at a stage; "" for nothing."""
    if change.low >= -terms.margin:
        return ""
    when = _WHEN[name]
    if change.high >= -terms.margin:
        return f"{when} may lose more than {_size(terms.margin)}: {_points(change)}"
    over = f", more than the limit of {100 * terms.limit:g}" if -change.value > terms.limit else ""
    return f"{when} loses {-100 * change.value:.1f} points{over}: {_points(change)}"


def _size(loss: float) -> str:
    return f"{100 * loss:g} point{'' if loss == 0.01 else 's'}"


def _points(change: Figure) -> str:
    low, value, high = (100 * x for x in (change.low, change.value, change.high))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def _not_known(new: Version, asked: "_Asked", found: Measured) -> tuple[str, ...]:
    sentences = []
    if not found.labelled:
        sentences.append(
            "whether the answers are right, since there are no labels. The quality is agreement with "
            f"what version {new.number} would answer if it had embedded every picture, which takes for "
            f"granted that it is the better version. Flips, false pairs and Definition 1 need labels."
        )
    if asked.own is not None:
        inside = int((asked.own >= 0).sum())
        sentences.append(
            f"how {inside} of the queries fare that are pictures of the gallery: each leaves itself out."
        )
    return tuple(sentences)


class _Asked(NamedTuple):
    """Queries and rows of both versions.

    `queries` and the rows "old" and "new" are float32 features; the rows "tenth" and "half" are the new
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
        mixed = {name: np.where(is_new[name][:, None], new, old) for name in ("tenth", "half")}
        rows = {"old": old, **mixed, "new": new}
        own = evaluation.same_pictures(query, gallery)
        if own is not None and len(gallery) < 2:
            raise UserError(
                "the gallery has no picture but the one that asks: give more", "gallery"
            )
        return cls(
            (features[0][0], features[0][1]),
            rows,
            is_new,
            data=(query, gallery),
            own=own,
            mesh=session.devices(),
        )

    def answers(self, k: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Best score float32[q] and the k nearest rows int64[q, k] of every stage."""
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


def _measure(asked: _Asked, metric: Metric | None, terms: Terms) -> Measured:
    """Measure all stages; without labels (no metric) by agreement."""
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


def _scores(asked: _Asked, metric: Metric) -> dict[str, np.ndarray]:
    """The metric's score of each query, at every stage."""
    query, gallery = asked.data
    prepare = metric.prepare if asked.own is None else metrics.everything
    rows = [prepare(features, gallery.need_labels()) for features in asked.rows.values()]
    found = [
        metric.score(Queries(features, query.need_labels(), asked.own, asked.mesh), rows)
        for features in asked.queries
    ]
    places = list(asked.rows)
    return {
        stage: np.asarray(found[asking][places.index(name)], np.float64)
        for stage, (asking, name) in _ASKING.items()
    }


def _stages(quality, kept, new_rows) -> dict[str, Stage]:
    """Means and intervals; all stages share the draws of the bootstrap."""
    names = list(STAGES)
    scores = np.stack([part[name] for part in (quality, kept) for name in names])
    means = resampled_means(scores)
    count = len(names)

    def figure(values: np.ndarray, draws: np.ndarray) -> Figure:
        low, high = interval(draws)
        return Figure(float(values), float(low), float(high))

    whole = np.array([row[~np.isnan(row)].mean() for row in scores])
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
    """Flips of the switch: of all queries, and by class, the greatest net loss first."""
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


def _pair_scores(asked: _Asked, terms: Terms) -> tuple[float, dict[str, AtThreshold]]:
    """What a fixed score lets pass among pairs of one class and of different ones."""
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
    """float32[m] of pairs of one class, and of different classes."""
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
    """What a fixed score lets pass of each query's best answer."""
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
