"""Watch a task: its metrics to the progress bar, the log and TensorBoard; values that are not finite."""

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compat_jax.errors import Diverged
from compat_jax.meter import Meter
from compat_jax.training.log import Board, Log
from compat_jax.training.optimizer import Settings, learning_rate
from compat_jax.training.state import TrainState
from compat_jax.training.step import NO_STEP, Metrics
from compat_jax.training.task import Task

NOTE_SECONDS = 2.0  # between two texts of the bar, and before the first number
LINE_SECONDS = 10.0  # between two lines of the log within an epoch


@dataclasses.dataclass
class Span:
    """Steps since a line.

    Attributes:
      steps: number of them.
      timed: those whose seconds count: the first step of a program is mostly its compilation.
      seconds: that these took, without saves and validation.
      before: sum of the metrics when the span began; None for zero.
    """

    steps: int = 0
    timed: int = 0
    seconds: float = 0.0
    before: Metrics | None = None

    def count(self, steps: int, seconds: float | None) -> None:
        """Add steps, and their seconds if they count."""
        self.steps += steps
        if seconds is not None:
            self.timed += steps
            self.seconds += seconds

    def rate(self) -> float | None:
        """Return steps per second; None where only compilation was timed."""
        return self.timed / max(self.seconds, 1e-9) if self.timed else None

    def mean(self, total: Metrics) -> Metrics:
        """Return the mean over the steps, in float32."""
        if self.before is not None:
            terms = {k: v - self.before.terms[k] for k, v in total.terms.items()}
            loss, accuracy = total.loss - self.before.loss, total.accuracy - self.before.accuracy
            total = Metrics(loss, accuracy, total.broken, terms)
        return total.over(np.float32(self.steps))


