"""The terms of a check, and the rule that turns measured stages into a verdict."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated

from compat_jax.errors import UserError
from compat_jax.fields import Rule, check_fields
from compat_jax.gallery.verdict import GO, LOSS, NO_GO, Figure, Stage
from compat_jax.means import ROUNDING
from compat_jax.models import DTYPE_CHOICES, computed_in

_WHEN = {
    "switched": "the switch",
    "first": "the first fiftieth of a backfill",
    "begun": "the beginning of a backfill",
    "half": "the middle of a backfill",
    "finished": "a finished backfill",
    "half back": "a rollback in the middle of a backfill",
    "back": "a rollback after a backfill",
}


@dataclasses.dataclass(frozen=True)
class Terms:
    """Tolerances and settings of a check.

    Attributes:
      margin: loss of quality that counts as none.
      limit: loss of quality above which a switch is out of the question.
      k: answers of a query whose change is measured.
      far: share of pairs of different classes that today's threshold lets pass.
      threshold: score, a cosine, that your product compares with; by default the one of `far`, or
        without labels the one that nine tenths of today's best answers reach.
      dtype: of the networks' computation; see `Run`.
    """

    margin: Annotated[float, Rule("loss of quality that counts as none", low=0, high=1)] = 0.01
    limit: Annotated[float, Rule("loss of quality that forbids a switch", low=0, high=1)] = 0.05
    k: Annotated[int, Rule("answers of a query that are compared", low=1, high=1000)] = 10
    far: Annotated[float, Rule("false pairs that the threshold lets pass", above=0, below=1)] = 0.01
    threshold: Annotated[float | None, Rule("fixed score, a cosine", low=-1, high=1)] = None
    dtype: Annotated[str, Rule("of the computation", choices=DTYPE_CHOICES)] = "float32"

    def __post_init__(self):
        check_fields(self)
        object.__setattr__(self, "dtype", computed_in(self.dtype))
        if self.limit < self.margin:
            raise UserError(
                f"limit must be at least the margin, {self.margin:g}, got {self.limit:g}", "limit"
            )


DEFAULT_TERMS = Terms()


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
    if _loses(switched.value, terms.limit) and _loses(switched.high, terms.margin):
        return NO_GO, reasons
    if reasons:
        return LOSS, reasons
    return GO, (
        f"no stage of the upgrade loses more than {_size(terms.margin)}; the switch changes "
        f"the quality by {_points(switched)}",
    )


def _reason(name: str, change: Figure, terms: Terms) -> str:
    """Say what is lost at a stage; "" for nothing."""
    if not _loses(change.low, terms.margin):
        return ""
    when = _WHEN[name]
    if not _loses(change.high, terms.margin):
        return f"{when} may lose more than {_size(terms.margin)}: {_points(change)}"
    is_over = _loses(change.value, terms.limit)
    over = f", more than the limit of {100 * terms.limit:g}" if is_over else ""
    return f"{when} loses {-100 * change.value:.1f} points{over}: {_points(change)}"


def _loses(change: float, tolerance: float) -> bool:
    """Return whether a change loses more than a tolerance; a loss of just as much does not."""
    return change < -tolerance - ROUNDING


def _size(loss: float) -> str:
    return f"{100 * loss:g} point{'' if loss == 0.01 else 's'}"


def _points(change: Figure) -> str:
    low, value, high = (100 * x for x in (change.low, change.value, change.high))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
