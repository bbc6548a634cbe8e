"""State that training carries from step to step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax


class TaskInfo(flax.struct.PyTreeNode):
    """The task that a state is in, as scalars, so that a new task compiles nothing.

    Attributes:
      seed: uint32[] of the run.
      index: int32[] number of the task.
      epochs: int32[] of the task.
      steps_per_epoch: int32[].
      num_seen: int32[] classes seen, those of this task included.
    """

    seed: jax.Array
    index: jax.Array
    epochs: jax.Array
    steps_per_epoch: jax.Array
    num_seen: jax.Array

    @classmethod
    def create(cls, seed: int, index: int, *, epochs=1, steps_per_epoch=1, num_seen=1):
        """Make one of Python numbers."""
        whole: Any = [np.int32(x) for x in (index, epochs, steps_per_epoch, num_seen)]
        first: Any = np.uint32(seed)
        return cls(first, *whole)


class TrainState(flax.struct.PyTreeNode):
    """Weights, statistics, optimiser, method and position.

    Attributes:
      step: int32[] steps done in the present task.
      params: trained weights.
      batch_stats: running statistics of BatchNorm ({} without any).
      opt_state: of the optimiser.
      carried: of the method, e.g. an EMA teacher or a queue; {} for a method without state.
      task: where in the sequence this is.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    carried: Any
    task: TaskInfo

    @property
    def variables(self) -> dict[str, Any]:
        """Return {"params", "batch_stats"}, the content of a version."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def create_state(
    variables: Any, optimizer: optax.GradientTransformation, carried: Any, *, task: TaskInfo
) -> TrainState:
    """Make a state at step 0 of a task, with a fresh optimiser."""
    params = variables["params"]
    return TrainState(
        step=jnp.int32(0),
        params=params,
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(params),
        carried=carried,
        task=task,
    )
