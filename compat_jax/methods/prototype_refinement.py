"""UniBCT: new features against old class prototypes that new features refine."""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from compat_jax import losses
from compat_jax.fields import Rule
from compat_jax.methods.base import LossInputs, Method, TaskStart, previous_features, weight_of
from compat_jax.methods.old_classifier import influence
from compat_jax.methods.registry import register


def refine(
    new: jax.Array,
    old: jax.Array,
    labels: jax.Array,
    *,
    smoothing: float = 0.9,
    temperature: float = 0.05,
) -> jax.Array:
    """Propagate old features over the graph of images of one class, as new features see it.

    Edges are E = softmax(cos(new_i, new_j) / T) over the other images j of the class of i, and the
    result is (1 - s) (I - s E)^-1 old, the limit of x <- s E x + (1 - s) old: an old feature that is far
    from its class is drawn to those of images that the new model finds alike.

    Args:
      new: float[batch, d], of the model in training.
      old: float[batch, d], of the previous model.
      labels: int[batch].
      smoothing: s in [0, 1); 0 returns `old`.
      temperature: T > 0.

    Returns:
      float32[batch, d]. The only image of a class stays where it is. No gradient.

    Source: Equations 9 and 10 of the paper; `refine_prototype.py` of yuleung/MixBCT, which
    normalises E by columns, so that the mean over a class is the plain mean; here by rows.
    """
    new = losses.normalize(jax.lax.stop_gradient(new))
    old = jax.lax.stop_gradient(old).astype(np.float32)
    itself = jnp.eye(len(labels), dtype=bool)
    is_linked = (labels[:, None] == labels[None, :]) & ~itself
    is_linked |= itself & ~is_linked.any(axis=-1, keepdims=True)
    edges = jax.nn.softmax(jnp.where(is_linked, new @ new.T / temperature, -jnp.inf), axis=-1)
    system = jnp.eye(len(labels), dtype=np.float32) - smoothing * edges
    return (1.0 - smoothing) * jnp.linalg.solve(system, old)


def moved(
    prototypes: jax.Array, features: jax.Array, classes: jax.Array, *, momentum: float
) -> jax.Array:
    """Move each prototype towards the mean of its class's features in a batch.

    Args:
      prototypes: float32[classes, d].
      features: float32[batch, d].
      classes: int32[batch].
      momentum: share that stays, in [0, 1).

    Returns:
      float32[classes, d]; a class without an image stays where it is.
    """
    member = jax.nn.one_hot(classes, len(prototypes), axis=0)
    count = member.sum(-1, keepdims=True)
    mean = member @ features / jnp.maximum(count, 1.0)
    return jnp.where(count > 0, momentum * prototypes + (1.0 - momentum) * mean, prototypes)


@register("UniBCT (refined prototypes)", "Zhang et al., UniBCT, IJCAI 2022")
def unibct(
    weight: Annotated[float, Rule("weight of the old prototypes' cross-entropy", low=0)] = 1.0,
    smoothing: Annotated[float, Rule("refinement of prototypes; 0 for none", low=0, below=1)] = 0.9,
    temperature: Annotated[float, Rule("of the graph's edges", above=0)] = 0.05,
    warm_up: Annotated[int, Rule("epochs before the prototypes count", low=0)] = 10,
    momentum: Annotated[float, Rule("of the prototypes, a step", low=0, below=1)] = 0.9,
) -> Method:
    """Train with CE(own head) + weight * CE(normalised old class prototypes on the new features).

    Prototypes start as class means of old features. At every step each moves towards the mean of
    its batch's refined old features (`refine`); with smoothing 0 they stay, and the loss is that of
    `bct` for a head made of class means alone.

    Args:
      weight: 0 during the warm-up.
      smoothing, temperature: see `refine`.
      warm_up: epochs of each task; shorten it for short runs.
      momentum: of the moving mean. MixBCT's version rebuilds prototypes from all data at epochs 10 and
        20 instead.

    Source: the paper; `BCT_Methods/UniBCT` of yuleung/MixBCT.
    """

    def freeze(start: TaskStart):
        shape = start.variables["params"]["head"]["kernel"].shape[::-1]
        return {
            "previous": start.variables,
            "means": start.mean_features() if start.num_old else np.zeros(shape, np.float32),
            "weight": weight_of(start, weight),
            "begin": np.int32(warm_up * start.steps_per_epoch),
        }

    def init(variables):
        kernel = variables["params"]["head"]["kernel"]
        return {"prototypes": jnp.zeros(kernel.shape[::-1], np.float32), "step": jnp.int32(0)}

    def teach(forward, frozen, carried):
        prototypes = jnp.where(carried["step"] == 0, frozen["means"], carried["prototypes"])
        features = previous_features(forward, frozen, carried)
        return {"features": features, "prototypes": prototypes, "step": carried["step"]}

    def loss(inputs: LossInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        frozen, taught = inputs.frozen, inputs.taught
        head = losses.normalize(taught["prototypes"]).T
        old = influence(inputs.outputs.features, head, inputs.classes, num_seen=inputs.num_seen)
        begun = jnp.where(taught["step"] >= frozen["begin"], frozen["weight"], 0.0)
        cross_entropy = inputs.cross_entropy()
        terms = {"cross_entropy": cross_entropy, "influence": old}
        return cross_entropy + begun * old, terms

    def update(carried, variables, inputs: LossInputs):
        del variables
        prototypes, step = inputs.taught["prototypes"], carried["step"] + 1
        if not smoothing:
            return {"prototypes": prototypes, "step": step}
        refined = refine(
            inputs.outputs.features,
            inputs.taught["features"],
            inputs.classes,
            smoothing=smoothing,
            temperature=temperature,
        )
        prototypes = moved(prototypes, refined, inputs.classes, momentum=momentum)
        return {"prototypes": prototypes, "step": step}

    return Method(
        "unibct",
        loss,
        fixed_simplex=False,
        freeze=freeze,
        teach=teach,
        init=init,
        update=update,
        terms=("cross_entropy", "influence"),
    )
