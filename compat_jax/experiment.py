"""Train, pre-train and evaluate by configuration."""

import os
from collections.abc import Sequence
from typing import TypeAlias

from ml_collections import ConfigDict

from compat_jax import config as configs
from compat_jax.chain import Chain, Version
from compat_jax.data import Dataset, load
from compat_jax.data.roles import check_roles
from compat_jax.errors import UserError
from compat_jax.evaluation import Evaluations
from compat_jax.evaluation import evaluate as evaluate_chain
from compat_jax.mesh import check_batch
from compat_jax.retrieval import Metric
from compat_jax.session import Session
from compat_jax.training import Run
from compat_jax.training import pretrain as pretrain_run
from compat_jax.training import train as train_run
from compat_jax.training.pretraining import check_counts
from compat_jax.training.workdir import Workdir

Path: TypeAlias = str | os.PathLike[str]


def train(config: ConfigDict, workdir: Path, session: Session) -> Chain:
    """Train the task sequence of a configuration; one version per task.

    Args:
      config: the configuration.
      workdir: folder of the run.
      session: see `config.session_of`.

    Raises:
      Stopped, Diverged, UserError: see `train.train`.
    """
    run, replacements = configs.run_of(config), load_replacements(config)
    _check_early(run, session, workdir)
    data, query, gallery = (load_role(config, role, session) for role in configs.ROLES)
    pretrained: dict[str, tuple[str, ...]] = {}
    if not configs.own_field(config, "data.pretraining_may_share"):
        pretrained = {
            f"pre-trained model {v.number}": v.record.class_names for v in replacements.values()
        }
    with configs.located():
        check_roles(data, {"query": query, "gallery": gallery}, pretrained)
        settings = configs.plain(config)
        return train_run(
            run, data, workdir, replacements=replacements, session=session, config=settings
        )


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
    _check_early(run, session, workdir)
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
    query, gallery = (load_role(config, role, session) for role in ("query", "gallery"))
    return evaluate_chain(chain, query, gallery, metrics=metrics, dtype=dtype, session=session)


def config_of(chain: Chain) -> ConfigDict:
    """Return the configuration that a chain carries.

    Raises:
      UserError: it does not name a query and a gallery.
    """
    record = chain.require().record(-1)
    if "query" not in record.config.get("data", {}):
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


def load_replacements(config: ConfigDict) -> dict[int, Version]:
    """Open the pre-trained models of a configuration, by the task at which they come in.

    Raises:
      UserError: replacements wanted without a chain of models, or with too few of them.
    """
    tasks = configs.own_field(config, "tasks.replace_at")
    if not tasks:
        return {}
    for task in tasks:
        if tasks.count(task) > 1:
            raise UserError(
                f"tasks.replace_at names task {task} twice: {tasks}", "tasks.replace_at"
            )
    pretrained = configs.own_field(config, "pretrained")
    if not pretrained:
        raise UserError(
            f"tasks.replace_at={tasks} needs pre-trained models: pre-train some and give their chain "
            "as pretrained, or empty tasks.replace_at",
            "pretrained",
        )
    chain = Chain(pretrained, _own_backbone(config)).require_whole()
    numbers = chain.numbers()
    if len(numbers) < len(tasks):
        raise UserError(
            f"{len(tasks)} replacements (tasks {tasks}), but {pretrained} has {len(numbers)} models: "
            "pre-train more or shorten tasks.replace_at",
            "tasks.replace_at",
        )
    return {t: chain.open(n) for t, n in zip(sorted(tasks), numbers, strict=False)}


def _own_backbone(config):
    """The backbone that the configuration names by import path; None for a registered one."""
    name = configs.run_of(config).given_backbone.name
    return name if ":" in name else None


def _check_early(run: Run, session: Session, workdir: Path) -> None:
    """Refuse before reading data what can be known before."""
    with configs.located():
        Workdir(workdir).check_writable()
        check_batch(session.devices(), run.batch_size)
