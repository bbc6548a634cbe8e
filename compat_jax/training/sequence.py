"""Train a sequence of tasks: fine-tune, store the version, replace the model where one is due."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from compat_jax.chain import Chain, Version
from compat_jax.data.dataset import Dataset
from compat_jax.data.tasks import TaskSequence
from compat_jax.errors import Stopped, UserError
from compat_jax.fields import check_types
from compat_jax.interrupts import saved_on_interrupt
from compat_jax.meter import Meter
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
    replacements: Mapping[int, Version] | None = None,
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
      replacements: {task: pre-trained version that the task starts from instead of the version
        before}, e.g. of a chain that `pretrain` made.
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
    session, replacements = session or Session(), dict(replacements or {})
    check_types(run=(run, Run), data=(data, Dataset))
    sequence = run.tasks.sequence(data.num_classes)
    run.check(sequence, data.labels, session.devices())
    check_replacements(run, sequence, replacements, data.images.shape[1:])
    _check_classes(run, data, replacements)
    folder, config = Workdir(workdir, run.given_backbone), recorded_settings(run, config)
    models = {str(t): v.sha256 for t, v in replacements.items()}
    check_validation(data, validation, run)
    watched = validation_identity(run, validation, session)
    identity = {**run.describe(), "data": data_identity(data), "models": models, **watched}
    folder.claim(identity, session.accept_changes)
    done = folder.chain.numbers()
    missing = [task for task in range(len(sequence)) if task not in done]
    if not missing:
        return folder.chain
    bar, steps = session.bar(run.given_method.name), _steps(run, sequence, data)
    with saved_on_interrupt(session) as session, Meter(bar, sum(steps)) as meter:
        fit, (longest, _) = (
            Fit(data, session, folder, validation),
            longest_plan(run, sequence, data.labels),
        )
        meter.skip(sum(steps) - sum(steps[task] for task in missing))
        for index in missing:
            if session.should_stop():
                raise Stopped
            start, replaced = _start(run, folder.chain, replacements, index)
            own = adopting(run) if start is not None and start.record.fresh else run
            task = sequence_task(own, sequence, index, data.labels, start=start, replaced=replaced)
            fit.publish(task, data, config, meter=meter, longest=longest)
    return folder.chain


def check_replacements(
    run: Run,
    sequence: TaskSequence,
    replacements: Mapping[int, Version],
    image_shape: tuple[int, ...],
) -> None:
    """Refuse replacement models that do not fit the run.

    Args:
      run: the run.
      sequence: its tasks.
      replacements: pre-trained model by task.
      image_shape: of the task data.

    Raises:
      UserError: task out of range, another K, another kind of head, another image shape, or another
        normalisation.
    """
    method = run.given_method
    for task, version in replacements.items():
        check_types(**{f"replacements[{task}]": (version, Version)})
        record = version.record
        if not isinstance(task, int) or not 0 <= task < len(sequence):
            raise UserError(
                f"replacement at task {task}, but the sequence has tasks 0..{len(sequence) - 1}",
                "tasks.replace_at",
            )
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
        if not _close(record.mean, mean) or not _close(record.std, std):
            raise UserError(
                f"the model for task {task} was trained with mean {record.mean} and std {record.std}, "
                f"the run has mean {mean} and std {std}: give both the same",
                "pretrained",
            )


def _check_classes(run: Run, data: Dataset, replacements: Mapping[int, Version]) -> None:
    """Refuse to write classes to prototypes that other classes of a starting version have."""
    for task, version in replacements.items():
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


def _close(a, b):
    return len(a) == len(b) and np.allclose(a, b, rtol=0, atol=1e-6)


def _start(run, chain, replacements, index) -> tuple[Version | None, bool]:
    """The version that a task starts from, and whether that is a pre-trained model."""
    if run.given_method.fresh_start:  # from the model of its generation, never from a version
        due = max((task for task in replacements if task <= index), default=None)
        return (None, False) if due is None else (replacements[due], True)
    if index in replacements:
        return replacements[index], True
    return (chain.open(index - 1) if index else None), False


def _steps(run, sequence, data):
    counts = data.counts()
    shapes = [
        sequence.plan_shape(task, counts, run.rehearsal, batch_size=run.batch_size)
        for task in range(len(sequence))
    ]
    return [run.epochs * batches for batches, _ in shapes]
