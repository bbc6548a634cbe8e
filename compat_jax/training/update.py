"""Train the next version of a chain on what is new: new classes, or more pictures of old ones."""

import collections
import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from compat_jax import hosts
from compat_jax.chain import Chain, Version
from compat_jax.data.class_register import Register, merged_aliases
from compat_jax.data.dataset import Dataset
from compat_jax.data.ledger import PARTS
from compat_jax.data.ledger_files import is_there
from compat_jax.data.photos import News, Photos, to_learn
from compat_jax.data.tasks import batch_plan
from compat_jax.errors import Diverged, Stopped, UserError
from compat_jax.fields import check_types
from compat_jax.interrupts import saved_on_interrupt
from compat_jax.mesh import check_batch
from compat_jax.meter import Meter, counted
from compat_jax.session import Session
from compat_jax.training.fit import Fit
from compat_jax.training.lesson import Begun, Lesson
from compat_jax.training.month import Month, month_of, start_of
from compat_jax.training.run import Run
from compat_jax.training.task import Task, adopting
from compat_jax.training.workdir import Workdir, recorded_settings


@dataclasses.dataclass(frozen=True)
class Update:
    """Result of `update`.

    Attributes:
      chain: the chain.
      version: number of the version that was trained; None if there was nothing new.
      news: what was new; None for a version that was begun before and is finished now.
      register: classes and prototypes after it.
    """

    chain: Chain
    version: int | None
    news: News | None
    register: Register

    def __str__(self) -> str:
        lines = [] if self.news is None else list(self.news.notes)
        room = self.register.room()
        if self.version is None:
            news = _shared_out(self.news)
            lines.append(f"{news}: {len(self.chain)} versions in {self.chain.path}; {room}")
            return "\n".join(lines)
        learnt = self.chain.record(self.version).learnt
        if self.news is not None:
            parts = collections.Counter(row.part for row in self.news.ledger)
            lines.append(", ".join(f"{parts[part]} pictures for {part}" for part in PARTS))
        lines.append(f"version {self.version} learnt {_in_words(learnt)}; {room}")
        return "\n".join(lines)


def update(
    run: Run,
    photos: Photos,
    workdir: str | os.PathLike[str],
    *,
    start: Version | None = None,
    adopt: Run | None = None,
    session: Session | None = None,
    config: Mapping[str, Any] | None = None,
) -> Update:
    """Train the next version on what is new in a folder or table of photos.

    The first call makes version 0. Called again after photos or classes were added, it makes the next
    version: new classes get the next free prototypes, wherever their names sort, and pictures of
    earlier classes that are still there are rehearsed. With nothing new it does nothing. A killed call
    resumes with the pictures it began with.

    A run with another backbone, or with another `start`, replaces the model: the new backbone learns
    all pictures that are there, against the same prototypes, so that old galleries stay searchable.

    Args:
      run: what to compute; of `tasks`, only `rehearsal` and `everything` matter.
      photos: where the pictures are.
      workdir: folder of the run, local or gs://.
      start: version that version 0 starts from, e.g. an imported backbone, or that replaces the model
        later; the same one given again changes nothing. A new run that starts from a version of another
        run keeps the parts that the other's pictures have: none that it has learnt becomes a query.
      adopt: settings for a version that puts a backbone onto the simplex: one that starts from
        weights that never met it, or from none. `run` by default. Its method is cross-entropy on the
        simplex, since there are no earlier features to stay near.
      session: where and how to train.
      config: JSON values for the record; the run's settings by default.

    Returns:
      What was done; `str()` of it says so.

    Raises:
      Stopped, Diverged: see `train`.
      UserError: see `photos.refresh` and `Workdir.claim`; a start that does not fit the chain; a
        workdir within the folder of photos, or one that cannot be written to.
    """
    session = session or Session()
    check_types(run=(run, Run), photos=(photos, Photos))
    check_batch(session.devices(), run.batch_size)
    if run.first_prototypes:
        raise UserError(
            "a chain of photos moves to a larger K with enlarge: leave out first_prototypes",
            "first_prototypes",
        )
    for settings in filter(None, (run, adopt)):
        settings.check_epochs()
    folder = Workdir(workdir, start.backbone if start else run.given_backbone)
    folder.check_apart(photos.path)
    hosts.on_first(folder.check_writable)
    identity = _identity(run, photos, session)
    with folder.claimed(identity, session.accept_changes), saved_on_interrupt(session) as session:
        known = merged_aliases(folder.aliases(), photos.aliases)
        photos = dataclasses.replace(photos, aliases=known)
        month = month_of(run, photos, folder, start=start, session=session)
        hosts.on_first(lambda: folder.remember(known))
        if month.is_over:
            return Update(folder.chain, None, month.news, month.register)
        lesson = _lesson(photos, month, run)
        data = photos.dataset(lesson.rows, month.grown, session.bar("reading pictures"))
        if session.should_stop():
            raise Stopped
        task = _task(run, adopt or run, month, lesson, data=data)
        _check_plan(task, session)
        if month.begun is None:
            begun = Begun.of(month.number, start_of(run, month), lesson)
            hosts.on_first(lambda: begun.write(folder.path))
        validation = _validation(photos, month, session)
        recorded, bar = recorded_settings(run, config), session.bar(task.run.given_method.name)
        with Meter(bar, task.steps) as meter:
            fit = Fit(data, session, folder, validation=validation)
            with _located(run, task):
                fit.publish(task, data, recorded, meter=meter, longest=task.steps)
            hosts.on_first(lambda: Begun.remove(folder.path))
    return Update(folder.chain, month.number, month.news, month.grown)


