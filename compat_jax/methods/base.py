"""A training method: pure functions around a loss, with what is frozen apart from what is carried.

    frozen  = method.freeze(start)                    once, when a task begins
    carried = method.init(variables)                  once, when a task begins
    at every step:
      taught  = method.teach(forward, frozen, carried)       no gradient
      loss    = method.loss(inputs)                          float32[batch]; its mean is minimised
                                                             (and terms of it, to watch)
      carried = method.update(carried, variables, inputs)    after the optimiser

`frozen` is replicated over the devices, never donated and never saved: it is made again from the chain.
`carried` is donated, saved and resumed like the optimiser's state.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from compat_jax import identity
from compat_jax.errors import UserError
from compat_jax.methods.heads import FixedSimplex, GrowingClassifier, Head
from compat_jax.models import Outputs

Forward = Callable[[Mapping[str, Any]], Outputs]


class LossInputs(NamedTuple):
    """Everything that a loss may look at for one batch.

    Attributes:
      outputs: of the model in training. For a method that takes padding, features of a fixed simplex
        may have more than K-1 columns, zeros behind, where devices share them.
      taught: result of `Method.teach`.
      frozen: result of `Method.freeze`.
      classes: int32[batch] class numbers, in the order in which classes appear in the sequence.
      targets: int32[batch], what the head compares with: prototype rows or class numbers.
      num_seen: int32[] classes seen so far, those of the present task included.
      head: the head.
      classifier: float32[feature_size, classes], the learnable head's kernel in training: gradients
        reach it; None for a fixed simplex.
    """

    outputs: Outputs
    taught: Any
    frozen: Any
    classes: jax.Array
    targets: jax.Array
    num_seen: jax.Array
    head: Head
    classifier: Any = None

    def cross_entropy(self) -> jax.Array:
        """Return the head's cross-entropy, float32[batch]."""
        return self.head.cross_entropy(self.outputs, self.targets, self.num_seen)


@dataclasses.dataclass(frozen=True)
class TaskStart:
    """Facts known when a task begins.

    Attributes:
      variables: of the previous model, as this task starts from them: a learnable head has columns
        for all classes, random ones where a class was not seen.
      num_old: classes seen before this task.
      num_seen: classes seen with this task.
      mean_features: () -> float32[num_classes, feature_size], the mean feature that the previous
        model gives the training images of each class seen so far, not normalised; zeros for classes
        to come. Computed when called.
      num_known: classes whose columns of a learnable head were learnt; 0 where the task starts from a
        model of other classes, or from fresh weights.
      steps_per_epoch: of the task.
    """

    variables: Mapping[str, Any]
    num_old: int
    num_seen: int
    mean_features: Callable[[], np.ndarray]
    num_known: int = 0
    steps_per_epoch: int = 1


def nothing(*_: Any) -> dict[str, Any]:
    """Return an empty state: the default of `freeze`, `teach`, `init`."""
    return {}


