"""Pre-train the models that replace others in a sequence."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from compat_jax.chain import Chain
from compat_jax.data.dataset import Dataset
from compat_jax.data.tasks import Tasks
from compat_jax.errors import Stopped, UserError
from compat_jax.fields import Field, Rule, check_types, checked
from compat_jax.interrupts import saved_on_interrupt
from compat_jax.meter import Meter
from compat_jax.session import Session
from compat_jax.training.fit import Fit
from compat_jax.training.run import Run
from compat_jax.training.task import pretraining_task
from compat_jax.training.workdir import Workdir, data_identity, recorded_settings


def pretrain(
    run: Run,
    data: Dataset,
    workdir: str | os.PathLike[str],
    *,
    class_counts: Sequence[int],
    session: Session | None = None,
    config: Mapping[str, Any] | None = None,
) -> Chain:
    """Train models on growing sets of classes, to replace others in a sequence later.

    Model i is version i of `workdir/chain`; it learns the first `class_counts[i]` classes. All are
    trained by one compiled program. Interrupted models resume as in `train`.

    Use `label_order="ascending"` here and "descending" for the sequence, so that the two write to the
    simplex from its two ends and share no prototype.

    Args:
      run: what to compute; `tasks` and `rehearsal` do not matter.
      data: images of the classes.
      workdir: folder of the run.
      class_counts: classes that each model learns, each at least 2.
      session: where and how to train.
      config: JSON values for every record; the run's own settings by default.

    Returns:
      The chain of models.

    Raises:
      Stopped, Diverged, UserError: see `train`.

    Source: the reference ships such models (`scripts/download_pretrained_models.sh`); its paper says
    how they were trained.
    """
    session, counts = session or Session(), check_counts(class_counts)
    check_types(run=(run, Run), data=(data, Dataset))
    largest = max(counts)
    if largest > data.num_classes:
        raise UserError(
            f"class_counts is {counts}, but the data has {data.num_classes} classes",
            "class_counts",
        )
    for count in counts:
        labels = data.labels[data.labels < count]
        run.check(Tasks(initial=count).sequence(count), labels, session.devices())
    folder, config = Workdir(workdir, run.given_backbone), recorded_settings(run, config)
    identity = {**run.describe(), "pretrain_classes": list(counts), "data": data_identity(data)}
    with folder.claimed(identity, session.accept_changes), saved_on_interrupt(session) as session:
        data = data.select(range(largest))
        missing = [n for n in range(len(counts)) if n not in folder.chain.numbers()]
        if not missing:
            return folder.chain
        fit = Fit(data, session, folder)
        for number in missing:
            if session.should_stop():
                raise Stopped
            task = pretraining_task(run, number, data.labels, counts[number])
            whole = counts[number] == data.num_classes
            part = data if whole else data.select(range(counts[number]))
            longest = max(run.epochs * (len(data) // task.plan.shape[1]), task.steps)
            bar = session.bar(f"{run.given_method.name}: pre-training on {counts[number]} classes")
            with Meter(bar, task.steps) as meter:
                fit.publish(task, part, config, meter=meter, longest=longest)
    return folder.chain


def check_counts(counts: Sequence[int]) -> tuple[int, ...]:
    """Return numbers of classes, if a model can learn each.

    Raises:
      UserError: none, one below 2, or no whole number.
    """
    rule = Rule("classes that each model learns")
    found = checked(Field("class_counts", tuple[int, ...], rule, ()), counts)
    if not found or min(found) < 2:
        raise UserError(
            f"class_counts needs numbers of classes, each at least 2, got {found}", "class_counts"
        )
    return found
