"""Backbone, projection, head: what every method trains and every version of a chain holds."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from compat_jax.models.layers import linear_init


class Outputs(NamedTuple):
    """What an embedder gives for a batch.

    Attributes:
      features: float[batch, feature_size], what retrieval compares.
      logits: float[batch, classes] of a learnable head; None for a fixed simplex, whose logits
        `simplex.logits(features)` gives without any variable.
    """

    features: jax.Array
    logits: jax.Array | None


class Embedder(nn.Module):
    """A backbone, an optional projection to the simplex space, an optional learnable head.

    Attributes:
      backbone: module (images, train) -> float[batch, width].
      projection: size of the bias-free projection (K-1 for a simplex of K classes); None leaves the
        pooled backbone as the feature.
      head: classes of a learnable bias-free head; None for the fixed simplex.
      dtype: of the computation; parameters are float32.

    Source: `Incremental_ResNet` in `src/iamcl2r/models/__init__.py` (fc1, fc2).
    """

    backbone: nn.Module
    projection: int | None = None
    head: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> Outputs:
        """float[batch, h, w, 3] normalised images -> Outputs."""
        features = self.backbone(images, train)
        if self.projection is not None:
            features = self._linear(features, self.projection, "fc1")
        logits = None if self.head is None else self._linear(features, self.head, "fc2")
        return Outputs(features, logits)

    def _linear(self, x, size, name):
        layer = nn.Dense(size, use_bias=False, dtype=self.dtype, kernel_init=linear_init, name=name)
        return layer(x)
