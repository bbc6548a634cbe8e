"""The steps of one task: batches to the devices, saves, the log, an orderly stop."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compat_jax import hosts
from compat_jax import mesh as meshes
from compat_jax.data import streaming
from compat_jax.data.dataset import Dataset
from compat_jax.errors import Diverged, Stopped
from compat_jax.meter import Meter
from compat_jax.session import Session
from compat_jax.training.state import TrainState
from compat_jax.training.step import DeviceData, Feed, Metrics, Trainer
from compat_jax.training.task import Task, image_bytes
from compat_jax.training.workdir import Workdir

# An epoch on an accelerator may take less than its save.
_SAVE_SECONDS = 30.0


@dataclasses.dataclass
class Fit:
    """Trains tasks on one data set, saving on the way.

    Attributes:
      data: all images and labels.
      session: where and how.
      workdir: takes the state and the log.
    """

    data: Dataset
    session: Session
    workdir: Workdir

    def __post_init__(self):
        self.mesh = self.session.devices()
        self.on_device = None
        budget = self.session.device_budget
        if not budget or image_bytes(self.data) * len(self.data) <= budget:
            self.on_device = self._place(np.asarray(self.data.images), self.data.labels)

    def __call__(self, task: Task, meter: Meter, longest: int) -> tuple[Trainer, Any]:
        """Train a task.

        Args:
          task: the task.
          meter: of the steps of the run.
          longest: steps of the longest task, to which every plan is padded: one program for all.

        Returns:
          The trainer, and the variables after the task's steps, as the chain holds them.

        Raises:
          Stopped: after saving, when the session asked to stop.
          Diverged: the loss or the weights are not finite.
        """
        trainer = task.trainer(self.mesh)
        variables = task.starting_variables(trainer, self.data.images.shape[1:])
        frozen = task.freeze(trainer, variables, self.data)
        state = trainer.create_state(variables, task.info())
        state = self.workdir.checkpointer.restore(task.index, state)
        self.workdir.log.rewind(task.index, int(state.step))
        meter.skip(int(state.step))
        pending = self.workdir.checkpointer.pending(task.index, int(state.step))
        parts = [(count, seconds, Metrics(*metrics)) for count, seconds, metrics in pending]
        progress = _Progress(task, self.workdir, meter, parts=parts)
        state = self._steps(trainer, frozen, state, progress=progress, longest=longest)
        return trainer, trainer.stored(state.variables)

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
        trainer, variables = self(task, meter, longest)
        variables = trainer.head.trim(variables, task.num_seen)
        self.workdir.chain.add(variables, task.record(trainer, data, config), task.index)
        self.workdir.checkpointer.clear()

    def _steps(self, trainer, frozen, state, *, progress, longest) -> TrainState:
        task, total, epoch = progress.task, progress.task.steps, progress.task.steps_per_epoch
        save_every, saved, end = self.session.save_every or epoch, time.monotonic(), 0
        batches, plan = self._batches(task.plan, int(state.step), longest)
        with contextlib.closing(batches):
            while (step := int(state.step)) < total:
                began = time.perf_counter()
                if step >= end:
                    on_device, end = next(batches)
                stop = min(_next_multiple(step, epoch), _next_multiple(step, save_every), end)
                state, metrics = trainer.run_steps(
                    state,
                    frozen,
                    Feed(on_device, plan),
                    stop=stop,
                    should_stop=lambda: progress.tick() or self.session.should_stop(),
                )
                metrics, stop = jax.tree.map(float, metrics), int(state.step)
                progress.add(step, stop, metrics, time.perf_counter() - began)
                due = stop < total and stop % save_every == 0
                stopping = stop < total and self.session.should_stop()
                if due or stopping or not stop % epoch:  # a chunk may end before that
                    progress.check(stop, state)
                if due or not stop % epoch:
                    progress.report(stop)
                if due and not self.session.save_every:
                    due = hosts.broadcast(time.monotonic() - saved > _SAVE_SECONDS)
                if stopping or due:
                    self.workdir.checkpointer.save(task.index, state, progress.pending())
                    saved = time.monotonic()
                if stopping:
                    raise Stopped
        return state

    def _batches(self, plan, first, longest):
        """Return the data of `run_steps`, with the step until which they serve, and the plan in them."""
        steps, size = plan.shape

        def put(plan):
            return meshes.shard_batch(plan, self.mesh, axis=1)

        if self.on_device is not None:
            whole: Iterator[Any] = (x for x in [(self.on_device, steps)])
            return whole, put(np.pad(plan, ((0, longest - steps), (0, 0))))
        chunk = streaming.steps_a_chunk(image_bytes(self.data), size, self.session.device_budget)

        def place(chunk):
            return self._place(chunk.images, chunk.labels), chunk.stop

        content = self.data.images, self.data.labels
        batches = streaming.chunks(*content, plan, first=first, chunk=chunk, place=place)
        return batches, put(streaming.ring_plan(longest, size, chunk))

    def _place(self, images, labels):
        return meshes.device_put(DeviceData(images, labels), meshes.replicated(self.mesh))


@dataclasses.dataclass
class _Progress:
    """Steps since the last report: feeds the bar and the log, and refuses values that are not finite."""

    task: Task
    workdir: Workdir
    meter: Meter
    ticked: int = 0
    parts: list[tuple[int, float, Metrics]] = dataclasses.field(default_factory=list)

    def tick(self) -> bool:
        """Count a step whose metrics are yet to come; False."""
        self.ticked += 1
        self.meter.update()
        return False

    def add(self, first: int, stop: int, metrics: Metrics, seconds: float) -> None:
        """Count steps first..stop-1; refuse a loss that is not finite."""
        if metrics.finite != 1.0:
            self._diverged("loss", first + round(float(metrics.finite) * (stop - first)))
        self.parts.append((stop - first, seconds, metrics))
        self.meter.update(stop - first - self.ticked)
        self.ticked = 0

    def pending(self) -> list[Any]:
        """Return the steps since the last line of the log, as JSON values."""
        return [[count, seconds, [float(m) for m in part]] for count, seconds, part in self.parts]

    def check(self, step: int, state: TrainState) -> None:
        """Refuse weights that are not finite."""
        if not bool(_all_finite((state.params, state.batch_stats))):
            self._diverged("weights", step - 1)

    def report(self, step: int) -> None:
        """Show the bar's text and write a line of the log."""
        if not self.parts:
            return
        counts, seconds, metrics = zip(*self.parts, strict=True)
        self.parts.clear()
        rate = sum(counts) * self.task.plan.shape[1] / max(sum(seconds), 1e-9)
        mean = Metrics(*(np.average(m, weights=counts) for m in zip(*metrics, strict=True)))
        self.meter.say(
            f"{self.task.label}, loss {mean.loss:.3f}, accuracy {mean.accuracy:.2f}, "
            f"{rate:.0f} images/s"
        )
        line = {"loss": float(mean.loss), "accuracy": float(mean.accuracy)}
        line["images_per_second"] = round(rate, 1)
        self.workdir.log.add({"task": self.task.index, "step": step, **line})

    def _diverged(self, what, step):
        epoch = step // self.task.steps_per_epoch
        verb = "is" if what == "loss" else "are"
        raise Diverged(
            f"{self.task.label} diverged: the {what} {verb} not finite at step {step} (epoch "
            f"{epoch}); nothing of this task was published. Lower the learning rate, and give the "
            "run another workdir",
            "optimizer.lr",
        )


@functools.cache
def _all_finite_program():
    def check(tree):
        floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, np.floating)]
        return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()

    return jax.jit(check)


def _all_finite(tree):
    return _all_finite_program()(tree)


def _next_multiple(step, period):
    return (step // period + 1) * period
