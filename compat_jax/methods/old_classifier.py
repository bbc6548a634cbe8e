"""BCT: the old classifier judges the new features too."""

from typing import Annotated

import jax
import numpy as np

from compat_jax import losses
from compat_jax.fields import Rule
from compat_jax.methods.base import LossInputs, Method, TaskStart, beside_cross_entropy
from compat_jax.methods.registry import register


def old_head(start: TaskStart) -> np.ndarray:
    """Return the classifier of the old model, with a column for every class seen.

    Columns that the old model learnt stay as they are. A class that it did not learn gets the mean
    feature that it gives the class's images, as long as learnt columns are on average (1 if there are
    none).

    Args:
      start: of the task.

    Returns:
      float32[feature_size, classes]; zeros for classes to come, and before there is an old model.
    """
    kernel = start.variables["params"]["head"]["kernel"]
    if not start.num_old:
        return np.zeros(kernel.shape, np.float32)
    known = min(start.num_known, start.num_seen)
    head = np.zeros(kernel.shape, np.float32)
    head[:, :known] = np.asarray(kernel)[:, :known]
    if known < start.num_seen:
        means = start.mean_features()[known : start.num_seen]
        lengths = np.linalg.norm(means, axis=1, keepdims=True)
        length = np.linalg.norm(head[:, :known], axis=0).mean() if known else 1.0
        head[:, known : start.num_seen] = (length * means / np.maximum(lengths, 1e-12)).T
    return head


def influence(
    features: jax.Array, head: jax.Array, classes: jax.Array, *, num_seen: jax.Array
) -> jax.Array:
    """Compute the cross-entropy of new features under an old classifier.

    Args:
      features: float[batch, d], of the model in training, not normalised.
      head: float32[d, classes], fixed: no gradient flows into it.
      classes: int32[batch] columns of the head.
      num_seen: int32[], columns that count.

    Returns:
      float32[batch].

    Source: the influence loss of Shen et al., CVPR 2020.
    """
    logits = features.astype(np.float32) @ jax.lax.stop_gradient(head)
    return losses.softmax_cross_entropy(logits, classes, num_seen)


@register("BCT (old classifier)", "Shen et al., BCT, CVPR 2020")
def bct(
    weight: Annotated[float, Rule("weight of the old classifier's cross-entropy", low=0)] = 1.0,
) -> Method:
    """Train with CE(own head) + weight * CE(old head on the new features).

    The old head is fixed; its columns for classes that the old model did not learn are made of the
    mean features that the old model gives their images. Where a replacement model of other classes
    starts a task, all columns are made so. With a fixed simplex, whose head never changes, the second
    term is the simplex cross-entropy.

    Args:
      weight: of the old classifier, >= 0; 1 in OpenCompatible and AdvBCT, 10 in BT2's CIFAR settings.

    Source: `trainer/trainer.py` of TencentARC/OpenCompatible; the columns as in
    `generate_pseudo_classifier` of YantaoShen/openBCT, but as long as the learnt ones.
    """

    def influence_of(inputs: LossInputs) -> jax.Array:
        features, head = inputs.outputs.features, inputs.frozen["old_head"]
        return influence(features, head, inputs.classes, num_seen=inputs.num_seen)

    def freeze(start: TaskStart):
        return {"old_head": old_head(start)}

    return beside_cross_entropy("bct", "influence", influence_of, weight, freeze=freeze)
