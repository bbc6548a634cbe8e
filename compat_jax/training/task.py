"""One task of a run: its classes, its batches, the model it starts from, the version it ends as."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compat_jax import methods
from compat_jax.chain import Record, Version
from compat_jax.data.dataset import Dataset
from compat_jax.data.tasks import TaskSequence, batch_plan
from compat_jax.features import Extractor, mean_features
from compat_jax.methods import TaskStart
from compat_jax.models import Backbone, Embedder, feature_size
from compat_jax.training.run import Run, head_key, init_key, make_trainer
from compat_jax.training.state import TaskInfo
from compat_jax.training.step import DeviceData, Feed, Trainer


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
      run: what to compute.
      index: number of the task, and of the version it ends as.
      num_classes: of the whole sequence.
      num_old: classes seen before it.
      num_seen: classes seen with it.
      plan: int32[steps, batch] positions of every batch, its epochs one after the other.
      start: version that it starts from; None for fresh weights.
      teacher: the old model that the method looks at, where the task starts from fresh weights
        although there is one; None for `start`.
      kind: "task" of a sequence, "replacement" for one that starts from another model than the
        version before,
        "pretraining" for a model that is to replace others.
      lineage: fields of `Record` that differ from what the run and the data say.
    """

    run: Run
    index: int
    num_classes: int
    num_old: int
    num_seen: int
    plan: np.ndarray
    start: Version | None = None
    teacher: Version | None = None
    kind: str = "task"
    lineage: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Return the number of steps."""
        return len(self.plan)

    @property
    def steps_per_epoch(self) -> int:
        """Return the steps of one epoch."""
        return self.steps // self.run.epochs

    @property
    def backbone(self) -> Backbone:
        """Return the backbone: that of the model it starts from, or the run's own."""
        return self.start.backbone if self.start else self.run.given_backbone

    @property
    def label(self) -> str:
        """Return what to call it in a progress bar."""
        return f"{'model' if self.kind == 'pretraining' else 'task'} {self.index}"

    def info(self) -> TaskInfo:
        """Return the scalars that the compiled step takes."""
        return TaskInfo.create(
            self.run.seed,
            self.index,
            epochs=self.run.epochs,
            steps_per_epoch=self.steps_per_epoch,
            num_seen=self.num_seen,
        )

    def trainer(self, mesh) -> Trainer:
        """Return the trainer of its architecture."""
        teacher = None if self.teacher is None else self.teacher.backbone
        return make_trainer(
            self.run, self.num_classes, mesh, backbone=self.backbone, teacher=teacher
        )

    def starting_variables(self, trainer: Trainer, image_shape: tuple[int, int, int]) -> Any:
        """Return the variables that it starts from: fresh ones, or those of `start`."""
        if self.start is None:
            key = init_key(self.run)
            begins_anew = self.run.given_method.fresh_start or self.teacher is not None
            if self.kind == "pretraining" or begins_anew:
                key = jax.random.fold_in(key, self.index)
            return trainer.init(key, image_shape)
        key = head_key(self.run, self.index)
        return trainer.head.begin(self.start.variables, key, self.num_known > 0)

    @property
    def num_known(self) -> int:
        """Return how many columns of a learnable head it takes over: 0 where classes differ."""
        old = self.start or self.teacher
        if old is None or old.record.task is None:  # none, or a pre-trained head
            return 0
        if self.kind == "replacement" and self.lineage:
            return 0
        return old.record.head_classes or 0

    def freeze(self, trainer: Trainer, variables: Any, data: Dataset) -> Any:
        """Return the method's frozen state on the devices."""
        if self.teacher is not None:
            key = head_key(self.run, self.index)
            variables = trainer.head.begin(self.teacher.variables, key, self.num_known > 0)
        own, network = trainer.shard(variables), trainer.teaching_network

        def means():
            seen = data.labels < self.num_seen
            images, labels = data.images[seen], data.labels[seen]
            extractor = Extractor(network, trainer.preprocess, trainer.mesh, normalized=False)
            rows = mean_features(extractor, own, images, labels=labels)
            padded = np.zeros((self.num_classes, rows.shape[1]), np.float32)
            padded[: len(rows)] = rows
            return padded[:, : trainer.embedder.projection_size]

        start = TaskStart(
            variables=own,
            num_old=self.num_old,
            num_seen=self.num_seen,
            mean_features=means,
            num_known=self.num_known,
            steps_per_epoch=self.steps_per_epoch,
        )
        return trainer.shard(trainer.adapted.freeze(start))

    def record(self, trainer: Trainer, data: Dataset, config: Mapping[str, Any]) -> Record:
        """Describe the version that it ends as."""
        described = None
        if self.kind == "replacement":
            described = f"{self.backbone.name} with fresh weights"
            if self.start is not None:
                described = f"pre-trained version {self.start.number}"
        shape: Any = tuple(int(n) for n in data.images.shape[1:])
        lineage: dict[str, Any] = {
            "head_classes": None if trainer.head.is_fixed else self.num_seen,
            "task": None if self.kind == "pretraining" else self.index,
            "classes_seen": self.num_seen,
            "class_names": data.class_names[: self.num_seen],
            "parent": self.index - 1 if self.kind == "task" and self.index and self.start else None,
            "replaced_by": described,
            "data_fingerprint": data.fingerprint(),
            "preparation": data.preparation.describe() if data.preparation else {},
            "config": config,
        }
        lineage |= self.lineage
        return version_record(self.run, trainer.embedder, shape, backbone=self.backbone, **lineage)


