"""Data of the comparison, and our training step by step."""

import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from compat_jax import Dataset
from compat_jax import mesh as meshes
from compat_jax.errors import unknown
from compat_jax.training import DeviceData, Feed, Task

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


def _tfds(name, split, **fields):
    return {"source": "tfds", "name": name, "split": split, "size": SIZE, **fields}


# name: (mean and standard deviation of the normalisation, data of each role)
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
            "pretraining": _tfds("cifar100", "train", classes=(40, 100), per_class=40),
            "steps": _tfds("cifar100", "train", classes=(30, 40), per_class=64),
            "tasks": _tfds("cifar100", "train", classes=(0, TASKS * NEW_CLASSES), per_class=20),
            "query": _tfds("cifar10", "train", classes=(0, 10), per_class=100),
            "gallery": _tfds("cifar10", "test", classes=(0, 10), per_class=40),
        },
    ),
}


def check_data(name: str) -> None:
    """Refuse a name that is not in DATA.

    Raises:
      UserError: with the valid names.
    """
    if name not in DATA:
        raise unknown("data of the comparison", name, DATA)


class OurSteps:
    """Our training of a task, one step at a time.

    Args:
      task: the task; its plan says which images are in each batch.
      data: images and labels.
      mesh: devices.
      start: variables to start from; those of the task by default.
      previous: variables of the frozen previous model; `start` by default.

    Attributes:
      losses: loss of each step so far.
      seconds: duration of each step so far.
    """

    def __init__(
        self,
        task: Task,
        data: Dataset,
        mesh: Mesh,
        *,
        start: Any = None,
        previous: Any = None,
    ):
        self._trainer = task.trainer(mesh)
        if start is None:
            start = task.starting_variables(self._trainer, data.images.shape[1:])
        self._state = self._trainer.create_state(start, task.info())
        previous = start if previous is None else previous
        self._frozen = task.freeze(self._trainer, previous, data)
        images = DeviceData(np.asarray(data.images), data.labels)
        images = meshes.device_put(images, meshes.replicated(mesh))
        self._feed = Feed(images, meshes.shard_batch(task.plan, mesh, axis=1))
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def advance(self) -> None:
        """Do one more step."""
        began = time.perf_counter()
        stop = len(self.losses) + 1
        self._state, metrics = self._trainer.run_steps(
            self._state, self._frozen, self._feed, stop=stop
        )
        self.losses.append(float(metrics.loss))
        jax.block_until_ready(self._state.params)
        self.seconds.append(time.perf_counter() - began)

    def variables(self) -> Any:
        """Return the variables as a chain stores them."""
        return jax.tree.map(np.asarray, self._trainer.stored(self._state.variables))
