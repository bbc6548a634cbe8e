"""Optimisers: SGD as the reference runs it, or any optax transformation."""

import dataclasses
from typing import Annotated, Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from compat_jax.errors import UserError
from compat_jax.fields import Rule, check_fields

DECAYS = ("package", "notebook")
SCHEDULES = ("cosine", "constant")


@dataclasses.dataclass(frozen=True)
class Sgd:
    """SGD with momentum, decay on some or all weights, and a cosine over the epochs of a task.

    Each task starts with a fresh one.

    Attributes:
      lr: learning rate of a task's first epoch, > 0.
      min_lr: where the cosine ends, in [0, lr].
      momentum: in [0, 1).
      weight_decay: >= 0, added to the gradient (PyTorch's SGD).
      decay: "package" decays kernels only (norms and biases are left out), "notebook" everything;
        the reference's package and notebooks differ so.
      schedule: "cosine" (the reference's) or "constant".
    """

    lr: Annotated[float, Rule("learning rate of a task's first epoch", above=0)] = 0.001
    min_lr: Annotated[float, Rule("learning rate where the cosine ends", low=0)] = 0.00001
    momentum: Annotated[float, Rule("share of the last step that is kept", low=0, below=1)] = 0.9
    weight_decay: Annotated[float, Rule("decay of the weights", low=0)] = 5e-4
    decay: Annotated[
        str, Rule("decay kernels only, as the package, or everything", choices=DECAYS)
    ] = "package"
    schedule: Annotated[str, Rule("course of the learning rate", choices=SCHEDULES)] = "cosine"

    def __post_init__(self):
        check_fields(self, "optimizer.")
        if self.min_lr > self.lr:
            raise UserError(
                f"optimizer.min_lr must lie in [0, optimizer.lr={self.lr}], got {self.min_lr}: set both",
                "optimizer.min_lr",
            )


Optimizer: TypeAlias = Sgd | optax.GradientTransformation


def learning_rate(settings: Sgd, epoch: jax.Array, epochs: jax.Array) -> jax.Array:
    """Return the rate of an epoch: min + (lr - min) (1 + cos(pi epoch / epochs)) / 2.

    Args:
      settings: lr, min_lr and schedule.
      epoch: int[] in 0..epochs-1.
      epochs: int[] of the task.

    Returns:
      float32[].

    Source: `CosineAnnealingLR(T_max=epochs, eta_min=min_lr)`, stepped once an epoch.
    """
    if settings.schedule == "constant":
        return jnp.float32(settings.lr)
    done = jnp.asarray(epoch, jnp.float32) / jnp.asarray(epochs, jnp.float32)
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * done))
    return settings.min_lr + (settings.lr - settings.min_lr) * cosine


def make_optimizer(optimizer: Optimizer) -> optax.GradientTransformationExtraArgs:
    """Return the optax transformation that trains.

    Args:
      optimizer: `Sgd`, or a transformation whose updates are added to the parameters.

    Returns:
      A transformation whose `update` also takes the keywords `epoch` and `epochs`, int[].
    """
    if not isinstance(optimizer, Sgd):
        return optax.with_extra_args_support(optimizer)
    mask = None
    if optimizer.decay == "package":
        mask = lambda params: jax.tree_util.tree_map_with_path(_is_decayed, params)  # noqa: E731
    return optax.chain(
        optax.add_decayed_weights(optimizer.weight_decay, mask=mask),
        optax.trace(decay=optimizer.momentum),
        _scale_by_epoch(optimizer),
    )


def _scale_by_epoch(settings):
    """Scale by minus the learning rate, after momentum, as PyTorch does."""

    def update(updates: Any, state: Any, params: Any = None, *, epoch, epochs, **_: Any):
        del params
        rate = learning_rate(settings, epoch, epochs)
        return jax.tree.map(lambda u: -rate * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _is_decayed(path, leaf) -> bool:
    """Kernels are; norm scales, biases and every other vector are not (reference's `exclude`)."""
    del path
    return leaf.ndim >= 2
