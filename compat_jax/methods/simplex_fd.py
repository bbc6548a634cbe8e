"""d-Simplex-FD: CL2R's feature distillation."""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from compat_jax import losses
from compat_jax.fields import Rule
from compat_jax.methods.base import LossInputs, Method, TaskStart, previous_features
from compat_jax.methods.registry import register


@register("d-Simplex-FD (CL²R)", "Biondi et al., CL2R (d-Simplex-FD)")
def fd(
    weight: Annotated[float, Rule("distillation for as many new classes as old", low=0)] = 5.0,
) -> Method:
    """Train with simplex cross-entropy, and keep the features of rehearsed images where they were.

    The distance to the previous model's features counts for images of old classes only, as their mean,
    and weighs weight * sqrt(new classes / old classes).

    Args:
      weight: of the distillation for as many new classes as old ones, >= 0.

    Source: `EmbeddingsSimilarity` and `update_criterion_weight` of CompatibleLifelongRepresentation.
    """

    def freeze(start: TaskStart):
        new = start.num_seen - start.num_old
        return {
            "previous": start.variables,
            "num_old": np.int32(start.num_old),
            "weight": np.float32(losses.distillation_weight(new, start.num_old, weight)),
        }

    def loss(inputs: LossInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        distance = losses.feature_distillation(inputs.outputs.features, inputs.taught)
        memory = (inputs.classes < inputs.frozen["num_old"]).astype(jnp.float32)
        # Scaled so that the mean over the batch equals the mean over the memory images.
        share = memory / jnp.maximum(memory.mean(), 1.0 / len(distance))
        cross_entropy = inputs.cross_entropy()
        terms = {"cross_entropy": cross_entropy, "distillation": share * distance}
        return cross_entropy + inputs.frozen["weight"] * share * distance, terms

    return Method(
        "fd",
        loss,
        freeze=freeze,
        teach=previous_features,
        terms=("cross_entropy", "distillation"),
        takes_padding=True,
    )
