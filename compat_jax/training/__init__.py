"""Training: runs, sessions, tasks, one step, many steps as one dispatch, the sequence of tasks."""

from compat_jax.session import Session
from compat_jax.training.optimizer import Sgd
from compat_jax.training.pretraining import pretrain
from compat_jax.training.run import Run, make_trainer
from compat_jax.training.sequence import train
from compat_jax.training.state import TaskInfo, TrainState
from compat_jax.training.step import DeviceData, Feed, Metrics, Trainer
from compat_jax.training.task import Task

__all__ = [
    "DeviceData",
    "Feed",
    "Metrics",
    "Run",
    "Session",
    "Sgd",
    "Task",
    "TaskInfo",
    "TrainState",
    "Trainer",
    "make_trainer",
    "pretrain",
    "train",
]
