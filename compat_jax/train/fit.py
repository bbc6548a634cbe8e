"""The steps of one task: batches to the devices, saves, the log, stopping in good order."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from compat_jax import hosts
from compat_jax import mesh as meshes
from compat_jax.data import streaming
from compat_jax.data.dataset import Dataset
from compat_jax.errors import Stopped
from compat_jax.files import append
from compat_jax.train.progress import Progress
from compat_jax.train.state import TaskInfo
from compat_jax.train.step import DeviceData, Metrics, Trainer

# An epoch on an accelerator may take less than its save.
_SAVE_SECONDS = 30.0


@dataclasses.dataclass
class Fit:
    """Trains one task from given variables, saving on the way.

    Attributes:
      data: all images and labels.
      mesh: devices.
      progress: takes the state.
      save_every, log, should_stop, device_budget: see `loop.train`.
    """

    data: Dataset
    mesh: Mesh
    progress: Progress
    save_every: int
    log: epath.Path | None
    should_stop: Callable[[], bool]
    device_budget: int = 0

    def __post_init__(self):
        self.on_device = None
        if not self.device_budget or self._image_bytes() * len(self.data) <= self.device_budget:
            self.on_device = self._place(np.asarray(self.data.images), self.data.labels)

    def __call__(
        self,
        trainer: Trainer,
        variables: Any,
        info: TaskInfo,
        plan: np.ndarray,
        total: int,
        meter: tqdm,
        label: str,
    ) -> Any:
        """Variables after `total` steps of the plan.

        Args:
          trainer: of the architecture.
          variables: to start from; also the frozen previous model.
          info: the task.
          plan: int32[>= total, batch] positions of every batch.
          total: steps.
          meter: progress bar.
          label: of the task, for the bar.

        Raises:
          Stopped: after saving, when `should_stop` said so.
        """
        task = int(info.index)
        previous = None
        if trainer.method.needs_previous:
            previous = trainer.place(variables)
        state = self.progress.restore(task, trainer.create_state(variables, info))
        meter.update(int(state.step))
        epoch = int(info.steps_per_epoch)
        save_every = self.save_every or epoch
        saved, end = time.monotonic(), 0
        unreported = []
        batches, plan = self._batches(plan, int(state.step), total)
        with contextlib.closing(batches):
            while (step := int(state.step)) < total:
                began = time.perf_counter()
                if step >= end:
                    on_device, end = next(batches)
                stop = min(_next_multiple(step, epoch), _next_multiple(step, save_every), end)
                state, metrics = trainer.run_steps(
                    state, previous, on_device, plan, stop, self.should_stop
                )
                metrics, stop = jax.tree.map(float, metrics), int(state.step)
                unreported.append((stop - step, time.perf_counter() - began, metrics))
                meter.update(stop - step)
                due = stop < total and stop % save_every == 0
                if due or not stop % epoch:  # a chunk may end before that
                    self._report(task, stop, unreported, plan.shape[1], meter, label)
                stopping = stop < total and self.should_stop()
                if stopping and unreported:
                    self._report(task, stop, unreported, plan.shape[1], meter, label)
                if due and not self.save_every:
                    due = hosts.first_says(time.monotonic() - saved > _SAVE_SECONDS)
                if stopping or due:
                    self.progress.save(task, state)
                    saved = time.monotonic()
                if stopping:
                    raise Stopped
        return trainer.stored(state.variables)

    def _batches(self, plan, first, total):
        """What `run_steps` takes as data, with the step until which it serves, and the plan in it."""
        size, put = plan.shape[1], lambda plan: meshes.feed(plan, self.mesh, axis=1)
        if self.on_device is not None:
            return (x for x in [(self.on_device, total)]), put(plan)
        steps = streaming.steps_a_chunk(self._image_bytes(), size, self.device_budget)

        def place(chunk):
            return self._place(chunk.images, chunk.labels), chunk.stop

        content = self.data.images, self.data.labels
        batches = streaming.chunks(*content, plan[:total], first, steps, place)
        return batches, put(streaming.ring_plan(len(plan), size, steps))

    def _place(self, images, labels):
        return meshes.put(DeviceData(images, labels), meshes.replicated(self.mesh))

    def _image_bytes(self):
        return math.prod(self.data.images.shape[1:])

    def _report(self, task, step, parts, batch, meter, label):
        counts, seconds, metrics = zip(*parts, strict=True)
        parts.clear()
        rate = sum(counts) * batch / sum(seconds)
        metrics = Metrics(*(np.average(m, weights=counts) for m in zip(*metrics, strict=True)))
        meter.set_postfix_str(
            f"{label}, loss {metrics.loss:.3f}, accuracy {metrics.accuracy:.2f}, "
            f"{rate:.0f} images/s"
        )
        if self.log is not None and hosts.is_first():
            line = {"task": task, "step": step, **metrics._asdict()}
            line["images_per_second"] = round(rate, 1)
            append(self.log, json.dumps(line))


def _next_multiple(step, period):
    return (step // period + 1) * period
