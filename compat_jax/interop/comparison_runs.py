"""Training on both sides: optimiser steps, a short sequence with a replacement, and their speed."""

import functools
import json
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from compat_jax import compatibility, evaluation, models
from compat_jax import mesh as meshes
from compat_jax.chain import Chain, Record, Version, variables_sha256
from compat_jax.data import sources
from compat_jax.data.augment import Preprocess
from compat_jax.data.dataset import Dataset
from compat_jax.data.tasks import TaskSequence, batch_plan, memory_indices
from compat_jax.interop import reference_run
from compat_jax.interop.comparison import Line, line, worst
from compat_jax.interop.comparison_inputs import DATA, NEW_CLASSES, SIZE, TASKS, OurSteps
from compat_jax.interop.reference import open_clone
from compat_jax.interop.reference_process import Process
from compat_jax.interop.weights import to_torch
from compat_jax.methods import LossSettings, build_embedder, get_method
from compat_jax.retrieval import extract
from compat_jax.train import loop
from compat_jax.train.optimizer import OptimizerSettings
from compat_jax.train.progress import Progress
from compat_jax.train.state import TaskInfo
from compat_jax.train.step import Trainer

K, BACKBONE = 1024, "resnet18"
STEPS_EPOCHS, STEPS_BATCH, STEPS_LR = 4, 128, 0.005  # 640 images: five steps an epoch
REHEARSAL, EPOCHS, BATCH, LR = 5, 3, 64, 0.01
REPLACE_AT = (0, 2)
PRETRAIN_STEPS, PRETRAIN_LR = (30, 90), 0.05
POINTS = 0.5  # tolerance of a matrix entry, in percent


class _Steps(NamedTuple):
    """Both sides after the optimiser steps."""

    start: Any
    trained: Any
    losses: list[float]
    seconds: list[float]
    theirs: reference_run.Outcome


class _Protocol(NamedTuple):
    """Both sides after the sequence."""

    chain: Chain
    evaluation: evaluation.Evaluation
    epoch_losses: list[float]
    inputs: reference_run.Inputs
    process: Process

    @property
    def theirs(self) -> reference_run.Outcome:
        """What the reference made of it."""
        return self.process.outcome


