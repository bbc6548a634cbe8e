"""The result of a check: figures by stage of the upgrade, and a verdict in words and JSON."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from compat_jax.definition_1 import PairShares
from compat_jax.statistics import without_nan

GO, LOSS, NO_GO = "go", "go with loss", "no-go"
# The stages of an upgrade: who asks, and who embedded the rows.
STAGES = {
    "today": "version {old} asks, its own rows",
    "switched": "version {new} asks, rows of version {old}",
    "first": "version {new} asks, a fiftieth of the rows its own",
    "begun": "version {new} asks, a tenth of the rows its own",
    "half": "version {new} asks, half of the rows its own",
    "finished": "version {new} asks, its own rows",
    "half back": "version {old} asks, half of the rows of version {new}",
    "back": "version {old} asks, rows of version {new}",
}
_WORST = 5  # classes named in the text


class Figure(NamedTuple):
    """A mean over the queries with its interval.

    Attributes:
      value: the mean.
      low: lower end of the interval.
      high: upper end.
    """

    value: float
    low: float
    high: float


class Stage(NamedTuple):
    """Answers at a stage of the upgrade.

    Attributes:
      quality: of the answers, in 0..1.
      change: of the quality since today, paired by query.
      kept: share of today's answers that are among these.
      new_rows: share of these answers that are rows of the new version.
    """

    quality: Figure
    change: Figure
    kept: Figure
    new_rows: float


class AtThreshold(NamedTuple):
    """Pairs and answers that pass a fixed score at a stage.

    Attributes:
      score: mean cosine of what should pass: pairs of one class; each query's best answer without
        labels.
      accepted: share of these at or above the threshold.
      falsely: share of pairs of different classes at or above it; NaN without labels.
      moved: threshold that lets as many false pairs pass as today's, or as many answers without
        labels.
    """

    score: float
    accepted: float
    falsely: float
    moved: float


class ClassFlips(NamedTuple):
    """Effect of the switch on the queries of a class.

    Attributes:
      name: of the class.
      queries: how many there are.
      gained: share that was wrong and becomes right.
      lost: share that was right and becomes wrong.
    """

    name: str
    queries: int
    gained: float
    lost: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """Everything that was measured by querying.

    Attributes:
      metric: name of the metric of quality.
      unit: of the quality.
      labelled: whether the quality is of labels, or of agreement with the new version's own answers.
      queries: how many asked.
      gallery: number of pictures that answer.
      k: answers compared a query.
      stages: by name, see `STAGES`.
      threshold: the fixed score, a cosine.
      at_threshold: by stage.
      flips: of all queries at the switch; None without labels.
      classes: by class, the greatest net loss first; () without labels.
      definition_1: shares of pairs of gallery pictures; None without labels.
    """

    metric: str
    unit: str
    labelled: bool
    queries: int
    gallery: int
    k: int
    stages: Mapping[str, Stage]
    threshold: float
    at_threshold: Mapping[str, AtThreshold]
    flips: ClassFlips | None = None
    classes: tuple[ClassFlips, ...] = ()
    definition_1: PairShares | None = None

    def summary(self) -> dict[str, Any]:
        """Return everything as JSON values; null where there is no number."""
        return {
            **{
                name: getattr(self, name)
                for name in ("metric", "unit", "labelled", "queries", "gallery", "k")
            },
            "stages": {
                name: {
                    **{part: _numbers(getattr(stage, part)) for part in ("quality", "change")},
                    "kept": _numbers(stage.kept),
                    "new_rows": stage.new_rows,
                }
                for name, stage in self.stages.items()
            },
            "threshold": without_nan(self.threshold),
            "at_threshold": {name: _numbers(at) for name, at in self.at_threshold.items()},
            "flips": self.flips and _numbers(self.flips),
            "classes": [_numbers(each) for each in self.classes],
            "definition_1": self.definition_1 and _numbers(self.definition_1),
        }


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The answer to whether a new version may answer in the gallery of an old one.

    Attributes:
      word: "go", "go with loss" or "no-go".
      reasons: sentences that say why.
      not_known: sentences on what the figures do not tell.
      old: number of the version of today.
      new: number of the version that is to answer.
      sha256: of the variables of both, old and new.
      measured: the figures; None where the versions cannot be compared at all.
    """

    word: str
    reasons: tuple[str, ...]
    old: int
    new: int
    sha256: tuple[str, str]
    not_known: tuple[str, ...] = ()
    measured: Measured | None = None

    @property
    def refused(self) -> bool:
        """Return whether the versions cannot be compared at all."""
        return self.measured is None

    def summary(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "verdict": self.word,
            "refused": self.refused,
            "reasons": list(self.reasons),
            "not_known": list(self.not_known),
            "old": {"version": self.old, "sha256": self.sha256[0]},
            "new": {"version": self.new, "sha256": self.sha256[1]},
            "measured": self.measured and self.measured.summary(),
        }

    def text(self) -> str:
        """Return the verdict, its figures and its reasons as lines of text."""
        lines = [f"{self.word}: version {self.new} in the place of version {self.old}"]
        lines += [f"  - {reason}" for reason in self.reasons]
        if self.measured is not None:
            lines += _stages(self.measured, self.old, self.new)
            lines += _thresholds(self.measured)
            lines += _pairs(self.measured)
        lines += [f"Not known: {sentence}" for sentence in self.not_known]
        return "\n".join(lines)


