"""What training carries from step to step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


class TaskInfo(flax.struct.PyTreeNode):
    """The task that a state is in, as scalars, so that a new task compiles nothing.

    Attributes:
      seed: uint32[] of the run.
      index: int32[] number of the task.
      epochs: int32[] of the task.
      steps_per_epoch: int32[].
      num_seen: int32[] classes seen, those of this task included.
      num_old: int32[] classes seen before this task.
      distillation_weight: float32[] of the `fd` method.
    """

    seed: jax.Array
    index: jax.Array
    epochs: jax.Array
    steps_per_epoch: jax.Array
    num_seen: jax.Array
    num_old: jax.Array
    distillation_weight: jax.Array

    @classmethod
    def create(
        cls, seed, index, epochs, steps_per_epoch, num_seen, num_old=0, distillation_weight=0.0
    ) -> "TaskInfo":
        """From Python numbers."""
        whole = [np.int32(x) for x in (index, epochs, steps_per_epoch, num_seen, num_old)]
        return cls(np.uint32(seed), *whole, np.float32(distillation_weight))


class TrainState(flax.struct.PyTreeNode):
    """Weights, statistics, optimiser and position.

    Attributes:
      step: int32[] steps done in the present task.
      params: trained weights.
      batch_stats: running statistics of BatchNorm ({} without any).
      opt_state: of the optimiser.
      task: where in the sequence this is.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    task: TaskInfo

    @property
    def variables(self) -> dict[str, Any]:
        """{"params", "batch_stats"}: what a version of the chain holds."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def create_state(variables, optimizer, task: TaskInfo) -> TrainState:
    """A state at step 0 of a task, with a fresh optimiser."""
    params = variables["params"]
    return TrainState(
        step=jnp.int32(0),
        params=params,
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(params),
        task=task,
    )