class Runs:
    """What is trained, once, for the parts that ask for it.

    Args:
      clone: folder of a clone of iamcl2r.
      data: a name in DATA.
      seed: of weights and batches.
      folder: empty, for both sides' files.
      progress: whether to show bars.
    """

    def __init__(
        self,
        clone: str,
        data: str,
        seed: int,
        folder: Path,
        progress: bool = False,
    ):
        self._clone, self._modules = clone, open_clone(clone, "iamcl2r")
        self._seed, self._folder, self._progress = seed, folder, progress
        (mean, std), self._specs = DATA[data]
        self._preprocess = Preprocess(mean, std)
        self._mesh = meshes.make_mesh("data:1", jax.devices()[:1])

    # --- the three parts

    def steps(self) -> Iterator[Line]:
        """Optimiser steps from the same weights on the same batches."""
        done = self._steps
        make = functools.partial(line, "steps")
        images = self._data("query").images[:128]
        before, after = to_torch(done.start), to_torch(done.trained)
        theirs = done.theirs.states[0]
        title = f"features before, of {len(images)} images"
        ours = extract(self._version(done.start), images, self._mesh)
        yield make(title, ours, self._their_features(before, images), 1e-4, "network")
        losses, expected = np.array(done.losses), np.array(done.theirs.losses)
        for first, last, tolerance in ((0, 1, 1e-5), (1, 5, 1e-5), (5, len(losses), 1e-4)):
            some = range(first, min(last, len(losses)))
            each = [make("", losses[i], expected[i], tolerance, "step") for i in some]
            span = f"step {last}" if last == first + 1 else f"steps {first + 1} to {last}"
            yield worst(each, f"loss, {span}")
        for kind, is_one in (("kernels", lambda x: x.ndim > 1), ("norms", lambda x: x.ndim == 1)):
            # How far they moved, so that the updates are compared and not what they changed.
            names = [n for n in after if is_one(after[n]) and "running" not in n]
            moved = [
                np.concatenate([(side[n] - before[n]).ravel() for n in names])
                for side in (after, theirs)
            ]
            yield make(f"{kind} after - before, {len(names)} tensors", *moved, 1e-2, "step")
        for kind in ("mean", "var"):
            names = [n for n in after if n.endswith(f"running_{kind}")]
            each = [make("", after[n], theirs[n], 1e-3, "step") for n in names]
            yield worst(each, f"running {kind} after {len(losses)} steps, {len(names)} tensors")
        ours = extract(self._version(done.trained), images, self._mesh)
        title = f"features after {len(losses)} steps"
        yield make(title, ours, self._their_features(theirs, images), 1e-3, "step")

    def protocol(self) -> Iterator[Line]:
        """A short sequence with a replacement, trained and evaluated on both sides."""
        done = self._protocol
        make = functools.partial(line, "protocol")
        batches = [plan.shape[1] for plan in done.inputs.plans]
        yield make("batches an epoch of each task", batches, done.theirs.batches, 0, "exact", True)
        expected, rest = [], np.array(done.theirs.losses)
        for plan in done.inputs.plans:
            count = plan.shape[0] * plan.shape[1]
            expected += rest[:count].reshape(plan.shape[:2]).mean(axis=1).tolist()
            rest = rest[count:]
        each = [
            make("", a, b, 1e-4, "step") for a, b in zip(done.epoch_losses, expected, strict=True)
        ]
        yield worst(each, f"mean loss of an epoch, {len(each)} epochs")
        images = self._data("query").images[:128]
        ours = extract(done.chain.open(-1), images, self._mesh)
        theirs = self._their_features(done.theirs.states[-1], images)
        yield make("features of the last version", ours, theirs, 1e-3, "step")
        matrix, other = 100 * done.evaluation.matrix, 100 * done.theirs.matrix
        for t, k in zip(*np.tril_indices(len(matrix)), strict=True):
            mark = "*" if t in REPLACE_AT and k == t else ""
            title = f"M[{t},{k}]{mark} queries of {t}, gallery of {k}, %"
            yield make(title, matrix[t, k], other[t, k], POINTS, "matrix", True)
        yield from _summary_lines(make, matrix, other, done.theirs)

    def speed(self) -> Iterator[Line]:
        """Both sides by turns; no verdict."""
        steps, done = self._steps, self._protocol
        warm = 2  # the first compiles here and allocates there
        yield _timed(
            f"a step, {BACKBONE}, batch {STEPS_BATCH}",
            [1e3 * s for s in steps.seconds[warm:]],
            [1e3 * s for s in steps.theirs.seconds[warm:]],
            "ms",
        )
        images = self._data("query").images
        version = done.chain.open(-1)
        seconds = self._by_turns(
            "features",
            lambda: extract(version, images, self._mesh, batch_size=BATCH),
            lambda: done.process.seconds("features"),
            7,
        )
        yield _timed("feature extraction", *seconds, "images/s", len(images))
        query, gallery = self._data("query"), self._data("gallery")
        seconds = self._by_turns(
            "evaluation",
            lambda: evaluation.evaluate(
                done.chain, query, gallery, mesh=self._mesh, batch_size=BATCH
            ),
            lambda: done.process.seconds("evaluate"),
            3,
        )
        yield _timed(f"evaluation of {TASKS} versions", *seconds, "s")

    def close(self) -> None:
        """End the other process, if one was started."""
        if "_protocol" in vars(self):
            self._protocol.process.close()

    # --- what they need, made once

    @functools.cached_property
    def _steps(self) -> _Steps:
        data = self._data("steps")
        optim = OptimizerSettings(lr=STEPS_LR, min_lr=STEPS_LR / 100)
        trainer = self._trainer("hoc", optim, "descending")
        start = self._pretrained[-1]
        nothing = np.zeros(0, np.int64)
        plan = batch_plan(
            np.arange(len(data)), nothing, STEPS_BATCH, STEPS_EPOCHS, self._seed, task=0
        )
        inputs = reference_run.Inputs(
            data=data,
            plans=[plan],
            task_classes=[range(data.num_classes)],
            memories=[nothing],
            replacements={0: to_torch(start)},
            query=None,
            gallery=None,
            **self._shared_inputs(STEPS_BATCH, REHEARSAL, optim),
        )
        total = plan.shape[0] * plan.shape[1]
        info = TaskInfo.create(0, 0, *plan.shape[:2], data.num_classes)
        ours = OurSteps(trainer, start, start, data, plan, info)
        with self._bar("steps", total) as bar:

            def before(step):
                ours.advance()
                bar.update()

            theirs = Process(self._clone, inputs, self._new("steps"), before)
        theirs.close()
        return _Steps(start, ours.variables(), ours.losses, ours.seconds, theirs.outcome)

    @functools.cached_property
    def _protocol(self) -> _Protocol:
        data, query, gallery = (self._data(role) for role in ("tasks", "query", "gallery"))
        optim = OptimizerSettings(lr=LR, min_lr=LR / 100)
        run = loop.Run(
            method=get_method("hoc"),
            backbone=loop.Backbone(BACKBONE),
            num_prototypes=K,
            label_order="descending",
            sequence=TaskSequence(data.num_classes, NEW_CLASSES, NEW_CLASSES),
            rehearsal=REHEARSAL,
            epochs=EPOCHS,
            batch_size=BATCH,
            seed=self._seed,
            loss=LossSettings(same_class="as_coded"),
            optim=optim,
            preprocess=self._preprocess,
        )
        starts = dict(zip(REPLACE_AT, self._pretrained, strict=True))
        inputs = self._sequence_inputs(run, data, query, gallery, starts, optim)
        folder = self._new("ours")
        chain = Chain(folder / "chain")
        loop.train(
            run,
            data,
            chain,
            Progress(folder / "progress"),
            self._mesh,
            {task: self._version(variables) for task, variables in starts.items()},
            log=folder / "log.jsonl",
            bar="protocol, ours" if self._progress else None,
        )
        log = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
        found = evaluation.evaluate(chain, query, gallery, mesh=self._mesh, batch_size=BATCH)
        total = sum(plan.shape[0] * plan.shape[1] for plan in inputs.plans)
        with self._bar("protocol, theirs", total) as bar:
            theirs = Process(self._clone, inputs, self._new("theirs"), lambda step: bar.update())
        return _Protocol(chain, found, [x["loss"] for x in log], inputs, theirs)

    @functools.cached_property
    def _pretrained(self) -> list[Any]:
        """Variables of two models, the second trained longer, on characters of their own."""
        data = self._data("pretraining")
        optim = OptimizerSettings(lr=PRETRAIN_LR, min_lr=0.0, schedule="constant")
        trainer = self._trainer("sce", optim, "ascending")
        start = trainer.init(jax.random.key(self._seed), data.images.shape[1:])
        epochs = -(-PRETRAIN_STEPS[-1] * BATCH // (len(data) - BATCH))
        nothing = np.zeros(0, np.int64)
        plan = batch_plan(np.arange(len(data)), nothing, BATCH, epochs, self._seed, task=0)
        info = TaskInfo.create(0, 0, *plan.shape[:2], data.num_classes)
        ours = OurSteps(trainer, start, None, data, plan, info)
        found = []
        with self._bar("pre-training", PRETRAIN_STEPS[-1]) as bar:
            for stop in PRETRAIN_STEPS:
                while len(ours.losses) < stop:
                    ours.advance()
                    bar.update()
                found.append(ours.variables())
        return found

    def _sequence_inputs(self, run, data, query, gallery, starts, optim):
        tasks = range(len(run.sequence))
        memories = [
            memory_indices(data.labels, range(run.sequence.num_seen(t - 1)), REHEARSAL, run.seed)
            for t in tasks
        ]
        plans = []
        for t in tasks:
            new = np.flatnonzero(np.isin(data.labels, run.sequence.classes(t)))
            plans.append(batch_plan(new, memories[t], BATCH, EPOCHS, run.seed, t))
        return reference_run.Inputs(
            data=data,
            plans=plans,
            task_classes=[run.sequence.classes(t) for t in tasks],
            memories=memories,
            replacements={task: to_torch(variables) for task, variables in starts.items()},
            query=query,
            gallery=gallery,
            **self._shared_inputs(BATCH, REHEARSAL, optim),
        )

    def _shared_inputs(self, batch_size, rehearsal, optim) -> Mapping[str, Any]:
        return {
            "mean": self._preprocess.mean,
            "std": self._preprocess.std,
            "batch_size": batch_size,
            "rehearsal": rehearsal,
            "lr": optim.lr,
            "min_lr": optim.min_lr,
            "weight_decay": optim.weight_decay,
        }

    def _trainer(self, method, optim, order):
        method = get_method(method)
        return Trainer(
            build_embedder(method, models.create_backbone(BACKBONE), K, None, np.float32),
            method,
            LossSettings(same_class="as_coded"),
            optim,
            self._preprocess,
            K,
            order,
            self._mesh,
        )

    def _version(self, variables) -> Version:
        """Variables as an opened entry of a chain of pre-trained models."""
        variables = jax.tree.map(np.asarray, variables)
        record = Record(
            method="hoc",
            backbone=BACKBONE,
            backbone_arguments={},
            image_shape=(SIZE, SIZE, 3),
            mean=self._preprocess.mean,
            std=self._preprocess.std,
            feature_size=K - 1,
            num_prototypes=K,
            label_order="ascending",
            head_classes=None,
            task=None,
            classes_seen=0,
            parent=None,
            replaced_by="pre-trained for the comparison",
            data_fingerprint="",
            seed=self._seed,
        )
        return Version(0, record, variables, variables_sha256(variables))

    @functools.cache  # noqa: B019 - lives as long as the comparison
    def _data(self, role) -> Dataset:
        return sources.load(self._specs[role])

    def _new(self, name) -> Path:
        folder = self._folder / name
        folder.mkdir()
        return folder

    def _bar(self, name, total):
        return tqdm(total=total, desc=name, unit="step", disable=not self._progress, leave=False)

    def _by_turns(self, name, ours, their_seconds, turns):
        """Seconds of both sides, A B A B, after one turn to warm up."""
        seconds = [], []
        for _ in tqdm(range(turns + 1), name, disable=not self._progress, leave=False):
            began = time.perf_counter()
            ours()
            seconds[0].append(time.perf_counter() - began)
            seconds[1].append(their_seconds())
        return seconds[0][1:], seconds[1][1:]

    def _their_features(self, state, images):
        net = reference_run.network(self._modules, state)
        settings = self._preprocess.mean, self._preprocess.std, BATCH
        return reference_run.extract(self._modules, net, images, *settings)


def _summary_lines(make, matrix, other, theirs) -> Iterator[Line]:
    """AC and AA of both matrices, and of theirs by our functions."""
    rows, columns = np.tril_indices(len(matrix), -1)
    margins = np.abs(matrix[rows, columns] - np.diagonal(matrix)[columns])
    open_share = float(np.mean(margins <= 2 * POINTS))
    both = compatibility.average_compatibility(matrix), theirs.average_compatibility
    yield make("AC", *both, open_share + 1e-9, "pairs", True)
    both = compatibility.average_accuracy(matrix), theirs.average_accuracy
    yield make("AA, %", *both, POINTS, "matrix", True)
    both = compatibility.average_compatibility(other), theirs.average_compatibility
    yield make("AC of their matrix, by our function", *both, 1e-9, "rounding")
    both = compatibility.average_accuracy(other), theirs.average_accuracy
    yield make("AA of their matrix, by our function, %", *both, 1e-9, "rounding")


def _timed(quantity, ours, theirs, unit, per_second=None) -> Line:
    """A line of times by turns; with `per_second` the values are so many a second."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    first, _, third = statistics.quantiles(ratios, n=4, method="inclusive")
    values = [statistics.median(side) for side in (ours, theirs)]
    if per_second is not None:
        values = [per_second / value for value in values]
    ratio, spread = statistics.median(ratios), (third - first) / 2
    return Line("speed", quantity, *values, ratio, None, "speed", unit, spread)
