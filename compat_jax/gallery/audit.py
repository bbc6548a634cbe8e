"""Every claim of a gallery's manifest, held against its chain, its rows and their pictures."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from compat_jax.chain import Version
from compat_jax.errors import UserError
from compat_jax.fields import Field, Rule, checked
from compat_jax.gallery.canary import LEAST_COSINE
from compat_jax.gallery.opened import Opened, select
from compat_jax.gallery.originals import embed
from compat_jax.gallery.store import Rows
from compat_jax.meter import Meter, counted

_NORM = 1e-3  # how far the norm of a feature may be from 1
_NAMED = 5
_SAMPLE = Field("sample", int, Rule("rows to embed again", low=0), None)


@dataclasses.dataclass(frozen=True)
class Audit:
    """Findings of an audit.

    Attributes:
      rows: rows that were read.
      embedded: rows whose pictures were embedded again.
      problems: {what is wrong: keys or numbers that it is wrong of}; empty if every claim holds.
    """

    rows: int
    embedded: int
    problems: Mapping[str, Sequence[str]]

    @property
    def passes(self) -> bool:
        """Return whether every claim holds."""
        return not self.problems

    def describe(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {**dataclasses.asdict(self), "passes": self.passes}

    def sentence(self) -> str:
        """Say it in lines."""
        read = (
            f"{counted(self.rows, 'row')} read, {counted(self.embedded, 'picture')} embedded again"
        )
        if self.passes:
            return f"{read}: every claim of the manifest holds"
        lines = [f"{read}: {len(self.problems)} claims do not hold:"]
        for problem, names in self.problems.items():
            more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
            lines.append(f"  {problem}: {', '.join(names[:_NAMED])}{more}")
        return "\n".join(lines)


def audit(gallery: Opened, sample: int | None = 256, *, seed: int = 0) -> Audit:
    """Check a gallery: its versions, every row, and pictures embedded again.

    A row must be there once, of a version and a fingerprint that the manifest has, with a feature of
    norm 1 (or zero). Its picture must be there with the content that the row says and, embedded by the
    row's own version, have a cosine of .999 with the row's feature. Rows that others write meanwhile
    may be reported.

    Args:
      gallery: to check.
      sample: rows whose pictures are embedded again, drawn at random; None for all.
      seed: of the sample.
    """
    if sample is not None:
        checked(_SAMPLE, sample)
    auditor = _Auditor(gallery)
    auditor.check_versions()
    total = sum(gallery.store.counts().values())
    count = total if sample is None else min(sample, total)
    chosen = np.random.default_rng(seed).choice(total, count, replace=False)
    with Meter(gallery.work.label("verify"), total, units="rows") as meter:
        for page in gallery.pages(vectors=True):
            auditor.check_rows(page)
            places = np.arange(auditor.read, auditor.read + len(page))
            auditor.check_features(select(page, np.flatnonzero(np.isin(places, chosen))))
            auditor.read += len(page)
            meter.update(len(page))
    if auditor.read != total:
        auditor.note(
            "rows read differ from rows counted", [f"{auditor.read} read, {total} counted"]
        )
    return Audit(auditor.read, auditor.embedded, dict(auditor.problems))


class _Auditor:
    """Takes down what is wrong."""

    def __init__(self, gallery: Opened):
        self.gallery, self.manifest = gallery, gallery.manifest()
        self.problems: dict[str, list[str]] = collections.defaultdict(list)
        self.versions: dict[int, Version] = {}
        self.read = self.embedded = 0
        self._last = -1

    def note(self, problem: str, names: Iterable[str]) -> None:
        """Take down what is wrong, and of which rows or versions."""
        if found := list(names):
            self.problems[problem] += found

    def check_versions(self) -> None:
        """Open every version of the manifest; those that are not what it says are not used."""
        for number in sorted(self.manifest.members):
            try:
                self.versions[number] = self.gallery.version(number, self.manifest)
            except UserError as error:
                self.note("versions that cannot be used", [f"{number} ({error})"])

    def check_rows(self, page: Rows) -> None:
        """Check what rows say of themselves."""
        members, ids = self.manifest.members, page.ids
        again = np.diff(ids, prepend=self._last) <= 0
        self._last = int(ids[-1])
        self.note("rows that are there twice, or out of order", _named(page, again))
        known = np.array([int(n) in members for n in page.versions])
        self.note("rows of versions that the manifest does not have", _named(page, ~known))
        models = [getattr(members.get(int(n)), "model", None) for n in page.versions]
        torn = np.array([a != b for a, b in zip(models, page.models, strict=True)])
        self.note("rows whose fingerprint is not their version's", _named(page, known & torn))
        assert page.vectors is not None, "asked for"
        norms = np.linalg.norm(page.vectors, axis=1)
        odd = (np.abs(norms - 1) > _NORM) & (norms > 0)
        self.note("rows whose feature is not of norm 1", _named(page, odd))

    def check_features(self, page: Rows) -> None:
        """Embed the pictures of rows again, each by the row's own version."""
        for number in np.unique(page.versions).tolist():
            if number not in self.versions:
                continue
            rows = select(page, np.flatnonzero(page.versions == number))
            found = embed(
                self.versions[number],
                rows.keys,
                self.gallery.originals.find,
                preprocessing=self.manifest.preprocessing,
                work=self.gallery.work,
                expected=rows.contents,
            )
            self.embedded += len(found.kept)
            self.note("pictures that are gone or cannot be read", found.problems.values())
            self.note("pictures that are others than their rows'", found.changed)
            assert rows.vectors is not None, "asked for"
            old = rows.vectors[found.kept]
            lengths = np.linalg.norm(old, axis=1) * np.linalg.norm(found.vectors, axis=1)
            products = np.einsum("nd,nd->n", old, found.vectors)
            differs = np.abs(products - lengths) > (1 - LEAST_COSINE) * lengths
            differs |= (lengths == 0) & (old != found.vectors).any(axis=1)
            self.note(
                "rows whose feature is not what their version makes of their picture",
                _named(select(rows, found.kept), differs),
            )


def _named(rows: Rows, mask: np.ndarray) -> list[str]:
    return [rows.keys[int(i)] for i in np.flatnonzero(mask)]
