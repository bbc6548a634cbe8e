"""The reference's own program, `iamcl2r.main`, on data and batches that the caller gives.

Its tasks, networks, optimiser, schedule, training, checkpoints, evaluation and metrics run as they
are. Replaced, in its modules and for the time of the run, are what would download or report (data
sets, wandb), and what draws batches, so that both sides see the same ones.
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
from compat_jax.interop.reference import (
    Nothing,
    Recorder,
    losses_of,
    replaced,
    torch_module,
    with_in1d,
)

_DATA = ("dataset_train", "dataset_val", "train_transform", "val_transform")


class Inputs(NamedTuple):
    """What both sides are given.

    Attributes:
      data: images of the tasks.
      plans: a task's batches, int32[epochs, batches, batch] positions in `data`.
      task_classes: new classes of each task.
      memories: int[m] positions that are in memory when a task begins.
      replacements: state dict by the task that starts from it; task 0 must have one.
      query: images that ask, or None for no evaluation.
      gallery: images that answer, or None.
      mean: of the normalisation.
      std: of the normalisation.
      batch_size: images a batch.
      rehearsal: images of a class in memory.
      lr: of a task's first epoch.
      min_lr: where the cosine ends.
      weight_decay: of kernels.
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
    """What the reference made of it.

    Attributes:
      losses: of every step of every task.
      seconds: between handing out a batch and being asked for the next, of every step.
      batches: an epoch of each task, by its own count.
      states: state dict after each task.
      matrix: float[T, T]; None without evaluation, as the following.
      average_compatibility: of the matrix.
      average_accuracy: of the matrix, in percent.
      evaluate: evaluates once more, from its files.
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
    """`iamcl2r.main.main()` on the inputs.

    Args:
      modules: of a clone, see `reference.open_clone`.
      inputs: see there.
      folder: empty, for its files; they must stay as long as `evaluate` of the outcome is called.
      before_step: called with the number of each step before its batch is handed out.

    Returns:
      An Outcome.
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
        losses_of(meter),
        world.seconds,
        world.batches,
        [torch_files.read(file) for file in files],
        seen.get("matrix"),
        seen.get("average_compatibility"),
        seen.get("average_accuracy"),
        evaluate_again if "again" in seen else None,
    )


def network(modules: Callable[[str], ModuleType], state: Mapping[str, np.ndarray]):
    """Its network with weights, loaded with `strict=True`.

    Args:
      modules: of a clone.
      state: state dict of a ResNet-18 and a simplex.

    Returns:
      A module of PyTorch.
    """
    torch = torch_module()
    num_classes, size = state["fc2.weight"].shape
    net = modules("models").Incremental_ResNet(num_classes, size, "resnet18")
    tensors = {name: torch.tensor(np.asarray(array)) for name, array in state.items()}
    net.load_state_dict(tensors, strict=True)
    return net


def extract(
    modules: Callable[[str], ModuleType], net, images: np.ndarray, mean, std, batch_size: int
) -> np.ndarray:
    """Normalised features, by its `extract_features`.

    Args:
      modules: of a clone.
      net: see `network`.
      images: uint8[n, h, w, 3].
      mean: of the normalisation.
      std: of the normalisation.
      batch_size: images a batch.

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
    """A function that extracts the features of the queries, as often as it is called."""
    net = network(modules, state)
    images, settings = inputs.query.images, (inputs.mean, inputs.std, inputs.batch_size)
    return lambda: extract(modules, net, images, *settings)


def _tensor(images, mean, std):
    """uint8[n, h, w, c] as torchvision's ToTensor and Normalize make of it."""
    images = images.astype(np.float32) / np.float32(255)
    images = (images - np.float32(mean)) / np.float32(std)
    return torch_module().from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _configuration(inputs: Inputs, folder: Path) -> Path:
    """A configuration file of the reference, and the pre-trained files that it names."""
    models = []
    for task, state in sorted(inputs.replacements.items()):
        # With "pretrained" in its name a file is read as one of theirs: without its classifier.
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
        # Its check_params reads these two, which no configuration of its has.
        "learning_rate": inputs.lr,
        "momentum": 0.9,
    }
    file.write_text(yaml.safe_dump(content))
    return file


@contextlib.contextmanager
def _surroundings(modules: Callable[[str], ModuleType], world: "_World") -> Iterator[None]:
    """The modules of the clone, on the CPU, with data and batches of ours."""
    torch = torch_module()
    main, dataset, evaluation = modules("main"), modules("dataset"), modules("eval")
    with_in1d(modules("performance_metrics"))
    nobody = Nothing()
    # Its checkpoints hold its settings object, which torch >= 2.6 does not load unasked.
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
    """Stand-ins for continuum's scenario and memory and for PyTorch's loader."""

    def __init__(self, inputs: Inputs, before_step: Callable[[int], None]):
        self.inputs, self.before_step = inputs, before_step
        self.seconds, self.batches = [], []
        self.query, self.gallery = (
            None if data is None else _Retrieval(data) for data in (inputs.query, inputs.gallery)
        )

    def scenario(self, dataset, initial_increment, increment, transformations):
        """continuum.ClassIncremental."""
        del dataset, initial_increment, increment, transformations
        return _Scenario(self.inputs, range(len(self.inputs.plans)))

    def memory(self, **settings):
        """continuum.rehearsal.RehearsalMemory."""
        del settings
        return _Memory(self.inputs)

    def loader(self, data, batch_size=1, batch_sampler=None, **settings):
        """torch.utils.data.DataLoader; what validates between epochs has nothing to read."""
        del settings
        if isinstance(data, _TaskSet):
            own = len(data._y) // batch_size if batch_sampler is None else len(batch_sampler)
            self.batches.append(own)
            return _Epochs(self, self.inputs.plans[data.task])
        if isinstance(data, _Retrieval):
            return _Images(self, data, batch_size)
        return []

    def tensors(self, data, positions):
        """Normalised images, and class numbers."""
        images = _tensor(data.images[positions], self.inputs.mean, self.inputs.std)
        labels = data.labels[positions].astype(np.int64)
        return images, torch_module().from_numpy(labels)


class _Epochs:
    """Loader of a task: each time it is gone through, the batches of its next epoch."""

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
    """Loader of a retrieval set."""

    def __init__(self, world, dataset, batch_size):
        self.world, self.dataset, self.batch_size = world, dataset, batch_size

    def __iter__(self):
        data = self.dataset.data
        for start in range(0, len(data), self.batch_size):
            yield self.world.tensors(data, slice(start, start + self.batch_size))


class _Retrieval:
    """A data set of torchvision: what is asked of it is its targets."""

    def __init__(self, data):
        self.data, self.targets = data, data.labels.tolist()


class _TaskSet:
    """Images of one task, to which memory is added."""

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
    """The sequence of tasks, or some of them."""

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
    """The rehearsal memory: which images it holds is given."""

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
