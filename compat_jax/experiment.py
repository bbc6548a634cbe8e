"""Train, pre-train and evaluate by configuration."""

import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from typing import TypeAlias

from ml_collections import ConfigDict

from compat_jax import config as configs
from compat_jax.chain import Chain, Version
from compat_jax.config_schema import ROLES
from compat_jax.data import Dataset, load
from compat_jax.data.photos import Photos
from compat_jax.data.roles import check_roles
from compat_jax.errors import UserError
from compat_jax.evaluation import evaluate as evaluate_chain
from compat_jax.interop import ImageSettings, starting_version_of
from compat_jax.matrix import Evaluations
from compat_jax.mesh import check_batch
from compat_jax.models import Backbone
from compat_jax.retrieval import Metric
from compat_jax.session import Session
from compat_jax.training import Run
from compat_jax.training import pretrain as pretrain_run
from compat_jax.training import train as train_run
from compat_jax.training.pretraining import check_counts
from compat_jax.training.update import Update, update
from compat_jax.training.workdir import Workdir

Path: TypeAlias = str | os.PathLike[str]
_NUMBER = re.compile("-?[0-9]{1,9}")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def train(config: ConfigDict, workdir: Path, session: Session) -> Chain | Update:
    """Train what a configuration describes: a task sequence, or the next version on new photos.

    Args:
      config: the configuration.
      workdir: folder of the run.
      session: see `config.session_of`.

    Returns:
      The chain of a sequence, a version per task; what `update` did for photos.

    Raises:
      Stopped, Diverged, UserError: see `training.train` and `training.update`.
    """
    photos = configs.photos_of(config)
    if photos is not None:
        return _update(config, photos, workdir, session)
    run, replacements = configs.run_of(config), load_replacements(config)
    _check_early(config, run, session, workdir)
    start = load_start(config, run, None)
    if start is not None and replacements.setdefault(0, start) is not start:
        raise UserError("tasks.replace_at has task 0 already: leave out start and weights", "start")
    data, query, gallery = (load_role(config, role, session) for role in ROLES)
    pretrained: dict[str, tuple[str, ...]] = {}
    if not configs.own_field(config, "data.pretraining_may_share"):
        pretrained = {
            f"pre-trained model {v.number}": v.record.class_names
            for v in replacements.values()
            if isinstance(v, Version)
        }
    with configs.located():
        check_roles(data, {"query": query, "gallery": gallery}, pretrained)
        settings = configs.plain(config)
        return train_run(
            run,
            data,
            workdir,
            replacements=replacements,
            session=session,
            config=settings,
        )


def _update(config, photos: Photos, workdir, session) -> Update:
    """Train the next version on what is new in the photos of a configuration."""
    run = configs.run_of(config)
    _check_early(config, run, session, workdir)
    start = load_start(config, run, photos)
    if start is not None:
        run = _with_images(run, start.record.mean, start.record.std)
    elif not configs.says_images(config):
        run = _with_images(run, *_known_images(run, Workdir(workdir).chain))
    with configs.located():
        return update(
            run,
            photos,
            workdir,
            start=start,
            adopt=configs.adopting_run(config, run),
            session=session,
            config=configs.plain(config),
        )


def _known_images(run: Run, chain: Chain) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of the version that the next one goes on from; ImageNet's for a new network."""
    if len(chain):
        last = chain.record(-1)
        if last.backbone == run.given_backbone.name:
            return last.mean, last.std
    return IMAGENET_MEAN, IMAGENET_STD


def _with_images(run: Run, mean, std) -> Run:
    preprocess = dataclasses.replace(run.preprocess, mean=tuple(mean), std=tuple(std))
    return dataclasses.replace(run, preprocess=preprocess)


def load_start(config: ConfigDict, run: Run, photos: Photos | None) -> Version | None:
    """Open the version or the weight file that a configuration starts from; None for neither.

    Args:
      config: the configuration.
      run: its run.
      photos: its photos, whose size and preparation a weight file gets; None without any.

    Raises:
      UserError: both are given, no such version, or weights that do not fit.
    """
    weights, start = (str(configs.own_field(config, name)) for name in ("weights", "start"))
    if weights and start:
        raise UserError("weights and start are both given: start from one of them", "start")
    if start:
        path, number = _numbered(start)
        if number is None:
            raise UserError(
                f"start is CHAIN:NUMBER, e.g. runs/a/chain:2, got {start!r:.200}", "start"
            )
        with configs.located():
            return Chain(path, _own_backbone(config)).open(number)
    if not weights:
        return None
    given = ImageSettings()
    if photos is not None:
        given = ImageSettings(
            photos.size, crop=photos.crop, filter=photos.filter, resize=photos.resize
        )
    if configs.says_images(config):
        preprocess = run.preprocess
        given = dataclasses.replace(given, mean=preprocess.mean, std=preprocess.std)
    with configs.located():
        found = starting_version_of(
            weights, run, ema=bool(configs.own_field(config, "ema")), settings=given
        )
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    return found.version


def pretrain(config: ConfigDict, workdir: Path, session: Session) -> Chain:
    """Pre-train the models of a configuration: model i learns the first `pretrain_classes[i]` classes.

    Args:
      config: the configuration.
      workdir: folder of the run.
      session: see `config.session_of`.

    Raises:
      Stopped, Diverged, UserError: see `train.pretrain`.
    """
    counts = configs.own_field(config, "pretrain_classes")
    with configs.located():
        check_counts(counts)
    run = configs.run_of(config)
    _check_early(config, run, session, workdir)
    data, settings = load_role(config, "train", session), configs.plain(config)
    with configs.located():
        return pretrain_run(
            run, data, workdir, class_counts=counts, session=session, config=settings
        )


