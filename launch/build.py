"""From a configuration to the arguments of the functions that do the work."""

import json
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from compat_jax import hosts
from compat_jax import mesh as meshes
from compat_jax.chain import Chain, Version
from compat_jax.data import sources
from compat_jax.data.augment import Preprocess
from compat_jax.data.dataset import Dataset
from compat_jax.data.tasks import TaskSequence
from compat_jax.errors import UserError
from compat_jax.files import write_json
from compat_jax.methods import LossSettings, get_method
from compat_jax.train.loop import Backbone, Run
from compat_jax.train.optimizer import OptimizerSettings

# Fields that change how a run is computed or watched, not what comes out.
_FREE = ("save_every", "mesh", "device_budget_mb", "in_memory")


def build_run(config: ConfigDict, sequence: TaskSequence, rehearsal: int) -> Run:
    """The Run of a configuration; unknown names are refused here, before any data is read."""
    data, arguments = config.data, config.backbone.arguments
    return Run(
        method=get_method(config.method),
        backbone=Backbone(
            config.backbone.name, {k: v for k, v in arguments.items() if v is not None}
        ),
        num_prototypes=config.num_prototypes,
        label_order=config.label_order,
        sequence=sequence,
        rehearsal=rehearsal,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=config.seed,
        loss=LossSettings(**config.loss),
        optim=OptimizerSettings(**config.optim),
        preprocess=Preprocess(tuple(data.mean), tuple(data.std), data.crop_padding, data.flip),
        dtype=config.dtype,
    )


def build_mesh(config: ConfigDict) -> Mesh:
    """The mesh of a configuration over all devices."""
    return meshes.make_mesh(config.mesh, jax.devices())


def load_data(config: ConfigDict, *roles: str, bar: bool = False) -> list[Dataset]:
    """The data sets of some roles ("train", "query", "gallery")."""
    return [sources.load(config.data[role].to_dict(), bar) for role in roles]


def load_replacements(config: ConfigDict) -> dict[int, Version]:
    """Pre-trained models by the task at which they come in.

    Raises:
      UserError: replacements wanted without a chain of models, or with too few of them.
    """
    tasks = tuple(config.tasks.replace_at)
    if not tasks:
        return {}
    for task in tasks:
        if tasks.count(task) > 1:
            raise UserError(f"tasks.replace_at names task {task} twice: {tasks}")
    if not config.pretrained:
        raise UserError(
            f"tasks.replace_at={tasks} needs pre-trained models: make them with launch.pretrain "
            "and give --config.pretrained=ITS_WORKDIR/chain, or set --config.tasks.replace_at='()'"
        )
    chain = Chain(config.pretrained).require()
    numbers = chain.numbers()
    if len(numbers) < len(tasks):
        raise UserError(
            f"{len(tasks)} replacements (tasks {tasks}), but {config.pretrained} has "
            f"{len(numbers)} models: pre-train more or shorten tasks.replace_at"
        )
    return {t: chain.open(n) for t, n in zip(sorted(tasks), numbers, strict=False)}


def check_roles(config: ConfigDict, train: Dataset, query: Dataset, gallery: Dataset, models):
    """Refuse classes in two roles (see `sources.check_roles`) and pictures of several sizes."""
    for role, data in (("query", query), ("gallery", gallery)):
        if data.images.shape[1:] != train.images.shape[1:]:
            raise UserError(
                f"data.{role} has images of {data.images.shape[1:]}, data.train of "
                f"{train.images.shape[1:]}: set data.*.size alike"
            )
    if query.class_names != gallery.class_names:
        raise UserError("data.query and data.gallery have different classes: give both the same")
    pretrained = {f"pre-trained model {v.number}": v.record.class_names for v in models.values()}
    sources.check_roles(
        train,
        {"query": query, "gallery": gallery},
        pretrained,
        config.data.pretraining_may_share,
    )


def claim_workdir(
    workdir: str, config: ConfigDict, data: Dataset, replacements: Mapping[int, Version]
) -> None:
    """Write the run's identity into its folder, or check it against what is there.

    Raises:
      UserError: the folder belongs to another run (the differing fields are named), or cannot be
        written to.
    """
    hosts.first_does(lambda: _claim(workdir, config, data, replacements))


def _claim(workdir, config, data, replacements):
    path = epath.Path(workdir) / "run.json"
    mine = {
        **plain(config),
        "data_fingerprint": data.fingerprint(),
        "models": {str(t): v.sha256 for t, v in replacements.items()},
    }
    if path.exists():
        try:
            theirs = dict(json.loads(path.read_text()))
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged: use another --workdir") from error
        differing = sorted(_differences(theirs, mine))
        if differing:
            raise UserError(
                f"{workdir} belongs to a run with other settings: {'; '.join(differing[:6])}. "
                "Give them as they were to go on with it, or use another --workdir"
            )
        return
    if (path.parent / "chain").exists():
        raise UserError(f"{workdir} has a chain but no run.json: use another --workdir")
    try:
        write_json(path, mine)
    except OSError as error:
        raise UserError(f"cannot write to {workdir}: {error.strerror or error}") from error


def plain(config: ConfigDict) -> dict[str, Any]:
    """A configuration as JSON values, without the fields that do not change the result."""
    return _without_free(json.loads(config.to_json_best_effort()))


def _without_free(content):
    if not isinstance(content, dict):
        return content
    return {k: _without_free(v) for k, v in content.items() if k not in _FREE}


def _differences(theirs, mine, prefix=""):
    for key in {*theirs, *mine}:
        a, b = theirs.get(key), mine.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key} was {a}, now {b}"
