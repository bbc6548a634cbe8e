"""From a gallery in a store to one that can be shown: both features of each row, and who asks."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from compat_jax.demo.picks import PICKS, Pick, draw, spread
from compat_jax.demo.showcase import SHARES, Quality, Showcase
from compat_jax.errors import UserError
from compat_jax.gallery.gallery import Gallery
from compat_jax.gallery.opened import select
from compat_jax.gallery.originals import embed
from compat_jax.gallery.store import Rows, Where
from compat_jax.means import mean_score
from compat_jax.meter import Meter
from compat_jax.retrieval import metric as metrics
from compat_jax.retrieval.mixed import Both, Swap, measure

ASKING = 8  # versions that ask, where none are named
_METRIC = "recall@1"
_QUERIES, _SCORES = 500, 10**6  # of the quality: queries, and scores of these


def prepare(
    gallery: Gallery,
    *,
    old: int | None = None,
    new: int | None = None,
    asking: Sequence[int] | None = None,
    sample: int = 2000,
    picks: Sequence[Pick] | None = None,
) -> Showcase:
    """Read rows of a gallery and embed each by the version that it lacks. The store is not written to.

    Args:
      gallery: with a row, and the pictures of its rows.
      old: number of the version that the gallery comes from; the one of most rows by default.
      new: number of the version that would embed them again; the chain's last by default.
      asking: numbers of the versions that ask; by default the chain's last ones that fit, and the old
        and the new one.
      sample: rows to show, drawn at random; 0 for all.
      picks: pictures to ask with; by default those of some rows.

    Raises:
      UserError: no row, no picture of any, versions that do not fit the gallery, or pictures of another
        size than the versions' where nobody says how they are prepared.
    """
    counts = gallery.store.counts()
    if not sum(counts.values()):
        raise UserError("the gallery has no rows yet: index pictures first")
    new = gallery.chain.numbers()[-1] if new is None else new
    old = _comes_from(gallery, counts, new) if old is None else old
    if old == new:
        raise UserError(f"the old and the new version are both version {new}: name two", "old")
    asking = _asking(gallery, old, new) if asking is None else _fitting(gallery, asking)
    rows = _sample(gallery, sum(counts.values()), sample)
    both = _embedded(gallery, rows, old=old, new=new)
    made = Showcase(
        gallery=gallery,
        old=old,
        new=new,
        asking=tuple(asking),
        rows=both.rows,
        before=both.before,
        after=both.after,
        renewed=both.renewed,
        total=sum(counts.values()),
        left_out=len(rows) - len(both.rows),
        picks=(),
    )
    made.ask(made.picture(0))  # compiles, so that nobody waits for it later
    picks = _picks(made) if picks is None else picks
    return dataclasses.replace(made, picks=tuple(picks), quality=_quality(made))


def _comes_from(gallery: Gallery, counts: Mapping[int, int], new: int) -> int:
    """Return the version of most rows but the new one; without such the one before the last switch."""
    others = {number: count for number, count in counts.items() if number != new and count}
    if others:
        return max(others, key=lambda number: (others[number], -number))
    manifest = gallery.manifest()
    found = next((n for n in (manifest.previous, manifest.query) if n not in (None, new)), None)
    return gallery.chain.numbers()[0] if found is None else found


def _fitting(gallery: Gallery, numbers: Sequence[int]) -> list[int]:
    for number in numbers:
        gallery.version(number)
    return sorted(set(numbers))


def _asking(gallery: Gallery, old: int, new: int) -> list[int]:
    found = _fitting(gallery, (old, new))
    for number in reversed(gallery.chain.numbers()):
        if len(found) >= ASKING:
            break
        try:
            found = _fitting(gallery, [*found, number])
        except UserError:
            continue  # of another kind, which the gallery's manifest does not admit
    return found


def _sample(gallery: Gallery, total: int, sample: int) -> Rows:
    """Read rows drawn at random, with features."""
    if not sample or sample >= total:
        pages = list(gallery.pages(vectors=True))
        parts = {
            name: [one for page in pages for one in getattr(page, name)]
            for name in ("keys", "models", "contents", "payloads")
        }
        versions, vectors = (
            np.concatenate([getattr(page, name) for page in pages])
            for name in ("versions", "vectors")
        )
        return Rows(versions=versions, vectors=vectors, **parts)
    ids = np.concatenate([page.ids for page in gallery.pages()])
    chosen = np.sort(ids[draw(len(ids), sample)])
    return gallery.store.rows(Where(ids=chosen), limit=len(chosen), vectors=True)


class _Both(NamedTuple):
    """Rows with both features, see `Showcase`."""

    rows: Rows
    before: np.ndarray
    after: np.ndarray
    renewed: int


def _embedded(gallery: Gallery, rows: Rows, *, old: int, new: int) -> _Both:
    """Embed each row by the version that it lacks, in the order in which a backfill goes."""
    rows = select(rows, np.lexsort((rows.ids, rows.versions, rows.versions != new)))
    renewed = np.flatnonzero(rows.versions == new)
    rest = np.flatnonzero(rows.versions != new)
    done, by_old = _embed(gallery, select(rows, renewed), old)
    left, by_new = _embed(gallery, select(rows, rest), new)
    kept = select(rows, np.concatenate([renewed[done], rest[left]]))
    if not len(kept):
        raise UserError(
            "no picture of the gallery's rows is where it was, as it was: give the folder that they "
            "are in",
            "root",
        )
    assert kept.vectors is not None, "asked for"
    stored = np.split(kept.vectors, [len(done)])
    kept.versions[: len(done)] = old
    before, after = np.concatenate([by_old, stored[1]]), np.concatenate([stored[0], by_new])
    return _Both(dataclasses.replace(kept, vectors=None), before, after, len(done))


def _embed(gallery: Gallery, rows: Rows, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the rows whose pictures are there, int64[m], and float32[m, d]."""
    preprocessing = gallery.manifest().preprocessing
    label = gallery.work.label(f"features of version {number}") if len(rows) else None
    with Meter(label, len(rows), units="pictures") as meter:
        found = embed(
            gallery.version(number),
            rows.keys,
            gallery.originals.find,
            preprocessing=preprocessing,
            work=gallery.work,
            expected=rows.contents,
            tick=meter.update,
        )
    return found.kept, found.vectors


