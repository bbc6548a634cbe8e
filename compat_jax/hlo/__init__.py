"""The compiled program: what it launches, how fast a chip can run it at best, what it wastes."""

from compat_jax.hlo.chips import CHIPS, Chip
from compat_jax.hlo.kernels import Collective, Kernel, Program, read
from compat_jax.hlo.roofline import Bound, bound, duration
from compat_jax.hlo.waste import findings

__all__ = [
    "CHIPS",
    "Bound",
    "Chip",
    "Collective",
    "Kernel",
    "Program",
    "bound",
    "duration",
    "findings",
    "read",
]
