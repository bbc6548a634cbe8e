"""Data: images from folders, tables, Hugging Face's and TensorFlow Datasets, arrays, or drawn here."""

from compat_jax.data.augment import Preprocess
from compat_jax.data.class_register import Register
from compat_jax.data.dataset import Dataset, from_arrays
from compat_jax.data.listing import list_pictures
from compat_jax.data.pictures import Preparation
from compat_jax.data.registry import load, register, source_names
from compat_jax.data.sources import (
    from_folder,
    from_huggingface,
    from_pictures,
    from_table,
    from_tfds,
)
from compat_jax.data.tasks import Tasks, TaskSequence

pictures = list_pictures  # the function hides the module of this name

__all__ = [
    "Dataset",
    "Preparation",
    "Preprocess",
    "Register",
    "TaskSequence",
    "Tasks",
    "from_arrays",
    "from_folder",
    "from_huggingface",
    "from_pictures",
    "from_table",
    "from_tfds",
    "list_pictures",
    "load",
    "pictures",
    "register",
    "source_names",
]
