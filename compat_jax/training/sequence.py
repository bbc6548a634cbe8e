"""Train a sequence of tasks: fine-tune, store the version, replace the model where one is due."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from compat_jax.chain import Chain, Version
from compat_jax.data.dataset import Dataset
from compat_jax.data.tasks import TaskSequence
from compat_jax.enlarge import enlarge
from compat_jax.errors import Stopped, UserError
from compat_jax.fields import check_types
from compat_jax.interrupts import saved_on_interrupt
from compat_jax.meter import Meter
from compat_jax.methods.base import nothing
from compat_jax.models import DTYPES, Backbone, GivenBackbone, as_backbone, feature_size, registered
from compat_jax.session import Session
from compat_jax.training.fit import Fit
from compat_jax.training.run import Run
from compat_jax.training.task import adopting, longest_plan, sequence_task
from compat_jax.training.validation import check_validation, validation_identity
from compat_jax.training.workdir import Workdir, data_identity, recorded_settings


def train(
    run: Run,
    data: Dataset,
    workdir: str | os.PathLike[str],
    *,
    replacements: Mapping[int, Version | GivenBackbone] | None = None,
    validation: Dataset | None = None,
    session: Session | None = None,
    config: Mapping[str, Any] | None = None,
) -> Chain:
    """Train the tasks of a run; every task ends as a version of `workdir/chain`.

    Versions that the chain already has are not trained again, and an interrupted task resumes from its
    last saved state: call again after a kill, and the result is bit-identical.

    Args:
      run: what to compute.
      data: all classes of the sequence, labelled in the order in which they come.
      workdir: folder of the run, local or gs://; it belongs to this run alone.
      replacements: {task: what the task starts from instead of the version before}: a pre-trained
        version, e.g. of a chain that `pretrain` made, whose features the method then keeps near; or a
        registered backbone, for fresh weights that are trained against the version before.
      validation: held-out pictures that training is watched on, and chosen by where `run.keep` says
        so; its classes are the first of the data's, numbered alike.
      session: where and how to train: devices, saves, validation, progress bars.
      config: JSON values for every record; the run's own settings by default.

    Returns:
      The chain, one version per task.

    Raises:
      Stopped: after saving, when the session asked to stop.
      Diverged: a loss or weights that are not finite; nothing of that task is published.
      UserError: settings, data or replacements that cannot work, or a workdir of another run.

    Source: `main` in `src/iamcl2r/main.py`.
    """
    session, replacements = session or Session(), _replacements(replacements)
    check_types(run=(run, Run), data=(data, Dataset))
    data.need_labels()
    sequence = run.tasks.sequence(data.num_classes)
    run.check(sequence, data.labels, session.devices())
    check_replacements(run, sequence, replacements, data.images.shape[1:])
    _check_classes(run, data, replacements)
    folder, config = Workdir(workdir, run.given_backbone), recorded_settings(run, config)
    models = {str(t): _identity(v) for t, v in replacements.items()}
    check_validation(data, validation, run)
    watched = validation_identity(run, validation, session)
    identity = {**run.describe(), "data": data_identity(data), "models": models, **watched}
    with folder.claimed(identity, session.accept_changes):
        _train_first(run, data, folder, session, config, validation)
        done = folder.chain.numbers()
        missing = [task for task in range(len(sequence)) if task not in done]
        if not missing:
            return folder.chain
        bar, steps = session.bar(run.given_method.name), _steps(run, sequence, data)
        with saved_on_interrupt(session) as session, Meter(bar, sum(steps)) as meter:
            fit = Fit(data, session, folder, validation)
            longest, _ = longest_plan(run, sequence, data.labels)
            meter.skip(sum(steps) - sum(steps[task] for task in missing))
            for index in missing:
                if session.should_stop():
                    raise Stopped
                own, beginning = _begin(run, folder.chain, replacements, index)
                task = sequence_task(own, sequence, index, data.labels, **beginning._asdict())
                fit.publish(task, data, config, meter=meter, longest=longest)
    return folder.chain


def _replacements(given) -> dict[int, Version | Backbone]:
    """Return replacements with backbones as objects, not yet checked."""
    found = {}
    for task, model in (given or {}).items():
        found[task] = model if isinstance(model, Version) else as_backbone(model)
    return found


def _identity(model: Version | Backbone) -> Any:
    """JSON values by which a run knows what starts a task again."""
    if isinstance(model, Version):
        return model.sha256
    return {"name": model.name, **model.arguments}


def _train_first(run: Run, data: Dataset, folder: Workdir, session, config, validation) -> None:
    """Train version 0 on its smaller simplex in a folder of its own, and move it to the run's."""
    if not run.first_prototypes or 0 in folder.chain.numbers():
        return
    classes = run.tasks.initial
    first = dataclasses.replace(
        run,
        num_prototypes=run.first_prototypes,
        first_prototypes=0,
        tasks=dataclasses.replace(run.tasks, increment=0),
    )
    own = data if classes == data.num_classes else data.select(range(classes))
    if validation is not None and validation.num_classes > classes:
        validation = validation.select(range(classes))
    place = folder.path / "first"
    chain = train(first, own, place, validation=validation, session=session, config=config)
    enlarge(chain, folder.chain, run.num_prototypes)


