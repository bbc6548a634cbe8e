"""The steps of one task: batches to the devices, saves, validation, an orderly stop."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from compat_jax import hosts, memory
from compat_jax import mesh as meshes
from compat_jax.data import streaming
from compat_jax.data.dataset import Dataset
from compat_jax.data.reading import LazyImages
from compat_jax.errors import Stopped, UserError
from compat_jax.meter import SECONDS, Meter, duration
from compat_jax.session import Session
from compat_jax.training.log import Board
from compat_jax.training.state import TrainState
from compat_jax.training.step import DeviceData, Feed, Metrics, Trainer, batch_key
from compat_jax.training.task import Task, image_bytes
from compat_jax.training.validation import (
    Interrupted,
    Validation,
    check_validation,
    previous_version,
)
from compat_jax.training.watch import Watch
from compat_jax.training.workdir import Workdir

# An epoch on an accelerator may take less than its save.
_SAVE_SECONDS = 30.0
# Seconds of a dispatch on an accelerator: between them the host asks, notes and logs.
_FAST, _SLOW = 1.0, 4.0
_SHARE = 0.5  # of the free memory, that decoded files may take
_STREAMED = 1 << 30  # bytes of them on a device at once, where they would take more
_SHOWN = 16  # pictures of a batch on TensorBoard


class Fitted(NamedTuple):
    """Result of training a task.

    Attributes:
      trainer: of the task.
      variables: as the chain holds them.
      step: of the task, after which the variables were these.
      validation: {measure: share} of these variables; {} without validation.
    """

    trainer: Trainer
    variables: Any
    step: int
    validation: Mapping[str, float]


@dataclasses.dataclass
class Fit:
    """Trains tasks on one data set, saving on the way.

    Attributes:
      data: all images and labels.
      session: where and how.
      workdir: takes the state and the log.
      validation: held-out pictures of the same classes; None for none.
    """

    data: Dataset
    session: Session
    workdir: Workdir
    validation: Dataset | None = None

    def __post_init__(self):
        self.mesh = self.session.devices()
        self.board = Board(self.session.tensorboard)
        self.on_device, self.warm = None, None  # the trainer whose program was compiled last
        self.pace = 1  # steps a dispatch
        self.budget = self.session.device_budget or self._spare()
        if not self.budget or image_bytes(self.data) * len(self.data) <= self.budget:
            self.on_device = self._place(np.asarray(self.data.images), self.data.labels)

    def _spare(self) -> int:
        """Bytes of pictures on a device by default: 0, which is all, unless they would fill the host."""
        free, size = memory.free_bytes(), image_bytes(self.data) * len(self.data)
        in_files = isinstance(self.data.images, LazyImages)
        is_short = in_files and free is not None and size > _SHARE * free
        return min(_STREAMED, size // 4) if hosts.any_process(is_short) else 0

    def __call__(self, task: Task, meter: Meter, longest: int) -> Fitted:
        """Train a task.

        Args:
          task: the task.
          meter: of the steps of the run.
          longest: steps of the longest task, to which every plan is padded: one program for all.

        Raises:
          Stopped: after saving, when the session asked to stop.
          Diverged: the loss or the weights are not finite.
          UserError: validation that does not fit; fewer epochs than are done.
        """
        check_validation(self.data, self.validation, task.run)
        trainer = task.trainer(self.mesh)
        variables = task.starting_variables(trainer, self.data.images.shape[1:])
        frozen = task.freeze(trainer, variables, self.data)
        begun = trainer.create_state(variables, task.info())
        state = self.workdir.checkpointer.restore(task.index, begun)
        state = state.replace(task=begun.task)  # the epochs to come may have changed
        step = int(state.step)
        _check_epochs(task, step)
        self.workdir.log.rewind(task.index, step)
        meter.skip(step)
        meter.say("compiling" if self.warm is not trainer else "")
        course = _Course(self, task, trainer, frozen, watch=self._watch(task, trainer, meter, step))
        with contextlib.closing(self.board):
            self.board.begin(task.label, step)
            state = course.run(state, longest)
        return course.fitted(state)

    def publish(
        self, task: Task, data: Dataset, config: Mapping[str, Any], *, meter: Meter, longest: int
    ) -> None:
        """Train a task and add it to the chain.

        Args:
          task: the task.
          data: that the record describes.
          config: settings for the record.
          meter, longest: see `__call__`.
        """
        began = time.monotonic()
        trainer, variables, step, results = self(task, meter, longest)
        record = task.record(trainer, data, config)
        if results:
            shares = {name: round(value, 6) for name, value in results.items()}
            learnt = {**record.learnt, "validation": {"step": step, **shares}}
            record = dataclasses.replace(record, learnt=learnt)
        variables = trainer.head.trim(variables, task.num_seen)
        self.workdir.chain.add(variables, record, task.index)
        self.workdir.checkpointer.clear()
        seconds = time.monotonic() - began
        if hosts.is_first() and (not self.session.progress or seconds >= SECONDS):
            note = f", {meter.note.partition(', ')[2]}" if meter.note else ""
            meter.print(
                f"{task.label}: version {task.index} of {self.workdir.chain.path} after "
                f"{task.steps} steps in {duration(seconds)}{note}"
            )

    def _watch(self, task, trainer, meter, step):
        return Watch(
            task,
            self.workdir.log,
            self.board,
            meter,
            step=step,
            is_cold=self.warm is not trainer,
            log_every=self.session.log_every,
        )

    def batches(self, plan: np.ndarray, first: int, longest: int) -> tuple[Iterator[Any], Any]:
        """Return the data of a plan's steps, and the plan as positions in them.

        Args:
          plan: int32[steps, batch].
          first: step to begin with.
          longest: steps to which the plan is padded.

        Returns:
          An iterator of (data on the devices, the step until which they serve), and int32[longest,
          batch] on the devices.
        """
        steps, size = plan.shape

        def put(plan):
            return meshes.shard_batch(plan, self.mesh, axis=1)

        if self.on_device is not None:
            whole: Iterator[Any] = (x for x in [(self.on_device, steps)])
            return whole, put(np.pad(plan, ((0, longest - steps), (0, 0))))
        chunk = streaming.steps_a_chunk(image_bytes(self.data), size, self.budget)

        def place(chunk):
            return self._place(chunk.images, chunk.labels), chunk.stop

        content = self.data.images, self.data.labels
        batches = streaming.chunks(*content, plan, first=first, chunk=chunk, place=place)
        return batches, put(streaming.ring_plan(longest, size, chunk))

    def _place(self, images, labels):
        with memory.shortage("keep pictures on the host, device_budget", "device_budget"):
            return meshes.device_put(DeviceData(images, labels), meshes.replicated(self.mesh))


@dataclasses.dataclass
class _Course:
    """One task under way.

    Attributes:
      fit: what it belongs to.
      task, trainer, frozen: of the task.
      watch: takes the metrics.
      total: their sum since the last line at the end of an epoch or a save.
      validated: the last step that was validated.
      results: of that validation.
      best: step of the best validation, where the run keeps the best.
      best_results: of that step.
    """

    fit: Fit
    task: Task
    trainer: Trainer
    frozen: Any
    watch: Watch

    def __post_init__(self):
        task, fit = self.task, self.fit
        self.exam: Validation | None = None
        if fit.validation is not None:
            previous = previous_version(task, fit.workdir.chain)
            session = dataclasses.replace(fit.session, mesh=fit.mesh)
            self.exam = Validation(fit.validation, task, self.trainer, session, previous)
        self.judge: str | None = None
        if self.exam is not None and task.run.keep != "last":
            self.judge = self.exam.judge(task.run.keep)
        self.save_every = fit.session.save_every or task.steps_per_epoch
        self.saved = time.monotonic()
        notes = fit.workdir.checkpointer.notes(task.index, self.watch.step)
        total = self.watch.restore(notes)
        self.total: Metrics = self.trainer.no_metrics()
        if total is not None:
            self.total = meshes.device_put(total, meshes.replicated(fit.mesh))
        self.validated, self.results = notes.get("validated", 0), notes.get("results", {})
        self.best, self.best_results = None, {}
        if self.judge is not None:
            self.best, self.best_results = notes.get("best"), notes.get("best_results", {})

    def run(self, state: TrainState, longest: int) -> TrainState:
        """Do the steps that are left."""
        step, end = int(state.step), 0
        if self._is_due(step) and not self._validate(state):  # stopped before it was done
            raise Stopped("stopped and saved")
        batches: Any
        batches, plan = self.fit.batches(self.task.plan, step, longest)
        with contextlib.closing(batches):
            while (step := int(state.step)) < self.task.steps:
                self.watch.start_clock()
                if step >= end:
                    on_device, end = next(batches)
                self._show(step)
                feed, stop = Feed(on_device, plan), min(self._next_stop(step), end)
                with memory.shortage(
                    "take a smaller batch_size, smaller pictures or remat='blocks'"
                ):
                    self._check_memory(state, feed)
                    state = self._advance(state, feed, stop)
                    self._settle(state)
        return state

    def _check_memory(self, state, feed):
        """Compile the first step, which has to be done anyway, and see that it fits (on a CPU)."""
        trainer, mesh = self.trainer, self.fit.mesh
        is_new = self.fit.warm is not trainer and trainer.dispatches_each_step
        if is_new and not hosts.is_distributed():
            compiled = trainer.lower(state, self.frozen, feed, self.total).compile()
            free, batch_size = memory.free_bytes(), feed.plan.shape[1]
            memory.check(compiled, mesh, batch_size, free, remat=trainer.remat)

    def fitted(self, state: TrainState) -> Fitted:
        """Return what is published: the last weights, or the best."""
        step = int(state.step)
        if self.best is None or self.best == step:
            variables = self.trainer.stored(state.variables)
            return Fitted(self.trainer, variables, step, self.results)
        variables = self.fit.workdir.checkpointer.load_best(self.task.index, self.best)
        return Fitted(self.trainer, variables, self.best, self.best_results)

    def _advance(self, state, feed, stop):
        """Dispatch steps: on an accelerator some seconds of them, on a CPU one by one."""
        asked = self.fit.session.should_stop

        def after(step, total):
            if step < stop:
                self.watch.tick(step, total)
            return asked()

        if not self.trainer.dispatches_each_step:
            stop = min(stop, int(state.step) + self.fit.pace)
        began, is_cold = time.monotonic(), self.watch.is_cold
        state, self.total = self.trainer.advance(
            state, self.frozen, feed, self.total, stop=stop, after=after
        )
        self.watch.observe(int(state.step), self.total, show=not self._is_regular(int(state.step)))
        self.fit.warm = self.trainer
        if not self.trainer.dispatches_each_step and not is_cold:
            seconds = time.monotonic() - began
            # All hosts dispatch alike: the first one's clock decides.
            if hosts.broadcast(seconds < _FAST):
                self.fit.pace *= 2
            elif hosts.broadcast(seconds > _SLOW):
                self.fit.pace = max(1, self.fit.pace // 2)
        return state

    def _settle(self, state):
        """Report, validate, save and stop where it is due after a step."""
        session, step = self.fit.session, int(state.step)
        due = step < self.task.steps and step % self.save_every == 0
        stopping = step < self.task.steps and session.should_stop()
        if stopping or self._is_regular(step) or self._is_due(step):
            self.watch.check(state)
        if self._is_regular(step):
            self.watch.report(self.total)
            self.total = self.trainer.no_metrics()
        if not stopping and self._is_due(step):
            stopping = not self._validate(state)
        if due and not session.save_every:
            due = hosts.broadcast(time.monotonic() - self.saved > _SAVE_SECONDS)
        if stopping or due:
            self._save(state)
        if stopping:
            raise Stopped("stopped and saved")

    def _is_regular(self, step):
        """Return whether an epoch ends or a save is due after a step."""
        at_save = step < self.task.steps and step % self.save_every == 0
        return at_save or step % self.task.steps_per_epoch == 0

    def _is_due(self, step):
        return self.exam is not None and step != self.validated and self.exam.due(step)

    def _next_stop(self, step):
        """The step before which something is due."""
        session = self.fit.session
        periods = [self.task.steps_per_epoch, self.save_every]
        if self.exam is not None and session.validate_every:
            periods.append(session.validate_every)
        if session.log_every and not self.trainer.dispatches_each_step:
            periods.append(session.log_every)
        return min((step // period + 1) * period for period in periods)

    def _validate(self, state):
        """Validate, and keep the best weights; False where the session asked to stop meanwhile."""
        assert self.exam is not None
        self.watch.meter.say(f"{self.task.label}, {self.watch.text}, validating")
        try:
            self.results = self.exam(state.variables)
        except Interrupted:
            return False
        self.validated = step = int(state.step)
        self.watch.validated(step, self.results)
        if self.judge is not None:
            score, best = self.results[self.judge], self.best_results.get(self.judge, -1.0)
            if hosts.broadcast(score >= best):
                variables = self.trainer.stored(state.variables)
                self.fit.workdir.checkpointer.save_best(self.task.index, step, variables)
                self.best, self.best_results = step, self.results
        return True

    def _save(self, state):
        notes = {
            **self.watch.notes(self.total),
            "validated": self.validated,
            "results": self.results,
            "best": self.best,
            "best_results": self.best_results,
        }
        self.fit.workdir.checkpointer.save(self.task.index, state, notes)
        self.saved = time.monotonic()

    def _show(self, step):
        """Show pictures of the first batch, augmented as in training, on TensorBoard."""
        if not self.fit.board.is_on or step:
            return
        images = np.asarray(self.fit.data.images[self.task.plan[0][:_SHOWN]])
        key = batch_key(self.task.info(), np.int32(0))
        augmented = jax.jit(self.trainer.preprocess.augment)(key, images)
        self.fit.board.show(0, np.asarray(augmented).astype(np.uint8))


def _check_epochs(task, step):
    if step > task.steps:
        raise UserError(
            f"{task.label} has done {step // task.steps_per_epoch} epochs already, so it cannot end "
            f"after {task.run.epochs}: give as many at least",
            "epochs",
        )
