"""The compatibility matrix of a chain under a metric, with its scores, as text and as numbers."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from compat_jax import compatibility, methods, statistics
from compat_jax.errors import UserError
from compat_jax.statistics import Flips, MatrixIntervals

Scores = dict[tuple[int, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The compatibility matrix of one metric.

    Attributes:
      metric: name of the retrieval metric.
      matrix: float64[T, T], rows = query version, columns = gallery version, 0 above the diagonal.
      tasks: label of each version, e.g. its task number.
      replaced: whether each version started from a pre-trained replacement.
      incomparable: pairs whose features have different sizes; they count as 0.
      unit: of the matrix, for pictures.
      method: name of the method that trained the chain.
      scores: {(t, k): float[queries]}, one score per query for every comparable pair; NaN where a query
        was left out.
      notes: sentences about how the numbers were made.
      labels: int[queries], class of each query; None if not known.
      class_names: of the queries.
    """

    metric: str
    matrix: np.ndarray
    tasks: tuple[str, ...]
    replaced: tuple[bool, ...]
    incomparable: tuple[tuple[int, int], ...] = ()
    unit: str = "%"
    method: str = ""
    scores: Scores = dataclasses.field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()
    labels: np.ndarray | None = dataclasses.field(default=None, repr=False)
    class_names: tuple[str, ...] = dataclasses.field(default=(), repr=False)

    @property
    def average_compatibility(self) -> float:
        """AC, in 0..1."""
        return compatibility.average_compatibility(self.matrix)

    @property
    def average_accuracy(self) -> float:
        """AA, in 0..1."""
        return compatibility.average_accuracy(self.matrix)

    @functools.cached_property
    def intervals(self) -> MatrixIntervals | None:
        """95 % intervals by a paired bootstrap over queries; None without scores."""
        return statistics.matrix_intervals(self.scores, len(self.matrix)) if self.scores else None

    @functools.cached_property
    def flips(self) -> Flips | None:
        """Positive and negative flips of every pair, see `statistics.flips`; None without scores."""
        return statistics.flips(self.scores, len(self.matrix)) if self.scores else None

    @property
    def within_noise(self) -> np.ndarray:
        """bool[T, T], true where the interval of [t, k] - [k, k] holds 0; false without scores."""
        if self.intervals is None:
            return np.zeros(self.matrix.shape, bool)
        return self.intervals.within_noise

    def flips_by_class(self) -> Flips:
        """Return the flips of each class's queries, float64[T, T, classes].

        Raises:
          UserError: an evaluation without scores, or without the queries' labels.
        """
        if not self.scores or self.labels is None:
            raise UserError(
                "flips by class need the queries' scores and labels: evaluate the chain"
            )
        return statistics.flips_by_class(
            self.scores,
            len(self.matrix),
            labels=self.labels,
            num_classes=max(len(self.class_names), int(self.labels.max()) + 1),
        )

    def summary(self) -> dict[str, Any]:
        """Return everything but the scores as JSON values; intervals and flips come from the scores.

        "unit" is that of pictures and tables, which show the values times 100; "scale" is theirs here.
        """
        several = len(self.matrix) > 1
        return {
            "metric": self.metric,
            "unit": self.unit,
            "scale": "shares in 0..1",
            "method": self.method,
            "matrix": self.matrix.tolist(),
            "tasks": list(self.tasks),
            "replaced": list(self.replaced),
            "incomparable": [list(pair) for pair in self.incomparable],
            "notes": list(self.notes),
            "average_compatibility": self.average_compatibility,
            "average_accuracy": self.average_accuracy,
            "average_accuracy_per_step": [
                float(x) for x in compatibility.average_accuracy_per_step(self.matrix)
            ],
            "backward_compatibility": (
                float(compatibility.backward_compatibility(self.matrix)) if several else None
            ),
            "forward_compatibility": (
                float(compatibility.forward_compatibility(self.matrix)) if several else None
            ),
            "intervals": self.intervals and self.intervals.summary(),
            "flips": self.flips
            and {name: statistics.without_nan(part) for name, part in self.flips._asdict().items()},
        }

    def table(self, name: str = "") -> str:
        """Write the matrix in per cent, with AC and AA.

        Args:
          name: of the method, for the title; the evaluation's own by default.

        Returns:
          Text; "x" marks an incompatible pair, whose cell is not above its column's self-test, "~" a
          pair whose difference to that self-test is within noise, above or below it, and "*" a row whose
          model was replaced.
        """
        good, noise = compatibility.compatible_pairs(self.matrix), self.within_noise
        title = methods.title(name or self.method)
        legend = "* model replaced, x not compatible" + (", ~ within noise" if noise.any() else "")
        lines = [
            f"{title + ': ' if title else ''}{self.metric} %, rows = query version, columns = gallery "
            f"version ({legend})",
            "      " + "".join(f"{task:>8}" for task in self.tasks),
        ]
        for t, row in enumerate(self.matrix):
            cells = []
            for k in range(t + 1):
                mark = "~" if noise[t, k] else "x" if k < t and not good[t, k] else " "
                cells.append(f"{100 * row[k]:7.2f}{mark}")
            star = "*" if self.replaced[t] else " "
            lines.append(f"{self.tasks[t]:>4}{star} " + "".join(cells))
        return "\n".join([*lines, self._averages(), *self.notes])

    def _averages(self) -> str:
        """AC and AA, with their intervals and the pairs within noise where the scores are known."""
        size = len(self.matrix)
        line = f"AC {self.average_compatibility:.2f}" if size > 1 else "AC -"
        line += f"   AA {100 * self.average_accuracy:.2f}"
        if self.intervals is None:
            return line
        aa = "AA {:.2f} to {:.2f}".format(*(100 * x for x in self.intervals.average_accuracy))
        if size == 1:
            return f"{line}   (95 %: {aa})"
        ac = "AC {:.2f} to {:.2f}".format(*self.intervals.average_compatibility)
        pairs, noisy = size * (size - 1) // 2, int(self.within_noise.sum())
        return f"{line}   (95 %: {ac}, {aa}; {noisy} of {pairs} pairs within noise)"

    def sentence(self, name: str = "") -> str:
        """Say in plain words what happened to old galleries when the model was replaced.

        Args:
          name: of the method; the evaluation's own by default.

        Returns:
          A sentence with the numbers that it rests on; "" without a replacement.
        """
        crossed = across_replacements(self.matrix, self.replaced)
        if not len(crossed):
            return ""
        own = np.diag(self.matrix)[np.cumsum(self.replaced) > 0]
        return (
            f"{methods.title(name or self.method)}: after a replacement, queries of the new model find "
            f"{100 * crossed.mean():.0f} % in galleries that older models embedded "
            f"(the new models' own galleries: {100 * own.mean():.0f} %)."
        )

    def meaning(self) -> str:
        """Say in one sentence what AC and AA mean here."""
        pairs = len(self.matrix) * (len(self.matrix) - 1) // 2
        if not pairs:
            return "One version alone has no older gallery to be compatible with."
        good = round(self.average_compatibility * pairs)
        noisy = int(self.within_noise.sum())
        doubt = f" In {noisy} the difference is within noise, either way." if noisy else ""
        return (
            f"AC: in {good} of {pairs} pairs, queries of the newer version do better on the older "
            f"version's gallery than the older version itself.{doubt} AA: mean of all cells."
        )

    def __str__(self) -> str:
        return "\n".join(filter(None, (self.table(), self.meaning(), self.sentence())))


