"""The work of a call of `update`: what is new, what it starts from, and whether both fit the chain."""

import dataclasses
import functools
import json
from typing import Any

from etils import epath

from compat_jax import hosts
from compat_jax.chain import Chain, Record, Version
from compat_jax.data.class_register import Register
from compat_jax.data.ledger import LEDGER, Ledger
from compat_jax.data.parts import of_trained
from compat_jax.data.photos import News, Photos, refresh
from compat_jax.errors import UserError
from compat_jax.training.lesson import Begun
from compat_jax.training.run import Run
from compat_jax.training.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Month:
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


def month_of(run: Run, photos: Photos, folder: Workdir, *, start, session) -> Month:
    """Find out what is new, and write the ledger before anything is trained.

    Args:
      run, photos, start, session: see `update`.
      folder: of the run, claimed.

    Raises:
      UserError: see `photos.refresh`; a chain with a gap or without its ledger; a start that does not
        fit the chain, or is another one than that of the version under way.
    """
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
    if not number and start is not None:
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
    month = Month(
        number=number,
        start=start if begins or run.given_method.fresh_start else folder.chain.open(-1),
        origin=_origin(start, before, begins),
        replaces=replaces,
        register=register,
        grown=register.extended(
            (register.name(x) or x for x in labels), of_trained(photos.aliases, ledger, register)
        ),
        ledger=ledger,
        news=news,
        begun=begun,
        is_over=news is not None and not news and not replaces,
    )
    if begun is not None:
        begun.check(start_of(run, month), folder.path)
    _check_images(run, month)
    return month


def _next(chain: Chain) -> int:
    """The number of the version to come; refuse a chain with a gap."""
    return len(chain.require_whole()) if chain.numbers() else 0


def _take_over(start: Version, ledger: epath.Path) -> None:
    """Let a new run keep the parts of the pictures that the run had whose version it starts from."""
    source = None if start.home is None else start.home.parent / LEDGER
    if source is not None and source.exists() and not ledger.exists():
        Ledger.read(source).learnt_before(start.number).write(ledger)


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


def start_of(run: Run, month: Month) -> dict[str, Any]:
    """Describe what a version starts from, as JSON values."""
    backbone = month.start.backbone if month.start else run.given_backbone
    found = {"name": backbone.name, "arguments": dict(backbone.arguments)}
    return {"backbone": found, "weights": month.origin, "replaces": month.replaces}


def _check_images(run: Run, month: Month) -> None:
    """Refuse another normalisation of the pictures than that of the version it starts from.

    Raises:
      UserError: with both.
    """
    if month.start is None:
        return
    record, mine = month.start.record, run.preprocess
    if not mine.normalizes_like(record.mean, record.std):
        raise UserError(
            f"version {month.number} starts from weights that know pictures of mean {record.mean} and "
            f"std {record.std}, the run has {mine.mean} and {mine.std}: give the former",
            "preprocess.mean",
        )
