"""Exchange with PyTorch: weights by name, and its files. The rest of the package never imports it."""

from compat_jax.interop import torch_files
from compat_jax.interop.weights import Misfit, from_torch, is_bare, to_torch

__all__ = ["Misfit", "from_torch", "is_bare", "to_torch", "torch_files"]
