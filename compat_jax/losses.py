"""Losses as pure functions: arrays in, one value per example out; the caller takes the mean.

Pass features as the network returns them: each loss L2-normalises them where it needs to. Values and
gradients stay finite for zero features, for batches of one and for batches of a single class.
"""

import math
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from compat_jax import simplex
from compat_jax.errors import unknown

SameClass = Literal["exclude", "as_coded"]
SAME_CLASS = ("exclude", "as_coded")


def normalize(features: jax.Array) -> jax.Array:
    """Divide features by their L2 norm, in float32.

    Args:
      features: float[..., d].

    Returns:
      float32[..., d] (wider if the input is). A feature with norm below 1e-12 counts as zero: its
      result and its gradient are zero.
    """
    wide = features.astype(np.promote_types(features.dtype, np.float32))
    square = jnp.sum(wide * wide, axis=-1, keepdims=True)
    # Near zero the gradient of rsqrt overflows; the inner where keeps it out of the graph.
    is_zero = square < 1e-24
    return wide * jnp.where(is_zero, 0.0, jax.lax.rsqrt(jnp.where(is_zero, 1.0, square)))


def simplex_cross_entropy(
    features: jax.Array, labels: jax.Array, num_prototypes: int | None = None
) -> jax.Array:
    """Compute the cross-entropy of a softmax over the fixed d-Simplex prototypes.

    Args:
      features: float[batch, d], d = K-1, not normalised.
      labels: int[batch], prototype rows in 0..K-1 (see `simplex.prototype_rows`).
      num_prototypes: K, if the features have padding columns (see `simplex.split_logits`).

    Returns:
      float32[batch].

    Source: L_SCE of the paper; `CrossEntropyLoss` on `fc2` with fixed weights in the reference.
    """
    chex.assert_rank([features, labels], [2, 1])
    chex.assert_equal_shape_prefix([features, labels], 1)
    # Two arrays rather than one row of K: K-1 columns divide evenly over devices, K do not.
    body, last = simplex.split_logits(features, num_prototypes)
    partition = jnp.logaddexp(jax.nn.logsumexp(body, axis=-1), last)
    return partition - simplex.label_logit(features, labels, num_prototypes)


def info_nce(
    new: jax.Array,
    old: jax.Array,
    labels: jax.Array,
    mu: float = 10.0,
    same_class: SameClass = "exclude",
    positive_in_denominator: bool = False,
) -> jax.Array:
    """Compute the contrast of new features against the frozen previous model's, on the same images.

    The positive pair of image i is (old_i, new_i); its negatives are the pairs (old_i, new_j) where j
    is of another class.

    Args:
      new: float[batch, d], features of the model in training.
      old: float[batch, d], features of the previous model; no gradient flows into them.
      labels: int[batch], any class numbers.
      mu: inverse temperature.
      same_class: "exclude" leaves pairs of the same class out of the denominator, as the paper
        describes; "as_coded" counts each of them as exp(0), as the reference's code does.
      positive_in_denominator: add exp(mu * positive) to the denominator.

    Returns:
      float32[batch]. With an empty denominator (for "exclude" without the positive: no image of
      another class in the batch) the loss is the positive part only.

    Raises:
      UserError: unknown `same_class`.

    Source: L_iNCE, Equation 4 of the CVPR 2024 paper; `HocLoss` in `src/iamcl2r/methods/hoc.py`.
    """
    chex.assert_rank([new, old, labels], [2, 2, 1])
    chex.assert_equal_shape([new, old])
    chex.assert_equal_shape_prefix([new, labels], 1)
    if same_class not in SAME_CLASS:
        raise unknown("same_class", same_class, SAME_CLASS)
    new, old = normalize(new), normalize(jax.lax.stop_gradient(old))
    similarity = mu * (old @ new.T)
    positive = mu * jnp.sum(old * new, axis=-1)
    same = labels[:, None] == labels[None, :]
    if same_class == "as_coded":
        terms = jnp.where(same, 0.0, similarity)
    else:
        terms = jnp.where(same, -jnp.inf, similarity)
    if positive_in_denominator:
        terms = jnp.where(jnp.eye(len(labels), dtype=bool), positive[:, None], terms)
    has_term = jnp.any(terms > -jnp.inf, axis=-1)
    # The gradient of logsumexp is NaN for a row of -inf: give it zeros and drop the result.
    negative = jax.nn.logsumexp(jnp.where(has_term[:, None], terms, 0.0), axis=-1)
    return jnp.where(has_term, negative, 0.0) - positive


