"""Train on both sides: optimiser steps, a short sequence with a replacement, and their speed."""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from compat_jax import (
    Chain,
    Dataset,
    Evaluation,
    Preprocess,
    Run,
    Session,
    Sgd,
    Tasks,
    Version,
    compatibility,
    embed,
    evaluate,
    methods,
    train,
)
from compat_jax import data as sources
from compat_jax import mesh as meshes
from compat_jax.chain import variables_sha256
from compat_jax.data.tasks import memory_indices
from compat_jax.interop.weights import to_torch
from compat_jax.training.task import pretraining_task, sequence_task
from launch.reference import clone_run
from launch.reference.clone import open_clone
from launch.reference.clone_process import Process
from launch.reference.inputs import DATA, NEW_CLASSES, TASKS, OurSteps
from launch.reference.lines import Line, line, worst

STEPS_EPOCHS, STEPS_BATCH, STEPS_LR = 4, 128, 0.005  # 640 images: five steps an epoch
REHEARSAL, EPOCHS, BATCH, LR = 5, 3, 64, 0.01
REPLACE_AT = (0, 2)
PRETRAIN_STEPS, PRETRAIN_LR = (30, 90), 0.05
POINTS = 0.5  # tolerance of a matrix entry, in percentage points


class _Steps(NamedTuple):
    """Both sides after the optimiser steps."""

    start: Version
    trained: Version
    losses: list[float]
    seconds: list[float]
    theirs: clone_run.Outcome


class _Protocol(NamedTuple):
    """Both sides after the sequence."""

    chain: Chain
    evaluation: Evaluation
    epoch_losses: list[float]
    inputs: clone_run.Inputs
    process: Process

    @property
    def theirs(self) -> clone_run.Outcome:
        """The results of the reference."""
        return self.process.outcome


