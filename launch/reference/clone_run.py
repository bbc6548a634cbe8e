"""Run the reference's own program, `iamcl2r.main`, on the caller's data and batches.

Its tasks, networks, optimiser, schedule, training, checkpoints, evaluation and metrics run
unchanged. During the run its modules get replacements for what would download or report (data sets,
wandb) and for what draws batches, so that both sides see the same ones.
"""

import contextlib
import functools
import os
import sys
import time
import unittest.mock
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import yaml

from compat_jax.data.dataset import Dataset
from compat_jax.interop import torch_files
from launch.reference.clone import (
    Nothing,
    Recorder,
    losses_of,
    replaced,
    torch_module,
    with_in1d,
)

_DATA = ("dataset_train", "dataset_val", "train_transform", "val_transform")


class Inputs(NamedTuple):
    """The inputs of both sides.

    Attributes:
      data: images of all tasks.
      plans: batches of each task, int32[epochs, batches, batch] positions in `data`.
      task_classes: new classes of each task.
      memories: positions in memory at the start of each task, int[m].
      replacements: state dict by the task that starts from it; task 0 must have one.
      query: query images, or None to skip the evaluation.
      gallery: gallery images, or None.
      mean: mean of the normalisation, by channel.
      std: standard deviation of the normalisation, by channel.
      batch_size: images in a batch.
      rehearsal: images of a class in memory.
      lr: learning rate of a task's first epoch.
      min_lr: learning rate at which the cosine schedule ends.
      weight_decay: weight decay of kernels.
    """

    data: Dataset
    plans: Sequence[np.ndarray]
    task_classes: Sequence[range]
    memories: Sequence[np.ndarray]
    replacements: Mapping[int, Mapping[str, np.ndarray]]
    query: Dataset | None
    gallery: Dataset | None
    mean: Sequence[float]
    std: Sequence[float]
    batch_size: int
    rehearsal: int
    lr: float
    min_lr: float
    weight_decay: float


class Outcome(NamedTuple):
    """The results of the reference's program.

    Attributes:
      losses: loss of every step of every task.
      seconds: duration of every step, from the moment its batch is handed out to the next request.
      batches: batches in an epoch of each task, as the reference counts them.
      states: state dict after each task.
      matrix: float[T, T]; None if there is no evaluation, like the fields that follow.
      average_compatibility: AC of the matrix.
      average_accuracy: AA of the matrix, in percent.
      evaluate: a function that evaluates all checkpoints once more.
    """

    losses: list[float]
    seconds: list[float]
    batches: list[int]
    states: list[dict[str, np.ndarray]]
    matrix: np.ndarray | None = None
    average_compatibility: float | None = None
    average_accuracy: float | None = None
    evaluate: Callable[[], None] | None = None


def run(
    modules: Callable[[str], ModuleType],
    inputs: Inputs,
    folder: Path,
    before_step: Callable[[int], None] = lambda step: None,
) -> Outcome:
    """Run `iamcl2r.main.main()`.

    Args:
      modules: modules of a clone, see `clone.open_clone`.
      inputs: data, batches and settings.
      folder: an empty folder for its files; keep it as long as `Outcome.evaluate` is used.
      before_step: called with the number of each step before its batch is handed out.
    """
    world = _World(inputs, before_step)
    arguments = ["main", "-c", str(_configuration(inputs, folder))]
    main, seen = modules("main"), {}
    meter = Recorder.of(modules("utils").AverageMeter)
    with _surroundings(modules, world), replaced(sys, argv=arguments):
        evaluation = modules("eval")

        def evaluate(*args, **settings):
            seen["again"] = functools.partial(evaluate_once, *args, **settings)
            return evaluate_once(*args, **settings)

        def keep(name, function):
            def kept(*, matrix):
                seen["matrix"] = np.array(matrix)
                seen[name] = float(function(matrix=matrix))
                return seen[name]

            return kept

        evaluate_once = main.evaluate
        kept = {
            name: keep(name, getattr(evaluation, name))
            for name in ("average_compatibility", "average_accuracy")
        }
        with (
            replaced(modules("train"), AverageMeter=meter),
            replaced(main, evaluate=evaluate),
            replaced(evaluation, **kept),
        ):
            main.main()
    files = sorted(folder.glob("output/**/ckpt_*.pt"), key=lambda f: int(f.stem.split("_")[1]))

    def evaluate_again():
        with _surroundings(modules, world):
            seen["again"]()

    return Outcome(
        losses=losses_of(meter),
        seconds=world.seconds,
        batches=world.batches,
        states=[torch_files.read(file) for file in files],
        matrix=seen.get("matrix"),
        average_compatibility=seen.get("average_compatibility"),
        average_accuracy=seen.get("average_accuracy"),
        evaluate=evaluate_again if "again" in seen else None,
    )


