"""SGD as the reference runs it: momentum, decay on some or all weights, a cosine an epoch."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from compat_jax.errors import UserError, unknown

DECAYS = ("package", "notebook")


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """Numbers of the optimiser; each task starts with a fresh one.

    Attributes:
      lr: learning rate of a task's first epoch, > 0.
      min_lr: where the cosine ends, in [0, lr].
      momentum: in [0, 1).
      weight_decay: >= 0, added to the gradient (PyTorch's SGD).
      decay: "package" decays kernels only (norms and biases are left out), "notebook" everything;
        the reference's package and notebooks differ so.
      schedule: "cosine" (the reference's) or "constant".
    """

    lr: float = 0.001
    min_lr: float = 0.00001
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay: str = "package"
    schedule: str = "cosine"

    def __post_init__(self):
        if self.lr <= 0:
            raise UserError(f"optim.lr must be positive, got {self.lr}")
        if not 0 <= self.min_lr <= self.lr:
            raise UserError(f"optim.min_lr must lie in [0, optim.lr={self.lr}], got {self.min_lr}")
        if not 0 <= self.momentum < 1:
            raise UserError(f"optim.momentum must lie in [0, 1), got {self.momentum}")
        if self.weight_decay < 0:
            raise UserError(f"optim.weight_decay must not be negative, got {self.weight_decay}")
        if self.decay not in DECAYS:
            raise unknown("optim.decay", self.decay, DECAYS)
        if self.schedule not in ("cosine", "constant"):
            raise unknown("optim.schedule", self.schedule, ("cosine", "constant"))


def learning_rate(settings: OptimizerSettings, epoch: jax.Array, epochs: jax.Array) -> jax.Array:
    """The rate of an epoch: min + (lr - min) (1 + cos(pi epoch / epochs)) / 2.

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


def _is_decayed(path, leaf) -> bool:
    """Kernels are; norm scales, biases and every other vector are not (reference's `exclude`)."""
    del path
    return leaf.ndim >= 2


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
    """Decay and momentum; the caller scales by the learning rate afterwards, as PyTorch does."""
    mask = None
    if settings.decay == "package":
        mask = lambda params: jax.tree_util.tree_map_with_path(_is_decayed, params)  # noqa: E731
    return optax.chain(
        optax.add_decayed_weights(settings.weight_decay, mask=mask),
        optax.trace(decay=settings.momentum),
    )
