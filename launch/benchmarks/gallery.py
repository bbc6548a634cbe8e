"""Measure of galleries in vector stores: rows written, indexed, searched, and embedded again."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from compat_jax.errors import UserError
from compat_jax.gallery import Where, open_store
from compat_jax.gallery.conventions import manifest_name
from compat_jax.gallery.originals import Work
from compat_jax.gallery.probe import recall
from compat_jax.gallery.store import Rows, Store
from compat_jax.retrieval import search
from launch.benchmarks.sides import Context, program
from launch.benchmarks.timing import Result, Timing, peak_bytes, resident_bytes
from launch.benchmarks.work import GallerySizes
from launch.reference.clone_speed import Unavailable

_NAME, _MEMORY, _EDGE = "compat_jax_benchmark", "memory", "edge"
_LEAST_RECALL = 0.9
_LEAST_QUERIES = 20
# Rows of one planted cluster, how far rows lie from its centre, and how far those of the better model.
_CLUSTER, _OLD, _NEW = 200, 1.0, 0.6
_DRAWN = 1 << 16  # rows at once
_MODELS = ("0" * 16, "1" * 16)
# Searches whose exact answers are known: before and after the backfill, and rows of one version then.
_BEFORE, _AFTER, _NEW_ROWS = "before", "after", "new rows"


def load(context: Context) -> Iterator[Result]:
    """Measure a gallery in memory, in LanceDB, in Qdrant Edge and in the store that was named.

    Each runs in a program of its own.
    """
    sizes = context.sizes.gallery
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder, sizes)
        places = [f"{_MEMORY}:{_NAME}", f"lance:{folder}/{_NAME}", f"{_EDGE}:{folder}/{_NAME}"]
        if context.places.gallery_url:
            places.append(f"{context.places.gallery_url.rstrip('/')}/{_NAME}_{os.getpid()}")
        for place in places:
            settings = {"place": place, "sizes": dataclasses.asdict(sizes)}
            (folder / "settings.json").write_text(json.dumps(settings))
            try:
                lines = json.loads(program(context, f"gallery:{folder}").splitlines()[-1])
            except Unavailable as error:
                yield Result.not_run("gallery", _engine(place), error)
            else:
                yield from (Result(**line) for line in lines)


def draw(folder: Path, sizes: GallerySizes) -> None:
    """Draw unit features with planted clusters, and write them with the exact answers of queries.

    Args:
      folder: gets old.f32, float32[rows, size]; moved.npy, the positions of a tenth of them; new.npy,
        the features of the better model for these; queries.npy, of the better model too; and the scores
        of the exact answers.
      sizes: how many.
    """
    rng = np.random.default_rng(0)
    count, size = sizes.rows, sizes.size
    centres = rng.standard_normal((max(count // _CLUSTER, 2), size), np.float32)
    cluster = rng.integers(len(centres), size=count)
    rows = np.empty((count, size), np.float32)
    for start in range(0, count, _DRAWN):
        stop = min(start + _DRAWN, count)
        rows[start:stop] = _around(centres[cluster[start:stop]], _OLD, rng)
    moved = np.sort(rng.choice(count, count // 10, replace=False))
    new = _around(centres[cluster[moved]], _NEW, rng)
    queries = _around(centres[rng.integers(len(centres), size=sizes.queries)], _NEW, rng)
    rows.tofile(folder / "old.f32")
    answers = {_BEFORE: _exact(queries, rows, sizes.k), _NEW_ROWS: _exact(queries, new, sizes.k)}
    rows[moved] = new
    answers[_AFTER] = _exact(queries, rows, sizes.k)
    np.savez(folder / "answers.npz", **answers)
    for name, array in (("moved", moved), ("new", new), ("queries", queries)):
        np.save(folder / f"{name}.npy", array)


def _around(centres, spread, rng):
    found = centres + spread * rng.standard_normal(centres.shape, np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def _exact(queries, rows, k):
    return search(queries, rows, min(k, len(rows)))[0]


def one_store(folder: str) -> list[dict]:
    """Measure one store, in a process that `load` starts.

    Args:
      folder: holds what `draw` wrote, and settings.json: the place and the sizes.

    Returns:
      The fields of each `Result`.
    """
    settings = json.loads((Path(folder) / "settings.json").read_text())
    sizes, place = GallerySizes(**settings["sizes"]), settings["place"]
    with _emptied(place):
        measured = _Load(Path(folder), sizes, place)
        return [dataclasses.asdict(line) for line in measured.lines()]


@contextlib.contextmanager
def _emptied(place):
    """Delete the collections of a server afterwards; folders of the trial go by themselves."""
    try:
        yield
    finally:
        address, _, name = place.partition(":")[2].rpartition("/")
        if address.startswith("http"):
            import qdrant_client

            client = qdrant_client.QdrantClient(
                url=address, api_key=os.environ.get("QDRANT_API_KEY")
            )
            for collection in (name, manifest_name(name)):
                client.delete_collection(collection)


def opened(place: str, size: int) -> Store | Any:
    """Open a store of the library's, or as much of one as `_Load` asks for on a shard of Qdrant Edge.

    Args:
      place: see `compat_jax.gallery.open_store`; or "edge:FOLDER".
      size: of the features.

    Raises:
      UserError: an engine that is not installed, or see `open_store`.
    """
    if _engine(place) != _EDGE:
        return open_store(place, size)
    if importlib.util.find_spec("qdrant_edge") is None:
        raise UserError(
            "Qdrant Edge needs qdrant-edge-py, which is not installed: pip install qdrant-edge-py"
        )
    from launch.benchmarks.edge import EdgeStore

    return EdgeStore(Path(place.partition(":")[2]), size)


class _Load:
    """One store under load."""

    def __init__(self, folder: Path, sizes: GallerySizes, place: str):
        self.folder, self.sizes, self.place = folder, sizes, place
        self.engine = _engine(place)
        self.moved, self.new, self.queries = (
            np.load(folder / f"{name}.npy") for name in ("moved", "new", "queries")
        )
        self.answers = np.load(folder / "answers.npz")
        self.part = Work().part  # rows per write, as a gallery writes them by default
        self.peaks, self.bytes = [f"{_mb(peak_bytes())} before"], []
        self.store = opened(place, sizes.size)

    def lines(self) -> Iterator[Result]:
        """Measure everything, in the order in which a gallery meets it."""
        everything, has_index = Where(), self.engine != _MEMORY
        yield self.ingest()
        self._note("after ingest")
        if has_index:
            yield self.ask("before an index", everything, _BEFORE)
            yield self.refresh("index")
            self._note("after the index")
        yield self.ask("", everything, _BEFORE)
        yield self.ask("where version = 0, all rows", Where(version=0), _BEFORE)
        yield self.at_once()
        yield self.backfill()
        if has_index:
            self._note("after the backfill")
            yield self.ask("after a backfill of 10 %", everything, _AFTER)
            yield self.refresh("index after the backfill")
        name = "after a backfill of 10 %" + (" and refresh" if has_index else "")
        yield self.ask(name, everything, _AFTER)
        yield self.ask(f"{name}, where version = 1", Where(version=1), _NEW_ROWS)
        self._note("at the end")
        yield self._line("peak memory of the program", peak_bytes() / 1e6, "MB", self.peaks)
        yield from self._resident()
        if self.bytes:
            yield self._line("disk", self._disk() / 1e6, "MB", self.bytes)

    def ingest(self) -> Result:
        """Insert all rows."""
        count, size = self.sizes.rows, self.sizes.size
        seconds = 0.0
        with open(self.folder / "old.f32", "rb") as file:
            for start in range(0, count, self.part):
                at = np.arange(start, min(start + self.part, count))
                vectors = np.fromfile(file, np.float32, len(at) * size).reshape(-1, size)
                rows = _rows(at, 0, vectors)
                began = time.perf_counter()
                self.store.insert(rows)
                seconds += time.perf_counter() - began
        return self._rate("ingest", count, seconds)

    def backfill(self) -> Result:
        """Give a tenth of the rows the features of the better model."""
        seconds, updated = 0.0, 0
        for start in range(0, len(self.moved), self.part):
            at = self.moved[start : start + self.part]
            rows = _rows(at, 1, self.new[start : start + self.part])
            began = time.perf_counter()
            updated += self.store.update(rows, Where(version=0))
            seconds += time.perf_counter() - began
        counts = dict(self.store.counts())
        assert updated == len(self.moved) == counts[1], (updated, counts)
        return self._rate("update, 10 % of the rows", updated, seconds)

    def refresh(self, what: str) -> Result:
        """Have the store index what is not indexed."""
        began = time.perf_counter()
        self.store.refresh()
        seconds = time.perf_counter() - began
        note = "optimize, flush" if self.engine == _EDGE else "refresh, with its probe"
        return self._line(what, seconds, "s", [note])

    def ask(self, what: str, where: Where, known: str) -> Result:
        """Ask queries one at a time, and compare their answers with the exact ones."""
        k = self.answers[known].shape[1]
        self.store.search(self.queries[:1], k, where)  # compiles, opens files
        seconds, scores = [], []
        for query in self.queries:
            began = time.perf_counter()
            scores.append(self.store.search(query[None], k, where).scores)
            seconds.append(time.perf_counter() - began)
            if sum(seconds) > self.sizes.seconds and len(seconds) >= _LEAST_QUERIES:
                break
        share = recall(self.answers[known][: len(scores)], np.concatenate(scores))
        return Result.of(
            "gallery",
            f"{self.engine}, a query" + (f" {what}" if what else ""),
            Timing(tuple(seconds)),
            value=1e3 * float(np.median(seconds)),
            unit="ms",
            ratio=share,
            goal=f"recall at least {_LEAST_RECALL}",
            met=share >= _LEAST_RECALL,
            note=f"p99 {1e3 * np.quantile(seconds, 0.99):.3g} ms",
        )

    def at_once(self) -> Result:
        """Ask all queries in one call."""
        self.store.search(self.queries, self.sizes.k)
        began = time.perf_counter()
        self.store.search(self.queries, self.sizes.k)
        each = 1e3 * (time.perf_counter() - began) / len(self.queries)
        return self._line(f"{len(self.queries)} queries at once", each, "ms/query", [])

    def _line(self, what, value, unit, notes):
        what, note = f"{self.engine}, {what}", "; ".join(notes)
        return Result(measure="gallery", what=what, value=value, unit=unit, note=note)

    def _rate(self, what, count, seconds):
        return self._line(
            what, count / seconds, "rows/s", [f"{count:,} rows, {self.part:,} a write"]
        )

    def _resident(self):
        if found := resident_bytes():
            note = f"{_mb(found[1])} of it pages of files, which the system can take back"
            yield self._line("memory at the end", found[0] / 1e6, "MB", [note])

    def _note(self, when):
        self.peaks.append(f"{_mb(peak_bytes())} {when}")
        if self._folder().exists():
            self.bytes.append(f"{_mb(self._disk())} {when}")

    def _folder(self):
        where = self.place.partition(":")[2]
        names = {"lance": f"{where}.lance", _EDGE: where}
        return self.folder / names.get(self.engine, "none")  # of an absolute path: that path

    def _disk(self):
        found = [one.stat() for one in self._folder().rglob("*") if one.is_file()]
        # Some files are made larger than what is in them: a block that was never written takes none.
        return sum(min(one.st_size, 512 * one.st_blocks) for one in found)


def _engine(place):
    return place.partition(":")[0]


def _mb(count):
    return f"{count / 1e6:,.0f}"


def _rows(at, version, vectors):
    """Return rows as a gallery of photos has them."""
    count = len(at)
    return Rows(
        keys=[f"photos/{i % 1000:03d}/{i:08d}.jpg" for i in at],
        versions=np.full(count, version, np.int32),
        models=[_MODELS[version]] * count,
        contents=[f"{i:032x}" for i in at],
        payloads=[{"label": f"class {i % 1000}"} for i in at],
        vectors=vectors,
    )
