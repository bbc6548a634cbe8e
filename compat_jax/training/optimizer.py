"""Optimisers: SGD as the reference runs it, AdamW, LARS, or any optax transformation."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from compat_jax.errors import UserError
from compat_jax.fields import Rule, check_fields

DECAYS = ("package", "notebook")
SCHEDULES = ("cosine", "constant")

# What all of them have.
Rate = Annotated[float, Rule("learning rate of a task's first epoch", above=0)]
LastRate = Annotated[float, Rule("learning rate where the cosine ends", low=0)]
WeightDecay = Annotated[float, Rule("decay of the weights", low=0)]
Decay = Annotated[str, Rule("decay kernels only, as the package, or everything", choices=DECAYS)]
Schedule = Annotated[str, Rule("course of the learning rate", choices=SCHEDULES)]
Warmup = Annotated[
    float, Rule("epochs in which the rate rises to lr, fractions allowed; 0 for none", low=0)
]
LayerDecay = Annotated[
    float, Rule("factor of the rate for each layer below the head; 1 for none", above=0, high=1)
]
FreezeBackbone = Annotated[
    int, Rule("first epochs of a task in which the backbone stays as it is", low=0, high=10**6)
]
Clip = Annotated[float, Rule("largest norm of all gradients together; 0 for any", low=0)]
Momentum = Annotated[float, Rule("share of the last step that is kept", low=0, below=1)]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Common fields of `Sgd`, `Adamw` and `Lars`; each task starts with a fresh optimiser.

    Attributes:
      lr: learning rate of a task's first epoch (after the warm-up), > 0.
      min_lr: where the cosine ends, in [0, lr].
      weight_decay: >= 0.
      decay: "package" decays kernels only (norms and biases are left out), "notebook" everything;
        the reference's package and notebooks differ so.
      schedule: "cosine" (the reference's, from epoch to epoch) or "constant".
      warmup: epochs, whole or not, in which the rate rises linearly, step by step, to `lr`; the
        cosine takes the epochs that are left.
      layer_decay: each layer's rate is this factor times that of the layer above it, see
        `layer_depths`; 1 for the same rate everywhere.
      freeze_backbone: first epochs of each task in which the backbone's weights keep their bits;
        momenta gather on, and running statistics of norms follow the images.
      clip: gradients are scaled down to this global norm; 0 for never.
    """

    lr: Rate = 0.001
    min_lr: LastRate = 0.00001
    weight_decay: WeightDecay = 5e-4
    decay: Decay = "package"
    schedule: Schedule = "cosine"
    warmup: Warmup = 0.0
    layer_decay: LayerDecay = 1.0
    freeze_backbone: FreezeBackbone = 0
    clip: Clip = 0.0

    def __post_init__(self):
        check_fields(self, "optimizer.")
        if self.min_lr > self.lr:
            raise UserError(
                f"optimizer.min_lr must lie in [0, optimizer.lr={self.lr}], got {self.min_lr}: set both",
                "optimizer.min_lr",
            )

    @property
    def name(self) -> str:
        """Return the name in `OPTIMIZERS`."""
        return next(name for name, kind in OPTIMIZERS.items() if type(self) is kind)

    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON values, for a workdir and for records.

        The name is left out for `Sgd`, and so are the common options that are off: what release 0.2
        wrote stays equal, the order included.
        """
        common = {field.name for field in dataclasses.fields(Settings)}
        found: dict[str, Any] = {} if isinstance(self, Sgd) else {"name": self.name}
        fields = dataclasses.fields(self)
        for field in sorted(
            fields, key=lambda f: (f.name not in ("lr", "min_lr"), f.name in common)
        ):
            value = getattr(self, field.name)
            if field.name not in _OPTIONS or value != field.default:
                found[field.name] = value
        return found

    def check_epochs(self, epochs: int) -> None:
        """Refuse a warm-up that leaves no epoch at the full rate.

        Args:
          epochs: of a task.

        Raises:
          UserError: the warm-up takes all epochs.
        """
        if self.warmup and self.warmup >= epochs:
            raise UserError(
                f"optimizer.warmup must be below the {epochs} epochs of a task, got {self.warmup}: "
                "warm up for less, or train for more epochs",
                "optimizer.warmup",
            )


_OPTIONS = ("warmup", "layer_decay", "freeze_backbone", "clip")


@dataclasses.dataclass(frozen=True)
class Sgd(Settings):
    """SGD with momentum, decay on some or all weights, and a cosine over the epochs of a task.

    Weight decay is added to the gradient (PyTorch's SGD).

    Attributes:
      momentum: in [0, 1).
    """

    momentum: Momentum = 0.9


@dataclasses.dataclass(frozen=True)
class Adamw(Settings):
    """Adam with decoupled weight decay, for ViTs, ConvNeXts and fine-tuning in few epochs.

    A step moves a weight w by -lr (m / (sqrt(v) + eps) + weight_decay w), m and v corrected for their
    start at zero.

    Attributes:
      b1: share of the old mean of the gradients, in [0, 1).
      b2: share of the old mean of their squares, in [0, 1).
      eps: added to the root, > 0.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019, algorithm 2.
    """

    b1: Annotated[float, Rule("share of the old mean gradient", low=0, below=1)] = 0.9
    b2: Annotated[float, Rule("share of the old mean squared gradient", low=0, below=1)] = 0.999
    eps: Annotated[float, Rule("added to the root of the mean square", above=0)] = 1e-8
    weight_decay: WeightDecay = 0.05


@dataclasses.dataclass(frozen=True)
class Lars(Settings):
    """SGD whose step in each kernel is scaled to the kernel's norm, for very large batches.

    With g the gradient plus weight_decay w, the momentum takes lr trust |w| / |g| g of each kernel, and
    lr g of every vector.

    Attributes:
      momentum: in [0, 1).
      trust: trust coefficient, > 0.

    Source: You, Gitman and Ginsburg, Large Batch Training of Convolutional Networks, 2017, algorithm 1.
    """

    lr: Rate = 1.0
    min_lr: LastRate = 0.001
    momentum: Momentum = 0.9
    trust: Annotated[float, Rule("step of a kernel as a share of its norm", above=0)] = 0.001
    weight_decay: WeightDecay = 1e-4


OPTIMIZERS: Mapping[str, Callable[..., Settings]] = {"adamw": Adamw, "lars": Lars, "sgd": Sgd}

Optimizer: TypeAlias = Settings | optax.GradientTransformation


def learning_rate(
    settings: Settings,
    epoch: jax.Array,
    epochs: jax.Array,
    *,
    step: jax.Array | None = None,
    steps_per_epoch: jax.Array | None = None,
) -> jax.Array:
    """Return the rate of an epoch: min + (lr - min) (1 + cos(pi epoch / epochs)) / 2.

    During `warmup` epochs it rises linearly to lr, from step to step where the step is given; the
    cosine then goes over the remaining epochs.

    Args:
      settings: of any of `OPTIMIZERS`.
      epoch: int[] in 0..epochs-1.
      epochs: int[] of the task.
      step: int[] of the task, for the warm-up; without it the rate is that of the epoch's last step.
      steps_per_epoch: int[], given with `step`.

    Returns:
      float32[].

    Source: `CosineAnnealingLR(T_max=epochs, eta_min=min_lr)`, stepped once an epoch.
    """
    begun = jnp.asarray(epoch, jnp.float32)
    if not settings.warmup:
        return _scheduled(settings, begun, jnp.asarray(epochs, jnp.float32))
    left = jnp.maximum(jnp.asarray(epochs, jnp.float32) - settings.warmup, 1.0)
    rate = _scheduled(settings, jnp.maximum(begun - settings.warmup, 0.0), left)
    done = begun + 1
    if step is not None:
        done = (jnp.asarray(step, jnp.float32) + 1) / jnp.asarray(steps_per_epoch, jnp.float32)
    return rate * jnp.minimum(done / settings.warmup, 1.0)


def _scheduled(settings, epoch, epochs):
    if settings.schedule == "constant":
        return jnp.float32(settings.lr)
    done = epoch / epochs
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * done))
    return settings.min_lr + (settings.lr - settings.min_lr) * cosine


def make_optimizer(optimizer: Optimizer) -> optax.GradientTransformationExtraArgs:
    """Return the optax transformation that trains.

    Args:
      optimizer: `Sgd`, `Adamw`, `Lars`, or a transformation whose updates are added to the
        parameters.

    Returns:
      A transformation whose `update` also takes the keywords `epoch`, `epochs` and, for a warm-up
      from step to step, `step` and `steps_per_epoch`, int[].
    """
    if not isinstance(optimizer, Settings):
        return optax.with_extra_args_support(optimizer)
    steps = [*_direction(optimizer)]
    if optimizer.clip:
        steps.insert(0, optax.clip_by_global_norm(optimizer.clip))
    if optimizer.layer_decay != 1 or optimizer.freeze_backbone:
        steps.append(_scale_by_layer(optimizer))
    return _with_mixed_dtypes(optax.chain(*steps))


def _direction(settings):
    """The transformations that make a method's step of its gradients."""
    mask = None
    if settings.decay == "package":
        mask = _kernels
    decayed = optax.add_decayed_weights(settings.weight_decay, mask=mask)
    scaled = _scale_by_epoch(settings)
    if isinstance(settings, Adamw):
        adam = optax.scale_by_adam(settings.b1, settings.b2, settings.eps)
        return adam, decayed, scaled
    if isinstance(settings, Lars):
        # The rate comes before the momentum, as in the paper: old steps keep the rate they had.
        trusted = optax.scale_by_trust_ratio(trust_coefficient=settings.trust)
        trusted = optax.masked(trusted, _kernels)
        return decayed, trusted, scaled, optax.trace(decay=settings.momentum)
    return decayed, optax.trace(decay=settings.momentum), scaled


def _with_mixed_dtypes(optimizer):
    """Let optax mix whole numbers and floats where the program's own code may not."""

    def update(updates: Any, state: Any, params: Any = None, **position: Any):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(updates, state, params, **position)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _scale_by_epoch(settings):
    """Scale by minus the learning rate; for SGD after momentum, as PyTorch does."""

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        epoch,
        epochs,
        step=None,
        steps_per_epoch=None,
        **_: Any,
    ):
        del params
        rate = learning_rate(settings, epoch, epochs, step=step, steps_per_epoch=steps_per_epoch)
        return jax.tree.map(lambda u: -rate * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _scale_by_layer(settings):
    """Scale each layer's update by its depth, and hold the backbone in the first epochs."""

    def update(updates: Any, state: Any, params: Any = None, *, epoch, **_: Any):
        del params
        is_held = jnp.asarray(epoch) < settings.freeze_backbone

        def scale(path, update, depth):
            update = update * jnp.float32(settings.layer_decay**depth)
            if settings.freeze_backbone and _keys(path)[0] == BACKBONE:
                # Minus zero: adding it keeps the bits of every weight, those of minus zero too.
                update = jnp.where(is_held, jnp.float32(-0.0), update)
            return update

        return jax.tree_util.tree_map_with_path(scale, updates, layer_depths(updates)), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


# The parameters of the backbone lie under this name; projection and head lie beside it.
BACKBONE = "backbone"
# layer1_0, layer2_blocks_3, stage_1_0, stages_0_blocks_2, stages_0/blocks_2, blocks_11.
_BLOCK = re.compile(r"(?:layer|stage|block)s?_?(\d+)(?:[_/](?:blocks?_?)?(\d+)(?![^_/]))?")
# Layers of a backbone that come after its blocks.
_TOP = re.compile(r"(fc_|head_|pre_logits_)?norm|head")


def layer_depths(params: Any) -> Any:
    """Return how many layers lie between each parameter's layer and the head.

    Projection and head have depth 0, and so have the backbone's layers after its last block, such as
    a ViT's last norm. The last block has depth 1, the first of n blocks n, and what comes before
    the blocks n + 1. Blocks are told by their names (`layer1_0`, `blocks_3`, `stages_0_blocks_2`); a
    backbone without such names counts as a stem.

    Args:
      params: nested mappings, with the backbone's parameters under "backbone".

    Returns:
      The same tree of Python ints.

    Source: Bao et al., BEiT, ICLR 2022, appendix (layer-wise learning-rate decay); Clark et al.,
    ELECTRA, ICLR 2020.
    """
    paths = [_keys(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    blocks = sorted({block for path in paths if (block := _block(path)) is not None})

    def depth(path, leaf):
        del leaf
        keys = _keys(path)
        block = _block(keys)
        if block is not None:
            return len(blocks) - blocks.index(block)
        is_stem = keys[0] == BACKBONE and not (len(keys) > 1 and _TOP.fullmatch(keys[1]))
        return len(blocks) + 1 if is_stem else 0

    return jax.tree_util.tree_map_with_path(depth, params)


def _block(keys):
    """The (stage, block) that a parameter of the backbone belongs to; None for none."""
    found = _BLOCK.match("/".join(keys[1:])) if keys[0] == BACKBONE else None
    return found and tuple(int(number or 0) for number in found.groups())


def _keys(path):
    return [str(getattr(part, "key", getattr(part, "name", part))) for part in path] or [""]


def _kernels(params):
    """Tell kernels, which decay, from norm scales, biases and other vectors (the `exclude`)."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)