@contextlib.contextmanager
def _located(run: Run, task: Task) -> Iterator[None]:
    """Name the rate of `adopt` where its own was too high."""
    try:
        yield
    except Diverged as error:
        own = task.run.optimizer != run.optimizer
        raise Diverged(str(error), "adopt.lr" if own else error.argument) from error


def _lesson(photos: Photos, month: Month, run: Run) -> Lesson:
    """The pictures to learn: those that were begun with, or what is new and what is rehearsed."""
    if month.begun is not None:
        return month.begun.lesson(month.ledger)
    new, old = to_learn(
        month.ledger,
        month.grown,
        version=month.number,
        rehearsal=run.tasks.rehearsal,
        seed=run.seed,
        everything=month.replaces or run.rehearsal is None,
    )
    if not new:
        raise UserError(
            f"no picture of {photos.path} is left to train on: see the splits, or put pictures back",
            "path",
        )
    return Lesson(new + old, len(new))


def _task(run: Run, adopt: Run, month: Month, lesson: Lesson, *, data: Dataset) -> Task:
    """The task of a month; one whose weights never met the simplex is put onto it."""
    start, number, total = month.start, month.number, len(lesson.rows)
    begins = month.replaces or not number
    if begins and (start is None or start.record.fresh):
        run = adopting(adopt)
    plan = batch_plan(
        np.arange(lesson.num_new),
        np.arange(lesson.num_new, total),
        run.batch_size,
        epochs=run.epochs,
        seed=run.seed,
        task=number,
    )
    lineage = {
        "class_names": month.grown.names,
        "aliases": dict(month.grown.aliases),
        "learnt": _learnt(month, lesson, data.labels),
        "replaced_by": _replaced_by(start, run) if begins and (start or number) else None,
        "parent": None if begins or run.given_method.fresh_start else number - 1,
    }
    return Task(
        run=run,
        index=number,
        num_classes=len(month.grown),
        num_old=len(month.register),
        num_seen=len(month.grown),
        plan=plan.reshape(-1, plan.shape[-1]),
        start=start,
        kind="replacement" if month.replaces else "task",
        lineage=lineage,
    )


def _learnt(month: Month, lesson: Lesson, labels: np.ndarray) -> dict[str, Any]:
    """Describe what is new in a version, for its record."""
    names = month.grown.names
    pictures = np.bincount(labels[: lesson.num_new], minlength=len(names))
    return {
        "classes": list(names[len(month.register) :]),
        "pictures": {names[c]: int(n) for c, n in enumerate(pictures) if n},
        "rehearsed": len(lesson.rows) - lesson.num_new,
        "origin": month.origin,
    }


def _identity(run: Run, photos: Photos, session: Session) -> dict[str, Any]:
    """The settings that make a chain what it is: all but the backbone, which may be replaced."""
    found = {k: v for k, v in run.describe().items() if k not in ("backbone", "tasks")}
    preprocess = {k: v for k, v in found["preprocess"].items() if k not in ("mean", "std")}
    tasks = {k: v for k, v in run.tasks.describe().items() if k in ("rehearsal", "everything")}
    found |= {"preprocess": preprocess, "tasks": tasks}
    if run.keep != "last":  # then the moments of validation choose the weights
        found["validate_every"] = session.validate_every
    return {**found, "photos": photos.describe()}


def _check_plan(task: Task, session: Session) -> None:
    size, devices = task.plan.shape[1], session.devices().shape["data"]
    if not size or size % devices:
        raise UserError(
            f"version {task.index} has batches of {size} pictures, which {devices} devices cannot "
            "share: use another batch_size, more pictures or fewer devices (mesh)",
            "batch_size",
        )


def _replaced_by(start: Version | None, run: Run) -> str:
    if start is None:
        return f"{run.given_backbone.name} with fresh weights"
    imported = start.record.replaced_by if start.record.fresh else None
    return imported or f"version {start.number}"


def _validation(photos: Photos, month: Month, session: Session) -> Dataset | None:
    rows = [
        row
        for row in month.ledger.part("validation")
        if row.label in month.grown and is_there(row.path)
    ]
    if not rows:
        return None
    return photos.dataset(rows, month.grown, session.bar("reading validation pictures"))


def _shared_out(news: News | None) -> str:
    """Say where new pictures went of which none is to be learnt."""
    if news is None or not news.parts:
        return "nothing new"
    total = counted(sum(news.parts.values()), "new picture")
    shares = ", ".join(f"{count} for {part}" for part, count in news.parts.items())
    return f"{total}: {shares}; nothing new to learn"


def _in_words(learnt: Mapping[str, Any]) -> str:
    pictures, classes = sum(learnt["pictures"].values()), learnt["classes"]
    parts = [f"{counted(pictures, 'picture')} of {counted(len(learnt['pictures']), 'class')}"]
    if classes:
        some = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
        parts.append(f"{len(classes)} of them new ({some})")
    if learnt["rehearsed"]:
        parts.append(f"{learnt['rehearsed']} rehearsed")
    return ", ".join(parts)