def network(modules: Callable[[str], ModuleType], state: Mapping[str, np.ndarray]):
    """Make the reference's network and load weights with `strict=True`.

    Args:
      modules: modules of a clone.
      state: state dict of a ResNet-18 with a simplex classifier.

    Returns:
      A torch.nn.Module.
    """
    torch = torch_module()
    num_classes, size = state["fc2.weight"].shape
    net = modules("models").Incremental_ResNet(num_classes, size, "resnet18")
    tensors = {name: torch.tensor(np.asarray(array)) for name, array in state.items()}
    net.load_state_dict(tensors, strict=True)
    return net


def extract(
    modules: Callable[[str], ModuleType],
    net,
    images: np.ndarray,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
) -> np.ndarray:
    """Extract normalised features with the reference's `extract_features`.

    Args:
      modules: modules of a clone.
      net: a network, see `network`.
      images: uint8[n, h, w, 3].
      mean: mean of the normalisation, by channel.
      std: standard deviation of the normalisation, by channel.
      batch_size: images in a batch.

    Returns:
      float32[n, d].
    """
    torch = torch_module()
    starts = range(0, len(images), batch_size)
    batches = ([_tensor(images[i : i + batch_size], mean, std)] for i in starts)
    device, settings = torch.device("cpu"), SimpleNamespace(amp=False)
    return modules("models").extract_features(settings, device, net, batches)


def feature_work(
    modules: Callable[[str], ModuleType], inputs: Inputs, state: Mapping[str, np.ndarray]
) -> Callable[[], None]:
    """Return a function that extracts the features of the query images, for timing."""
    net = network(modules, state)
    settings = {"mean": inputs.mean, "std": inputs.std, "batch_size": inputs.batch_size}
    return lambda: extract(modules, net, inputs.query.images, **settings)


def _tensor(images, mean, std):
    """Convert uint8[n, h, w, c] as torchvision's ToTensor and Normalize do."""
    images = images.astype(np.float32) / np.float32(255)
    images = (images - np.float32(mean)) / np.float32(std)
    return torch_module().from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _configuration(inputs: Inputs, folder: Path) -> Path:
    """Write a configuration file of the reference and the pre-trained files that it names."""
    models = []
    for task, state in sorted(inputs.replacements.items()):
        # The reference drops the classifier of a file that has "pretrained" in its path.
        models.append(str(folder / "pretrained" / f"{task}.pt"))
        torch_files.write(models[-1], state)
    (folder / "output").mkdir()
    file = folder / "config.yaml"
    content = {
        "method": "hoc",
        "output_folder": str(folder / "output"),
        "data_path": str(folder),
        "pretrained_model_path": models,
        "replace_ids": sorted(task for task in inputs.replacements if task),
        "use_subsampled_dataset": False,
        "initial_increment": len(inputs.task_classes[0]),
        "increment": len(inputs.task_classes[-1]),
        "rehearsal": inputs.rehearsal,
        "epochs": len(inputs.plans[0]),
        "batch_size": inputs.batch_size,
        "lr": inputs.lr,
        "min_lr": inputs.min_lr,
        "weight_decay": inputs.weight_decay,
        "amp": False,
        "num_workers": 0,
        "seed": 1,
        "train_only": inputs.query is None,
        # Its check_params reads these two, which none of its configurations has.
        "learning_rate": inputs.lr,
        "momentum": 0.9,
    }
    file.write_text(yaml.safe_dump(content))
    return file


@contextlib.contextmanager
def _surroundings(modules: Callable[[str], ModuleType], world: "_World") -> Iterator[None]:
    """Give the clone's modules our data and batches, and keep them on the CPU."""
    torch = torch_module()
    main, dataset, evaluation = modules("main"), modules("dataset"), modules("eval")
    with_in1d(modules("performance_metrics"))
    nobody = Nothing()
    # Its checkpoints hold its settings object, which torch >= 2.6 refuses to load by default.
    trusting = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    alone = {name: "1" for name in ("WORLD_SIZE", "SLURM_NTASKS") if name in os.environ}
    with (
        warnings.catch_warnings(),
        unittest.mock.patch.dict(os.environ, trusting | alone),
        replaced(torch.cuda, is_available=lambda: False),
        replaced(main, wandb=nobody, setup_logger=nobody, DataLoader=world.loader),
        replaced(modules("train"), wandb=nobody),
        replaced(evaluation, wandb=nobody),
        replaced(
            dataset,
            ClassIncremental=world.scenario,
            RehearsalMemory=world.memory,
            DataLoader=world.loader,
        ),
        replaced(
            modules("dataset.cifar"),
            load_cifar=lambda **settings: dict.fromkeys(_DATA),
            load_cifar_identification=lambda path: (world.gallery, world.query),
        ),
    ):
        warnings.simplefilter("ignore")
        yield


