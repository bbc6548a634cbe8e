"""What is measured: sizes, the trainer, random data."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from compat_jax import mesh as meshes
from compat_jax import models
from compat_jax.data.augment import Preprocess
from compat_jax.data.dataset import Dataset
from compat_jax.data.tasks import TaskSequence
from compat_jax.methods import LossSettings, build_embedder, get_method
from compat_jax.train.loop import Backbone, Run
from compat_jax.train.optimizer import OptimizerSettings
from compat_jax.train.state import TaskInfo, TrainState
from compat_jax.train.step import DeviceData, Trainer

PREPROCESS = Preprocess((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), 4, True)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much of everything; the defaults are those of the issue, for two CPU cores.

    Attributes:
      backbone: by name.
      image: side of the pictures.
      batch: images a batch.
      num_prototypes: K.
      repeats: of most measures.
      steps: in one repetition of `step`.
      features: images in one repetition of `features`.
      feature_batch: images a batch of it.
      epoch: (classes of task 0, new ones of task 1, images a class, epochs) of `epoch`.
      versions: of `evaluation`.
      evaluated: (queries, gallery pictures) of it.
      search: (queries, queries for FAISS, gallery rows, size, k).
      large_k: numbers of prototypes.
      scaling: (classes, images, versions) of the small side; the other has ten times as many.
      streaming: (images, bytes that may lie on the device, steps).
      protocol: epochs a task of `protocol`.
    """

    backbone: str = "resnet18"
    image: int = 32
    batch: int = 128
    num_prototypes: int = 1024
    repeats: int = 15
    steps: int = 1
    features: int = 1024
    feature_batch: int = 256
    epoch: tuple[int, int, int, int] = (4, 4, 560, 2)
    versions: int = 31
    evaluated: tuple[int, int] = (1000, 200)
    search: tuple[int, int, int, int, int] = (10_000, 1000, 1_000_000, 128, 10)
    large_k: tuple[int, ...] = (1000, 10_000, 100_000, 1_000_000)
    scaling: tuple[int, int, int] = (20, 4000, 3)
    streaming: tuple[int, int, int] = (8000, 1 << 23, 24)
    protocol: int = 70


# An accelerator does in a second what two cores do in minutes.
ON_ACCELERATOR = Sizes(
    steps=50,
    features=65_536,
    feature_batch=1024,
    epoch=(10, 15, 300, 20),
    evaluated=(10_000, 2000),
    search=(10_000, 1000, 1_000_000, 128, 10),
    streaming=(50_000, 1 << 25, 500),
)
TINY = Sizes(
    backbone="resnet_small",
    image=8,
    batch=8,
    num_prototypes=16,
    repeats=2,
    features=16,
    feature_batch=8,
    epoch=(2, 2, 8, 2),
    versions=3,
    evaluated=(8, 4),
    search=(4, 4, 300, 8, 3),
    large_k=(100, 1000),
    scaling=(2, 40, 2),
    streaming=(64, 1 << 12, 4),
    protocol=1,
)


def mesh() -> Mesh:
    """All devices."""
    return meshes.make_mesh("data:-1")


def run(sizes: Sizes, method: str, dtype: str, sequence: TaskSequence, epochs: int) -> Run:
    """A run of the paper's protocol with these sizes."""
    return Run(
        method=get_method(method),
        backbone=Backbone(sizes.backbone),
        num_prototypes=sizes.num_prototypes,
        label_order="descending",
        sequence=sequence,
        rehearsal=20,
        epochs=epochs,
        batch_size=sizes.batch,
        seed=0,
        loss=LossSettings(),
        optim=OptimizerSettings(),
        preprocess=PREPROCESS,
        dtype=dtype,
    )


def dataset(classes: int, per_class: int, image: int, seed: int = 0) -> Dataset:
    """Random pictures."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    images = rng.integers(0, 256, (len(labels), image, image, 3), np.uint8)
    return Dataset(images, labels, tuple(f"class{c}" for c in range(classes)))


@dataclasses.dataclass
class Training:
    """A trainer with everything that a step of it takes."""

    trainer: Trainer
    state: TrainState
    previous: Any
    data: DeviceData
    plan: jax.Array

    @classmethod
    def create(cls, sizes: Sizes, dtype: str, steps: int) -> "Training":
        """HOC at the start of a task, on random images."""
        devices, method = mesh(), get_method("hoc")
        backbone = models.create_backbone(sizes.backbone, {}, dtype)
        trainer = Trainer(
            build_embedder(method, backbone, sizes.num_prototypes, None, models.DTYPES[dtype]),
            method,
            LossSettings(),
            OptimizerSettings(),
            PREPROCESS,
            sizes.num_prototypes,
            "descending",
            devices,
        )
        variables = trainer.init(jax.random.key(0), (sizes.image, sizes.image, 3))
        info = TaskInfo.create(0, 1, 1, steps, 25, 10)
        images = dataset(25, 80, sizes.image)
        plan = np.random.default_rng(0).integers(0, len(images), (steps, sizes.batch), np.int32)
        return cls(
            trainer,
            trainer.create_state(variables, info),
            trainer.place(variables),
            meshes.put(DeviceData(images.images, images.labels), meshes.replicated(devices)),
            meshes.feed(plan, devices, axis=1),
        )

    def advance(self, steps: int) -> Any:
        """Do some more steps; past the last one of the plan that one again and again."""
        stop = int(self.state.step) + steps
        self.state, metrics = self.trainer.run_steps(
            self.state, self.previous, self.data, self.plan, stop
        )
        return self.state.params, metrics
