"""Fields of a configuration: each with its type, range, default and one sentence."""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from compat_jax import methods, models
from compat_jax.data import Preprocess, Tasks
from compat_jax.data.ledger import Splits
from compat_jax.data.photos import Photos
from compat_jax.data.registry import source_fields, source_names
from compat_jax.fields import Field, Rule, describe
from compat_jax.training.optimizer import OPTIMIZERS
from compat_jax.training.run import Run

# Sections of a configuration, and what they become.
SECTIONS: Mapping[str, Any] = {"tasks": Tasks, "data": Preprocess}
ROLES = ("train", "query", "gallery")

OWN = (
    Field(
        "save_every", int, Rule("steps between saves; 0 saves after epochs", low=0, high=10**9), 0
    ),
    Field(
        "device_budget_mb", int, Rule("MB of images on a device; 0 for all", low=0, high=10**9), 0
    ),
    Field("mesh", str, Rule("devices, e.g. data:-1,model:1"), "data:-1"),
    Field(
        "validate_every",
        int,
        Rule("steps between validations; 0 after each epoch", low=0, high=10**9),
        0,
    ),
    Field(
        "log_every",
        int,
        Rule("steps between lines of the log; 0 for epochs and every 10 s", low=0, high=10**9),
        0,
    ),
    Field("tensorboard", str, Rule("folder for TensorBoard; empty for none"), ""),
    Field(
        "pretrained",
        str,
        Rule("models that come in at tasks.replace_at: a chain, or CHAIN:NUMBER,CHAIN:NUMBER,..."),
        "",
    ),
    Field(
        "tasks.replace_at",
        tuple[int, ...],
        Rule("tasks that start from a pre-trained model"),
        (),
    ),
    Field(
        "tasks.fresh_at",
        tuple[int, ...],
        Rule("tasks that start from fresh weights, trained against the version before"),
        (),
    ),
    Field(
        "fresh_backbone.name",
        str,
        Rule("network of tasks.fresh_at, a registered one; empty for that of the run"),
        "",
    ),
    Field(
        "pretrain_classes",
        tuple[int, ...],
        Rule("classes that each pre-trained model learns"),
        (100, 300, 600),
    ),
    Field("weights", str, Rule("weight file (.pt, .pth, .safetensors) of the backbone"), ""),
    Field("ema", bool, Rule("take the averaged (EMA) weights of the file"), False),
    Field(
        "start", str, Rule("version to start from, CHAIN:NUMBER, of any chain on the simplex"), ""
    ),
    Field(
        "adopt.epochs",
        int | None,
        Rule("epochs of a version that puts a backbone onto the simplex", low=1, high=10**6),
        None,
    ),
    Field("adopt.lr", float | None, Rule("its learning rate", above=0), None),
    Field(
        "adopt.freeze_backbone",
        int | None,
        Rule("its first epochs, in which only the projection is trained", low=0, high=10**6),
        None,
    ),
    Field(
        "data.photos.aliases",
        str,
        Rule("classes that were renamed or merged: new=old,other=old"),
        "",
    ),
    Field(
        "data.pretraining_may_share",
        bool,
        Rule("whether pre-training and retrieval may share classes"),
        False,
    ),
)


def schema() -> tuple[Field, ...]:
    """List every field that a configuration may have, by its dotted name, section by section.

    The fields of `loss` are those of the chosen method, those of `data.ROLE` those of its source.
    """
    fields = tuple(_schema())
    sections = [_section(field) for field in fields]
    return tuple(sorted(fields, key=lambda field: sections.index(_section(field))))


def _section(field):
    return field.name.rpartition(".")[0]


def _schema() -> Iterator[Field]:
    method = Rule("training method", choices=tuple(sorted(methods.names())))
    yield Field("method", str, method, "hoc")
    yield from describe(Run)
    yield Field(
        "backbone.name",
        str,
        Rule(f"network: {', '.join(models.registered())}, or package.module:Name"),
        "resnet18",
    )
    for name in backbone_arguments():
        yield Field(
            f"backbone.arguments.{name}", int | None, Rule("argument of the backbone", low=1), None
        )
    for name in sorted(methods.names()):
        for field in describe(inspect.unwrap(methods.factory(name))):
            yield dataclasses.replace(field, name=f"loss.{field.name}", owners=(name,))
    usual = describe(OPTIMIZERS["sgd"])
    optimizers = {name: describe(kind) for name, kind in OPTIMIZERS.items()}
    yield Field("optim.name", str, Rule("optimiser", choices=tuple(OPTIMIZERS)), "sgd")
    yield from _of_kinds("optim.", optimizers, usual=usual)
    for section, owner in SECTIONS.items():
        for field in describe(owner):
            yield dataclasses.replace(field, name=f"{section}.{field.name}")
    for kind in (Photos, Splits):
        for field in describe(kind):
            where = "data.photos" if kind is Photos else "data.photos.splits"
            yield dataclasses.replace(field, name=f"{where}.{field.name}")
    yield Field("data.ROLE.source", str, Rule("kind of data", choices=source_names()), None)
    sources = {name: source_fields(name) for name in source_names()}
    yield from _of_kinds("data.ROLE.", sources)
    yield from OWN
    for name in backbone_arguments():
        rule = Rule("argument of the network of fresh weights", low=1)
        yield Field(f"fresh_backbone.arguments.{name}", int | None, rule, None)


def _of_kinds(begin, kinds, usual=()):
    """The fields of several kinds of a thing, those that are alike once, with their owners.

    A field among `usual` that every kind has in some form counts as that of all.
    """
    fields = [(name, field) for name, described in kinds.items() for field in described]
    for field in dict.fromkeys([*usual, *(field for _, field in fields)]):
        owners = tuple(name for name, other in fields if other == field)
        is_everywhere = sum(other.name == field.name for _, other in fields) == len(kinds)
        if is_everywhere and field in usual:
            owners = ()
        yield dataclasses.replace(field, name=f"{begin}{field.name}", owners=owners)


def backbone_arguments() -> tuple[str, ...]:
    """Return the names of the arguments that any registered backbone takes."""
    names = {key for name in models.registered() for key in models.parameters(name)}
    return tuple(sorted(names))
