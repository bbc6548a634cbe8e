"""The task sequence, the rehearsal memory and the plan of batches.

Everything random is drawn from a generator addressed by (seed, what, task, epoch): no state is
carried from one task to the next, so a run that was stopped draws the same numbers again.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import numpy as np

from compat_jax.errors import UserError
from compat_jax.fields import Rule, check_fields

_MEMORY, _PLAN = 1, 2  # addresses of the two kinds of draws


@dataclasses.dataclass(frozen=True)
class Tasks:
    """How classes are split into tasks, and what is kept of tasks that have ended.

    Attributes:
      initial: classes of the first task.
      increment: classes of every later task.
      rehearsal: images kept of each class of earlier tasks, to train on again.

    Source: the paper's protocol on CIFAR-100 with 7 tasks.
    """

    initial: Annotated[int, Rule("classes of the first task", low=1, high=10**9)] = 10
    increment: Annotated[int, Rule("classes of every later task", low=0, high=10**9)] = 15
    rehearsal: Annotated[int, Rule("images kept of each earlier class", low=0, high=10**9)] = 20

    def __post_init__(self):
        check_fields(self, "tasks.")

    def sequence(self, num_classes: int) -> "TaskSequence":
        """Split so many classes into tasks.

        Raises:
          UserError: fewer classes than the first task has.
        """
        return TaskSequence(num_classes, self.initial, self.increment)


@dataclasses.dataclass(frozen=True)
class TaskSequence:
    """Classes in label order, split into tasks.

    Attributes:
      num_classes: of the whole sequence.
      initial: classes of task 0.
      increment: classes of every later task (the last may have fewer).

    Source: `ClassIncremental(initial_increment, increment)` in the reference's data loading.
    """

    num_classes: int
    initial: int
    increment: int

    def __post_init__(self):
        if not 1 <= self.initial <= self.num_classes:
            raise UserError(
                f"tasks.initial must lie in 1..{self.num_classes} (the classes of the data), "
                f"got {self.initial}",
                "tasks.initial",
            )
        if self.increment < 1 and self.initial < self.num_classes:
            raise UserError(
                f"tasks.increment must be at least 1 for {self.num_classes - self.initial} more "
                f"classes, got {self.increment}",
                "tasks.increment",
            )

    def __len__(self) -> int:
        rest = self.num_classes - self.initial
        return 1 + -(-rest // self.increment) if rest else 1

    def num_seen(self, task: int) -> int:
        """Count the classes seen up to and including a task; 0 for task -1."""
        if task < 0:
            return 0
        return min(self.initial + task * self.increment, self.num_classes)

    def classes(self, task: int) -> range:
        """Return the classes that are new in a task."""
        return range(self.num_seen(task - 1), self.num_seen(task))

    def plan_shape(
        self, task: int, counts: np.ndarray, rehearsal: int | None, batch_size: int
    ) -> tuple[int, int]:
        """Return batches per epoch and images per batch of a task, without drawing the batches.

        Args:
          task: number of the task.
          counts: int[num_classes], images of each class.
          rehearsal: images kept of each earlier class; None to learn all of them again.
          batch_size: images per batch.
        """
        new, rehearsal = self._learnt(task, rehearsal)
        memory = np.minimum(counts[: new.start], rehearsal).sum()
        return plan_shape(int(counts[new.start : new.stop].sum()), int(memory), batch_size)

    def batch_plan(
        self,
        task: int,
        labels: np.ndarray,
        rehearsal: int | None,
        *,
        batch_size: int,
        epochs: int,
        seed: int,
    ) -> np.ndarray:
        """Draw the batches of a task, its epochs one after the other: int32[steps, batch].

        Args:
          task: number of the task.
          labels: int[n] of the data.
          rehearsal: images kept of each earlier class; None to learn all of them again.
          batch_size, epochs, seed: see `batch_plan`.
        """
        classes, rehearsal = self._learnt(task, rehearsal)
        first, last = classes[0], classes[-1]
        new = np.flatnonzero((labels >= first) & (labels <= last))
        memory = memory_indices(labels, range(first), rehearsal, seed)
        plan = batch_plan(new, memory, batch_size, epochs=epochs, seed=seed, task=task)
        return plan.reshape(-1, plan.shape[-1])

    def _learnt(self, task, rehearsal) -> tuple[range, int]:
        """The classes of which a task learns every image, and the images kept of those before."""
        if rehearsal is None:
            return range(self.num_seen(task)), 0
        return self.classes(task), rehearsal


def memory_indices(
    labels: np.ndarray, classes: Sequence[int], per_class: int, seed: int
) -> np.ndarray:
    """Draw the rehearsal memory: random images of each class, without replacement.

    Args:
      labels: int[n] of the task data.
      classes: classes whose task has ended.
      per_class: images kept of each (all of them, if it has fewer).
      seed: of the run; the draw of a class depends on nothing else.

    Returns:
      int64[m] positions into `labels`, class by class.

    Source: `RehearsalMemory(herding_method="random", fixed_memory=True)` in the reference.
    """
    kept = [np.zeros(0, np.int64)]
    for c in classes:
        own = np.flatnonzero(labels == c)
        rng = np.random.default_rng([seed, _MEMORY, c])
        kept.append(np.sort(rng.permutation(own)[:per_class]))
    return np.concatenate(kept)


def batch_plan(
    new: np.ndarray, memory: np.ndarray, batch_size: int, epochs: int, seed: int, task: int
) -> np.ndarray:
    """Draw the images of every batch of a task.

    Without memory (task 0, or rehearsal 0): shuffled epochs, the last short batch dropped; a batch
    larger than the data shrinks to it. With memory: the first half of each batch from the memory, the
    second from the new images, each half drawn without replacement within the batch, or with
    replacement where the pool is no larger than the half; floor((new + memory) / batch) batches an
    epoch, and if that is 0, one batch with half of all samples from each side.

    Args:
      new: int[n] positions of the task's new images, n >= 1.
      memory: int[m] positions of the memory.
      batch_size: images per batch.
      epochs: of the task.
      seed: of the run.
      task: number of the task.

    Returns:
      int32[epochs, batches, batch].

    Source: `BalancedBatchSampler` and the loaders in `src/iamcl2r/main.py`.
    """
    batches, size = plan_shape(len(new), len(memory), batch_size)
    plan = np.empty((epochs, batches, size), np.int32)
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, _PLAN, task, epoch])
        if not len(memory):
            plan[epoch] = rng.permutation(new)[: batches * size].reshape(batches, size)
            continue
        half = size // 2
        plan[epoch, :, :half] = _draw(rng, memory, batches, half)
        plan[epoch, :, half:] = _draw(rng, new, batches, half)
    return plan


def plan_shape(num_new: int, num_memory: int, batch_size: int) -> tuple[int, int]:
    """Return batches per epoch and images per batch of `batch_plan`, without drawing it.

    Args:
      num_new: new images of the task, >= 1.
      num_memory: images of the memory.
      batch_size: images per batch.
    """
    total = num_new + num_memory
    batches = total // batch_size
    size = batch_size if batches else total
    return max(batches, 1), 2 * (size // 2) if num_memory else size


def _draw(rng, pool, batches, size):
    """int[batches, size] positions, without replacement within a row where the pool allows it."""
    if len(pool) <= size:
        return rng.choice(pool, (batches, size))
    # The positions of the `size` smallest of random numbers are a draw without replacement.
    order = np.argpartition(rng.random((batches, len(pool))), size, axis=1)[:, :size]
    return pool[order]