def hoc(
    new: jax.Array,
    old: jax.Array,
    labels: jax.Array,
    lam: float = 0.1,
    mu: float = 10.0,
    same_class: SameClass = "exclude",
    num_prototypes: int | None = None,
) -> jax.Array:
    """Compute the HOC loss, lam * simplex_cross_entropy + (1 - lam) * info_nce.

    Args:
      new: float[batch, d], d = K-1, features of the model in training.
      old: float[batch, d], features of the frozen previous model on the same images.
      labels: int[batch], prototype rows in 0..K-1.
      lam: weight of the cross-entropy, in [0, 1].
      mu: inverse temperature of the contrast.
      same_class: see `info_nce`.
      num_prototypes: K, if both features have padding columns of zeros (see
        `simplex.split_logits`).

    Returns:
      float32[batch].

    Source: Equation 3 of the CVPR 2024 paper; `src/iamcl2r/train.py`.
    """
    contrast = info_nce(new, old, labels, mu=mu, same_class=same_class)
    return lam * simplex_cross_entropy(new, labels, num_prototypes) + (1.0 - lam) * contrast


def feature_distillation(new: jax.Array, old: jax.Array) -> jax.Array:
    """Compute 1 - cos(new, old), the distance of features from the previous model's.

    Args:
      new: float[batch, d], features of the model in training.
      old: float[batch, d], features of the previous model; no gradient flows into them.

    Returns:
      float32[batch] in [0, 2]; 1 where a feature is zero.

    Source: `EmbeddingsSimilarity` in `src/cl2r/train.py` of CompatibleLifelongRepresentation.
    """
    chex.assert_equal_shape([new, old])
    return 1.0 - jnp.sum(normalize(new) * normalize(jax.lax.stop_gradient(old)), axis=-1)


def distillation_weight(new_classes: int, seen_classes: int, base: float = 5.0) -> float:
    """Return the weight of `feature_distillation` in a task, base * sqrt(new / seen classes).

    Args:
      new_classes: number of classes that the task adds, >= 0.
      seen_classes: number of classes of the tasks before it; 0 gives weight 0, since there is
        no memory yet.
      base: weight for equally many new and seen classes.

    Returns:
      The weight.

    Source: `update_criterion_weight` in `src/cl2r/utils.py`.
    """
    return base * math.sqrt(new_classes / seen_classes) if seen_classes else 0.0


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array, num_seen: jax.Array) -> jax.Array:
    """Compute the cross-entropy of a learnable head that has grown to `num_seen` classes.

    The head is allocated for all classes at once, so that growing it recompiles nothing; the softmax
    leaves out the columns of classes not seen yet.

    Args:
      logits: float[batch, classes].
      labels: int[batch] in 0..num_seen-1.
      num_seen: int[], number of classes seen so far.

    Returns:
      float32[batch].
    """
    chex.assert_rank([logits, labels], [2, 1])
    wide = logits.astype(np.promote_types(logits.dtype, np.float32))
    unseen = jnp.arange(logits.shape[-1]) >= num_seen
    lowest = jnp.finfo(wide.dtype).min
    return optax.losses.softmax_cross_entropy_with_integer_labels(
        jnp.where(unseen, lowest, wide), labels
    )
