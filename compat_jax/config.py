"""Configurations: the one place where a `ConfigDict` becomes a `Run`, a `Session` and data."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from compat_jax import methods, models
from compat_jax.config_schema import OWN, ROLES, schema
from compat_jax.data import Preprocess, Tasks
from compat_jax.data.ledger import Splits
from compat_jax.data.photos import Photos
from compat_jax.data.sources import LISTED
from compat_jax.errors import UserError, unknown
from compat_jax.fields import checked, describe
from compat_jax.files import absolute
from compat_jax.models import Backbone
from compat_jax.session import Session, never
from compat_jax.training.optimizer import OPTIMIZERS, Settings
from compat_jax.training.run import Run

# Fields that change how a run is carried out or watched, not what comes out.
_FREE = (
    *("save_every", "mesh", "device_budget_mb", "in_memory"),
    *("validate_every", "log_every", "tensorboard"),
)
# Arguments of the library whose field has another name.
_RENAMED = {
    "class_counts": "pretrain_classes",
    "backbone": "backbone.name",
    "accept_changes": "continue_with_changes",
    "replacements": "fresh_backbone.name",
}


def own_field(config: ConfigDict, name: str) -> Any:
    """Read a field that belongs to no object, checked; its default if it is missing.

    Args:
      config: the configuration.
      name: dotted name in `schema`.

    Raises:
      UserError: of another type, or out of range.
    """
    field = next(f for f in OWN if f.name == name)
    section, _, key = name.rpartition(".")
    place = _section(config, section) if section else config
    where = f"{section}." * bool(section)
    return checked(dataclasses.replace(field, name=key), place.get(key, field.default), where)


def run_of(config: ConfigDict) -> Run:
    """Make the run that a configuration describes; no data is read.

    Args:
      config: the configuration; fields that it lacks have their defaults.

    Raises:
      UserError: unknown names or values out of range, with `argument` the dotted name of the field.
    """
    check_names(config)
    given = {f.name: config[f.name] for f in describe(Run) if f.name in config}
    backbone, data = _section(config, "backbone"), _section(config, "data")
    method, name = config.get("method", "hoc"), backbone.get("name", "resnet18")
    for field, value in (("method", method), ("backbone.name", name)):
        if not isinstance(value, str):
            raise UserError(f"{field} must be a text, got {value!r:.80}", field)
    arguments = _plain_values(_section(backbone, "arguments"))
    preprocess = {
        f.name: data[f.name] for f in describe(Preprocess) if data.get(f.name) is not None
    }
    tasks = _plain_values(_section(config, "tasks"))
    for when in ("replace_at", "fresh_at"):  # which belong to no object
        tasks.pop(when, None)
    numbers = _plain_values(_section(config, "loss"))
    _check_numbers(method, numbers)
    with located():
        return Run(
            method=methods.get(method, numbers),
            backbone=Backbone(name, arguments),
            optimizer=_optimizer(_plain_values(_section(config, "optim"))),
            preprocess=Preprocess(**preprocess),
            tasks=_made(Tasks, "tasks", tasks),
            **given,
        )


def _check_numbers(method, numbers):
    """Refuse numbers of another method, which a configuration made for that one has."""
    for number in numbers:
        owners = [m for m in methods.names() if number in methods.get(m).arguments]
        if owners and method not in owners and method in methods.names():
            raise UserError(
                f"method {method!r} has no number {number!r}, which is {owners[0]}'s: choose the method "
                f"where the configuration is made, FILE.py:method={method}",
                f"loss.{number}",
            )


def _optimizer(given: dict[str, Any]) -> Settings:
    """Make the optimiser of a section `optim`; without a name it is SGD."""
    name = given.pop("name", "sgd")
    if not isinstance(name, str) or name not in OPTIMIZERS:
        raise unknown("optimizer.name", str(name), OPTIMIZERS, "optimizer.name")
    kind = OPTIMIZERS[name]
    for field in given:
        owners = [n for n, k in OPTIMIZERS.items() if field in {f.name for f in describe(k)}]
        if owners and name not in owners:
            raise UserError(
                f"optimiser {name!r} has no field {field!r}, which is {' and '.join(owners)}'s: choose "
                f"the optimiser where the configuration is made, FILE.py:optimizer={name}",
                f"optimizer.{field}",
            )
    return _made(kind, "optimizer", given)


def check_names(config: ConfigDict) -> None:
    """Refuse fields that no configuration has, for example misspelt ones.

    Raises:
      UserError: naming the nearest field.
    """
    known = [f.name for f in schema()]
    top = {name.partition(".")[0] for name in known}
    inside = {
        section: {name.split(".")[1] for name in known if name.startswith(f"{section}.")}
        for section in top
    }
    inside["data"] = inside["data"] - {"ROLE"} | {*ROLES}
    checked = ("data", "adopt", "backbone", "fresh_backbone")
    for section, valid in (("", top), *((section, inside[section]) for section in checked)):
        for name in _section(config, section) if section else config:
            if name not in valid:
                where = f"{section}.{name}" if section else name
                raise unknown("field of the configuration", where, valid, argument=where)


def photos_of(config: ConfigDict) -> Photos | None:
    """Return the photos that a configuration names; None if it has no data.photos.

    Raises:
      UserError: unknown fields, values out of range, or aliases that are no name=name.
    """
    data = _section(config, "data")
    if "photos" not in data:
        return None
    given = _plain_values(_section(data, "photos"))
    splits, aliases = given.pop("splits", {}), own_field(config, "data.photos.aliases")
    given.pop("aliases", None)
    with located("photos"):
        if not given.get("path"):
            raise UserError(
                "data.photos.path is missing: a folder of class folders, or a table", "path"
            )
        return _made(
            Photos,
            "data.photos",
            {
                **given,
                "splits": _made(Splits, "data.photos.splits", dict(splits)),
                "aliases": _pairs(aliases),
            },
            extra=("splits", "aliases"),
        )


def _pairs(text: str) -> dict[str, str]:
    found = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        new, equals, old = (p.strip() for p in part.partition("="))
        if not (new and equals and old):
            raise UserError(f"aliases are written new=old,other=old: got {part!r:.80}", "aliases")
        found[new] = old
    return found


def fresh_backbone(config: ConfigDict, run: Run) -> Backbone:
    """Return the network of tasks that start from fresh weights: the run's own where none is named.

    Raises:
      UserError: unknown name or argument.
    """
    name = own_field(config, "fresh_backbone.name")
    if not name:
        return run.given_backbone
    arguments = _plain_values(_section(_section(config, "fresh_backbone"), "arguments"))
    found = Backbone(str(name), arguments)
    with located("fresh_backbone"):
        found.build(run.dtype)
    return found


def says_images(config: ConfigDict) -> bool:
    """Return whether a configuration gives the mean and deviation of its images."""
    data = _section(config, "data")
    return data.get("mean") is not None and data.get("std") is not None


def adopting_run(config: ConfigDict, run: Run) -> Run:
    """Return the run with the settings for a version that puts a backbone onto the simplex.

    Raises:
      UserError: values out of range.
    """
    epochs, lr, freeze = (
        own_field(config, f"adopt.{name}") for name in ("epochs", "lr", "freeze_backbone")
    )
    changes: dict[str, Any] = {}
    if lr is not None:
        changes |= {"lr": lr, "min_lr": min(lr, getattr(run.optimizer, "min_lr", lr))}
    if freeze is not None:
        changes["freeze_backbone"] = freeze
    with located():
        optimizer: Any = run.optimizer
        changed = dataclasses.replace(optimizer, **changes) if changes else optimizer
        return dataclasses.replace(run, epochs=epochs or run.epochs, optimizer=changed)


def session_of(
    config: ConfigDict,
    should_stop: Callable[[], bool] = never,
    *,
    progress: bool = True,
    accept_changes: bool = False,
) -> Session:
    """Make the session that a configuration describes.

    Args:
      config: the configuration.
      should_stop, progress, accept_changes: see `Session`.

    Raises:
      UserError: values out of range.
    """
    return Session(
        mesh=own_field(config, "mesh"),
        save_every=own_field(config, "save_every"),
        device_budget=own_field(config, "device_budget_mb") << 20,
        should_stop=should_stop,
        progress=progress,
        accept_changes=accept_changes,
        validate_every=own_field(config, "validate_every"),
        log_every=own_field(config, "log_every"),
        tensorboard=own_field(config, "tensorboard") or None,
    )


def source_of(config: ConfigDict, role: str) -> dict[str, Any]:
    """Return the data section of a role ("train", "query", "gallery").

    Raises:
      UserError: the configuration has none.
    """
    data = _section(config, "data")
    if role not in data:
        raise UserError(f"the configuration has no data.{role}", f"data.{role}")
    return _plain_values(_section(data, role))


def folders_of(config: ConfigDict) -> Iterator[tuple[str, tuple[str, ...]]]:
    """List the folders whose pictures the roles of a configuration list, with patterns to pass over."""
    data = _section(config, "data")
    for role in ROLES:
        section = _section(data, role)
        path, exclude = section.get("path"), section.get("exclude")
        if section.get("source") in LISTED and path and isinstance(path, str):
            yield path, tuple(exclude) if isinstance(exclude, list | tuple) else ()


def plain(config: ConfigDict) -> dict[str, Any]:
    """Return a configuration as JSON values, for the record of a version.

    Fields that do not change the result are left out, folders of data become absolute, and a dtype that
    this machine was to choose is the one it chose.
    """
    found = _without_free(json.loads(config.to_json_best_effort()))
    if "dtype" in found:
        found["dtype"] = models.computed_in(found["dtype"])
    for section in found.get("data", {}).values():
        if isinstance(section, dict):
            for name in ("path", "data_dir"):
                if section.get(name):
                    section[name] = str(absolute(section[name]))
    return found


@contextlib.contextmanager
def located(role: str | None = None) -> Iterator[None]:
    """Give errors about an argument the name of the configuration's field, within a block.

    Args:
      role: of the data that the block reads, or "fresh_backbone"; None for other work.

    Raises:
      UserError: whatever the block raises, with `argument` a dotted field name.
    """
    try:
        yield
    except UserError as error:
        error.argument = field_of(error.argument, role)
        raise


def field_of(argument: str | None, role: str | None = None) -> str | None:
    """Return the configuration's field for an argument of the library; None for none."""
    if argument is None:
        return None
    section, _, name = argument.rpartition(".")
    if role == "photos":
        return f"data.photos.{argument}"
    if role == "fresh_backbone":
        return f"{role}.name"
    if role is not None:
        return f"data.{role}.{name}"
    if section == "optimizer":
        return f"optim.{name}"
    if section in methods.names():
        return f"loss.{name}"
    if section == "splits" or argument in ("path", "aliases", "resize", "on_bad"):
        return f"data.photos.{argument}"
    if argument in {f.name for f in describe(Preprocess)} | {"pretraining_may_share"}:
        return f"data.{argument}"
    if argument == "size":
        return "data.train.size"
    if argument in _RENAMED:
        return _RENAMED[argument]
    known = {f.name for f in schema()} | {"workdir", "mesh"}
    return argument if argument in known or section == "tasks" else None


def _section(config, name) -> ConfigDict:
    """A section of a configuration; an empty one if it is missing."""
    section = config.get(name, ConfigDict())
    if not isinstance(section, ConfigDict):
        raise UserError(f"{name} must be a section of fields, got {section!r:.80}", name)
    return section


def _made(kind: Any, where: str, arguments: dict[str, Any], extra: tuple[str, ...] = ()) -> Any:
    valid = [*(f.name for f in describe(kind)), *extra]
    for name in arguments:
        if name not in valid:
            raise unknown(f"field of {where}", name, valid, f"{where}.{name}")
    return kind(**arguments)


def _plain_values(section):
    return {
        k: tuple(v) if isinstance(v, list | tuple) else v
        for k, v in section.to_dict().items()
        if v is not None
    }


def _without_free(content):
    if not isinstance(content, dict):
        return content
    return {k: _without_free(v) for k, v in content.items() if k not in _FREE}
