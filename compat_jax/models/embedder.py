"""The network of every method and every version: backbone, projection, head."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import InvalidRngError

from compat_jax.errors import UserError
from compat_jax.models.layers import linear_init

# Linen derives initial weights from the names of modules. Drawing them under the names that these two
# layers had in the first release keeps the weights of every seed.
_DRAWN_AS = {"projection": "fc1", "head": "fc2"}
# What other libraries call it; a backbone with one of these would be trained in its default mode.
_OTHER_MODES = (
    *("training", "is_training", "is_train", "train_mode", "deterministic", "inference"),
    *("use_running_average", "use_running_stats", "eval_mode", "is_eval"),
)
# LLVM takes ten times longer to optimise the random numbers of an initialisation than they save.
_QUICK_ON_CPU = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


class Outputs(NamedTuple):
    """Outputs of an embedder for one batch.

    Attributes:
      features: float[batch, feature_size], compared by retrieval.
      logits: float[batch, classes] of a learnable head; None for a fixed simplex, whose logits
        `simplex.logits(features)` computes without any variable.
    """

    features: jax.Array
    logits: jax.Array | None


class Embedder(nn.Module):
    """A backbone, an optional projection into the simplex space, an optional learnable head.

    Attributes:
      backbone: module (images, train) -> float[batch, width].
      projection_size: columns of the bias-free projection (K-1 for a simplex of K prototypes); None
        uses the pooled backbone as the feature.
      head_size: classes of a learnable bias-free head; None for the fixed simplex.
      dtype: of the computation; parameters are float32.
      layer_names: names of projection and head in the variables.

    Source: `Incremental_ResNet` in `src/iamcl2r/models/__init__.py`.
    """

    backbone: nn.Module
    projection_size: int | None = None
    head_size: int | None = None
    dtype: Any = jnp.float32
    layer_names: tuple[str, str] = ("projection", "head")

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Outputs:
        """Embed float[batch, h, w, c] normalised images.

        Raises:
          UserError: of a backbone that returns something else than floats of shape [batch, width] or
            asks for random numbers; in training, of one that would not learn of it.
        """
        mode = _mode(self.backbone, train)
        features = _pooled(self.backbone, images, mode)
        if train and not mode and jax.tree.leaves(self.variables.get("batch_stats", {})):
            raise _untold(
                self.backbone, "has running statistics, but is not told when to update them"
            )
        projection, head = self.layer_names
        if self.projection_size is not None:
            features = self._linear(features, self.projection_size, projection)
        logits = None if self.head_size is None else self._linear(features, self.head_size, head)
        return Outputs(features, logits)

    def _linear(self, x, size, name):
        layer = nn.Dense(size, use_bias=False, dtype=self.dtype, kernel_init=linear_init, name=name)
        return layer(x)


def _mode(backbone, train):
    """The keyword `train`, for backbones that take it; others must have no mode."""
    # What flax.nnx.bridge.to_linen returns takes anything, and hands it to the class that it holds.
    call = getattr(backbone, "nnx_class", backbone).__call__
    taken = inspect.signature(call).parameters
    if "train" in taken:
        return {"train": train}
    if train and (named := [name for name in _OTHER_MODES if name in taken]):
        raise _untold(backbone, f"takes {named[0]!r} in place of 'train'")
    return {}


def _untold(backbone, what):
    """Return the error for a backbone that would be trained as if it only embedded."""
    return UserError(
        f"backbone {_class_name(backbone)} {what}: call the argument `train`, __call__(self, images, "
        "train), which is True in training",
        "backbone",
    )


def _pooled(backbone, images, mode):
    """Return float[batch, width], what a backbone makes of images; refuse anything else."""
    try:
        found = backbone(images, **mode)
    except (InvalidRngError, KeyError, ValueError) as error:
        if not _lacks_randomness(error):
            raise
        raise UserError(
            f"backbone {_class_name(backbone)} asks for random numbers, and backbones get none: leave "
            "out its dropout and stochastic depth",
            "backbone",
        ) from error
    is_floats = isinstance(found, jax.Array) and jnp.issubdtype(found.dtype, jnp.floating)
    if is_floats and found.ndim == 2 and len(found) == len(images):
        return found
    raise UserError(
        f"backbone {_class_name(backbone)} returned {_described(found)} for a batch of {len(images)}, "
        "where one array float[batch, width] is needed: pool a map, x.mean((1, 2)), and leave out "
        "other outputs",
        "backbone",
    )


def _lacks_randomness(error):
    """Return whether a module asked for random numbers; Flax NNX has no error of its own for this."""
    return isinstance(error, InvalidRngError) or any(
        text in str(error) for text in ("No RngStream named", "no `rngs` argument was provided")
    )


def _described(output):
    """Return the dtype and shape of an array, the type of anything else."""
    if isinstance(output, jax.Array):
        return f"{output.dtype}{list(output.shape)}"
    return f"a value of type {type(output).__name__}"


def _class_name(backbone):
    return getattr(backbone, "nnx_class", type(backbone)).__name__


def init_variables(
    embedder: Embedder, key: jax.Array, image_shape: tuple[int, int, int]
) -> dict[str, Any]:
    """Draw fresh variables of an embedder.

    Args:
      embedder: the module.
      key: random key.
      image_shape: (height, width, channels).

    Returns:
      {"params": ..., "batch_stats": ...}; "batch_stats" is {} for a network without BatchNorm.
    """
    drawn = embedder.clone(layer_names=tuple(_DRAWN_AS.values()))

    def init(key):
        return drawn.init(key, jnp.zeros((1, *image_shape)), train=False)

    config: Any = jax.config
    device = config.jax_default_device or jax.devices()[0]
    options = _QUICK_ON_CPU if device.platform == "cpu" else None
    if not isinstance(key, jax.core.Tracer):  # a nested jit takes no options
        init = jax.jit(init, compiler_options=options)
    variables = init(key)
    params = renamed_layers(variables["params"], {old: new for new, old in _DRAWN_AS.items()})
    return {"params": params, "batch_stats": variables.get("batch_stats", {})}


def renamed_layers(params: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Rename top-level layers of an embedder's parameters; other names stay."""
    return {names.get(name, name): layer for name, layer in params.items()}


def feature_size(embedder: Embedder, image_shape: tuple[int, int, int]) -> int:
    """Return the number of columns of an embedder's features, without computing any."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    outputs, _ = jax.eval_shape(
        lambda x: embedder.init_with_output(jax.random.key(0), x, train=False), image
    )
    return int(outputs.features.shape[-1])
