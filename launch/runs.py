"""A configuration run from end to end: what `train`, `pretrain`, `evaluate` and `quickstart` call."""

from collections.abc import Callable

import jax
from etils import epath
from ml_collections import ConfigDict

from compat_jax import evaluation, hosts
from compat_jax import mesh as meshes
from compat_jax.chain import Chain
from compat_jax.data.tasks import TaskSequence
from compat_jax.errors import UserError
from compat_jax.evaluation import Evaluation
from compat_jax.files import absolute
from compat_jax.train import loop
from compat_jax.train.progress import Progress
from launch import build


def pretrain(
    config: ConfigDict, workdir: str, should_stop: Callable[[], bool], bar: bool = True
) -> Chain:
    """Model i of the chain learns the first `pretrain_classes[i]` classes of the data."""
    folder, bar = absolute(workdir), bar and hosts.is_first()
    counts = tuple(config.pretrain_classes)
    if not counts or min(counts) < 2:
        raise UserError(f"pretrain_classes needs numbers of classes, each at least 2, got {counts}")
    mesh = build.build_mesh(config)
    largest = TaskSequence(max(counts), max(counts), 1)
    build.build_run(config, largest, 0).check(mesh)  # before reading data
    (data,) = build.load_data(config, "train", bar=bar)
    if max(counts) > data.num_classes:
        raise UserError(
            f"pretrain_classes is {counts}, but the data has {data.num_classes} classes"
        )
    for count in counts:
        part = build.build_run(config, TaskSequence(count, count, 1), 0)
        part.check(mesh, data.labels[data.labels < count])
    build.claim_workdir(workdir, config, data, {})
    run, data = build.build_run(config, largest, 0), data.select(range(max(counts)))
    chain = Chain(folder / "chain")
    for number, count in enumerate(counts):
        loop.pretrain(
            run,
            data,
            chain,
            Progress(folder / "progress"),
            mesh,
            number,
            count,
            config=build.plain(config),
            save_every=config.save_every,
            device_budget=config.device_budget_mb << 20,
            log=folder / "log.jsonl",
            should_stop=should_stop,
            bar=f"{config.method}: pre-training on {count} classes" if bar else None,
        )
    return chain


def train(
    config: ConfigDict, workdir: str, should_stop: Callable[[], bool], bar: bool = True
) -> Chain:
    """The task sequence of a configuration; one version a task."""
    folder, bar = absolute(workdir), bar and hosts.is_first()
    mesh = build.build_mesh(config)
    initial = max(config.tasks.initial, 1)
    first_task = TaskSequence(initial, initial, 1)
    build.build_run(config, first_task, config.tasks.rehearsal).check(mesh)  # before reading data
    replacements = build.load_replacements(config)
    data, query, gallery = build.load_data(config, "train", "query", "gallery", bar=bar)
    build.check_roles(config, data, query, gallery, replacements)
    sequence = TaskSequence(data.num_classes, config.tasks.initial, config.tasks.increment)
    run = build.build_run(config, sequence, config.tasks.rehearsal)
    run.check(mesh, data.labels)
    loop.check_replacements(run, replacements, data.images.shape[1:])
    build.claim_workdir(workdir, config, data, replacements)
    chain = Chain(folder / "chain")
    loop.train(
        run,
        data,
        chain,
        Progress(folder / "progress"),
        mesh,
        replacements,
        config=build.plain(config),
        save_every=config.save_every,
        device_budget=config.device_budget_mb << 20,
        log=folder / "log.jsonl",
        should_stop=should_stop,
        bar=config.method if bar else None,
    )
    return chain


def evaluate(
    chain: Chain,
    out: epath.Path,
    config: ConfigDict | None = None,
    metric: str = "identification",
    mesh: str = "data:-1",
    batch_size: int = 256,
    dtype: str = "float32",
    should_stop: Callable[[], bool] = lambda: False,
    bar: bool = True,
) -> Evaluation:
    """The matrix of a chain on the query and gallery of its own configuration, or of another's."""
    if config is None:
        record = chain.require().record(chain.numbers()[-1])
        if "query" not in record.config.get("data", {}):
            raise UserError(
                f"{chain.path} does not say what to query: give --config=FILE.py with data.query "
                "and data.gallery"
            )
        config = ConfigDict(dict(record.config))
    devices = meshes.make_mesh(mesh, jax.devices())
    bar = bar and hosts.is_first()
    query, gallery = build.load_data(config, "query", "gallery", bar=bar)
    return evaluation.evaluate(
        chain,
        query,
        gallery,
        metric,
        mesh=devices,
        batch_size=batch_size,
        dtype=dtype,
        cache=out / "cache",
        should_stop=should_stop,
        progress="evaluating" if bar else None,
    )