@dataclasses.dataclass
class Watch:
    """Of one task, from the step at which it begins or resumes.

    Lines at the end of epochs, and at saves where the session asks for some, hold means over the steps
    since the one before. Lines between them come every `LINE_SECONDS`, or every `log_every` steps, and
    hold means over the steps since any line.

    Attributes:
      task: the task.
      log: of the run.
      board: TensorBoard's files.
      meter: of the steps of the run.
      step: done so far.
      is_cold: whether the first step to come compiles the program.
      log_every: steps between lines; 0 for every `LINE_SECONDS`.
    """

    task: Task
    log: Log
    board: Board
    meter: Meter
    step: int
    is_cold: bool = True
    log_every: int = 0

    def __post_init__(self):
        self.began = self._compiled_at = time.monotonic()
        self.text, self._compiled = "", ""  # loss, accuracy and rate
        self._long, self._short = Span(), Span()
        self._noted = self._lined = 0.0  # neither so far
        self._counted, self._clock, self._validated = self.step, time.perf_counter(), ""

    def notes(self, total: Metrics) -> dict[str, Any]:
        """Return what goes with a saved state, as JSON values.

        Args:
          total: sum of the metrics since the last line at the end of an epoch or a save.
        """
        spans = [[s.steps, s.timed, s.seconds, _plain(s.before)] for s in (self._long, self._short)]
        return {"total": _plain(total), "spans": spans}

    def restore(self, notes: Mapping[str, Any]) -> Metrics | None:
        """Go on from what was saved.

        Args:
          notes: see `notes`; {} at the beginning of a task.

        Returns:
          The sum to go on with, on the host; None to begin one.
        """
        if "spans" not in notes:
            return None
        self._long, self._short = (
            Span(steps, timed, seconds, _metrics(before))
            for steps, timed, seconds, before in notes["spans"]
        )
        return _metrics(notes["total"])

    def start_clock(self) -> None:
        """Begin to time steps; what was between is not counted."""
        self._clock = time.perf_counter()

    def tick(self, step: int, total: Metrics) -> None:
        """Count a step that is under way, and wait for it where it is time for a number.

        Args:
          step: steps done with it.
          total: see `observe`.
        """
        self._count(step)
        now = time.monotonic()
        if self.is_cold or self._wants_note(now) or self._wants_line(step, now):
            self.observe(step, total)

    def observe(self, step: int, total: Metrics, show: bool = True) -> None:
        """Wait for a step and take its metrics.

        Args:
          step: steps done.
          total: sum of the metrics since the last line at the end of an epoch or a save.
          show: whether to write what is due.

        Raises:
          Diverged: a loss was not finite.
        """
        host: Metrics = jax.tree.map(np.asarray, total)
        if host.broken != NO_STEP:
            self._diverged("loss", int(host.broken))
        self._count(step)
        fresh, self.step = step - self.step, step
        seconds, self._clock = time.perf_counter() - self._clock, time.perf_counter()
        was_cold = self.is_cold
        for span in (self._long, self._short):
            span.count(fresh, None if was_cold else seconds)
        if was_cold and fresh:
            self.is_cold, self._compiled = False, f"compiled in {seconds:.0f} s"
            self._compiled_at = time.monotonic()
            self.meter.restart()
        if show:
            self._show(host, was_cold)

    def _show(self, total, was_cold):
        now = time.monotonic()
        if self._wants_note(now):
            is_first, self._noted = not self._noted, now
            self._note(self._short, total)
            if is_first:
                self.meter.speak()
        if self._wants_line(self.step, now) and (self.log_every or not was_cold):
            self._write(self._short, total)
            self._short = Span(before=total)

    def report(self, total: Metrics) -> None:
        """Write the line of an epoch or a save; the sum begins anew after it."""
        if not self._long.steps:
            return
        host: Metrics = jax.tree.map(np.asarray, total)
        self._note(self._long, host)
        self._write(self._long, host)
        self._long, self._short = Span(), Span()

    def validated(self, step: int, results: Mapping[str, float]) -> None:
        """Show the results of a validation after a step."""
        values = {name: round(value, 6) for name, value in results.items()}
        self.log.add(self.task.index, self.step, self._epoch(), {"validation": values})
        self.board.add(self.step, values, "validation/")
        self._validated = ", ".join(f"{name} {value:.3f}" for name, value in results.items())
        self.meter.say(self._with_validation())

    def check(self, state: TrainState) -> None:
        """Refuse weights that are not finite.

        Raises:
          Diverged: some are not.
        """
        if not bool(_all_finite()((state.params, state.batch_stats))):
            self._diverged("weights", self.step - 1)

    def _count(self, step):
        count = self.meter.skip if self.is_cold else self.meter.update
        count(step - self._counted)
        self._counted = step

    def _wants_note(self, now):
        return now - (self._noted or self.began) >= NOTE_SECONDS

    def _wants_line(self, step, now):
        if self.log_every:
            return step % self.log_every == 0
        wait = LINE_SECONDS if self._lined else NOTE_SECONDS
        return now - (self._lined or self._compiled_at) >= wait

    def _note(self, span, total):
        if not span.steps:
            return
        mean, rate = span.mean(total), span.rate()
        speed = self._compiled
        if rate is not None:
            speed = f"{rate * self.task.plan.shape[1]:,.0f} images/s"
        self.text = f"loss {mean.loss:z.3f}, accuracy {mean.accuracy:.2f}, {speed}"
        self.meter.say(self._with_validation())

    def _with_validation(self):
        seen = f", validation {self._validated}" if self._validated else ""
        return f"{self.task.label}, {self.text}{seen}"

    def _write(self, span, total):
        if not span.steps:
            return
        mean, rate, self._lined = span.mean(total), span.rate(), time.monotonic()
        images = None if rate is None else round(rate * self.task.plan.shape[1], 1)
        line = {
            "lr": self._learning_rate(),
            "loss": float(mean.loss),
            "terms": {name: float(value) for name, value in mean.terms.items()},
            "accuracy": float(mean.accuracy),
            "images_per_second": images,
            "steps": span.steps,
        }
        self.log.add(self.task.index, self.step, self._epoch(), line)
        self.board.add(self.step, {k: v for k, v in line.items() if k != "steps"})

    def _epoch(self):
        return (self.step - 1) // self.task.steps_per_epoch

    def _learning_rate(self):
        """The rate of the last step; None where an optax transformation keeps it to itself."""
        settings, task = self.task.run.optimizer, self.task
        if not isinstance(settings, Settings):
            return None
        position: Any = [np.int32(n) for n in (self._epoch(), task.run.epochs)]
        within: Any = [np.int32(n) for n in (self.step - 1, task.steps_per_epoch)]
        rate = learning_rate(settings, *position, step=within[0], steps_per_epoch=within[1])
        return float(f"{float(rate):.7g}")

    def _diverged(self, what, step):
        epoch = step // self.task.steps_per_epoch
        verb = "is" if what == "loss" else "are"
        raise Diverged(
            f"{self.task.label} diverged: the {what} {verb} not finite at step {step} (epoch "
            f"{epoch}); nothing of this task was published. Lower the learning rate, and give the "
            "run another workdir",
            "optimizer.lr",
        )


def _plain(metrics):
    return jax.tree.map(lambda value: np.asarray(value).item(), metrics and metrics._asdict())


def _metrics(saved):
    """The metrics of which `_plain` made JSON values."""
    if saved is None:
        return None
    terms = {name: np.float32(value) for name, value in saved["terms"].items()}
    sums = np.float32(saved["loss"]), np.float32(saved["accuracy"])
    return Metrics(*sums, np.int32(saved["broken"]), terms)


@functools.cache
def _all_finite():
    def check(tree):
        floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, np.floating)]
        return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()

    return jax.jit(check)
