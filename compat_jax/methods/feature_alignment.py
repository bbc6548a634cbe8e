"""Alignment: new features stay near the old features of the same images."""

from typing import Annotated

import jax
import jax.numpy as jnp

from compat_jax import losses
from compat_jax.errors import unknown
from compat_jax.fields import Rule
from compat_jax.methods.base import (
    LossInputs,
    Method,
    beside_cross_entropy,
    previous_features,
    previous_variables,
)
from compat_jax.methods.registry import register

DISTANCES = ("l2", "mean_square", "cosine")


def feature_distance(
    new: jax.Array, old: jax.Array, *, kind: str = "l2", threshold: float = 0.0
) -> jax.Array:
    """Compute the distance of normalised features from old ones, beyond a threshold.

    Args:
      new: float[batch, d], of the model in training.
      old: float[batch, d], of the previous model; no gradient flows into them.
      kind: "l2", |n - o|; "mean_square", |n - o|^2 / d = (2 - 2 cos) / d; "cosine", 1 - cos(n, o).
      threshold: distance that costs nothing.

    Returns:
      float32[batch], max(distance - threshold, 0). Its gradient is zero inside the threshold, and for
      equal or zero features.

    Raises:
      UserError: unknown kind.
    """
    if kind not in DISTANCES:
        raise unknown("distance", kind, DISTANCES)
    if kind == "cosine":
        found = losses.feature_distillation(new, old)
    else:
        difference = losses.normalize(new) - losses.normalize(jax.lax.stop_gradient(old))
        square = jnp.sum(difference * difference, axis=-1)
        found = square / new.shape[-1]
        if kind == "l2":
            is_zero = square < 1e-14  # the gradient of the root is infinite there
            found = jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, square)))
    return jnp.maximum(found - threshold, 0.0)


@register("Alignment with the old features", "the L2 baseline of BCT, MixBCT and OpenCompatible")
def align(
    distance: Annotated[str, Rule("between normalised features", choices=DISTANCES)] = "l2",
    weight: Annotated[float, Rule("weight of the distance", low=0)] = 10.0,
    threshold: Annotated[float, Rule("distance that costs nothing", low=0)] = 0.0,
) -> Method:
    """Train with CE(own head) + weight * max(distance(new, old feature) - threshold, 0).

    Args:
      distance: "l2" (MixBCT), "mean_square" (OpenCompatible, there with weight 1) or "cosine".
      weight: of the distance, >= 0.
      threshold: MixBCT's "weakened L2" has 0.2.

    Source: `BCT_Methods/L2_weakenedL2/train.py` of yuleung/MixBCT; `model/loss.py` of
    TencentARC/OpenCompatible.
    """

    def away(inputs: LossInputs) -> jax.Array:
        features = inputs.outputs.features
        return feature_distance(features, inputs.taught, kind=distance, threshold=threshold)

    return beside_cross_entropy(
        "align", "distance", away, weight, freeze=previous_variables, teach=previous_features
    )
