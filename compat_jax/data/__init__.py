"""Data: labelled images from folders, TensorFlow Datasets, arrays, or drawn here."""

from compat_jax.data.augment import Preprocess
from compat_jax.data.dataset import Dataset, from_arrays
from compat_jax.data.registry import load, register, source_names
from compat_jax.data.sources import from_folder, from_tfds
from compat_jax.data.tasks import Tasks, TaskSequence

__all__ = [
    "Dataset",
    "Preprocess",
    "TaskSequence",
    "Tasks",
    "from_arrays",
    "from_folder",
    "from_tfds",
    "load",
    "register",
    "source_names",
]