class Evaluations(Mapping[str, Evaluation]):
    """The matrices of several metrics, by name; a single evaluation's attributes are the first's.

    Args:
      results: one for each metric, the first of them the main one.
    """

    def __init__(self, results: Sequence[Evaluation]):
        self._results = {result.metric: result for result in results}

    def __getitem__(self, metric: str) -> Evaluation:
        return self._results[metric]

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def __str__(self) -> str:
        return "\n\n".join(map(str, self._results.values()))

    @property
    def main(self) -> Evaluation:
        """The evaluation of the first metric."""
        return next(iter(self._results.values()))

    @property
    def matrix(self) -> np.ndarray:
        """The matrix of the first metric."""
        return self.main.matrix

    @property
    def average_compatibility(self) -> float:
        """AC of the first metric, in 0..1."""
        return self.main.average_compatibility

    @property
    def average_accuracy(self) -> float:
        """AA of the first metric, in 0..1."""
        return self.main.average_accuracy

    def summary(self) -> dict[str, Any]:
        """Return {metric: its summary} as JSON values."""
        return {name: result.summary() for name, result in self._results.items()}


def across_replacements(matrix: np.ndarray, replaced: Sequence[bool]) -> np.ndarray:
    """Return the cells whose query and gallery versions have a replacement between them.

    Args:
      matrix: float[T, T].
      replaced: whether each version started from a replacement.

    Returns:
      float[n], the accuracies of those cells.
    """
    epoch = np.cumsum(replaced)
    rows, columns = np.tril_indices(len(matrix), -1)
    return matrix[rows, columns][epoch[rows] != epoch[columns]]