def _picks(shown: Showcase) -> list[Pick]:
    """Take pictures of rows."""
    rows = draw(len(shown.rows), 0, seed=1).tolist()
    chosen = [rows[place] for place in spread([shown.label(row) for row in rows], PICKS)]
    return [Pick(shown.picture(row), shown.label(row)) for row in chosen]


def _quality(shown: Showcase) -> Quality | None:
    """Let rows ask, each leaving itself out."""
    labels = [shown.label(row) for row in range(len(shown.rows))]
    names: dict[str | None, int] = {None: -1}
    codes = np.array([names.setdefault(label, len(names) - 1) for label in labels])
    able = np.flatnonzero((codes >= 0) & (shown.rows.versions == shown.old))
    able = able[np.bincount(codes[codes >= 0], minlength=1)[codes[able]] > 1]
    able = np.sort(able[draw(len(able), min(_QUERIES, 1 + _SCORES // len(labels)), seed=2)])
    if not len(able):
        return None
    rows, metric = Both(shown.before, shown.after, codes), metrics.get(_METRIC)
    order, found = np.arange(len(labels)), []
    for features in (shown.before[able], shown.after[able]):
        searcher = Swap(Both(features, features, codes[able], able), rows, one_space=True)
        scores = measure(searcher, [metric], order, SHARES)[metric.name].scores
        found.append(np.array([mean_score(cell) for cell in scores]))
    return Quality(len(able), *found)