class Runs:
    """The parts that train; each training is done once, when a part first needs it.

    Args:
      clone: folder of a clone of iamcl2r.
      data: a name in DATA.
      seed: seed of the weights and the batches.
      folder: an empty folder for the files of both sides.
      progress: show progress bars.
    """

    def __init__(
        self,
        clone: str,
        *,
        data: str,
        seed: int,
        folder: Path,
        progress: bool = False,
    ):
        self._clone, self._modules = clone, open_clone(clone, "iamcl2r")
        self._seed, self._folder, self._progress = seed, folder, progress
        (mean, std), self._specs = DATA[data]
        self._preprocess = Preprocess(mean, std, crop_padding=0, flip=False)
        self._mesh = meshes.make_mesh("data:1", jax.devices()[:1])
        self._session = Session(mesh=self._mesh, batch_size=BATCH)

    # --- the three parts

    def steps(self) -> Iterator[Line]:
        """Compare optimiser steps from the same weights on the same batches."""
        done = self._steps
        make = functools.partial(line, part="steps")
        step = functools.partial(make, note="step")
        images = self._data("query").images[:128]
        before, after = to_torch(done.start.variables), to_torch(done.trained.variables)
        theirs = done.theirs.states[0]
        title = f"features before, of {len(images)} images"
        ours = embed(done.start, images, mesh=self._mesh)
        expected = self._their_features(before, images)
        yield make(title, ours, expected, tolerance=1e-4, note="network")
        losses, expected = np.array(done.losses), np.array(done.theirs.losses)
        for first, last, tolerance in ((0, 1, 1e-5), (1, 5, 1e-5), (5, len(losses), 1e-4)):
            some = range(first, min(last, len(losses)))
            each = [step("", losses[i], expected[i], tolerance=tolerance) for i in some]
            span = f"step {last}" if last == first + 1 else f"steps {first + 1} to {last}"
            yield worst(each, f"loss, {span}")
        for kind, is_one in (("kernels", lambda x: x.ndim > 1), ("norms", lambda x: x.ndim == 1)):
            # Of the change: weights hardly differ, updates do.
            names = [n for n in after if is_one(after[n]) and "running" not in n]
            moved = [
                np.concatenate([(side[n] - before[n]).ravel() for n in names])
                for side in (after, theirs)
            ]
            yield step(f"{kind} after - before, {len(names)} tensors", *moved, tolerance=1e-2)
        for kind in ("mean", "var"):
            names = [n for n in after if n.endswith(f"running_{kind}")]
            each = [step("", after[n], theirs[n], tolerance=1e-3) for n in names]
            yield worst(each, f"running {kind} after {len(losses)} steps, {len(names)} tensors")
        ours = embed(done.trained, images, mesh=self._mesh)
        title = f"features after {len(losses)} steps"
        yield step(title, ours, self._their_features(theirs, images), tolerance=1e-3)

    def protocol(self) -> Iterator[Line]:
        """Compare a short sequence with a replacement, trained and evaluated on both sides."""
        done = self._protocol
        make = functools.partial(line, part="protocol")
        step = functools.partial(make, note="step")
        exact = functools.partial(make, note="exact", tolerance=0, absolute=True)
        batches = [plan.shape[1] for plan in done.inputs.plans]
        yield exact("batches per epoch of each task", batches, done.theirs.batches)
        expected, rest = [], np.array(done.theirs.losses)
        for plan in done.inputs.plans:
            count = plan.shape[0] * plan.shape[1]
            expected += rest[:count].reshape(plan.shape[:2]).mean(axis=1).tolist()
            rest = rest[count:]
        pairs = zip(done.epoch_losses, expected, strict=True)
        each = [step("", *pair, tolerance=1e-4) for pair in pairs]
        yield worst(each, f"mean loss of an epoch, {len(each)} epochs")
        images = self._data("query").images[:128]
        ours = embed(done.chain.open(-1), images, mesh=self._mesh)
        theirs = self._their_features(done.theirs.states[-1], images)
        yield step("features of the last version", ours, theirs, tolerance=1e-3)
        matrix, other = 100 * done.evaluation.matrix, 100 * done.theirs.matrix
        for t, k in zip(*np.tril_indices(len(matrix)), strict=True):
            mark = "*" if t in REPLACE_AT and k == t else ""
            title = f"M[{t},{k}]{mark} queries of {t}, gallery of {k}, %"
            yield make(
                title, matrix[t, k], other[t, k], tolerance=POINTS, note="matrix", absolute=True
            )
        yield from _summary_lines(matrix, other, done.theirs)

    def speed(self) -> Iterator[Line]:
        """Time both sides alternately; no verdict."""
        steps, done = self._steps, self._protocol
        warm = 2  # the first steps compile here and allocate there
        yield _timed(
            f"a step, resnet18, batch {STEPS_BATCH}",
            [1e3 * s for s in steps.seconds[warm:]],
            [1e3 * s for s in steps.theirs.seconds[warm:]],
            unit="ms",
        )
        images = self._data("query").images
        version = done.chain.open(-1)
        seconds = self._alternately(
            "features",
            lambda: embed(version, images, mesh=self._mesh, batch_size=BATCH),
            lambda: done.process.seconds("features"),
            turns=7,
        )
        yield _timed("feature extraction", *seconds, unit="images/s", per_second=len(images))
        query, gallery = self._data("query"), self._data("gallery")
        seconds = self._alternately(
            "evaluation",
            lambda: evaluate(done.chain, query, gallery, session=self._session),
            lambda: done.process.seconds("evaluate"),
            turns=3,
        )
        yield _timed(f"evaluation of {TASKS} versions", *seconds, unit="s")

    def close(self) -> None:
        """End the other process, if one was started."""
        if "_protocol" in vars(self):
            self._protocol.process.close()

    # --- trainings, each done once

    @functools.cached_property
    def _steps(self) -> _Steps:
        data, start = self._data("steps"), self._models.open(1)
        tasks = Tasks(initial=data.num_classes, rehearsal=REHEARSAL)
        run = self._run(tasks, STEPS_EPOCHS, batch_size=STEPS_BATCH, lr=STEPS_LR)
        sequence = run.tasks.sequence(data.num_classes)
        task = sequence_task(run, sequence, 0, labels=data.labels, start=start, replaced=True)
        ours = OurSteps(task, data, self._mesh)
        with self._bar("steps", task.steps) as bar:

            def before(step):
                ours.advance()
                bar.update()

            folder, inputs = self._new("steps"), their_inputs(run, data, {0: start})
            theirs = Process(self._clone, inputs, folder, before_step=before)
        theirs.close()
        variables = ours.variables()
        trained = dataclasses.replace(
            start, variables=variables, sha256=variables_sha256(variables)
        )
        return _Steps(
            start=start,
            trained=trained,
            losses=ours.losses,
            seconds=ours.seconds,
            theirs=theirs.outcome,
        )

    @functools.cached_property
    def _protocol(self) -> _Protocol:
        data, query, gallery = (self._data(role) for role in ("tasks", "query", "gallery"))
        tasks = Tasks(initial=NEW_CLASSES, increment=NEW_CLASSES, rehearsal=REHEARSAL)
        run = self._run(tasks, EPOCHS, batch_size=BATCH, lr=LR)
        starts = dict(zip(REPLACE_AT, self._models, strict=True))
        inputs = their_inputs(run, data, starts, query=query, gallery=gallery)
        folder = self._new("ours")
        session = dataclasses.replace(self._session, progress=self._progress)
        chain = train(run, data, folder, replacements=starts, session=session)
        log = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
        found = evaluate(chain, query, gallery, session=self._session)
        total = sum(plan.shape[0] * plan.shape[1] for plan in inputs.plans)
        with self._bar("protocol, theirs", total) as bar:
            theirs = Process(
                self._clone, inputs, self._new("theirs"), before_step=lambda step: bar.update()
            )
        return _Protocol(
            chain=chain,
            evaluation=found["identification"],
            epoch_losses=[x["loss"] for x in log],
            inputs=inputs,
            process=theirs,
        )

    @functools.cached_property
    def _models(self) -> Chain:
        """Train a model on other classes, and store it early and late in the training."""
        data = self._data("pretraining")
        run = Run(
            method="sce",
            backbone="resnet18",
            epochs=-(-PRETRAIN_STEPS[-1] * BATCH // (len(data) - BATCH)),
            batch_size=BATCH,
            optimizer=Sgd(lr=PRETRAIN_LR, min_lr=0.0, schedule="constant"),
            preprocess=self._preprocess,
            label_order="ascending",
            seed=self._seed,
        )
        task = pretraining_task(run, 0, data.labels, count=data.num_classes)
        trainer = task.trainer(self._mesh)
        start = trainer.init(jax.random.key(self._seed), data.images.shape[1:])
        ours = OurSteps(task, data, self._mesh, start=start)
        chain = Chain(self._new("models"))
        with self._bar("pre-training", PRETRAIN_STEPS[-1]) as bar:
            for stop in PRETRAIN_STEPS:
                while len(ours.losses) < stop:
                    ours.advance()
                    bar.update()
                chain.add(ours.variables(), task.record(trainer, data, run.describe()))
        return chain

    def _run(self, tasks: Tasks, epochs: int, *, batch_size: int, lr: float) -> Run:
        return Run(
            method=methods.hoc(same_class="as_coded"),
            backbone="resnet18",
            tasks=tasks,
            epochs=epochs,
            batch_size=batch_size,
            optimizer=Sgd(lr=lr, min_lr=lr / 100),
            preprocess=self._preprocess,
            seed=self._seed,
        )

    @functools.cache  # noqa: B019 - lives as long as the comparison
    def _data(self, role) -> Dataset:
        return sources.load(self._specs[role])

    def _new(self, name) -> Path:
        folder = self._folder / name
        folder.mkdir()
        return folder

    def _bar(self, name, total):
        return tqdm(total=total, desc=name, unit="step", disable=not self._progress, leave=False)

    def _alternately(self, name, ours, their_seconds, *, turns):
        """Return the seconds of both sides, timed A B A B, after one turn to warm up."""
        seconds = [], []
        for _ in tqdm(range(turns + 1), name, disable=not self._progress, leave=False):
            began = time.perf_counter()
            ours()
            seconds[0].append(time.perf_counter() - began)
            seconds[1].append(their_seconds())
        return seconds[0][1:], seconds[1][1:]

    def _their_features(self, state, images):
        net = clone_run.network(self._modules, state)
        return clone_run.extract(
            self._modules,
            net,
            images,
            mean=self._preprocess.mean,
            std=self._preprocess.std,
            batch_size=BATCH,
        )


def their_inputs(
    run: Run,
    data: Dataset,
    starts: Mapping[int, Version],
    *,
    query: Dataset | None = None,
    gallery: Dataset | None = None,
) -> clone_run.Inputs:
    """Describe a run to the reference, with the batches that our side trains on.

    Args:
      run: the run; its optimiser is an `Sgd`.
      data: images of all tasks.
      starts: version by the task that starts from it; task 0 must have one.
      query: query images, or None to skip the evaluation.
      gallery: gallery images, or None.
    """
    sequence, plans, memories = run.tasks.sequence(data.num_classes), [], []
    for index in range(len(sequence)):
        task = sequence_task(run, sequence, index, labels=data.labels, start=None, replaced=False)
        plans.append(task.plan.reshape(run.epochs, task.steps_per_epoch, -1))
        old, kept = range(task.num_old), run.tasks.rehearsal
        memories.append(memory_indices(data.labels, old, per_class=kept, seed=run.seed))
    return clone_run.Inputs(
        data=data,
        plans=plans,
        task_classes=[sequence.classes(index) for index in range(len(sequence))],
        memories=memories,
        replacements={task: to_torch(version.variables) for task, version in starts.items()},
        query=query,
        gallery=gallery,
        mean=run.preprocess.mean,
        std=run.preprocess.std,
        batch_size=run.batch_size,
        rehearsal=run.tasks.rehearsal,
        lr=run.optimizer.lr,
        min_lr=run.optimizer.min_lr,
        weight_decay=run.optimizer.weight_decay,
    )


def _summary_lines(matrix, other, theirs) -> Iterator[Line]:
    """Compare AC and AA of both matrices, and our functions with theirs on their matrix."""
    make = functools.partial(line, part="protocol")
    exact = functools.partial(make, tolerance=1e-9, note="rounding")
    average, accuracy = compatibility.average_compatibility, compatibility.average_accuracy
    rows, columns = np.tril_indices(len(matrix), -1)
    margins = np.abs(matrix[rows, columns] - np.diagonal(matrix)[columns])
    open_share = float(np.mean(margins <= 2 * POINTS))
    both = average(matrix), theirs.average_compatibility
    yield make("AC", *both, tolerance=open_share + 1e-9, note="pairs", absolute=True)
    both = accuracy(matrix), theirs.average_accuracy
    yield make("AA, %", *both, tolerance=POINTS, note="matrix", absolute=True)
    both = average(other), theirs.average_compatibility
    yield exact("AC of their matrix, by our function", *both)
    both = accuracy(other), theirs.average_accuracy
    yield exact("AA of their matrix, by our function, %", *both)


def _timed(quantity, ours, theirs, *, unit, per_second=None) -> Line:
    """Make a line of times taken alternately; `per_second` turns them into so many a second."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    first, _, third = statistics.quantiles(ratios, n=4, method="inclusive")
    values = [statistics.median(side) for side in (ours, theirs)]
    if per_second is not None:
        values = [per_second / value for value in values]
    return Line(
        part="speed",
        quantity=quantity,
        ours=values[0],
        theirs=values[1],
        difference=statistics.median(ratios),
        tolerance=None,
        note="speed",
        unit=unit,
        spread=(third - first) / 2,
    )
