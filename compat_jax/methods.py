"""Methods by name: a head, a loss, and whether the previous model is needed.

To add one, write its loss as a function of `LossInputs` and put a `Method` in METHODS.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from compat_jax import losses, simplex
from compat_jax.errors import UserError, unknown
from compat_jax.models import Embedder, Outputs


class LossInputs(NamedTuple):
    """Everything a method's loss may look at for one batch.

    Attributes:
      outputs: of the model in training.
      old: float[batch, d] features of the previous model; None where the method needs none.
      labels: int32[batch], prototype rows for a fixed simplex, class numbers for a learnable head.
      memory: bool[batch], which images come from the rehearsal memory.
      num_seen: int32[] classes seen so far, those of the present task included.
      distillation_weight: float32[] of the present task (see `losses.distillation_weight`).
      num_prototypes: K of the simplex; None for the size of the features + 1. Features may have more
        than K-1 columns, zeros behind (see `simplex.split_logits`).
    """

    outputs: Outputs
    old: jax.Array | None
    labels: jax.Array
    memory: jax.Array
    num_seen: jax.Array
    distillation_weight: jax.Array
    num_prototypes: int | None = None


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """Numbers of the losses.

    Attributes:
      lam: weight of cross-entropy in HOC, in [0, 1].
      mu: inverse temperature of the contrast, > 0.
      same_class: "exclude" (paper) or "as_coded" (reference), see `losses.info_nce`.
      distillation: base weight of `fd`, >= 0.
    """

    lam: float = 0.1
    mu: float = 10.0
    same_class: str = "exclude"
    distillation: float = 5.0

    def __post_init__(self):
        if not 0 <= self.lam <= 1:
            raise UserError(f"loss.lam must lie in [0, 1], got {self.lam}")
        if self.mu <= 0:
            raise UserError(f"loss.mu must be positive, got {self.mu}")
        if self.same_class not in losses.SAME_CLASS:
            raise unknown("loss.same_class", self.same_class, losses.SAME_CLASS)
        if self.distillation < 0:
            raise UserError(f"loss.distillation must not be negative, got {self.distillation}")


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of training compatible (or, for comparison, incompatible) representations.

    Attributes:
      name: as given on the command line.
      fixed_simplex: True for the fixed d-Simplex (features in R^(K-1)), False for a learnable head
        that grows with the classes (features = the pooled backbone).
      needs_previous: whether the loss looks at the previous model's features.
      loss: (LossInputs, LossSettings) -> float32[batch].
      source: where the method comes from.
    """

    name: str
    fixed_simplex: bool
    needs_previous: bool
    loss: Callable[[LossInputs, LossSettings], jax.Array]
    source: str


def _sce(inputs: LossInputs, settings: LossSettings) -> jax.Array:
    del settings
    return losses.simplex_cross_entropy(
        inputs.outputs.features, inputs.labels, inputs.num_prototypes
    )


def _hoc(inputs: LossInputs, settings: LossSettings) -> jax.Array:
    return losses.hoc(
        inputs.outputs.features,
        inputs.old,
        inputs.labels,
        settings.lam,
        settings.mu,
        settings.same_class,
        inputs.num_prototypes,
    )


def _fd(inputs: LossInputs, settings: LossSettings) -> jax.Array:
    distance = losses.feature_distillation(inputs.outputs.features, inputs.old)
    # CL2R takes the mean over the memory images only; scaled so that the batch mean equals it.
    share = inputs.memory / jnp.maximum(inputs.memory.mean(), 1.0 / len(distance))
    return _sce(inputs, settings) + inputs.distillation_weight * share * distance


def _er(inputs: LossInputs, settings: LossSettings) -> jax.Array:
    del settings
    return losses.softmax_cross_entropy(inputs.outputs.logits, inputs.labels, inputs.num_seen)


METHODS = {
    m.name: m
    for m in (
        Method("hoc", True, True, _hoc, "Biondi et al., TPAMI 2026 (arXiv 2606.12488)"),
        Method("sce", True, False, _sce, "d-Simplex with cross-entropy only, same paper"),
        Method("fd", True, True, _fd, "Biondi et al., CL2R (d-Simplex-FD)"),
        Method("er", False, False, _er, "experience replay with a growing learnable classifier"),
    )
}


def get_method(name: str) -> Method:
    """The method of a name.

    Raises:
      UserError: unknown name, with the valid ones.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]


def build_embedder(method: Method, backbone, num_prototypes: int, head_classes: int, dtype):
    """The embedder that a method trains.

    Args:
      method: decides between projection and learnable head.
      backbone: a Linen module (images, train) -> float[batch, width].
      num_prototypes: K of the simplex.
      head_classes: classes of a learnable head.
      dtype: of the computation.

    Returns:
      An Embedder.
    """
    if method.fixed_simplex:
        return Embedder(backbone, num_prototypes - 1, None, dtype)
    return Embedder(backbone, None, head_classes, dtype)


def target_labels(method: Method, labels, num_prototypes: int, order: str):
    """What the loss compares with: prototype rows for a fixed simplex, class numbers otherwise."""
    if not method.fixed_simplex:
        return labels
    return simplex.prototype_rows(labels, num_prototypes, order)
