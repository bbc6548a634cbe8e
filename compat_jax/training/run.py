"""A run: everything that decides what training computes."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from compat_jax import identity, methods, simplex
from compat_jax import mesh as meshes
from compat_jax.data.augment import Preprocess
from compat_jax.data.tasks import Tasks, TaskSequence
from compat_jax.errors import UserError
from compat_jax.fields import Rule, check_fields
from compat_jax.methods import Method
from compat_jax.models import (
    DTYPE_CHOICES,
    DTYPES,
    Backbone,
    GivenBackbone,
    as_backbone,
    computed_in,
)
from compat_jax.models.rematerialize import REMAT
from compat_jax.training.optimizer import Optimizer, Settings, Sgd
from compat_jax.training.step import Trainer

KEEP = ("last", "accuracy", "recall@1", "cross")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Settings that decide what a run computes; the defaults are the paper's.

    Attributes:
      method: name of a method, or a `Method`.
      backbone: of a model that starts from nothing: a registered name, an import path
        "package.module:Name", a Linen module (images, train) -> float[batch, width], or a
        `models.Backbone` with arguments.
      tasks: how classes are split into tasks.
      epochs: of each task.
      batch_size: images per batch, over all devices.
      optimizer: `Sgd`, `Adamw`, `Lars`, or an optax transformation, which each task starts anew.
      preprocess: normalisation and augmentation.
      num_prototypes: K, classes that the simplex has room for; every class to come needs one.
      label_order: which prototype a class is written to, see `simplex.prototype_rows`.
      first_prototypes: a smaller K for the first version of a sequence, which is then moved to
        `num_prototypes` (see `enlarge`): the feature size grows; 0 for one K throughout.
      seed: of everything random.
      dtype: of the computation, "float32", "bfloat16", or "auto": bfloat16 where this machine multiplies
        it faster; records name the one that was taken. Parameters are float32.
      remat: what the backward pass computes again to save memory: "none"; "elementwise", norms and
        activations; "blocks", all but the results of residual blocks. It changes rounding only.
      keep: which weights of a task become the version: those of the last step, or those of the best
        validation by accuracy, by recall@1, or by recall@1 in the gallery of the version before (the
        last of equally good ones).

    Raises:
      UserError: unknown name, or a number out of range.
    """

    method: Method | str = "hoc"
    backbone: GivenBackbone = "resnet18"
    tasks: Tasks = dataclasses.field(default_factory=Tasks)
    epochs: Annotated[int, Rule("epochs of each task", low=1, high=10**6)] = 70
    batch_size: Annotated[int, Rule("images per batch, over all devices", low=1, high=10**6)] = 128
    optimizer: Optimizer = dataclasses.field(default_factory=Sgd)
    preprocess: Preprocess = dataclasses.field(default_factory=Preprocess)
    num_prototypes: Annotated[
        int, Rule("K, classes that the simplex has room for", low=2, high=10**8)
    ] = 1024
    label_order: Annotated[
        str, Rule("prototype that a class is written to", choices=simplex.LABEL_ORDERS)
    ] = "descending"
    seed: Annotated[int, Rule("of everything random", low=0, high=2**32 - 1)] = 0
    dtype: Annotated[
        str, Rule("of the computation; auto for the faster one here", choices=DTYPE_CHOICES)
    ] = "float32"
    first_prototypes: Annotated[
        int, Rule("K of a sequence's first version; 0 for num_prototypes", low=0, high=10**8)
    ] = 0
    remat: Annotated[
        str, Rule("what the backward pass computes again to save memory", choices=tuple(REMAT))
    ] = "none"
    keep: Annotated[
        str, Rule("weights that become the version: the last, or the best by", choices=KEEP)
    ] = "last"

    def __post_init__(self):
        check_fields(self)
        for name, (kinds, words) in _PARTS.items():
            if not isinstance(getattr(self, name), kinds):
                raise UserError(f"{name} must be {words}, got {getattr(self, name)!r:.80}", name)
        if isinstance(self.method, str):
            object.__setattr__(self, "method", methods.get(self.method))
        object.__setattr__(self, "backbone", as_backbone(self.backbone))
        object.__setattr__(self, "dtype", computed_in(self.dtype))
        self.given_backbone.build(self.dtype)
        self._check_first()

    def _check_first(self):
        """Refuse a first version whose K is not smaller, or that no map can move."""
        first = self.first_prototypes
        if not first:
            return
        if not self.given_method.fixed_simplex:
            raise UserError(
                f"first_prototypes needs a fixed simplex: method {self.given_method.name!r} has a "
                "learnable head, whose feature size is its backbone's",
                "first_prototypes",
            )
        if not 2 <= first < self.num_prototypes or self.tasks.first_share < 1:
            raise UserError(
                f"first_prototypes={first} must be at least 2 and below num_prototypes="
                f"{self.num_prototypes}, with tasks.first_share=1",
                "first_prototypes",
            )

    @property
    def given_method(self) -> Method:
        """Return the method as an object."""
        assert isinstance(self.method, Method)
        return self.method

    @property
    def given_backbone(self) -> Backbone:
        """Return the backbone as an object."""
        assert isinstance(self.backbone, Backbone)
        return self.backbone

    @property
    def rehearsal(self) -> int | None:
        """Return the images kept of each earlier class; None to learn all of them again.

        The method (`Method.all_data`) or the tasks (`Tasks.everything`) may ask for all.
        """
        is_all = self.given_method.all_data or self.tasks.everything
        return None if is_all else self.tasks.rehearsal

    def describe(self) -> dict[str, Any]:
        """Return all settings as JSON values, for a workdir and for records."""
        method, backbone = self.given_method, self.given_backbone
        if isinstance(self.optimizer, optax.GradientTransformation):
            optimizer: Any = f"an optax transformation, {identity.fingerprint(self.optimizer)}"
        else:
            optimizer = self.optimizer.describe()
        kept: dict[str, Any] = {} if self.keep == "last" else {"keep": self.keep}
        if self.first_prototypes:
            kept["first_prototypes"] = self.first_prototypes
        if self.remat != "none":
            kept["remat"] = self.remat
        return {
            "method": method.describe(),
            "backbone": {"name": backbone.name, **backbone.arguments},
            "tasks": self.tasks.describe(),
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "optimizer": optimizer,
            "preprocess": self.preprocess.describe(),
            "num_prototypes": self.num_prototypes,
            "label_order": self.label_order,
            "seed": self.seed,
            "dtype": self.dtype,
            **kept,
        }

    def check_epochs(self) -> None:
        """Refuse a warm-up that takes all epochs.

        Raises:
          UserError: see `optimizer.Settings.check_epochs`.
        """
        if isinstance(self.optimizer, Settings):
            self.optimizer.check_epochs(self.epochs)

    def check(self, sequence: TaskSequence, labels: np.ndarray, mesh: Mesh) -> None:
        """Refuse what cannot work on this data and these devices, before any work.

        Args:
          sequence: the tasks.
          labels: int[n] of the data.
          mesh: devices.

        Raises:
          UserError: K too small, or a batch that does not divide over the devices.
        """
        if self.given_method.fixed_simplex and self.num_prototypes < sequence.num_classes:
            raise UserError(
                f"num_prototypes {self.num_prototypes} is too small for "
                f"{sequence.num_classes} classes: use at least as many, better several times "
                "more, since every class to come needs one",
                "num_prototypes",
            )
        self.check_epochs()
        meshes.check_batch(mesh, self.batch_size)
        counts = np.bincount(labels, minlength=sequence.num_classes)
        for task in range(len(sequence)):
            _, size = sequence.plan_shape(task, counts, self.rehearsal, batch_size=self.batch_size)
            devices = mesh.shape["data"]
            if size % devices or not size:
                raise UserError(
                    f"task {task} has batches of {size} images, which {devices} devices cannot "
                    "share: use another batch_size, more images or fewer devices (mesh)",
                    "batch_size",
                )


