"""The task sequence, the rehearsal memory and the plan of batches.

Everything random is drawn from a generator addressed by (seed, what, task, epoch): no state is
carried from one task to the next, so a run that was stopped draws the same numbers again.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from compat_jax.errors import UserError

_MEMORY, _PLAN = 1, 2  # addresses of the two kinds of draws


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
                f"got {self.initial}"
            )
        if self.increment < 1 and self.initial < self.num_classes:
            raise UserError(f"tasks.increment must be at least 1, got {self.increment}")

    def __len__(self) -> int:
        rest = self.num_classes - self.initial
        return 1 + -(-rest // self.increment) if rest else 1

    def num_seen(self, task: int) -> int:
        """Classes seen up to and including a task; 0 for task -1."""
        if task < 0:
            return 0
        return min(self.initial + task * self.increment, self.num_classes)

    def classes(self, task: int) -> range:
        """The classes that are new in a task."""
        return range(self.num_seen(task - 1), self.num_seen(task))


def memory_indices(
    labels: np.ndarray, classes: Sequence[int], per_class: int, seed: int
) -> np.ndarray:
    """The rehearsal memory: images drawn at random from each class, without replacement.

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
    """Which images every batch of a task holds.

    Without memory (task 0, or rehearsal 0): shuffled epochs, the last short batch dropped; a batch
    larger than the data shrinks to it. With memory: the first half of each batch from the memory, the
    second from the new images, each half drawn without replacement within the batch, or with
    replacement where the pool is no larger than the half; floor((new + memory) / batch) batches an
    epoch, and if that is 0, one batch with half of all samples from each side.

    Args:
      new: int[n] positions of the task's new images, n >= 1.
      memory: int[m] positions of the memory.
      batch_size: images a batch.
      epochs: of the task.
      seed: of the run.
      task: number of the task.

    Returns:
      int32[epochs, batches, batch].

    Source: `BalancedBatchSampler` and the loaders in `src/iamcl2r/main.py`.
    """
    total = len(new) + len(memory)
    batches = total // batch_size
    size = batch_size if batches else total
    batches = max(batches, 1)
    plan = np.empty((epochs, batches, size if not len(memory) else 2 * (size // 2)), np.int32)
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, _PLAN, task, epoch])
        if not len(memory):
            plan[epoch] = rng.permutation(new)[: batches * size].reshape(batches, size)
            continue
        half = size // 2
        plan[epoch, :, :half] = _draw(rng, memory, batches, half)
        plan[epoch, :, half:] = _draw(rng, new, batches, half)
    return plan


def _draw(rng, pool, batches, size):
    """int[batches, size] positions, without replacement within a row where the pool allows it."""
    if len(pool) <= size:
        return rng.choice(pool, (batches, size))
    # The positions of the `size` smallest of random numbers are a draw without replacement.
    order = np.argpartition(rng.random((batches, len(pool))), size, axis=1)[:, :size]
    return pool[order]
