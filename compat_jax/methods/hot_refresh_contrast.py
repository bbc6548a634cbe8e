"""Hot-refresh: a contrast of new features against old ones, with or without new negatives."""

from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from compat_jax import losses
from compat_jax.fields import Rule
from compat_jax.methods.base import (
    LossInputs,
    Method,
    beside_cross_entropy,
    previous_features,
    previous_variables,
)
from compat_jax.methods.registry import register


def contrast(
    new: jax.Array,
    old: jax.Array,
    labels: jax.Array,
    *,
    temperature: float = 0.01,
    hardest: int = 10,
    new_negatives: bool = True,
) -> jax.Array:
    """Compute the contrast of each new feature with the old feature of its image.

    Negatives of the new feature n_i are the old features o_j of images of other classes, and, with
    `new_negatives`, their new features n_j. `losses.info_nce` has its negatives the other way round,
    (o_i, n_j): with all negatives, this loss is that of exchanged versions.

    Args:
      new: float[batch, d], of the model in training.
      old: float[batch, d], of the previous model; no gradient flows into them.
      labels: int[batch], any class numbers.
      temperature: T; similarities are cosines / T.
      hardest: negatives of each kind that count, those most alike; 0 for all.
      new_negatives: the regression-alleviating form (RACT).

    Returns:
      float32[batch], -log(exp(p) / (exp(p) + sum of exp(negatives))); 0 without any negative.
    """
    chex.assert_equal_shape([new, old])
    new, old = losses.normalize(new), losses.normalize(jax.lax.stop_gradient(old))
    positive = jnp.sum(new * old, axis=-1, keepdims=True) / temperature
    terms = [positive]
    for others in (old, new) if new_negatives else (old,):
        is_same = labels[:, None] == labels[None, :]
        negative = jnp.where(is_same, -jnp.inf, new @ others.T / temperature)
        if 0 < hardest < len(labels):
            negative, _ = jax.lax.top_k(negative, hardest)
        terms.append(negative)
    return jax.nn.logsumexp(jnp.concatenate(terms, axis=-1), axis=-1) - positive[:, 0]


@register("Hot-refresh (RACT)", "Zhang et al., hot-refresh model upgrades, ICLR 2022")
def hot_refresh(
    form: Annotated[
        str, Rule("negatives: old features only, or new ones too", choices=("plain", "ract"))
    ] = "ract",
    weight: Annotated[float, Rule("weight of the contrast", low=0)] = 1.0,
    temperature: Annotated[float, Rule("of the contrast", above=0)] = 0.01,
    hardest: Annotated[int, Rule("negatives that count, of each kind; 0 for all", low=0)] = 10,
) -> Method:
    """Train with CE(own head) + weight * contrast of new features against old ones.

    Args:
      form: "plain", or "ract" (regression-alleviating compatible training).
      weight: of the contrast, >= 0.
      temperature: of the similarities, > 0.
      hardest: negatives of each kind, >= 0.

    Source: `contra` and `contra_reg_free` in `model/loss.py`, `config.json` of
    TencentARC/OpenCompatible.
    """

    def contrasted(inputs: LossInputs) -> jax.Array:
        return contrast(
            inputs.outputs.features,
            inputs.taught,
            inputs.classes,
            temperature=temperature,
            hardest=hardest,
            new_negatives=form == "ract",
        )

    return beside_cross_entropy(
        "hot_refresh",
        "contrast",
        contrasted,
        weight,
        freeze=previous_variables,
        teach=previous_features,
    )