_PARTS: Mapping[str, tuple[Any, str]] = {
    "method": ((str, Method), "a name or a Method"),
    "tasks": (Tasks, "Tasks"),
    "optimizer": (
        (Settings, optax.GradientTransformation),
        "Sgd, Adamw, Lars or an optax transformation",
    ),
    "preprocess": (Preprocess, "Preprocess"),
}


def make_trainer(
    run: Run,
    num_classes: int,
    mesh: Mesh,
    *,
    backbone: Backbone | None = None,
    teacher: Backbone | None = None,
) -> Trainer:
    """Make the trainer of a run; runs whose step is the same program share one.

    Args:
      run: the run.
      num_classes: of the whole sequence.
      mesh: devices.
      backbone: of the model that training starts from; None for the run's own.
      teacher: of the old model; None for the same.
    """
    backbone = backbone or run.given_backbone
    # The seed, the tasks and the epochs are arguments of the program, not part of it.
    same_program = dataclasses.replace(
        run,
        backbone=backbone,
        seed=0,
        tasks=Tasks(),
        epochs=1,
        batch_size=1,
        keep="last",
        first_prototypes=0,
    )
    return _trainer(same_program, num_classes, mesh, None if teacher == backbone else teacher)


@functools.lru_cache(maxsize=16)
def _trainer(run, num_classes, mesh, teacher):
    head = run.method.head(run.num_prototypes, run.label_order, num_classes)
    embedder, other = (
        backbone and head.embedder(backbone.build(run.dtype), DTYPES[run.dtype])
        for backbone in (run.backbone, teacher)
    )
    return Trainer(
        embedder=embedder,
        teacher=other,
        head=head,
        method=run.method,
        optimizer=run.optimizer,
        preprocess=run.preprocess,
        mesh=mesh,
        remat=run.remat,
    )


def init_key(run: Run) -> jax.Array:
    """Return the random key of the run's fresh weights."""
    return jax.random.fold_in(jax.random.key(run.seed), 1)


def head_key(run: Run, task: int) -> jax.Array:
    """Return the random key of the head's fresh columns at a task."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(run.seed), 2), task)