class _World:
    """Stand in for continuum's scenario and memory and for PyTorch's loader."""

    def __init__(self, inputs: Inputs, before_step: Callable[[int], None]):
        self.inputs, self.before_step = inputs, before_step
        self.seconds, self.batches = [], []
        self.query, self.gallery = (
            None if data is None else _Retrieval(data) for data in (inputs.query, inputs.gallery)
        )

    def scenario(self, dataset, initial_increment, increment, transformations):
        """Stand in for continuum.ClassIncremental."""
        del dataset, initial_increment, increment, transformations
        return _Scenario(self.inputs, range(len(self.inputs.plans)))

    def memory(self, **settings):
        """Stand in for continuum.rehearsal.RehearsalMemory."""
        del settings
        return _Memory(self.inputs)

    def loader(self, data, batch_size=1, batch_sampler=None, **settings):
        """Stand in for torch.utils.data.DataLoader; validation between epochs gets no batches."""
        del settings
        if isinstance(data, _TaskSet):
            own = len(data._y) // batch_size if batch_sampler is None else len(batch_sampler)
            self.batches.append(own)
            return _Epochs(self, self.inputs.plans[data.task])
        if isinstance(data, _Retrieval):
            return _Images(self, data, batch_size)
        return []

    def tensors(self, data, positions):
        """Return normalised images and class numbers as tensors."""
        images = _tensor(data.images[positions], self.inputs.mean, self.inputs.std)
        labels = data.labels[positions].astype(np.int64)
        return images, torch_module().from_numpy(labels)


class _Epochs:
    """Loader of a task: each iteration yields the batches of the next epoch."""

    def __init__(self, world, plan):
        self.world, self.epochs = world, iter(plan)

    def __iter__(self):
        for positions in next(self.epochs):
            seconds = self.world.seconds
            self.world.before_step(len(seconds))
            batch = self.world.tensors(self.world.inputs.data, positions)
            began = time.perf_counter()
            yield batch
            seconds.append(time.perf_counter() - began)


class _Images:
    """Loader of the query or gallery images."""

    def __init__(self, world, dataset, batch_size):
        self.world, self.dataset, self.batch_size = world, dataset, batch_size

    def __iter__(self):
        data = self.dataset.data
        for start in range(0, len(data), self.batch_size):
            yield self.world.tensors(data, slice(start, start + self.batch_size))


class _Retrieval:
    """Stand in for a data set of torchvision, of which only the targets are read."""

    def __init__(self, data):
        self.data, self.targets = data, data.labels.tolist()


class _TaskSet:
    """Images of one task; the reference adds the memory to them."""

    def __init__(self, inputs, task):
        self.task, self._classes = task, inputs.task_classes[task]
        self._x = np.flatnonzero(np.isin(inputs.data.labels, self._classes))
        self._y = inputs.data.labels[self._x]
        self.nb_classes = len(self._classes)

    def get_classes(self):
        return np.array(self._classes)

    def get_raw_samples(self):
        return self._x, self._y, None

    def add_samples(self, x, y, t):
        del t
        self._x, self._y = np.append(self._x, x), np.append(self._y, y)


class _Scenario:
    """The sequence of tasks, or a slice of it."""

    def __init__(self, inputs, tasks):
        self.inputs, self.tasks = inputs, tasks
        self.nb_tasks = len(tasks)
        self.nb_classes = sum(len(inputs.task_classes[task]) for task in tasks)

    def __iter__(self):
        return (_TaskSet(self.inputs, task) for task in self.tasks)

    def __getitem__(self, key):
        if isinstance(key, slice):
            return _Scenario(self.inputs, self.tasks[key])
        return _TaskSet(self.inputs, self.tasks[key])


class _Memory:
    """The rehearsal memory, whose images are given."""

    def __init__(self, inputs):
        self.inputs, self.task = inputs, 0

    def get(self):
        positions = self.inputs.memories[self.task]
        return positions, self.inputs.data.labels[positions], None

    def add(self, x, y, t, z):
        del x, y, t, z
        self.task += 1

    @property
    def seen_classes(self):
        return {c for classes in self.inputs.task_classes[: self.task] for c in classes}

    def save(self, path):
        del path
