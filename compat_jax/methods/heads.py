"""Heads: how classes become training targets, a loss and variables."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from compat_jax import losses, simplex
from compat_jax.models import Embedder, Outputs
from compat_jax.models.layers import linear_init


class Head(Protocol):
    """The last layer of a network, fixed or learned."""

    @property
    def is_fixed(self) -> bool:
        """Return whether the head has no variables."""

    def embedder(self, backbone: nn.Module, dtype: Any) -> Embedder:
        """Put this head on a backbone."""

    def targets(self, classes: jax.Array) -> jax.Array:
        """Map int32[batch] class numbers to the rows that the loss compares with."""

    def cross_entropy(self, outputs: Outputs, targets: jax.Array, num_seen: jax.Array) -> jax.Array:
        """Return the cross-entropy, float32[batch], among the `num_seen` classes seen so far."""

    def predict(self, outputs: Outputs, num_seen: jax.Array) -> jax.Array:
        """Return the row of the largest score, int32[batch]."""

    def begin(
        self, variables: Mapping[str, Any], key: jax.Array, same_classes: bool
    ) -> Mapping[str, Any]:
        """Turn a stored version's variables into those that a task starts from."""

    def trim(self, variables: Mapping[str, Any], num_seen: int) -> Mapping[str, Any]:
        """Cut variables to what a version stores after `num_seen` classes."""


@dataclasses.dataclass(frozen=True)
class FixedSimplex:
    """The fixed d-Simplex: no variables, features in R^(K-1).

    Attributes:
      num_prototypes: K.
      label_order: which prototype a class is written to, see `simplex.prototype_rows`.

    Source: the paper's section on the d-Simplex fixed classifier.
    """

    num_prototypes: int
    label_order: simplex.LabelOrder = "descending"
    is_fixed = True

    def embedder(self, backbone: nn.Module, dtype: Any) -> Embedder:
        """Put a projection to R^(K-1) on a backbone."""
        return Embedder(backbone, self.num_prototypes - 1, dtype=dtype)

    def targets(self, classes: jax.Array) -> jax.Array:
        """Map class numbers to prototype rows."""
        return simplex.prototype_rows(classes, self.num_prototypes, self.label_order)

    def cross_entropy(self, outputs: Outputs, targets: jax.Array, num_seen: jax.Array) -> jax.Array:
        """Return the cross-entropy over all K prototypes, also those of classes yet to come."""
        del num_seen
        return losses.simplex_cross_entropy(outputs.features, targets, self.num_prototypes)

    def predict(self, outputs: Outputs, num_seen: jax.Array) -> jax.Array:
        """Return the nearest prototype."""
        del num_seen
        # Found without the matrix of K logits, but reading the maximum is one more pass over the
        # features; cheap beside the network.
        return simplex.nearest_row(outputs.features, self.num_prototypes)

    def begin(
        self, variables: Mapping[str, Any], key: jax.Array, same_classes: bool
    ) -> Mapping[str, Any]:
        """Return the variables unchanged: all versions share the prototypes."""
        del key, same_classes
        return variables

    def trim(self, variables: Mapping[str, Any], num_seen: int) -> Mapping[str, Any]:
        """Return the variables unchanged."""
        del num_seen
        return variables


@dataclasses.dataclass(frozen=True)
class GrowingClassifier:
    """A learnable linear classifier that grows with the classes; features are the pooled backbone.

    Columns of all classes are allocated at once, so that growth compiles nothing; those of classes
    not yet seen are masked, and versions store the seen ones only.

    Attributes:
      num_classes: of the whole sequence.

    Source: `expand_classifier` in `src/iamcl2r/models/__init__.py`.
    """

    num_classes: int
    is_fixed = False

    def embedder(self, backbone: nn.Module, dtype: Any) -> Embedder:
        """Put a linear classifier on a backbone."""
        return Embedder(backbone, head_size=self.num_classes, dtype=dtype)

    def targets(self, classes: jax.Array) -> jax.Array:
        """Return the class numbers: a column is a class."""
        return classes

    def cross_entropy(self, outputs: Outputs, targets: jax.Array, num_seen: jax.Array) -> jax.Array:
        """Return the cross-entropy over the classes seen so far."""
        return losses.softmax_cross_entropy(_logits(outputs), targets, num_seen)

    def predict(self, outputs: Outputs, num_seen: jax.Array) -> jax.Array:
        """Return the class of the largest logit among those seen so far."""
        logits = _logits(outputs)
        unseen = jnp.arange(logits.shape[-1]) >= num_seen
        return jnp.where(unseen, -jnp.inf, logits).argmax(-1)

    def begin(
        self, variables: Mapping[str, Any], key: jax.Array, same_classes: bool
    ) -> Mapping[str, Any]:
        """Return the variables with fresh columns behind those stored; all fresh for other classes."""
        stored = np.asarray(variables["params"]["head"]["kernel"])
        kernel = np.array(linear_init(key, (stored.shape[0], self.num_classes), jnp.float32))
        if same_classes:  # a pre-trained head is of other classes
            kernel[:, : stored.shape[1]] = stored  # in NumPy: JAX would compile it for every width
        return _with_kernel(variables, kernel)

    def trim(self, variables: Mapping[str, Any], num_seen: int) -> Mapping[str, Any]:
        """Cut the columns of classes not yet seen."""
        kernel = np.asarray(variables["params"]["head"]["kernel"])
        return _with_kernel(variables, kernel[:, :num_seen])


def head_of(num_prototypes: int, label_order: str, num_classes: int | None) -> Head:
    """Return the head that a record describes.

    Args:
      num_prototypes: K.
      label_order: of a fixed simplex.
      num_classes: of a learnable head; None for a fixed simplex.
    """
    if num_classes is None:
        return FixedSimplex(num_prototypes, label_order)  # type: ignore[arg-type]
    return GrowingClassifier(num_classes)


def _logits(outputs):
    assert outputs.logits is not None, "an embedder with a learnable head has logits"
    return outputs.logits


def _with_kernel(variables, kernel):
    return {**variables, "params": {**variables["params"], "head": {"kernel": kernel}}}
