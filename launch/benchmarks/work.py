"""The workloads: sizes, a run, a trainer, random data."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from compat_jax import Dataset, Run, Tasks, Version
from compat_jax import mesh as meshes
from compat_jax.chain import variables_sha256
from compat_jax.training import DeviceData, Feed, Task, Trainer, TrainState
from compat_jax.training.task import sequence_task


@dataclasses.dataclass(frozen=True)
class PhotoSizes:
    """Sizes of the measures of real pictures; the defaults are for two CPU cores.

    Attributes:
      backbones: names of those of `photo_step` and `photo_features`; the first is also that of `cores`.
      image: height and width of the pictures, in pixels.
      batch: pictures in a batch.
      repeats: repetitions of most measures.
      features: pictures in one repetition of `photo_features`.
      files: JPEG files of `decoding`.
      trained: (backbone, pictures, repetitions) of `from_disk`.
      read: (backbone, JPEG files, pictures embedded) of `photo_memory`.
      latency: (backbone, size) of each network of `latency`; None for `image`.
      lookups: repetitions of `latency`.
    """

    backbones: tuple[str, ...] = ("resnet50", "vit_s16")
    image: int = 224
    batch: int = 8
    repeats: int = 5
    features: int = 16
    files: int = 300
    trained: tuple[str, int, int] = ("resnet18", 100, 3)
    read: tuple[str, int, int] = ("resnet50", 5000, 64)
    latency: tuple[tuple[str, int | None], ...] = (
        ("resnet50", None),
        ("vit_s16", None),
        ("resnet18", 96),
    )
    lookups: int = 20


@dataclasses.dataclass(frozen=True)
class GallerySizes:
    """Sizes of the measure of galleries in vector stores.

    Attributes:
      rows: of the gallery.
      size: of the features.
      queries: that are asked one at a time, and all at once.
      k: answers to each.
      seconds: after which no more queries are asked one at a time.
    """

    rows: int = 1_000_000
    size: int = 128
    queries: int = 1000
    k: int = 10
    seconds: float = 30.0


@dataclasses.dataclass(frozen=True)
class GrowthSizes:
    """Sizes of the first point of each growth of `scaling`; two more have 10 and 100 times as many.

    Those of the loss are the last three of `Sizes.large_k`.

    Attributes:
      trained: (backbone, pixels, epochs) of the trainings.
      images: (images, classes) of the training whose images grow.
      classes: (classes, images) of the training whose classes grow, and with them its prototypes.
      versions: of the evaluation, of `Sizes.evaluated` pictures.
      gallery: (rows, size, queries, k) of the search.
    """

    trained: tuple[str, int, int] = ("resnet_small", 8, 5)
    images: tuple[int, int] = (4000, 20)
    classes: tuple[int, int] = (100, 40_000)
    versions: int = 1
    gallery: tuple[int, int, int, int] = (10_000, 128, 1000, 10)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the workloads; the defaults are for two CPU cores.

    Attributes:
      backbone: name of the backbone.
      image: height and width of the images, in pixels.
      batch: images in a batch.
      num_prototypes: K.
      repeats: repetitions of most measures.
      steps: steps in one repetition of `step`.
      features: images in one repetition of `features`.
      feature_batch: images in a batch of `features`.
      epoch: (classes of task 0, new classes of task 1, images a class, epochs) of `epoch`.
      versions: versions of `evaluation`.
      evaluated: (query images, gallery images) of `evaluation`.
      search: (queries, queries for FAISS, gallery rows, size, k) of `search`.
      few_queries: numbers of queries that `search` is measured with besides.
      large_k: numbers of prototypes of `large_k`.
      scaling: sizes of `scaling`.
      streaming: (images, bytes for images on the device, steps) of `streaming`.
      protocol: (epochs of a task, images a class, least K) of `protocol`.
      photos: sizes of the measures of real pictures.
      gallery: sizes of the measure of galleries in vector stores.
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
    few_queries: tuple[int, ...] = (100, 1)
    large_k: tuple[int, ...] = (1000, 10_000, 100_000, 1_000_000)
    scaling: GrowthSizes = GrowthSizes()
    streaming: tuple[int, int, int] = (8000, 1 << 23, 24)
    protocol: tuple[int, int, int] = (70, 300, 1024)
    photos: PhotoSizes = PhotoSizes()
    gallery: GallerySizes = GallerySizes()

    def of_photos(self, backbone: str = "", image: int | None = None) -> "Sizes":
        """Return the sizes with the first backbone, image size and batch of `photos`, or those given."""
        return dataclasses.replace(
            self,
            backbone=backbone or self.photos.backbones[0],
            image=image or self.photos.image,
            batch=self.photos.batch,
        )


# An accelerator does in a second the work of minutes on two cores.
ON_ACCELERATOR = Sizes(
    steps=50,
    features=65_536,
    feature_batch=1024,
    epoch=(10, 15, 300, 20),
    evaluated=(10_000, 2000),
    search=(10_000, 1000, 1_000_000, 128, 10),
    streaming=(50_000, 1 << 25, 500),
    photos=PhotoSizes(batch=128, features=1024),
)
TINY = Sizes(
    backbone="resnet_small",
    image=8,
    batch=8,
    num_prototypes=32,
    repeats=2,
    features=16,
    feature_batch=8,
    epoch=(2, 2, 8, 2),
    versions=3,
    evaluated=(8, 4),
    search=(4, 4, 300, 8, 3),
    few_queries=(2, 1),
    large_k=(10, 100, 1000),
    scaling=GrowthSizes(
        trained=("resnet_small", 8, 3), images=(8, 2), classes=(2, 200), gallery=(50, 8, 4, 3)
    ),
    streaming=(64, 1 << 12, 4),
    protocol=(1, 4, 100),
    photos=PhotoSizes(
        backbones=("resnet_small",),
        image=16,
        repeats=2,
        files=6,
        trained=("resnet_small", 40, 2),
        read=("resnet_small", 12, 4),
        latency=(("resnet_small", None),),
        lookups=2,
    ),
    gallery=GallerySizes(rows=300, size=12, queries=8, k=3),
)


def mesh() -> Mesh:
    """Return a mesh of all devices."""
    return meshes.make_mesh("data:-1")


def run(sizes: Sizes, tasks: Tasks, epochs: int, *, method="hoc", dtype="float32") -> Run:
    """Return a run of the paper's protocol with these sizes.

    Args:
      sizes: backbone, batch size and K.
      tasks: how classes are split into tasks.
      epochs: epochs of each task.
      method: name of the method.
      dtype: dtype to compute in.
    """
    return Run(
        method=method,
        backbone=sizes.backbone,
        tasks=tasks,
        epochs=epochs,
        batch_size=sizes.batch,
        num_prototypes=sizes.num_prototypes,
        dtype=dtype,
    )


def dataset(classes: int, per_class: int, image: int, *, seed: int = 0) -> Dataset:
    """Return random images, `per_class` of each class, `image` pixels high and wide."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    images = rng.integers(0, 256, (len(labels), image, image, 3), np.uint8)
    return Dataset(images, labels, tuple(f"class{c}" for c in range(classes)))


