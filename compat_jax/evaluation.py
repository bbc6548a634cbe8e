"""Every version of a chain tried against every older one: the compatibility matrix."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Annotated

import numpy as np

from compat_jax import align
from compat_jax.array_cache import Cache
from compat_jax.chain import Chain, CorruptEntry, NoSuchVersion, Record, Version
from compat_jax.data.class_register import Register
from compat_jax.data.dataset import Dataset
from compat_jax.data.roles import check_same_classes
from compat_jax.data.same_pictures import note_of, same_pictures
from compat_jax.errors import Stopped, UserError
from compat_jax.fields import Rule, check_fields
from compat_jax.matrix import Evaluation, Evaluations
from compat_jax.means import leveled, mean_score
from compat_jax.meter import track
from compat_jax.models import computed_in
from compat_jax.retrieval import embed
from compat_jax.retrieval import metric as metrics_by_name
from compat_jax.retrieval.metric import Metric, Queries, everything
from compat_jax.session import Session


def retrieval_setting(class_names: Sequence[str], record: Record) -> str:
    """Name the setting of an evaluation: retrieval among classes that were trained on, or others.

    Args:
      class_names: of query and gallery.
      record: of the newest version; its aliases count as their classes.

    Returns:
      A sentence; "" where the record does not name its classes.
    """
    if not record.class_names:
        return ""
    register = Register(tuple(record.class_names), dict(record.aliases))
    trained = sum(name in register for name in class_names)
    classes = f"{len(class_names)} classes of query and gallery"
    if trained == len(class_names):
        return f"Closed set: the newest version was trained on all {classes}."
    if not trained:
        return f"Open set: no version was trained on the {classes}."
    return f"Mixed set: the newest version was trained on {trained} of the {classes}."


def evaluate(
    chain: Chain,
    query: Dataset,
    gallery: Dataset,
    *,
    metrics: Sequence[Metric | str] = ("identification",),
    versions: Sequence[int] | None = None,
    dtype: str = "float32",
    session: Session | None = None,
) -> Evaluations:
    """Compute the compatibility matrix of a chain, from two extractions a version.

    Query pictures that are in the gallery as well are not their own answers: each leaves itself out,
    and the result says so, see `same_pictures`. Further copies of a picture in the gallery stay; the
    result says of how many.

    Args:
      chain: to evaluate.
      query: images that ask; embedded by the newer version of each pair.
      gallery: images that answer; embedded by the older one.
      metrics: names (see `metrics.names()`) or `Metric` objects, at least one, of different names.
      versions: numbers of the versions to take, ascending; negative ones count from the end; all by
        default. A version counts as replaced if it, or one between it and the version taken before,
        started from a replacement.
      dtype: of the networks' computation: "float32", "bfloat16" or "auto"; see `Run`.
      session: devices, batch size, progress bars, and the cache from which an interrupted evaluation
        resumes.

    Returns:
      An evaluation for each metric.

    Raises:
      Stopped: the session asked to stop, before a version.
      UserError: unknown metric, one whose scores have another shape or range than `Metric` says, classes
        of query and gallery that differ, a chain with gaps, corrupt versions.

    Source: `evaluate` in `src/iamcl2r/eval.py`, which extracts T + T(T+1)/2 times.
    """
    return _evaluate(
        chain,
        (query, gallery),
        None,
        metrics=metrics,
        versions=versions,
        dtype=dtype,
        session=session,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Maps:
    """How queries of newer versions are mapped into the spaces of older ones.

    Attributes:
      kind: of the maps, a name of `align.KINDS`, fitted with its defaults.
      pairs: gallery images that a map is fitted on, embedded by both versions; at most half of the
        gallery counts.
      seed: by which the images are drawn.

    Raises:
      UserError: a value out of range.
    """

    kind: Annotated[str, Rule("of the maps", choices=tuple(align.KINDS))] = "procrustes"
    pairs: Annotated[int, Rule("gallery images to fit on", low=2)] = 1000
    seed: Annotated[int, Rule("of their draw", low=0, high=2**32 - 1)] = 0

    def __post_init__(self):
        check_fields(self)

    def rows(self, count: int) -> np.ndarray:
        """Return the rows of a gallery of `count` images to fit on, int64[n]: the first of a shuffle.

        Raises:
          UserError: a gallery of fewer than four images.
        """
        if count < 4:
            raise UserError(f"{count} images are too few to fit a map on half of them", "gallery")
        return self.drawn(count)

    def drawn(self, count: int) -> np.ndarray:
        """Return what `rows` does, and fewer than two rows for a gallery of fewer than four images."""
        return np.random.default_rng(self.seed).permutation(count)[: min(self.pairs, count // 2)]

    def unfit(self, gallery: Dataset) -> str:
        """Say why these maps cannot be fitted on a gallery; "" where they can."""
        return align.unfit(self.kind, gallery.need_labels()[self.drawn(len(gallery))])


def evaluate_mapped(
    chain: Chain,
    query: Dataset,
    gallery: Dataset,
    maps: Maps,
    *,
    metrics: Sequence[Metric | str] = ("identification",),
    dtype: str = "float32",
    session: Session | None = None,
) -> Evaluations:
    """Compute the matrix with a map for each pair of versions, fitted without training.

    Queries of a version are mapped into the space of each older version; on its own gallery they stay
    as they are. Unlike in `evaluate`, the features of two versions may have different sizes.

    Args:
      chain: see `evaluate`.
      query: see `evaluate`.
      gallery: see `evaluate`; the maps are fitted on some of its images.
      maps: kind of the maps, and what they are fitted on.
      metrics: see `evaluate`.
      dtype: see `evaluate`.
      session: see `evaluate`.

    Raises:
      Stopped: see `evaluate`.
      UserError: see `evaluate`; maps that cannot be fitted on the gallery, see `Maps.unfit`.
    """
    if reason := maps.unfit(gallery):
        raise UserError(reason, "gallery")
    mapper = _Mapper(maps, gallery)
    return _evaluate(
        chain,
        (query, gallery),
        mapper,
        metrics=metrics,
        versions=None,
        dtype=dtype,
        session=session,
    )


def _evaluate(chain, data, mapper, *, metrics, versions, dtype, session) -> Evaluations:
    query, gallery = data
    session, dtype = session or Session(), computed_in(dtype)
    found = metrics_by_name.chosen(metrics)
    check_same_classes(query, gallery)
    numbers = _taken(chain, versions)
    own = same_pictures(query, gallery)
    cache = Cache(session.cache, f"{dtype} {query.fingerprint()} {gallery.fingerprint()}")
    tables = [_Table(metric, own, cache, query) for metric in found]
    records: list[Record] = []
    replaced: list[bool] = []
    untrained: list[str] = []
    before = None
    bar = session.bar("evaluating" if mapper is None else f"evaluating with {mapper.maps.kind}")
    for number in track(numbers, bar, "versions"):
        if session.should_stop():
            raise Stopped
        version = chain.open(number)
        records.append(version.record)
        untrained += [f"{version.untrained}."] if version.untrained else []
        replaced.append(before is not None and _replaced(chain, before, version))
        before = version.number
        extraction = _Extraction(
            version, {"query": query, "gallery": gallery}, session, dtype=dtype
        )
        if mapper is not None:
            mapper.add(extraction)
        for table in tables:
            table.add(version, extraction, mapper)
    notes = untrained if own is None else [*untrained, note_of(own, query, gallery)]
    notes += [] if mapper is None else [mapper.note()]
    return Evaluations(
        [table.result(numbers, records, replaced=replaced, more=notes) for table in tables]
    )


def _taken(chain: Chain, versions: Sequence[int] | None) -> list[int]:
    """Return the numbers of the versions to evaluate, ascending: newer versions ask older galleries."""
    if versions is None:
        return chain.require_whole().numbers()
    try:
        given = [operator.index(number) for number in versions]
    except TypeError as error:
        raise UserError(
            f"versions must be whole numbers, several of them, got {versions!r:.80}", "versions"
        ) from error
    there = chain.numbers()
    numbers = [there[n] if -len(there) <= n < 0 else n for n in given]
    if not numbers or sorted(set(numbers)) != numbers:
        raise UserError(
            "versions must be at least one, each once, in ascending order, since newer versions ask in "
            f"the galleries of older ones, got {given}",
            "versions",
        )
    return numbers


def _replaced(chain: Chain, before: int, version: Version) -> bool:
    """Return whether a version started from a replacement, or one since the version before it."""
    if version.record.replaced_by is not None:
        return True
    low, high = sorted((before, version.number))
    for number in range(low + 1, high):
        try:
            if chain.record(number).replaced_by is not None:
                return True
        except (NoSuchVersion, CorruptEntry):  # it was not asked for, and nothing else needs it
            continue
    return False


def features(
    version: Version,
    data: Dataset,
    *,
    dtype: str = "float32",
    session: Session | None = None,
) -> np.ndarray:
    """Embed a data set with a version, or read what an evaluation with this cache has embedded.

    Args:
      version: an opened entry of a chain.
      data: images.
      dtype: see `evaluate`.
      session: devices, batch size, progress bars, and the cache.

    Returns:
      float32[n, feature_size], rows of norm 1.

    Raises:
      UserError: see `Version.embed`.
    """
    session, dtype = session or Session(), computed_in(dtype)

    def compute():
        found = embed(
            version,
            data,
            mesh=session.devices(),
            batch_size=session.batch_size,
            dtype=dtype,
            progress=session.bar(f"embedding with version {version.number}"),
        )
        return (found,)

    cache = Cache(session.cache, f"{dtype} {data.fingerprint()}")
    made_of = [f"{version.sha256} {version.record}"]
    return cache.get(f"features{version.number:04d}", made_of, compute)[0]


def scores_cache(cache: Cache, metrics: Sequence[Metric]) -> Cache:
    """Return the cache for what metrics give; one that keeps nothing if any is the user's.

    The name of a metric of the user's does not say what it computes.
    """
    return cache if all(map(metrics_by_name.is_own, metrics)) else Cache(None, cache.settings)


def _method(records: Sequence[Record]) -> str:
    """The method of a chain: that of its last fine-tuned version, else of the last.

    A version that puts a backbone onto the simplex is trained with cross-entropy, whatever the method.
    """
    tuned = [record.method for record in records if record.parent is not None]
    return (tuned or [record.method for record in records] or [""])[-1]


class _Extraction:
    """Features of query and gallery by one version, computed when asked for, once."""

    def __init__(self, version, data, session, *, dtype):
        self.version, self.data, self.session, self.dtype = version, data, session, dtype
        self._done: dict[str, np.ndarray] = {}

    def features(self, role: str) -> np.ndarray:
        """float32[n, d] of "query" or "gallery"."""
        if role not in self._done:
            self._done[role] = features(
                self.version, self.data[role], dtype=self.dtype, session=self.session
            )
        return self._done[role]


class _Mapper:
    """Queries of the version that was added last in the spaces of all versions before it."""

    def __init__(self, maps: Maps, gallery: Dataset):
        self.maps, self.rows = maps, maps.rows(len(gallery))
        self.labels = gallery.need_labels()[self.rows]
        self._pairs: list[np.ndarray] = []  # of each version, the features that maps are fitted on
        self._queries: list[np.ndarray] = []  # of each version, if the kind of map needs them
        self._mapped: list[np.ndarray] = []
        self._newest: _Extraction | None = None

    def add(self, extraction: "_Extraction") -> None:
        """Add a version; nothing is fitted before it is asked for."""
        if self._newest is not None and align.needs_old(self.maps.kind):
            self._queries.append(self._newest.features("query"))
        self._newest, self._mapped = extraction, []
        self._pairs.append(extraction.features("gallery")[self.rows])

    def queries(self) -> list[np.ndarray]:
        """Return the newest version's queries in each space, its own last: float32[q, d] each."""
        if not self._mapped:
            assert self._newest is not None
            features = self._newest.features("query")
            for k, old in enumerate(self._pairs[:-1]):
                found = align.fit(old, self._pairs[-1], self.maps.kind, labels=self.labels)
                before = self._queries[k] if self._queries else None
                self._mapped.append(found.map(features, before))
            self._mapped.append(features)
        return self._mapped

    def note(self) -> str:
        """Say what was done."""
        return (
            f"Queries are mapped into older spaces by {self.maps.kind}, fitted for each pair of "
            f"versions on {len(self.rows)} gallery images that both embedded."
        )