def _stages(found: Measured, old: int, new: int) -> list[str]:
    who = {name: STAGES[name].format(old=old, new=new) for name in found.stages}
    width = max(map(len, who.values()))
    lines = [
        f"{found.metric} ({found.unit}): {found.queries:,} queries, {found.gallery:,} pictures",
        f"{'':{width + 12}} {'%':>5} {'95 % interval':>14} {'change':>8} {'kept':>5} {'new rows':>9}",
    ]
    for name, stage in found.stages.items():
        quality = f"{_percent(stage.quality.value):>5} {_between(stage.quality):>14}"
        change = "" if name == "today" else f"{100 * stage.change.value:+.1f}"
        shares = f"{_percent(stage.kept.value, 0):>5} {_percent(stage.new_rows, 0):>9}"
        lines.append(f"  {name:9} {who[name]:{width}} {quality} {change:>8} {shares}")
    return [*lines, f"  kept: share of today's {found.k} nearest that are still among them"]


def _thresholds(found: Measured) -> list[str]:
    what = "pairs of a class" if found.labelled else "best answers"
    lines = [f"At the score {found.threshold:.3f}:"]
    for name, at in found.at_threshold.items():
        others = "" if math.isnan(at.falsely) else f", {_percent(at.falsely)} % of other pairs"
        moved = "" if name == "today" else f"; today's share again at {at.moved:.3f}"
        lines.append(f"  {name:9} {_percent(at.accepted):>5} % of {what}{others} pass{moved}")
    return lines


def _pairs(found: Measured) -> list[str]:
    lines = []
    if found.flips is not None:
        gained, lost = found.flips.gained, found.flips.lost
        lines.append(
            f"The switch puts {_percent(gained)} % of queries right and {_percent(lost)} % wrong."
        )
        worse = [each for each in found.classes if each.lost > each.gained][:_WORST]
        lines += [
            f"  {each.name}: {_percent(each.lost, 0)} % of {each.queries} lost, "
            f"{_percent(each.gained, 0)} % gained"
            for each in worse
        ]
    if found.definition_1 is not None:
        shares = found.definition_1
        lines.append(
            f"Definition 1 holds for {_percent(shares.same_class)} % of pairs of a class and "
            f"{_percent(shares.other_class)} % of other pairs."
        )
    return lines


def _numbers(found: Any) -> dict[str, Any]:
    return {
        name: without_nan(value) if isinstance(value, float) else value
        for name, value in found._asdict().items()
    }


def _percent(share: float, digits: int = 1) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.{digits}f}"


def _between(figure: Figure) -> str:
    return f"{100 * figure.low:.1f} to {100 * figure.high:.1f}"
