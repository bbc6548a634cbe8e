"""Exchange with PyTorch: weights by name, and its files. The rest of the package never imports it."""

from compat_jax.interop import torch_files
from compat_jax.interop.image_settings import ImageSettings
from compat_jax.interop.start import Start, starting_version, starting_version_of
from compat_jax.interop.weights import Misfit, from_torch, is_bare, to_torch

__all__ = [
    "ImageSettings",
    "Misfit",
    "Start",
    "from_torch",
    "is_bare",
    "starting_version",
    "starting_version_of",
    "to_torch",
    "torch_files",
]
