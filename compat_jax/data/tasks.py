"""The task sequence, the rehearsal memory and the plan of batches.

Everything random is drawn from a generator addressed by (seed, what, task, epoch): no state is
carried from one task to the next, so a run that was stopped draws the same numbers again.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np

from compat_jax.errors import UserError
from compat_jax.fields import Rule, check_fields

_MEMORY, _PLAN, _FIRST = 1, 2, 3  # addresses of the kinds of draws


@dataclasses.dataclass(frozen=True)
class Tasks:
    """How classes are split into tasks, and what is kept of tasks that have ended.

    Attributes:
      initial: classes of the first task.
      increment: classes of every later task.
      rehearsal: images kept of each class of earlier tasks, to train on again.
      everything: whether every task learns all images of the classes seen so far, as if all were new;
        then `rehearsal` does not matter.
      first_share: share of the images of each class that the first task has; below 1, the second task
        brings the others, and its classes if there are any left.
      first_loss: what a first task learns by that starts from fresh weights: "method", whose contrast
        (hoc) then holds features to those that the fresh weights gave, or "cross_entropy" alone.

    Source: the paper's protocol on CIFAR-100 with 7 tasks.
    """

    initial: Annotated[int, Rule("classes of the first task", low=1, high=10**9)] = 10
    increment: Annotated[int, Rule("classes of every later task", low=0, high=10**9)] = 15
    rehearsal: Annotated[int, Rule("images kept of each earlier class", low=0, high=10**9)] = 20
    everything: Annotated[
        bool, Rule("whether every task learns all images of the classes seen so far")
    ] = False
    first_share: Annotated[
        float,
        Rule(
            "share of each class's images in the first task; the second has the rest",
            above=0,
            high=1,
        ),
    ] = 1.0
    first_loss: Annotated[
        str,
        Rule(
            "loss of a first task that starts from fresh weights: the method's, whose contrast (hoc) "
            "then holds to them, or cross-entropy alone",
            choices=("method", "cross_entropy"),
        ),
    ] = "method"

    def __post_init__(self):
        check_fields(self, "tasks.")

    def describe(self) -> dict[str, Any]:
        """Return the fields as JSON values; those that came later only if they are not the defaults."""
        found = dataclasses.asdict(self)
        for name in ("everything", "first_share", "first_loss"):
            if found[name] == getattr(Tasks, name):
                del found[name]
        return found

    def sequence(self, num_classes: int) -> "TaskSequence":
        """Split so many classes into tasks.

        Raises:
          UserError: fewer classes than the first task has.
        """
        return TaskSequence(num_classes, self.initial, self.increment, self.first_share)


@dataclasses.dataclass(frozen=True)
class TaskSequence:
    """Classes in label order, split into tasks.

    Attributes:
      num_classes: of the whole sequence.
      initial: classes of task 0.
      increment: classes of every later task (the last may have fewer).
      first_share: share of the images of each class that task 0 has; task 1 brings the others.

    Source: `ClassIncremental(initial_increment, increment)` in the reference's data loading.
    """

    num_classes: int
    initial: int
    increment: int
    first_share: float = 1.0

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
        return max(1 + -(-rest // self.increment) if rest else 1, 1 if self.first_share == 1 else 2)

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

        Raises:
          UserError: the task brings no image.
        """
        before, now = self._num_images(task - 1, counts), self._num_images(task, counts)
        if now.sum() == before.sum():
            raise UserError(
                f"task {task} brings no image: a smaller first_share leaves it some",
                "tasks.first_share",
            )
        if rehearsal is None:
            return plan_shape(int(now.sum()), 0, batch_size)
        memory = np.minimum(before, rehearsal).sum()
        return plan_shape(int((now - before).sum()), int(memory), batch_size)

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
        before, now = self._images(task - 1, labels, seed), self._images(task, labels, seed)
        if rehearsal is None:
            before, rehearsal = np.zeros_like(before), 0
        known = np.where(before, labels, -1)
        memory = memory_indices(known, range(self.num_seen(task - 1)), rehearsal, seed)
        new = np.flatnonzero(now & ~before)
        plan = batch_plan(new, memory, batch_size, epochs=epochs, seed=seed, task=task)
        return plan.reshape(-1, plan.shape[-1])

    def _num_images(self, task, counts) -> np.ndarray:
        """int[num_classes], the images of each class that have come up to a task."""
        come = np.where(np.arange(len(counts)) < self.num_seen(task), counts, 0)
        if task == 0 and self.first_share < 1:
            return np.minimum(come, np.maximum(np.rint(self.first_share * come), 1).astype(int))
        return come

    def _images(self, task, labels, seed) -> np.ndarray:
        """bool[n], the images that have come up to a task."""
        if task or self.first_share == 1:
            return labels < self.num_seen(task)
        come = np.zeros(len(labels), bool)
        for c, count in enumerate(self._num_images(task, np.bincount(labels))):
            rng = np.random.default_rng([seed, _FIRST, c])
            come[rng.permutation(np.flatnonzero(labels == c))[:count]] = True
        return come


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
