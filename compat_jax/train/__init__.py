"""Training: the state, one step, a run of steps as one dispatch, the loop over tasks."""

from compat_jax.train.state import TaskInfo, TrainState
from compat_jax.train.step import DeviceData, Trainer

__all__ = ["DeviceData", "TaskInfo", "TrainState", "Trainer"]
