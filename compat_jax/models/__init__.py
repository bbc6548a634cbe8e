"""Backbones by name, and the embedder that puts a projection and a head on one."""

import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from compat_jax.errors import UserError, unknown
from compat_jax.models.embedder import Embedder, Outputs
from compat_jax.models.regnet import regnet_y_400mf
from compat_jax.models.resnet import resnet18, resnet50, resnet_small
from compat_jax.models.resnet_cifar import resnet32_cifar
from compat_jax.models.senet import senet18
from compat_jax.models.vit import vit_s16, vit_ti16

BACKBONES = {
    "regnet_y_400mf": regnet_y_400mf,
    "resnet18": resnet18,
    "resnet32_cifar": resnet32_cifar,
    "resnet50": resnet50,
    "resnet_small": resnet_small,
    "senet18": senet18,
    "vit_s16": vit_s16,
    "vit_ti16": vit_ti16,
}
# LLVM takes ten times longer to optimise the random numbers of an initialisation than they save.
_QUICK_ON_CPU = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

__all__ = ["BACKBONES", "DTYPES", "Embedder", "Outputs", "create_backbone", "init_variables"]


def create_backbone(
    name: str, arguments: Mapping[str, Any] | None = None, dtype: str = "float32"
) -> nn.Module:
    """The backbone of a name.

    Args:
      name: one of BACKBONES.
      arguments: keyword arguments of that backbone's function, e.g. {"width": 32}.
      dtype: "float32" or "bfloat16", of the computation.

    Raises:
      UserError: unknown name, argument or dtype, with the valid ones.
    """
    if name not in BACKBONES:
        raise unknown("backbone", name, BACKBONES)
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    build = BACKBONES[name]
    valid = [p for p in inspect.signature(build).parameters if p != "dtype"]
    for key in arguments or {}:
        if key not in valid:
            if not valid:
                raise UserError(f"backbone {name!r} takes no arguments, got {key!r}: leave it out")
            raise unknown(f"argument of backbone {name!r}", key, valid)
    return build(dtype=DTYPES[dtype], **(arguments or {}))


def init_variables(embedder: Embedder, key: jax.Array, image_shape: tuple[int, int, int]) -> dict:
    """Fresh variables of an embedder.

    Args:
      embedder: the module.
      key: random key.
      image_shape: (height, width, channels).

    Returns:
      {"params": ..., "batch_stats": ...}; "batch_stats" is {} for a network without BatchNorm.
    """

    def init(key):
        return embedder.init(key, jnp.zeros((1, *image_shape)), train=False)

    device = jax.config.jax_default_device or jax.devices()[0]
    options = _QUICK_ON_CPU if device.platform == "cpu" else None
    if not isinstance(key, jax.core.Tracer):  # a nested jit takes no options
        init = jax.jit(init, compiler_options=options)
    variables = init(key)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
