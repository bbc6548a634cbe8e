"""Train the next version of a chain on what is new: new classes, or more pictures of old ones."""

import collections
import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from compat_jax import hosts
from compat_jax.chain import Chain, Record, Version
from compat_jax.data.class_register import Register, merged_aliases
from compat_jax.data.dataset import Dataset
from compat_jax.data.ledger import LEDGER, PARTS, Ledger
from compat_jax.data.photos import News, Photos, is_there, of_trained, refresh, to_learn
from compat_jax.data.tasks import batch_plan
from compat_jax.errors import Diverged, Stopped, UserError
from compat_jax.fields import check_types
from compat_jax.interrupts import saved_on_interrupt
from compat_jax.mesh import check_batch
from compat_jax.meter import Meter, counted
from compat_jax.session import Session
from compat_jax.training.fit import Fit
from compat_jax.training.lesson import Begun, Lesson
from compat_jax.training.run import Run
from compat_jax.training.sequence import is_close
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
            versions = len(self.chain)
            lines.append(f"nothing new: {versions} versions in {self.chain.path}; {room}")
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
      UserError: see `photos.refresh` and `Workdir.claim`; a start that does not fit the chain.
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
    identity = _identity(run, photos, session)
    with folder.claimed(identity, session.accept_changes), saved_on_interrupt(session) as session:
        known = merged_aliases(folder.aliases(), photos.aliases)
        photos = dataclasses.replace(photos, aliases=known)
        month = _month(run, photos, folder, start=start, session=session)
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
            begun = Begun.of(month.number, _start_of(run, month), lesson)
            hosts.on_first(lambda: begun.write(folder.path))
        validation = _validation(photos, month, session)
        recorded, bar = recorded_settings(run, config), session.bar(task.run.given_method.name)
        with Meter(bar, task.steps) as meter:
            fit = Fit(data, session, folder, validation=validation)
            with _located(run, task):
                fit.publish(task, data, recorded, meter=meter, longest=task.steps)
            hosts.on_first(lambda: Begun.remove(folder.path))
    return Update(folder.chain, month.number, month.news, month.grown)


@dataclasses.dataclass(frozen=True)
class _Month:
    """The work of one call of `update`.

    Attributes:
      number: of the version to train.
      start: version that it starts from; None for fresh weights.
      origin: SHA-256 of the weights that its line of versions began with.
      replaces: whether another model takes the place of the one before.
      register: classes before it.
      grown: classes with it.
      ledger: with its pictures.
      news: what was new; None for a version that was begun before.
      begun: what a call that was stopped has begun; None for none.
      is_over: whether there is nothing to do.
    """

    number: int
    start: Version | None
    origin: str | None
    replaces: bool
    register: Register
    grown: Register
    ledger: Ledger
    news: News | None
    begun: Begun | None
    is_over: bool


def _month(run: Run, photos: Photos, folder: Workdir, *, start, session) -> _Month:
    """Find out what is new, and write the ledger before anything is trained."""
    number, path = _next(folder.chain), folder.path / LEDGER
    before = folder.chain.record(-1) if number else None
    if before is not None and not path.exists():
        raise UserError(
            f"{folder.path} has {number} versions but no {LEDGER}, which says what they learnt: restore "
            "it, or begin a new workdir that starts from the last version",
            "workdir",
        )
    replaces = _check_start(run, start, before)
    begins = before is None or replaces
    if begins and not number and start is not None:
        hosts.on_first(lambda: _take_over(start, path))
    register, news, begun = _register(run, before, start), None, None
    if number in folder.checkpointer.tasks():
        begun = Begun.read(folder.path, number)
    if begun is None and not hosts.broadcast(Ledger.read(path).pending(number)):
        news = refresh(
            photos,
            Ledger.read(path),
            register,
            version=number,
            progress=session.bar("checking pictures"),
        )
        hosts.on_first(functools.partial(news.ledger.write, path))
    ledger = Ledger.read(path)
    labels = {row.label for row in ledger.part("train") if row.version == number}
    month = _Month(
        number=number,
        start=start if begins or run.given_method.fresh_start else folder.chain.open(-1),
        origin=_origin(start, before, begins),
        replaces=replaces,
        register=register,
        grown=register.extended(
            (register.name(x) or x for x in labels), of_trained(photos.aliases, ledger)
        ),
        ledger=ledger,
        news=news,
        begun=begun,
        is_over=news is not None and not news and not replaces,
    )
    if begun is not None:
        begun.check(_start_of(run, month), folder.path)
    _check_images(run, month)
    return month


@contextlib.contextmanager
def _located(run: Run, task: Task) -> Iterator[None]:
    """Name the rate of `adopt` where its own was too high."""
    try:
        yield
    except Diverged as error:
        own = task.run.optimizer != run.optimizer
        raise Diverged(str(error), "adopt.lr" if own else error.argument) from error


def _take_over(start: Version, ledger: epath.Path) -> None:
    """Let a new run keep the parts of the pictures that the run had whose version it starts from."""
    source = None if start.home is None else start.home.parent / LEDGER
    if source is not None and source.exists() and not ledger.exists():
        Ledger.read(source).learnt_before(start.number).write(ledger)


def _next(chain: Chain) -> int:
    """The number of the version to come; refuse a chain with a gap."""
    return len(chain.require_whole()) if chain.numbers() else 0


