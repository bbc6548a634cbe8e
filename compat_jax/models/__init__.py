"""Backbones by name, and the embedder that puts a projection and a head on one.

A backbone is a function (dtype, **arguments) -> Linen module and a line here, or `register(name,
build)`, or any Linen module handed to `Run(backbone=...)`.
"""

from compat_jax.models.backbone import (
    Backbone,
    GivenBackbone,
    as_backbone,
    parameters,
    recorded_backbone,
    register,
    registered,
)
from compat_jax.models.convnext import convnext_base, convnext_small, convnext_tiny
from compat_jax.models.embedder import (
    Embedder,
    Outputs,
    feature_size,
    init_variables,
    renamed_layers,
)
from compat_jax.models.precision import (
    AUTO,
    DTYPE_CHOICES,
    DTYPES,
    computed_in,
    multiplies_bfloat16,
)
from compat_jax.models.regnet import regnet_y_400mf
from compat_jax.models.rematerialize import REMAT, block, product, rematerializing
from compat_jax.models.resnet import (
    resnet18,
    resnet18d,
    resnet34,
    resnet34d,
    resnet50,
    resnet50d,
    resnet101,
    resnet101d,
    resnet152,
    resnet152d,
    resnet_small,
)
from compat_jax.models.resnet_cifar import resnet32_cifar
from compat_jax.models.senet import senet18
from compat_jax.models.vit import VITS

for _build in (
    *(convnext_tiny, convnext_small, convnext_base),
    regnet_y_400mf,
    *(resnet18, resnet34, resnet50, resnet101, resnet152),
    *(resnet18d, resnet34d, resnet50d, resnet101d, resnet152d),
    *(resnet32_cifar, resnet_small),
    senet18,
):
    register(_build.__name__, _build)
for _name, _vit in VITS.items():
    register(_name, _vit)

__all__ = [
    "AUTO",
    "DTYPES",
    "DTYPE_CHOICES",
    "REMAT",
    "Backbone",
    "Embedder",
    "GivenBackbone",
    "Outputs",
    "as_backbone",
    "block",
    "computed_in",
    "feature_size",
    "init_variables",
    "multiplies_bfloat16",
    "parameters",
    "product",
    "recorded_backbone",
    "register",
    "registered",
    "rematerializing",
    "renamed_layers",
]