@dataclasses.dataclass
class Training:
    """The second task of HOC on random images, ready to do steps.

    Attributes:
      task: the task.
      data: its images.
      trainer: its trainer.
      state: the state of the training.
      frozen: the frozen state of HOC.
      feed: images and batches on the devices.
    """

    task: Task
    data: Dataset
    trainer: Trainer
    state: TrainState
    frozen: Any
    feed: Feed

    @classmethod
    def create(
        cls, sizes: Sizes, dtype: str = "float32", *, steps: int = 1000, per_class: int = 80
    ) -> "Training":
        """Set up a task with a plan of `steps` random batches of `per_class` images a class."""
        devices, data = mesh(), dataset(25, per_class, sizes.image)
        settings = run(sizes, Tasks(), 1, dtype=dtype)
        sequence = settings.tasks.sequence(data.num_classes)
        task = sequence_task(settings, sequence, 1, labels=data.labels, start=None, replaced=False)
        rng = np.random.default_rng(0)
        plan = rng.integers(0, len(data), (steps, sizes.batch), np.int32)
        task = dataclasses.replace(task, plan=plan)
        trainer = task.trainer(devices)
        variables = task.starting_variables(trainer, data.images.shape[1:])
        images = DeviceData(np.asarray(data.images), data.labels)
        images = meshes.device_put(images, meshes.replicated(devices))
        return cls(
            task=task,
            data=data,
            trainer=trainer,
            state=trainer.create_state(variables, task.info()),
            frozen=task.freeze(trainer, variables, data),
            feed=Feed(images, meshes.shard_batch(plan, devices, axis=1)),
        )

    def advance(self, steps: int) -> Any:
        """Do some more steps; beyond the plan, repeat its last batch."""
        stop = int(self.state.step) + steps
        self.state, metrics = self.trainer.run_steps(self.state, self.frozen, self.feed, stop=stop)
        return self.state.params, metrics


def version(sizes: Sizes, per_class: int = 80) -> Version:
    """Return a version that was not trained, as if opened from a chain; see `Training.create`."""
    training = Training.create(sizes, steps=1, per_class=per_class)
    stored = training.trainer.stored(training.state.variables)
    variables = jax.tree.map(np.asarray, stored)
    return Version(
        number=0,
        record=training.task.record(training.trainer, training.data, {}),
        variables=variables,
        sha256=variables_sha256(variables),
        backbone=training.task.backbone,
    )