def _start_of(run: Run, month: _Month) -> dict[str, Any]:
    """What a version starts from, as JSON values."""
    backbone = month.start.backbone if month.start else run.given_backbone
    found = {"name": backbone.name, "arguments": dict(backbone.arguments)}
    return {"backbone": found, "weights": month.origin, "replaces": month.replaces}


def _check_images(run: Run, month: _Month) -> None:
    """Refuse another normalisation of the pictures than that of the version it starts from.

    Raises:
      UserError: with both.
    """
    if month.start is None:
        return
    record, mine = month.start.record, run.preprocess
    if not (is_close(record.mean, mine.mean) and is_close(record.std, mine.std)):
        raise UserError(
            f"version {month.number} starts from weights that know pictures of mean {record.mean} and "
            f"std {record.std}, the run has {mine.mean} and {mine.std}: give the former",
            "preprocess.mean",
        )


def _lesson(photos: Photos, month: _Month, run: Run) -> Lesson:
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


def _task(run: Run, adopt: Run, month: _Month, lesson: Lesson, *, data: Dataset) -> Task:
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


def _learnt(month: _Month, lesson: Lesson, labels: np.ndarray) -> dict[str, Any]:
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


def _check_start(run: Run, start: Version | None, before: Record | None) -> bool:
    """Return whether the model is replaced; refuse what does not fit the chain."""
    backbone = start.backbone if start else run.given_backbone
    if start is not None and start.record.head.is_fixed != run.given_method.fixed_simplex:
        raise UserError(
            f"the version to start from has another kind of head than method "
            f"{run.given_method.name!r}: start from one of the same kind",
            "start",
        )
    if start is not None and start.record.head.is_fixed:
        own = start.record.num_prototypes
        if own != run.num_prototypes:
            raise UserError(
                f"the version to start from has num_prototypes={own}, the run "
                f"{run.num_prototypes}: all versions share one simplex",
                "num_prototypes",
            )
    if before is None:
        return False
    mine = (backbone.name, json.dumps(dict(backbone.arguments), sort_keys=True))
    theirs = (before.backbone, json.dumps(dict(before.backbone_arguments), sort_keys=True))
    replaces = mine != theirs or (start is not None and _mark(start) != before.learnt.get("origin"))
    if replaces and start is not None and not start.record.fresh:
        _check_shared_simplex(run, before, start.record)
    return replaces


def _check_shared_simplex(run: Run, before: Record, start: Record) -> None:
    """Refuse a replacement that has other classes on the prototypes of the chain's.

    Raises:
      UserError: naming the first class, or the numbers.
    """
    if not before.head.is_fixed or not start.class_names:
        return
    if start.label_order == before.label_order:
        for number, (old, new) in enumerate(
            zip(before.class_names, start.class_names, strict=False)
        ):
            if old != new:
                raise UserError(
                    f"prototype number {number} is {old!r} in the chain, but {new!r} in the version to "
                    "start from: train it with the other label_order, or on the chain's classes",
                    "start",
                )
    elif len(before.class_names) + len(start.class_names) > run.num_prototypes:
        raise UserError(
            f"{len(before.class_names)} classes of the chain and {len(start.class_names)} of the "
            f"version to start from do not fit into {run.num_prototypes} prototypes",
            "num_prototypes",
        )


def _register(run: Run, before: Record | None, start: Version | None) -> Register:
    """The register so far: the chain's, or that of the version that a new chain starts from."""
    room = run.num_prototypes if run.given_method.fixed_simplex else None
    if before is not None:
        return Register.of(before)
    names: tuple[str, ...] = ()
    aliases: dict[str, str] = {}
    if start is not None and not start.record.fresh and start.record.class_names:
        if start.record.label_order != run.label_order and room is not None:
            raise UserError(
                f"the version to start from writes classes in {start.record.label_order} order: "
                f"give label_order={start.record.label_order!r}",
                "label_order",
            )
        names, aliases = start.record.class_names, dict(start.record.aliases)
    return Register(names, aliases, room)


def _origin(start: Version | None, before: Record | None, begins: bool) -> str | None:
    """SHA-256 of the weights that the line of versions began with, to know them again; None for none."""
    if begins:
        return None if start is None else _mark(start)
    assert before is not None
    return before.learnt.get("origin")


def _mark(start: Version) -> str:
    """A SHA-256 to know a start again: of the weight file, or of a trained version's variables."""
    return start.record.data_fingerprint if start.record.fresh else start.sha256


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


def _validation(photos: Photos, month: _Month, session: Session) -> Dataset | None:
    rows = [
        row
        for row in month.ledger.part("validation")
        if row.label in month.grown and is_there(row.path)
    ]
    if not rows:
        return None
    return photos.dataset(rows, month.grown, session.bar("reading validation pictures"))


def _in_words(learnt: Mapping[str, Any]) -> str:
    pictures, classes = sum(learnt["pictures"].values()), learnt["classes"]
    parts = [f"{counted(pictures, 'picture')} of {counted(len(learnt['pictures']), 'class')}"]
    if classes:
        some = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
        parts.append(f"{len(classes)} of them new ({some})")
    if learnt["rehearsed"]:
        parts.append(f"{learnt['rehearsed']} rehearsed")
    return ", ".join(parts)