def check_replacements(
    run: Run,
    sequence: TaskSequence,
    replacements: Mapping[int, Version | Backbone],
    image_shape: tuple[int, ...],
) -> None:
    """Refuse replacement models that do not fit the run.

    Args:
      run: the run.
      sequence: its tasks.
      replacements: pre-trained model, or backbone of fresh weights, by task.
      image_shape: of the task data.

    Raises:
      UserError: task out of range, another K, another kind of head, another image shape, another
        normalisation; or features that cannot be compared with those of the version before.
    """
    method = run.given_method
    if run.first_prototypes and 0 in replacements:
        raise UserError(
            "first_prototypes and a model for task 0 are both given: leave one out",
            "first_prototypes",
        )
    for task, version in replacements.items():
        if not isinstance(version, Backbone):
            check_types(**{f"replacements[{task}]": (version, Version)})
        if not isinstance(task, int) or not 0 <= task < len(sequence):
            raise UserError(
                f"replacement at task {task}, but the sequence has tasks 0..{len(sequence) - 1}",
                "tasks.replace_at",
            )
        if isinstance(version, Backbone):
            _check_fresh(run, replacements, task, image_shape)
            continue
        record = version.record
        fixed = record.head.is_fixed
        if fixed != method.fixed_simplex:
            kinds = {True: "a fixed simplex", False: "a learnable head"}
            raise UserError(
                f"the model for task {task} was pre-trained with {kinds[fixed]}, but method "
                f"{method.name!r} has {kinds[not fixed]}: pre-train one with method {method.name!r}",
                "pretrained",
            )
        if fixed and record.num_prototypes != run.num_prototypes:
            raise UserError(
                f"the model for task {task} has num_prototypes={record.num_prototypes}, the run "
                f"{run.num_prototypes}: all versions share one simplex",
                "num_prototypes",
            )
        if record.image_shape != tuple(image_shape):
            raise UserError(
                f"the model for task {task} takes images of {record.image_shape}, the tasks have "
                f"{tuple(image_shape)}: give both the same size",
                "size",
            )
        mean, std = run.preprocess.mean, run.preprocess.std
        if not run.preprocess.normalizes_like(record.mean, record.std):
            raise UserError(
                f"the model for task {task} was trained with mean {record.mean} and std {record.std}, "
                f"the run has mean {mean} and std {std}: give both the same",
                "pretrained",
            )


def _check_fresh(run: Run, replacements, task: int, image_shape) -> None:
    """Refuse fresh weights that a record could not name, or a method could not compare."""
    backbone, method = replacements[task], run.given_method
    if backbone.module is not None or backbone.name not in registered():
        raise UserError(
            f"task {task} starts from fresh weights of {backbone.name!r}, which is no registered "
            "backbone: register it with compat_jax.models.register",
            "replacements",
        )
    if method.fixed_simplex or method.freeze is nothing or not task:
        return
    earlier = max((t for t in replacements if t < task), default=None)
    model = run.given_backbone if earlier is None else replacements[earlier]
    before = model.backbone if isinstance(model, Version) else model
    old, new = (_width(run, b, image_shape) for b in (before, backbone))
    if old != new:
        raise UserError(
            f"features of {before.name} have {old} numbers, those of {backbone.name} {new}: method "
            f"{method.name!r} cannot compare them. Take a method on the simplex, or one that does not "
            "look at the old model (er, independent)",
            "method",
        )


def _width(run: Run, backbone: Backbone, image_shape) -> int:
    head = run.given_method.head(run.num_prototypes, run.label_order, 2)
    return feature_size(head.embedder(backbone.build(run.dtype), DTYPES[run.dtype]), image_shape)


def _check_classes(run: Run, data: Dataset, replacements: Mapping[int, Version | Backbone]) -> None:
    """Refuse to write classes to prototypes that other classes of a starting version have."""
    for task, version in replacements.items():
        if isinstance(version, Backbone):
            continue
        record = version.record
        if record.task is None or record.fresh or record.label_order != run.label_order:
            continue
        pairs = zip(record.class_names, data.class_names, strict=False)
        for number, (old, new) in enumerate(pairs):
            if old != new and record.head.is_fixed:
                raise UserError(
                    f"prototype number {number} is {old!r} in the version that task {task} starts from, "
                    f"but {new!r} in the data: name the classes alike, or continue that chain with "
                    "update, which keeps its prototypes",
                    "start",
                )


class _Beginning(NamedTuple):
    """The beginning of a task.

    Attributes:
      start: version; None for fresh weights.
      replaced: whether that is another model than the version before.
      teacher: the version before, where fresh weights are trained against it.
    """

    start: Version | None
    replaced: bool = False
    teacher: Version | None = None


def _begin(run: Run, chain: Chain, replacements, index: int) -> tuple[Run, _Beginning]:
    """Return what a task starts from, and the run with the backbone and the method that it needs."""
    before = None
    if run.given_method.fresh_start:  # from the model of its generation, never from a version
        due = max((task for task in replacements if task <= index), default=None)
    else:
        due = index if index in replacements else None
        before = chain.open(index - 1) if index else None
    if due is None:
        return adopted(run, before), _Beginning(before)
    model = replacements[due]
    if isinstance(model, Version):
        return adopted(run, model), _Beginning(model, replaced=True)
    own = dataclasses.replace(run, backbone=model)
    return adopted(own, before), _Beginning(None, index > 0, before)


def adopted(run: Run, old: Version | None) -> Run:
    """Return the run of a task by the old model that it has: by cross-entropy alone where there is none.

    Args:
      run: of the sequence.
      old: the version that the task starts from or looks at; None at a first task from fresh weights,
        which `first_loss` decides about. One whose projection is fresh is none either.
    """
    fresh = old.record.fresh if old else run.tasks.first_loss == "cross_entropy"
    return adopting(run) if fresh else run


def _steps(run, sequence, data):
    counts = data.counts()
    shapes = [
        sequence.plan_shape(task, counts, run.rehearsal, batch_size=run.batch_size)
        for task in range(len(sequence))
    ]
    return [run.epochs * batches for batches, _ in shapes]
