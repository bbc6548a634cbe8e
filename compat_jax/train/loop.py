"""The loop over tasks: fine-tune, store the version, replace the model where a better one is due."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from compat_jax import losses, models, simplex
from compat_jax import mesh as meshes
from compat_jax.chain import Chain, Record, Version
from compat_jax.data.augment import Preprocess
from compat_jax.data.dataset import Dataset
from compat_jax.data.tasks import TaskSequence, batch_plan, memory_indices
from compat_jax.errors import Stopped, UserError, unknown
from compat_jax.methods import LossSettings, Method, build_embedder
from compat_jax.models.layers import linear_init
from compat_jax.train.fit import Fit
from compat_jax.train.optimizer import OptimizerSettings
from compat_jax.train.progress import Progress
from compat_jax.train.state import TaskInfo
from compat_jax.train.step import DeviceData, Trainer

_INIT, _HEAD = 1, 2  # addresses of the two draws of initial weights


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A backbone by name and arguments."""

    name: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that decides what a run computes.

    Attributes:
      method: by which to train.
      backbone: of a model that starts from nothing.
      num_prototypes: K.
      label_order: which prototype a class is written to.
      sequence: the tasks.
      rehearsal: images kept of each class, >= 0.
      epochs: of each task.
      batch_size: images a batch, over all devices.
      seed: of everything random.
      loss: numbers of the loss.
      optim: numbers of the optimiser.
      preprocess: normalisation and augmentation.
      dtype: of the computation, "float32" or "bfloat16".
    """

    method: Method
    backbone: Backbone
    num_prototypes: int
    label_order: str
    sequence: TaskSequence
    rehearsal: int
    epochs: int
    batch_size: int
    seed: int
    loss: LossSettings
    optim: OptimizerSettings
    preprocess: Preprocess
    dtype: str = "float32"

    def check(self, mesh: Mesh, labels: np.ndarray | None = None) -> None:
        """Refuse what cannot work, before any work.

        Args:
          mesh: devices.
          labels: int[n] of the data, for a look at every task's batches.

        Raises:
          UserError: K too small, no epochs, a batch that does not divide over the devices, ...
        """
        models.create_backbone(self.backbone.name, self.backbone.arguments, self.dtype)
        if self.method.fixed_simplex and self.num_prototypes < self.sequence.num_classes:
            raise UserError(
                f"num_prototypes {self.num_prototypes} is too small for "
                f"{self.sequence.num_classes} classes: use at least as many, better several times "
                "more, since every class to come needs one"
            )
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rehearsal < 0:
            raise UserError(f"tasks.rehearsal must not be negative, got {self.rehearsal}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must lie in 0..{2**32 - 1}, got {self.seed}")
        if self.label_order not in simplex.LABEL_ORDERS:
            raise unknown("label_order", self.label_order, simplex.LABEL_ORDERS)
        meshes.check_batch(mesh, self.batch_size)
        for task, plan in enumerate(_plans(dataclasses.replace(self, epochs=1), labels)):
            size, devices = plan.shape[1], mesh.shape["data"]
            if size % devices or not size:
                raise UserError(
                    f"task {task} has batches of {size} images, which {devices} devices cannot "
                    "share: use another batch_size, more images or fewer devices (mesh)"
                )


def check_replacements(
    run: Run, replacements: Mapping[int, Version], image_shape: tuple[int, ...]
) -> None:
    """Refuse replacement models that do not fit the run.

    Args:
      run: the run.
      replacements: pre-trained model by task.
      image_shape: of the task data.

    Raises:
      UserError: task out of range, another K, method of the other kind of head, image shape.
    """
    for task, version in replacements.items():
        record = version.record
        if not 0 <= task < len(run.sequence):
            raise UserError(
                f"replacement at task {task}, but the sequence has tasks "
                f"0..{len(run.sequence) - 1}: change tasks.replace_at"
            )
        fixed = record.head_classes is None
        if fixed != run.method.fixed_simplex:
            kinds = {True: "a fixed simplex", False: "a learnable head"}
            raise UserError(
                f"the model for task {task} was pre-trained with {kinds[fixed]}, but method "
                f"{run.method.name!r} has {kinds[not fixed]}: pre-train one with "
                f"--config=configs/pretrain.py:method={run.method.name}"
            )
        if fixed and record.num_prototypes != run.num_prototypes:
            raise UserError(
                f"the model for task {task} has num_prototypes={record.num_prototypes}, the run "
                f"{run.num_prototypes}: all versions share one simplex"
            )
        if record.image_shape != tuple(image_shape):
            raise UserError(
                f"the model for task {task} takes images of {record.image_shape}, the tasks have "
                f"{tuple(image_shape)}: set data.*.size alike"
            )


def train(
    run: Run,
    data: Dataset,
    chain: Chain,
    progress: Progress,
    mesh: Mesh,
    replacements: Mapping[int, Version] | None = None,
    config: Mapping[str, Any] | None = None,
    save_every: int = 0,
    log: epath.Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    bar: str | None = None,
    device_budget: int = 0,
) -> None:
    """Run the task sequence; every task ends as a version of the chain.

    Versions that the chain has already are not trained again, and a task that was cut off goes on
    from its last saved state, so calling again after a kill ends with the same bits.

    Args:
      run: what to compute.
      data: all classes of the sequence, labelled in the order in which they come.
      chain: takes the versions.
      progress: takes the state within a task.
      mesh: devices.
      replacements: pre-trained model by task at which it replaces the present one.
      config: written into every record.
      save_every: steps between saves within a task; 0 saves at the end of an epoch, if the last save
        is half a minute old.
      log: file that gets one JSON line an epoch.
      should_stop: asked between dispatches; when it says True, the state is saved.
      bar: label of the progress bar; None for none.
      device_budget: bytes of images that may lie on a device; if the data has more, batches are put
        there ahead of their use, which changes no bit. 0 for no limit.

    Raises:
      Stopped: after saving, when `should_stop` said so.
      UserError: what `Run.check` and `check_replacements` refuse.

    Source: `main` in `src/iamcl2r/main.py`.
    """
    replacements = dict(replacements or {})
    run.check(mesh, data.labels)
    check_replacements(run, replacements, data.images.shape[1:])
    done = chain.numbers()
    missing = [task for task in range(len(run.sequence)) if task not in done]
    if not missing:
        return
    fit = Fit(data, mesh, progress, save_every, log, should_stop, device_budget)
    plans = _plans(run, data.labels)
    longest = max(len(plan) for plan in plans)
    steps = [len(plan) for plan in plans]
    with tqdm(total=sum(steps), desc=bar, disable=bar is None, unit="step") as meter:
        meter.update(sum(steps) - sum(steps[task] for task in missing))
        for task in missing:
            if should_stop():
                raise Stopped
            start = replacements.get(task) or (chain.open(task - 1) if task else None)
            trainer = _trainer(run, start.record if start else None, mesh)
            variables = _starting_variables(run, trainer, start, task, data.images.shape[1:])
            plan = np.pad(plans[task], ((0, longest - steps[task]), (0, 0)))
            info = _task_info(run, task, steps[task])
            label = f"task {task + 1}/{len(run.sequence)}"
            trained = fit(trainer, variables, info, plan, steps[task], meter, label)
            chain.add(
                _stored_variables(run, trained, run.sequence.num_seen(task)),
                _record(run, data, task, start, task in replacements, config or {}),
                number=task,
            )
            progress.clear()


def pretrain(
    run: Run,
    data: Dataset,
    chain: Chain,
    progress: Progress,
    mesh: Mesh,
    number: int,
    num_classes: int | None = None,
    config: Mapping[str, Any] | None = None,
    save_every: int = 0,
    log: epath.Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    bar: str | None = None,
    device_budget: int = 0,
) -> None:
    """Train one model on the first classes of a data set, to replace others in a sequence later.

    Models that differ in their number of classes only are trained by one compiled program.

    Args:
      run: what to compute; its sequence must be one task of all classes of the data.
      data: images of the classes.
      chain: takes the model as version `number`, unless it has it already.
      progress, mesh, config, save_every, log, should_stop, bar, device_budget: see `train`.
      number: of the version; also the address of its random numbers.
      num_classes: how many classes it learns; None for all.

    Raises:
      Stopped, UserError: see `train`.

    Source: the reference ships such models (`scripts/download_pretrained_models.sh`); its paper says
    how they were trained.
    """
    run.check(mesh, data.labels)
    if number in chain.numbers():
        return
    if should_stop():
        raise Stopped
    fit = Fit(data, mesh, progress, save_every, log, should_stop, device_budget)
    trainer = _trainer(run, None, mesh)
    key = jax.random.fold_in(jax.random.key(run.seed), _INIT)
    variables = trainer.init(jax.random.fold_in(key, number), data.images.shape[1:])
    num_classes = num_classes or data.num_classes
    own = np.flatnonzero(data.labels < num_classes)
    plan = batch_plan(own, np.zeros(0, int), run.batch_size, run.epochs, run.seed, number)
    plan = plan.reshape(-1, plan.shape[-1])
    steps, longest = len(plan), run.epochs * (len(data) // plan.shape[-1])
    info = TaskInfo.create(run.seed, number, run.epochs, steps // run.epochs, num_classes)
    plan = np.pad(plan, ((0, longest - steps), (0, 0)))
    with tqdm(total=steps, desc=bar, disable=bar is None, unit="step") as meter:
        trained = fit(trainer, variables, info, plan, steps, meter, f"model {number}")
    part = data if num_classes == data.num_classes else data.select(range(num_classes))
    record = dataclasses.replace(
        _record(run, part, 0, None, False, config or {}),
        task=None,
        class_names=part.class_names,
        classes_seen=num_classes,
        head_classes=None if run.method.fixed_simplex else num_classes,
    )
    chain.add(_stored_variables(run, trained, num_classes), record, number=number)
    progress.clear()


def lower(
    run: Run,
    labels: np.ndarray,
    image_shape: tuple[int, int, int],
    mesh: Mesh,
    start: Record | None = None,
) -> jax.stages.Lowered:
    """The step that `train` compiles, lowered on a mesh, also of devices that are not there.

    Args:
      run: what to compute.
      labels: int[n] of the data.
      image_shape: (height, width, channels).
      mesh: devices.
      start: record of the model that the task starts from; None for the run's own backbone.

    Returns:
      A jax.stages.Lowered, to be compiled.
    """
    steps, batch = _plan_shape(run, labels)
    shape = jax.ShapeDtypeStruct
    data = DeviceData(
        shape((len(labels), *image_shape), jnp.uint8), shape((len(labels),), jnp.int32)
    )
    trainer = _trainer(run, start, mesh)
    return trainer.lower(*trainer.shapes(image_shape), data, shape((steps, batch), jnp.int32))


def _plan_shape(run, labels):
    """Steps of the longest task and images of the largest batch."""
    plans = _plans(dataclasses.replace(run, epochs=1), labels)
    return run.epochs * max(len(p) for p in plans), max(p.shape[1] for p in plans)


def _plans(run, labels):
    """int32[steps, batch] for every task, its epochs one after the other."""
    if labels is None:
        return []
    plans = []
    for task in range(len(run.sequence)):
        first, last = run.sequence.classes(task)[0], run.sequence.classes(task)[-1]
        new = np.flatnonzero((labels >= first) & (labels <= last))
        memory = memory_indices(labels, range(first), run.rehearsal, run.seed)
        plan = batch_plan(new, memory, run.batch_size, run.epochs, run.seed, task)
        plans.append(plan.reshape(plan.shape[0] * plan.shape[1], plan.shape[2]))
    return plans


def _task_info(run, task, steps):
    seen, old = run.sequence.num_seen(task), run.sequence.num_seen(task - 1)
    return TaskInfo.create(
        seed=run.seed,
        index=task,
        epochs=run.epochs,
        steps_per_epoch=steps // run.epochs,
        num_seen=seen,
        num_old=old,
        distillation_weight=losses.distillation_weight(seen - old, old, run.loss.distillation),
    )


def _trainer(run, record, mesh):
    """The trainer of an architecture: the start model's, or the run's own."""
    name = record.backbone if record else run.backbone.name
    arguments = record.backbone_arguments if record else run.backbone.arguments
    return _cached_trainer(run_key(run), name, json.dumps(dict(arguments)), mesh)


def run_key(run: Run) -> Run:
    """A run that compares equal for all runs whose step is the same program."""
    return dataclasses.replace(run, backbone=None, seed=0)


@functools.lru_cache(maxsize=16)
def _cached_trainer(run, name, arguments, mesh):
    dtype = models.DTYPES[run.dtype]
    backbone = models.create_backbone(name, json.loads(arguments), run.dtype)
    return Trainer(
        embedder=build_embedder(
            run.method, backbone, run.num_prototypes, run.sequence.num_classes, dtype
        ),
        method=run.method,
        loss=run.loss,
        optim=run.optim,
        preprocess=run.preprocess,
        num_prototypes=run.num_prototypes,
        label_order=run.label_order,
        mesh=mesh,
    )


def _starting_variables(run, trainer, start, task, image_shape):
    """Variables at the start of a task: fresh, the last version's, or the replacement's."""
    if start is None:
        key = jax.random.fold_in(jax.random.key(run.seed), _INIT)
        return trainer.init(key, image_shape)
    if run.method.fixed_simplex:
        return start.variables
    width = start.record.feature_size
    old = None
    if start.record.task is not None:  # a pre-trained head is of other classes
        old = start.variables["params"]["fc2"]["kernel"]
    head = _grown_head(run, width, old, task)
    params = {**start.variables["params"], "fc2": {"kernel": head}}
    return {**start.variables, "params": params}


def _grown_head(run, width, old, task):
    """float32[width, all classes]: old columns kept, the others drawn anew."""
    key = jax.random.fold_in(jax.random.key(run.seed), _HEAD)
    head = np.array(
        linear_init(jax.random.fold_in(key, task), (width, run.sequence.num_classes), jnp.float32)
    )
    if old is not None:
        head[:, : old.shape[1]] = old  # in NumPy: JAX would compile it for every width
    return head


def _stored_variables(run, variables, num_seen):
    """What the chain gets: a learnable head without the columns of classes not yet seen."""
    if run.method.fixed_simplex:
        return variables
    kernel = np.asarray(variables["params"]["fc2"]["kernel"])[:, :num_seen]
    return {**variables, "params": {**variables["params"], "fc2": {"kernel": kernel}}}


def _record(run, data, task, start, replaced, config):
    name = start.record.backbone if start else run.backbone.name
    arguments = start.record.backbone_arguments if start else run.backbone.arguments
    trainer_width = (
        run.num_prototypes - 1
        if run.method.fixed_simplex
        else _width(name, arguments, data.images.shape[1:])
    )
    return Record(
        method=run.method.name,
        backbone=name,
        backbone_arguments=dict(arguments),
        image_shape=tuple(int(x) for x in data.images.shape[1:]),
        mean=run.preprocess.mean,
        std=run.preprocess.std,
        feature_size=trainer_width,
        num_prototypes=run.num_prototypes,
        label_order=run.label_order,
        head_classes=None if run.method.fixed_simplex else run.sequence.num_seen(task),
        task=task,
        classes_seen=run.sequence.num_seen(task),
        parent=None if replaced or not task else task - 1,
        replaced_by=f"pre-trained version {start.number}" if replaced else None,
        data_fingerprint=data.fingerprint(),
        seed=run.seed,
        config=config,
    )


def _width(name, arguments, image_shape):
    backbone = models.create_backbone(name, arguments)
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    init = jax.eval_shape(
        lambda x: backbone.init_with_output(jax.random.key(0), x, train=False), images
    )
    return int(init[0].shape[-1])