def unchanged(carried: Any, variables: Mapping[str, Any], inputs: LossInputs) -> Any:
    """Return the carried state as it is: the default of `update`."""
    del variables, inputs
    return carried


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """A method of training compatible (or, for comparison, incompatible) representations.

    Attributes:
      name: by which a configuration and a record refer to it.
      loss: (LossInputs) -> float32[batch]; for a method with `terms`, this and {term: float32[batch]}.
      fixed_simplex: True for the fixed d-Simplex (features in R^(K-1)), False for a classifier that
        grows with the classes (features = the pooled backbone).
      freeze: (TaskStart) -> frozen state, a dict of arrays.
      teach: (forward, frozen, carried) -> targets computed without gradient, where
        `forward(variables)` returns another model's Outputs for the images of the batch.
      init: (variables) -> carried state at the start of a task, a dict of arrays.
      update: (carried, variables, inputs) -> carried state after a step; `variables` are those after
        the optimiser.
      arguments: the numbers that are its own, as JSON values, for the record.
      title: for tables and pictures.
      source: where the method comes from.
      terms: names of the parts of the loss that are worth watching, e.g. ("cross_entropy",
        "contrast"); they are logged, unweighted, and have no part in the gradient.
      fresh_start: True to start every task anew: from the pre-trained model that replaced the one
        before, at this task or an earlier one, else from fresh weights of its own.
      all_data: True to train every task on all images of the classes seen so far, False on those of
        its new classes and the rehearsal memory.
      takes_padding: True if loss and state give the same where features and projections of a fixed
        simplex have columns of zeros behind their K-1, which they get where devices share the columns.
        False never shows them to the method.
    """

    name: str
    loss: Callable[[LossInputs], jax.Array | tuple[jax.Array, Mapping[str, jax.Array]]]
    fixed_simplex: bool = True
    freeze: Callable[[TaskStart], Any] = nothing
    teach: Callable[[Forward, Any, Any], Any] = nothing
    init: Callable[[Mapping[str, Any]], Any] = nothing
    update: Callable[[Any, Mapping[str, Any], LossInputs], Any] = unchanged
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    title: str = ""
    source: str = ""
    terms: tuple[str, ...] = ()
    fresh_start: bool = False
    all_data: bool = False
    takes_padding: bool = False

    def describe(self) -> dict[str, Any]:
        """Return name and numbers as JSON values, and of functions that are the user's a digest.

        The library's functions are what its name says; those of a user may be edited between two runs.
        """
        functions = (self.loss, self.freeze, self.teach, self.init, self.update)
        flags = (self.fixed_simplex, self.fresh_start, self.all_data, self.takes_padding)
        own: dict[str, Any] = {}
        if identity.is_own(functions):
            own["functions"] = identity.fingerprint((functions, flags))
        return {"name": self.name, **self.arguments, **own}

    def losses(self, inputs: LossInputs) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Return the loss, float32[batch], and {term: float32[batch] or a mean, float32[]}.

        Raises:
          UserError: the loss returns other terms than `terms` names, or not one value per image.
        """
        result = self.loss(inputs)
        loss, terms = result if isinstance(result, tuple) else (result, {})
        if set(terms) != set(self.terms):
            raise UserError(
                f"method {self.name!r} names the terms {list(self.terms)}, but its loss returns "
                f"{sorted(terms)}: name what it returns, Method(..., terms=(...)), and return "
                "(loss, {term: values})"
            )
        shape, batch = np.shape(loss), np.shape(inputs.classes)
        if shape != batch:
            raise UserError(
                f"method {self.name!r}: its loss returns shape {list(shape)} for {batch[0]} images: "
                f"return one value for each image, float32[{batch[0]}], and leave the mean to the step",
                "method",
            )
        return loss, {name: terms[name] for name in self.terms}

    def updated(self, carried: Any, variables: Mapping[str, Any], inputs: LossInputs) -> Any:
        """Return the carried state after a step, see `update`.

        Raises:
          UserError: it has other leaves, shapes or dtypes than before.
        """
        after = self.update(carried, variables, inputs)
        old, new = _described(carried), _described(after)
        for leaf in sorted(old.keys() | new.keys()):
            was, became = old.get(leaf, "not there"), new.get(leaf, "not there")
            if was != became:
                raise UserError(
                    f"method {self.name!r}: its update turns carried{leaf} from {was} into {became}: "
                    "return every array of the carried state with the shape and dtype that `init` "
                    "gave it",
                    "method",
                )
        return after

    def head(self, num_prototypes: int, label_order: Any, num_classes: int) -> Head:
        """Return the head that the method trains.

        Args:
          num_prototypes: K of a fixed simplex.
          label_order: of a fixed simplex.
          num_classes: of a growing classifier.
        """
        if self.fixed_simplex:
            return FixedSimplex(num_prototypes, label_order)
        return GrowingClassifier(num_classes)


def _described(tree):
    """Return {path: dtype[shape]} of all leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): f"{jax.dtypes.result_type(leaf)}{list(np.shape(leaf))}"
        for path, leaf in leaves
    }


def previous_variables(start: TaskStart) -> dict[str, Any]:
    """Freeze the previous model."""
    return {"previous": start.variables}


def previous_features(forward: Forward, frozen: Any, carried: Any) -> jax.Array:
    """Embed the batch with the frozen previous model."""
    del carried
    return forward(frozen["previous"]).features


def weight_of(start: TaskStart, weight: float) -> np.float32:
    """Return the weight of a term that needs an old model: 0 at the first task."""
    return np.float32(weight if start.num_old else 0.0)


def beside_cross_entropy(
    name: str,
    term: str,
    compute: Callable[[LossInputs], jax.Array],
    weight: float,
    *,
    freeze: Callable[[TaskStart], dict[str, Any]],
    teach: Callable[[Forward, Any, Any], Any] = nothing,
) -> Method:
    """Make a method of a learnable head: cross-entropy + weight * one term that needs an old model.

    Args:
      name: of the method.
      term: name of the term, for the log.
      compute: (LossInputs) -> float32[batch], the term.
      weight: of the term from the second task on, >= 0.
      freeze: (TaskStart) -> frozen state of the term, without "weight".
      teach: see `Method`.
    """

    def frozen(start: TaskStart):
        return {**freeze(start), "weight": weight_of(start, weight)}

    def loss(inputs: LossInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        found, cross_entropy = compute(inputs), inputs.cross_entropy()
        total = cross_entropy + inputs.frozen["weight"] * found
        return total, {"cross_entropy": cross_entropy, term: found}

    terms = ("cross_entropy", term)
    return Method(name, loss, fixed_simplex=False, freeze=frozen, teach=teach, terms=terms)
