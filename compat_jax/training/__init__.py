"""Training: runs, sessions, tasks, one step, many steps as one dispatch, the sequence of tasks."""

from compat_jax.session import Session
from compat_jax.training.optimizer import Adamw, Lars, Sgd
from compat_jax.training.pretraining import pretrain
from compat_jax.training.run import Run, make_trainer
from compat_jax.training.sequence import train
from compat_jax.training.state import TaskInfo, TrainState
from compat_jax.training.step import DeviceData, Feed, Metrics, Trainer
from compat_jax.training.task import Task
from compat_jax.training.update import Update, update

__all__ = [
    "Adamw",
    "DeviceData",
    "Feed",
    "Lars",
    "Metrics",
    "Run",
    "Session",
    "Sgd",
    "Task",
    "TaskInfo",
    "TrainState",
    "Trainer",
    "Update",
    "make_trainer",
    "pretrain",
    "train",
    "update",
]
