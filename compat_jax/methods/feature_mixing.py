"""MixBCT: the new classifier learns on new and old features alike."""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from compat_jax import losses
from compat_jax.fields import Rule
from compat_jax.methods.base import LossInputs, Method, TaskStart, previous_features, weight_of
from compat_jax.methods.registry import register


def chosen_rows(
    old: jax.Array, means: jax.Array, *, share: jax.Array, credible: float
) -> jax.Array:
    """Choose the rows of a batch whose feature is replaced by the old one.

    Only credible old features may replace: those nearest to the mean of their class. Of these, evenly
    spread rows are taken; the batch's order is random, so that they are a random choice.

    Args:
      old: float[batch, d], old features.
      means: float32[batch, d], mean old feature of each row's class.
      share: float32[], of the batch's rows to replace.
      credible: share of the batch that counts as credible.

    Returns:
      bool[batch], floor(share * batch) of them True (at most as many as are credible).
    """
    size = len(old)
    kept = max(round(credible * size), 1)
    rank = jnp.argsort(jnp.argsort(losses.feature_distillation(old, means)))
    is_credible = rank < kept
    wanted = jnp.minimum(jnp.floor(share * size + 1e-3).astype(jnp.int32), kept)
    place = jnp.cumsum(is_credible)  # 1, 2, ..., kept at the credible rows
    return is_credible & (place * wanted // kept > (place - 1) * wanted // kept)


@register("MixBCT (mixed features)", "Liang et al., MixBCT, 2023 (arXiv 2308.06948)")
def mixbct(
    share: Annotated[
        float, Rule("of a batch's features replaced by old ones", low=0, high=1)
    ] = 0.3,
    credible: Annotated[
        float, Rule("share of old features that may replace", above=0, high=1)
    ] = 0.9,
) -> Method:
    """Train with CE(own head) where a share of the batch has old features in place of new ones.

    No further loss: the classifier has to separate old and new features at once, so that new
    features come to lie with the old ones of their class. Old features replace where they are
    credible, near the mean of their class. Rows replaced teach the head, not the backbone.

    Args:
      share: of the rows, in [0, 1]; 0 is plain cross-entropy.
      credible: in (0, 1]; ranked within the batch, where MixBCT ranks all images of a class.

    Source: `BCT_Methods/MixBCT/train.py` of yuleung/MixBCT, with a linear head in place of ArcFace and
    features as the network returns them.
    """

    def freeze(start: TaskStart):
        shape = start.variables["params"]["head"]["kernel"].shape[::-1]
        return {
            "previous": start.variables,
            "means": start.mean_features() if start.num_old else np.zeros(shape, np.float32),
            "share": weight_of(start, share),
        }

    def loss(inputs: LossInputs) -> jax.Array:
        frozen, old = inputs.frozen, inputs.taught.astype(np.float32)
        means = frozen["means"][inputs.classes]
        is_old = chosen_rows(old, means, share=frozen["share"], credible=credible)
        assert inputs.outputs.logits is not None, "its head is learnable"
        logits = inputs.outputs.logits.astype(np.float32)
        mixed = jnp.where(is_old[:, None], old @ inputs.classifier, logits)
        return losses.softmax_cross_entropy(mixed, inputs.classes, inputs.num_seen)

    return Method("mixbct", loss, fixed_simplex=False, freeze=freeze, teach=previous_features)
