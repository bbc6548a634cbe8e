"""Backbones by name, and the embedder that puts a projection and a head on one.

A backbone is a function (dtype, **arguments) -> Linen module and a line here, or `register(name,
build)`, or any Linen module handed to `Run(backbone=...)`.
"""

from compat_jax.models.backbone import (
    DTYPES,
    Backbone,
    GivenBackbone,
    as_backbone,
    parameters,
    recorded_backbone,
    register,
    registered,
)
from compat_jax.models.embedder import (
    Embedder,
    Outputs,
    feature_size,
    init_variables,
    renamed_layers,
)
from compat_jax.models.regnet import regnet_y_400mf
from compat_jax.models.resnet import resnet18, resnet50, resnet_small
from compat_jax.models.resnet_cifar import resnet32_cifar
from compat_jax.models.senet import senet18
from compat_jax.models.vit import vit_s16, vit_ti16

register("regnet_y_400mf", regnet_y_400mf)
register("resnet18", resnet18)
register("resnet32_cifar", resnet32_cifar)
register("resnet50", resnet50)
register("resnet_small", resnet_small)
register("senet18", senet18)
register("vit_s16", vit_s16)
register("vit_ti16", vit_ti16)

__all__ = [
    "DTYPES",
    "Backbone",
    "Embedder",
    "GivenBackbone",
    "Outputs",
    "as_backbone",
    "feature_size",
    "init_variables",
    "parameters",
    "recorded_backbone",
    "register",
    "registered",
    "renamed_layers",
]