def evaluate(
    chain: Chain,
    *,
    config: ConfigDict | None = None,
    metrics: Sequence[Metric | str] = ("identification",),
    dtype: str = "float32",
    session: Session,
) -> Evaluations:
    """Evaluate a chain on the query and gallery of its own configuration, or of another's.

    Args:
      chain: to evaluate.
      config: with `data.query` and `data.gallery`; the one that the chain carries by default.
      metrics: names or `Metric` objects.
      dtype: of the networks' computation.
      session: see `config.session_of`.

    Raises:
      Stopped, UserError: see `evaluation.evaluate`.
    """
    config = config_of(chain) if config is None else config
    session.devices()  # refuses a mesh before any data is read
    query, gallery = load_retrieval(config, chain, session)
    return evaluate_chain(chain, query, gallery, metrics=metrics, dtype=dtype, session=session)


def load_retrieval(config: ConfigDict, chain: Chain, session: Session) -> tuple[Dataset, Dataset]:
    """Load query and gallery: those of the configuration, or the parts of a run's photos.

    Args:
      config: the configuration.
      chain: of the run, beside which the ledger of its photos lies.
      session: shows progress.

    Raises:
      UserError: see `load_role` and `Photos.retrieval`.
    """
    photos = configs.photos_of(config)
    if photos is None:
        query, gallery = (load_role(config, role, session) for role in ("query", "gallery"))
        return query, gallery
    with configs.located():
        return photos.retrieval(chain.path.parent, session.bar("reading pictures"))


def config_of(chain: Chain) -> ConfigDict:
    """Return the configuration that a chain carries.

    Raises:
      UserError: it does not name a query and a gallery.
    """
    record = chain.require().record(-1)
    if not {"query", "photos"} & record.config.get("data", {}).keys():
        raise UserError(
            f"{chain.path} does not say what to query: give a configuration with data.query and "
            "data.gallery",
            "config",
        )
    return ConfigDict(dict(record.config))


def load_role(config: ConfigDict, role: str, session: Session) -> Dataset:
    """Load the data of a role ("train", "query", "gallery").

    Raises:
      UserError: see `data.load`, with `argument` the field of the configuration.
    """
    spec = configs.source_of(config, role)
    show = session.bar(role) is not None
    with configs.located(role):
        return load(spec, show)


def load_replacements(config: ConfigDict) -> dict[int, Version | Backbone]:
    """Open the pre-trained models of a configuration, by the task at which they come in.

    Returns:
      The models, and the network of fresh weights for the tasks that start from such.

    Raises:
      UserError: replacements wanted without models, or with too few of them; a task named twice.
    """
    tasks = configs.own_field(config, "tasks.replace_at")
    fresh = configs.own_field(config, "tasks.fresh_at")
    for name, named in (("tasks.replace_at", tasks), ("tasks.fresh_at", tasks + fresh)):
        for task in named:
            if named.count(task) > 1:
                also = " (with tasks.replace_at)" if task in tasks and task in fresh else ""
                raise UserError(f"{name}{also} names task {task} twice: {named}", name)
    found: dict[int, Version | Backbone] = {}
    if fresh:
        found |= dict.fromkeys(fresh, configs.fresh_backbone(config, configs.run_of(config)))
    return found | (_load_pretrained(config, tasks) if tasks else {})


def _load_pretrained(config, tasks) -> dict[int, Version]:
    pretrained = configs.own_field(config, "pretrained")
    if not pretrained:
        raise UserError(
            f"tasks.replace_at={tasks} needs pre-trained models: pre-train some and give their chain "
            "as pretrained, or empty tasks.replace_at",
            "pretrained",
        )
    models = _models(str(pretrained), _own_backbone(config))
    if len(models) < len(tasks):
        raise UserError(
            f"{len(tasks)} replacements (tasks {tasks}), but {pretrained} has {len(models)} models: "
            "pre-train more or shorten tasks.replace_at",
            "tasks.replace_at",
        )
    chosen = zip(sorted(tasks), models, strict=False)
    return {task: chain.open(number) for task, (chain, number) in chosen}


def _models(pretrained: str, backbone: str | None) -> list[tuple[Chain, int]]:
    """List chain and number of each model of "CHAIN,CHAIN:NUMBER,...": all of a chain without number."""
    found = []
    for part in pretrained.split(","):
        path, number = _numbered(part.strip())
        chain = Chain(path, backbone)
        numbers = chain.require_whole().numbers() if number is None else [number]
        found += [(chain, n) for n in numbers]
    return found


def _numbered(text: str) -> tuple[str, int | None]:
    """Return path and number of "CHAIN:NUMBER"; None for a chain without a number."""
    path, _, number = text.rpartition(":")
    return (path, int(number)) if path and _NUMBER.fullmatch(number) else (text, None)


def _own_backbone(config):
    """The backbone that the configuration names by import path; None for a registered one."""
    name = configs.run_of(config).given_backbone.name
    return name if ":" in name else None


def _check_early(config: ConfigDict, run: Run, session: Session, workdir: Path) -> None:
    """Refuse before reading data what can be known before."""
    folder = Workdir(workdir)
    with configs.located():
        for path, exclude in configs.folders_of(config):
            folder.check_apart(path, exclude)
        folder.check_writable()
        check_batch(session.devices(), run.batch_size)
