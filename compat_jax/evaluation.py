"""Every version of a chain tried against every older one: the compatibility matrix."""

import hashlib
import io
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from compat_jax import hosts
from compat_jax.chain import Chain, Record, Version
from compat_jax.data.class_register import Register
from compat_jax.data.dataset import Dataset
from compat_jax.data.roles import check_same_classes
from compat_jax.errors import Stopped, UserError
from compat_jax.files import absolute, read_sealed, write_sealed
from compat_jax.matrix import Evaluation, Evaluations
from compat_jax.meter import track
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

    Query pictures that are in the gallery as well (pixel by pixel) are not their own answers: each
    leaves itself out, and the result says so.

    Args:
      chain: to evaluate.
      query: images that ask; embedded by the newer version of each pair.
      gallery: images that answer; embedded by the older one.
      metrics: names (see `metrics.names()`) or `Metric` objects, at least one.
      versions: numbers of the versions to take; all by default.
      dtype: of the networks' computation.
      session: devices, batch size, progress bars, and the cache from which an interrupted evaluation
        resumes.

    Returns:
      An evaluation for each metric.

    Raises:
      Stopped: the session asked to stop, before a version.
      UserError: unknown metric, classes of query and gallery that differ, a chain with gaps, corrupt
        versions.

    Source: `evaluate` in `src/iamcl2r/eval.py`, which extracts T + T(T+1)/2 times.
    """
    session = session or Session()
    found = [metrics_by_name.get(m) for m in ([metrics] if isinstance(metrics, str) else metrics)]
    if not found:
        raise UserError("no metric: name at least one", "metrics")
    check_same_classes(query, gallery)
    numbers = list(chain.require_whole().numbers() if versions is None else versions)
    own = same_pictures(query, gallery)
    settings = f"{dtype} {query.fingerprint()} {gallery.fingerprint()}"
    tables = [_Table(metric, own, _Cache(session.cache, settings), query) for metric in found]
    records = []
    bar = session.bar("evaluating")
    for number in track(numbers, bar, "versions"):
        if session.should_stop():
            raise Stopped
        version = chain.open(number)
        records.append(version.record)
        extraction = _Extraction(
            version, {"query": query, "gallery": gallery}, session, dtype=dtype
        )
        for table in tables:
            table.add(version, extraction)
    return Evaluations([table.result(numbers, records) for table in tables])


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
      dtype: of the network's computation.
      session: devices, batch size, progress bars, and the cache.

    Returns:
      float32[n, feature_size], rows of norm 1.

    Raises:
      UserError: see `Version.embed`.
    """
    session = session or Session()

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

    cache = _Cache(session.cache, f"{dtype} {data.fingerprint()}")
    made_of = [f"{version.sha256} {version.record}"]
    return cache.get(f"features{version.number:04d}", made_of, compute)[0]


def _method(records: Sequence[Record]) -> str:
    """The method of a chain: that of its last fine-tuned version, else of the last.

    A version that puts a backbone onto the simplex is trained with cross-entropy, whatever the method.
    """
    tuned = [record.method for record in records if record.parent is not None]
    return (tuned or [record.method for record in records] or [""])[-1]


def same_pictures(query: Dataset, gallery: Dataset) -> np.ndarray | None:
    """Find the query pictures that are in the gallery, pixel by pixel.

    Returns:
      int[q], the gallery row of the same picture, -1 for none; None if no picture is in both.
    """
    rows = {digest: row for row, digest in reversed(list(enumerate(gallery.picture_digests)))}
    own = np.array([rows.get(digest, -1) for digest in query.picture_digests])
    return own if (own >= 0).any() else None


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


class _Table:
    """The matrix of one metric, row by row."""

    def __init__(self, metric: Metric, own: np.ndarray | None, cache: "_Cache", query: Dataset):
        self.metric, self.own, self.cache, self.query = metric, own, cache, query
        self.galleries: list[tuple[np.ndarray, ...]] = []
        self.made_of: list[str] = [metric.name]  # the versions whose galleries a row is made of
        self.rows: list[list[np.ndarray | None]] = []

    def add(self, version: Version, extraction: _Extraction) -> None:
        """Add a version: its gallery, and its queries in all galleries so far."""
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
            fit = [g for g in self.galleries if g[0].shape[1] == features.shape[1]]
            return (self.metric.score(queries, fit), np.array([len(features), features.shape[1]]))

        scores, (_, size) = self.cache.get(f"row{version.number:04d}", self.made_of, row)
        remaining = iter(scores)
        self.rows.append(
            [next(remaining) if g[0].shape[1] == size else None for g in self.galleries]
        )

    def result(self, numbers, records) -> Evaluation:
        """The matrix, from the scores of all rows."""
        matrix, scores, incomparable = np.zeros((len(self.rows),) * 2), {}, []
        for t, row in enumerate(self.rows):
            for k, cell in enumerate(row):
                if cell is None:
                    incomparable.append((t, k))
                    continue
                scores[t, k] = cell
                matrix[t, k] = cell[~np.isnan(cell)].mean()
        classes = self.query.class_names
        setting = retrieval_setting(classes, records[-1]) if records else ""
        notes = [setting] if setting else []
        if self.own is not None:
            inside, total = int((self.own >= 0).sum()), len(self.own)
            notes.append(
                f"{inside} of {total} query pictures are in the gallery: each leaves itself out."
            )
        if incomparable:
            notes.append(
                f"{len(incomparable)} pairs have features of different sizes and count as 0."
            )
        labels = (n if r.task is None else r.task for n, r in zip(numbers, records, strict=True))
        return Evaluation(
            self.metric.name,
            matrix,
            tasks=tuple(map(str, labels)),
            replaced=tuple(r.replaced_by is not None and t > 0 for t, r in enumerate(records)),
            incomparable=tuple(incomparable),
            unit=self.metric.unit,
            method=_method(records),
            scores=scores,
            notes=tuple(notes),
            labels=self.query.labels,
            class_names=classes,
        )


class _Cache:
    """Arrays that an evaluation has computed, on disk, addressed by what they were made of."""

    def __init__(self, folder, settings: str):
        self.folder = None if folder is None else absolute(folder)
        self.settings = settings

    def get(
        self,
        kind: str,
        made_of: Sequence[str],
        compute: Callable[[], tuple[np.ndarray, ...]],
    ) -> tuple[np.ndarray, ...]:
        """Read arrays, or compute and keep them."""
        if self.folder is None:
            return compute()
        key = "\n".join([self.settings, *made_of])
        path = self.folder / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
        content = read_sealed(path, key)
        if hosts.broadcast(content is not None):
            assert content is not None, f"{path} cannot be read on every host"
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                return tuple(arrays[name] for name in sorted(arrays.files))
        parts = compute()
        buffer = io.BytesIO()
        # Scores are mostly zeros and ones; features do not compress.
        save: Any = np.savez_compressed if kind.startswith("row") else np.savez
        save(buffer, **{f"{i:02d}": np.asarray(a) for i, a in enumerate(parts)})

        def write():
            try:
                write_sealed(path, buffer.getvalue(), key)
            except OSError as error:  # the numbers are right without a cache
                logging.warning("cannot keep %s: %s", path, error.strerror or error)

        hosts.on_first(write)
        return tuple(np.asarray(a) for a in parts)
