"""The types that networks compute in, and which of them a device is fast in."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from compat_jax.errors import unknown

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
AUTO = "auto"
# What may be asked for; a record names one of DTYPES.
DTYPE_CHOICES = (*DTYPES, AUTO)

# Instructions of x86 processors that multiply bfloat16, by their names in /proc/cpuinfo.
_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")
_AMPERE = 8.0  # compute capability of the first of NVIDIA's GPUs that multiply bfloat16


def computed_in(dtype: str) -> str:
    """Return the type that a name stands for here: itself, or for "auto" the faster one.

    Args:
      dtype: "float32", "bfloat16" or "auto".

    Returns:
      "float32" or "bfloat16".

    Raises:
      UserError: another name.
    """
    if dtype not in DTYPE_CHOICES:
        raise unknown("dtype", dtype, DTYPE_CHOICES)
    if dtype != AUTO:
        return dtype
    return "bfloat16" if multiplies_bfloat16(jax.default_backend()) else "float32"


@functools.cache
def multiplies_bfloat16(platform: str) -> bool:
    """Return whether devices of a platform multiply bfloat16 faster than float32.

    All TPUs do, NVIDIA's GPUs since Ampere, AMD's, and on Linux those x86 processors that have the
    instructions, which XLA uses since jax 0.12.

    Args:
      platform: "cpu", "gpu" or "tpu".
    """
    if platform == "gpu":
        capability = str(jax.devices(platform)[0].compute_capability)  # of AMD "gfx942" or the like
        return not capability[0].isdigit() or float(capability) >= _AMPERE
    if platform != "cpu":
        return True
    described = Path("/proc/cpuinfo")
    if jax.__version_info__ < (0, 12) or not described.exists():
        return False
    return any(name in described.read_text() for name in _INSTRUCTIONS)
