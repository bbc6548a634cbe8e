"""LwF: what the old classifier says of new features is what it said of old ones."""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from compat_jax.fields import Rule
from compat_jax.methods.base import (
    LossInputs,
    Method,
    TaskStart,
    beside_cross_entropy,
    previous_features,
)
from compat_jax.methods.old_classifier import old_head
from compat_jax.methods.registry import register


def distillation(
    new: jax.Array, old: jax.Array, *, temperature: float = 2.0, num_old: jax.Array
) -> jax.Array:
    """Compute -sum softmax(old / T) * log softmax(new / T) over the old classes.

    Args:
      new: float[batch, classes], logits of the model in training.
      old: float[batch, classes], logits of the previous model; no gradient flows into them.
      temperature: T > 0.
      num_old: int32[], columns that count; with 0 the result is 0.

    Returns:
      float32[batch]; the entropy of softmax(old / T), its smallest value, where both agree.
    """
    is_old = jnp.arange(new.shape[-1]) < num_old
    lowest = jnp.finfo(np.float32).min
    new, old = (
        jnp.where(is_old, x.astype(np.float32) / temperature, lowest)
        for x in (new, jax.lax.stop_gradient(old))
    )
    scores = jnp.where(is_old, jax.nn.log_softmax(new), 0.0)
    return -jnp.sum(jax.nn.softmax(old) * scores, axis=-1)


@register("LwF (learning without forgetting)", "Li and Hoiem, LwF, ECCV 2016")
def lwf(
    weight: Annotated[float, Rule("weight of the distillation", low=0)] = 1.0,
    temperature: Annotated[float, Rule("of the logits in the distillation", above=0)] = 2.0,
) -> Method:
    """Train with CE(own head) - weight * sum softmax(W'z'/T) * log softmax(W'z/T).

    W' is the old classifier (see `bct`), z and z' the new and the old feature of an image: the form
    used for compatible training, where the old head itself reads the new features. The sum is over
    the old classes; at the first task there are none, and cross-entropy remains.

    Args:
      weight: of the distillation, >= 0.
      temperature: T; 2 in the paper, 0.01 in OpenCompatible, whose logits are cosines.

    Source: the paper; `trainer/trainer.py` of TencentARC/OpenCompatible.
    """

    def freeze(start: TaskStart):
        return {
            "previous": start.variables,
            "old_head": old_head(start),
            "num_old": np.int32(start.num_old),
        }

    def distilled(inputs: LossInputs) -> jax.Array:
        frozen = inputs.frozen
        new, old = (
            x.astype(np.float32) @ jax.lax.stop_gradient(frozen["old_head"])
            for x in (inputs.outputs.features, inputs.taught)
        )
        return distillation(new, old, temperature=temperature, num_old=frozen["num_old"])

    return beside_cross_entropy(
        "lwf", "distillation", distilled, weight, freeze=freeze, teach=previous_features
    )
