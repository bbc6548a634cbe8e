"""What the two sides train on, and our steps one by one."""

import time
from typing import Any

import jax
import numpy as np

from compat_jax import mesh as meshes
from compat_jax.data.dataset import Dataset
from compat_jax.errors import unknown
from compat_jax.train.state import TaskInfo
from compat_jax.train.step import DeviceData, Trainer

SIZE, TASKS, NEW_CLASSES = 32, 3, 10


def _glyphs(classes, per_class, seed):
    return {
        "source": "glyphs",
        "classes": classes,
        "per_class": per_class,
        "look": "photo",
        "seed": seed,
        "size": SIZE,
    }


def _tfds(name, split, classes, per_class):
    section = {"source": "tfds", "name": name, "split": split, "size": SIZE}
    return {**section, "classes": classes, "per_class": per_class}


# name: (mean and std of the normalisation, the data of each role)
DATA = {
    "glyphs": (
        ((0.7,) * 3, (0.3,) * 3),
        {
            "pretraining": _glyphs((100, 160), 40, 1),
            "steps": _glyphs((1500, 1510), 64, 2),
            "tasks": _glyphs((1600, 1600 + TASKS * NEW_CLASSES), 20, 2),
            "query": _glyphs((2000, 2040), 25, 3),
            "gallery": _glyphs((2000, 2040), 10, 4),
        },
    ),
    "cifar": (
        ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        {
            "pretraining": _tfds("cifar100", "train", (40, 100), 40),
            "steps": _tfds("cifar100", "train", (30, 40), 64),
            "tasks": _tfds("cifar100", "train", (0, TASKS * NEW_CLASSES), 20),
            "query": _tfds("cifar10", "train", (0, 10), 100),
            "gallery": _tfds("cifar10", "test", (0, 10), 40),
        },
    ),
}


def check_data(name: str) -> None:
    """Refuse an unknown name.

    Raises:
      UserError: with the valid ones.
    """
    if name not in DATA:
        raise unknown("data of the comparison", name, DATA)


class OurSteps:
    """Our steps one by one, with the loss and the seconds of each.

    Args:
      trainer: whose `run_steps` is called.
      start: variables to start from.
      previous: variables of the frozen model; None for a method that needs none.
      data: images.
      plan: int32[epochs, steps, batch] positions in `data`.
      info: of the task.
    """

    def __init__(
        self,
        trainer: Trainer,
        start: Any,
        previous: Any,
        data: Dataset,
        plan: np.ndarray,
        info: TaskInfo,
    ):
        self._trainer = trainer
        self._state = trainer.create_state(start, info)
        self._previous = None if previous is None else trainer.place(previous)
        images = DeviceData(data.images, data.labels)
        self._data = meshes.put(images, meshes.replicated(trainer.mesh))
        self._plan = meshes.feed(plan.reshape(-1, plan.shape[-1]), trainer.mesh, axis=1)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def advance(self) -> None:
        """One more step."""
        began = time.perf_counter()
        self._state, metrics = self._trainer.run_steps(
            self._state, self._previous, self._data, self._plan, len(self.losses) + 1
        )
        self.losses.append(float(metrics.loss))
        jax.block_until_ready(self._state.params)
        self.seconds.append(time.perf_counter() - began)

    def variables(self) -> Any:
        """As a chain would store them."""
        return jax.tree.map(np.asarray, self._trainer.stored(self._state.variables))