class _Table:
    """The matrix of one metric, row by row."""

    def __init__(self, metric: Metric, own: np.ndarray | None, cache: Cache, query: Dataset):
        self.metric, self.own, self.query = metric, own, query
        self.cache = scores_cache(cache, [metric])
        self.galleries: list[tuple[np.ndarray, ...]] = []
        self.made_of: list[str] = [metric.name]  # the versions whose galleries a row is made of
        self.rows: list[list[np.ndarray | None]] = []

    def add(self, version: Version, extraction: _Extraction, mapper: _Mapper | None = None) -> None:
        """Add a version: its gallery, and its queries in all galleries so far, mapped or not."""
        gallery, query = extraction.data["gallery"], self.query
        prepare = self.metric.prepare if self.own is None else everything
        name = f"{self.metric.name} {prepare is everything} {version.sha256} {version.record}"

        def prepared():
            return prepare(extraction.features("gallery"), gallery.labels)

        self.galleries.append(
            prepared()  # the features are cached as they are
            if prepare is everything
            else self.cache.get(f"gallery{version.number:04d}", [name], prepared)
        )
        self.made_of.append(name)

        def row():
            features = extraction.features("query")
            mesh = extraction.session.devices()
            queries = Queries(features, query.labels, self.own, mesh=mesh)
            if mapper is not None:
                pairs = zip(mapper.queries(), self.galleries, strict=True)
                cells = [
                    self.metric.checked(queries._replace(features=f), [g])[0] for f, g in pairs
                ]
                return (np.stack(cells), np.array(features.shape))
            fit = [g for g in self.galleries if g[0].shape[1] == features.shape[1]]
            return (self.metric.checked(queries, fit), np.array([len(features), features.shape[1]]))

        made_of = self.made_of if mapper is None else [*self.made_of, str(mapper.maps)]
        scores, (_, size) = self.cache.get(f"row{version.number:04d}", made_of, row)
        remaining = iter(scores)
        fits = [mapper is not None or g[0].shape[1] == size for g in self.galleries]
        self.rows.append([next(remaining) if fit else None for fit in fits])

    def result(self, numbers, records, *, replaced, more) -> Evaluation:
        """The matrix, from the scores of all rows."""
        matrix, scores, incomparable = np.zeros((len(self.rows),) * 2), {}, []
        for t, row in enumerate(self.rows):
            for k, cell in enumerate(row):
                if cell is None:
                    incomparable.append((t, k))
                    continue
                scores[t, k] = cell
                matrix[t, k] = mean_score(cell)
        matrix = leveled(matrix, np.diagonal(matrix))
        classes = self.query.class_names
        setting = retrieval_setting(classes, records[-1]) if records else ""
        notes = [*filter(None, [setting]), *more]
        if incomparable:
            notes.append(
                f"{len(incomparable)} pairs have features of different sizes and count as 0."
            )
        labels = (n if r.task is None else r.task for n, r in zip(numbers, records, strict=True))
        return Evaluation(
            self.metric.name,
            matrix,
            tasks=tuple(map(str, labels)),
            replaced=tuple(replaced),
            incomparable=tuple(incomparable),
            unit=self.metric.unit,
            method=_method(records),
            scores=scores,
            notes=tuple(notes),
            labels=self.query.labels,
            class_names=classes,
        )