def adopting(run: Run) -> Run:
    """Return the run for weights that never met the simplex: with cross-entropy alone.

    There are no earlier features to stay near, and random ones are not worth it.
    """
    method = methods.get("sce") if run.given_method.fixed_simplex else run.given_method
    return run if run.given_method.fresh_start else dataclasses.replace(run, method=method)


def version_record(
    run: Run,
    embedder: Embedder,
    image_shape: tuple[int, int, int],
    *,
    backbone: Backbone,
    **lineage: Any,
) -> Record:
    """Describe a version: the one place where a record is made.

    Args:
      run: that made it.
      embedder: its network.
      image_shape: (height, width, channels).
      backbone: of the network.
      **lineage: fields of `Record` that say where it comes from: head_classes, task, classes_seen,
        class_names, parent, replaced_by, data_fingerprint, config, and optional ones.
    """
    return Record(
        method=run.given_method.name,
        method_arguments=dict(run.given_method.arguments),
        backbone=backbone.name,
        backbone_arguments=dict(backbone.arguments),
        image_shape=image_shape,
        mean=run.preprocess.mean,
        std=run.preprocess.std,
        feature_size=feature_size(embedder, image_shape),
        num_prototypes=run.num_prototypes,
        label_order=run.label_order,
        seed=run.seed,
        **lineage,
    )


def sequence_task(
    run: Run,
    sequence: TaskSequence,
    index: int,
    labels: np.ndarray,
    *,
    start: Version | None,
    replaced: bool,
    teacher: Version | None = None,
) -> Task:
    """Make a task of a sequence.

    Args:
      run: what to compute.
      sequence: all tasks.
      index: number of the task.
      labels: int[n] of the data.
      start: version that it starts from.
      replaced: whether that is another model than the version before.
      teacher: see `Task`.
    """
    plan = sequence.batch_plan(
        index,
        labels,
        run.rehearsal,
        batch_size=run.batch_size,
        epochs=run.epochs,
        seed=run.seed,
    )
    return Task(
        run=run,
        index=index,
        num_classes=sequence.num_classes,
        num_old=sequence.num_seen(index - 1),
        num_seen=sequence.num_seen(index),
        plan=plan,
        start=start,
        teacher=teacher,
        kind="replacement" if replaced else "task",
    )


def pretraining_task(run: Run, index: int, labels: np.ndarray, count: int) -> Task:
    """Make the only task of a model that learns the first `count` classes.

    Args:
      run: what to compute.
      index: number of the model.
      labels: int[n] of all classes of the data.
      count: classes that it learns.
    """
    own = np.flatnonzero(labels < count)
    memory = np.zeros(0, int)
    plan = batch_plan(own, memory, run.batch_size, epochs=run.epochs, seed=run.seed, task=index)
    return Task(
        run=run,
        index=index,
        num_classes=int(labels.max()) + 1,
        num_old=0,
        num_seen=count,
        plan=plan.reshape(-1, plan.shape[-1]),
        kind="pretraining",
    )


def longest_plan(run: Run, sequence: TaskSequence, labels: np.ndarray) -> tuple[int, int]:
    """Return steps of the longest task and images of the largest batch.

    Args:
      run: what to compute.
      sequence: all tasks.
      labels: int[n] of the data.
    """
    counts = np.bincount(labels, minlength=sequence.num_classes)
    shapes = [
        sequence.plan_shape(task, counts, run.rehearsal, batch_size=run.batch_size)
        for task in range(len(sequence))
    ]
    return run.epochs * max(b for b, _ in shapes), max(size for _, size in shapes)


def lower_step(
    run: Run, labels: np.ndarray, image_shape: tuple[int, int, int], mesh: Any
) -> jax.stages.Lowered:
    """Lower the step that `train` compiles, also for devices that can only be compiled for.

    Args:
      run: what to compute.
      labels: int[n] of the data.
      image_shape: (height, width, channels).
      mesh: devices.
    """
    sequence = run.tasks.sequence(int(labels.max()) + 1)
    plan, shape = longest_plan(run, sequence, labels), jax.ShapeDtypeStruct
    images = shape((len(labels), *image_shape), jnp.uint8)
    data = DeviceData(images, shape((len(labels),), jnp.int32))  # type: ignore[arg-type]
    trainer = make_trainer(run, sequence.num_classes, mesh)
    state, frozen = trainer.shapes(image_shape)
    return trainer.lower(state, frozen, Feed(data, shape(plan, jnp.int32)))  # type: ignore[arg-type]


def image_bytes(data: Dataset) -> int:
    """Return the bytes of one image."""
    return math.prod(data.images.shape[1:])
