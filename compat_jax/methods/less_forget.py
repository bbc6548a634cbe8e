"""LUCIR: features keep their direction, and old classes keep their distance from new ones."""

import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from compat_jax import losses
from compat_jax.fields import Rule
from compat_jax.methods.base import LossInputs, Method, TaskStart, previous_features, weight_of
from compat_jax.methods.registry import register


def less_forget_weight(new_classes: int, old_classes: int, base: float = 5.0) -> float:
    """Return base * sqrt(old / new classes), the weight of the less-forget term in a task.

    It grows with the share of old classes; that of `losses.distillation_weight` falls.

    Args:
      new_classes: number of classes that the task adds; 0 counts as 1.
      old_classes: number of classes before it.
      base: weight for as many new classes as old ones.
    """
    return base * math.sqrt(old_classes / max(new_classes, 1))


def margin_ranking(
    features: jax.Array,
    classifier: jax.Array,
    classes: jax.Array,
    *,
    num_old: jax.Array,
    num_seen: jax.Array,
    margin: float = 0.5,
    nearest: int = 2,
) -> jax.Array:
    """Compute how far images of old classes are from their class, measured by the nearest new classes.

    Args:
      features: float[batch, d].
      classifier: float32[d, classes].
      classes: int32[batch] columns of the classifier.
      num_old: int32[], classes before the task.
      num_seen: int32[], classes with it.
      margin: by which the cosine with the own class should be larger.
      nearest: new classes with the largest cosines that count.

    Returns:
      float32[batch], the sum of max(margin - cos(z, w_own) + cos(z, w_new), 0) over them; 0 for
      images of new classes.
    """
    cosine = losses.normalize(features) @ losses.normalize(classifier.T).T
    own = jnp.take_along_axis(cosine, classes[:, None], axis=-1)
    column = jnp.arange(cosine.shape[-1])
    is_new = (column >= num_old) & (column < num_seen)
    found, _ = jax.lax.top_k(jnp.where(is_new, cosine, -jnp.inf), min(nearest, len(column)))
    cost = jnp.where(found > -jnp.inf, jnp.maximum(margin - own + found, 0.0), 0.0)
    return jnp.where(classes < num_old, cost.sum(-1), 0.0)


@register("LUCIR (less-forget)", "Hou et al., LUCIR, CVPR 2019")
def lucir(
    weight: Annotated[float, Rule("less-forget, for as many new classes as old", low=0)] = 5.0,
    ranking: Annotated[float, Rule("weight of the margin ranking", low=0)] = 1.0,
    margin: Annotated[float, Rule("of the ranking, a cosine", low=0, high=2)] = 0.5,
    nearest: Annotated[int, Rule("new classes that an image is ranked against", low=1)] = 2,
) -> Method:
    """Train with CE(own head) + lambda * (1 - cos(z, z')) + ranking * margin ranking.

    lambda = weight * sqrt(old classes / new classes), over the whole batch; z and z' are the new and
    the old feature of an image. The ranking keeps images of old classes nearer to their class than to
    the nearest new classes. The head is linear as in `er`, not the paper's cosine head of a learnt
    scale.

    Args:
      weight: 5 for CIFAR-100, 10 for ImageNet in the paper.
      ranking, margin, nearest: 1, 0.5 and 2 in the paper.

    Source: the paper; `hshustc/CVPR19_Incremental_Learning`; FACIL's `lucir.py`.
    """

    def freeze(start: TaskStart):
        new = start.num_seen - start.num_old
        return {
            "previous": start.variables,
            "num_old": np.int32(start.num_old),
            "weight": np.float32(less_forget_weight(new, start.num_old, weight)),
            "ranking": weight_of(start, ranking),
        }

    def loss(inputs: LossInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        frozen, features = inputs.frozen, inputs.outputs.features
        away = losses.feature_distillation(features, inputs.taught)
        ranked = margin_ranking(
            features,
            inputs.classifier,
            inputs.classes,
            num_old=frozen["num_old"],
            num_seen=inputs.num_seen,
            margin=margin,
            nearest=nearest,
        )
        cross_entropy = inputs.cross_entropy()
        terms = {"cross_entropy": cross_entropy, "less_forget": away, "ranking": ranked}
        return cross_entropy + frozen["weight"] * away + frozen["ranking"] * ranked, terms

    return Method(
        "lucir",
        loss,
        fixed_simplex=False,
        freeze=freeze,
        teach=previous_features,
        terms=("cross_entropy", "less_forget", "ranking"),
    )
