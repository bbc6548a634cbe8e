"""Measures of training: a step, an epoch, the first step, streaming, the whole protocol."""

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from compat_jax.benchmarks import work
from compat_jax.benchmarks.flops import forward_flops, hoc_step_flops
from compat_jax.benchmarks.sides import Context, best_reference, program, reference_sides
from compat_jax.benchmarks.timing import Result, Timing, alternate, seconds_of
from compat_jax.chain import Chain
from compat_jax.data.streaming import RecordImages
from compat_jax.data.tasks import TaskSequence
from compat_jax.train import loop
from compat_jax.train.fit import Fit
from compat_jax.train.progress import Progress


def step(context: Context) -> Iterator[Result]:
    """One step of HOC, beside the reference's."""
    sizes = context.sizes
    sides, counts = {}, {}
    for dtype in context.dtypes:
        one = work.Training.create(sizes, dtype, 1000)
        sides[f"jax {dtype}"] = seconds_of(lambda one=one: one.advance(sizes.steps))
        forward = forward_flops(one.trainer.network, one.previous, (sizes.image, sizes.image, 3))
        counts[f"jax {dtype}"] = hoc_step_flops(forward)
    needed = sizes.batch * next(iter(counts.values()))
    settings = {"batch": sizes.batch, "num_classes": sizes.num_prototypes, "seed": 0}
    others, refused = reference_sides(context, "step", steps=sizes.steps, **settings)
    timings = alternate({**sides, **others}, sizes.repeats)
    for name, timing in timings.items():
        dtype = name.removeprefix("jax ")
        ratio, goal, met = None, None, None
        if name in sides:
            ratio, goal, met = _step_goal(dtype, timing.median / sizes.steps, timings)
        yield Result(
            "step",
            name,
            1e3 * timing.median / sizes.steps,
            "ms",
            timing.spread,
            len(timing.seconds),
            needed * sizes.steps / timing.median,
            ratio,
            goal,
            met,
        )
    yield from refused


def _step_goal(dtype, seconds, timings):
    if jax.default_backend() != "cpu":
        return 1e3 * seconds, "at most 1.0 ms", 1e3 * seconds <= 1.0
    eager, best = timings.get("torch eager"), best_reference(timings)
    if eager is None:
        return None, None, None
    newer = jax.__version_info__ >= (0, 12)
    if dtype == "float32":
        limit, against, name = (0.75 if newer else 0.95), eager.median, "torch eager"
    else:
        limit, against, name = 0.9, best.median, "the best of torch"
    ours = timings[f"jax {dtype}"].median
    if dtype != "float32" and not newer:
        return ours / against, None, None
    return ours / against, f"at most {limit} of {name}", ours / against <= limit


def epoch(context: Context) -> Iterator[Result]:
    """A task's epochs with memory and augmentation: how much of the time is in the step."""
    sizes = context.sizes
    first, new, per_class, epochs = sizes.epoch
    data = work.dataset(first + new, per_class, sizes.image)
    run = work.run(sizes, "hoc", "float32", TaskSequence(first + new, first, new), epochs)
    one = work.Training.create(sizes, "float32", 1000)
    with tempfile.TemporaryDirectory() as folder:
        epoch_of = _Epochs(run, data, Path(folder))
        timings = alternate(
            {
                "steps": seconds_of(lambda: one.advance(epoch_of.steps)),
                "epochs": epoch_of,
            },
            max(sizes.repeats // 5, 2),
            1,
        )
    share = timings["steps"].median / timings["epochs"].median
    yield Result(
        "epoch",
        f"{epochs} epochs of {epoch_of.steps // epochs} steps",
        1e3 * timings["epochs"].median / epochs,
        "ms",
        timings["epochs"].spread,
        len(timings["epochs"].seconds),
        None,
        share,
        "at least 0.97 of it in the step",
        share >= 0.97,
        "steps alone: time of as many dispatched without the loop around them",
    )


class _Epochs:
    """All epochs of task 1, as the loop over tasks runs them, saves included."""

    def __init__(self, run, data, folder, budget=0):
        devices = work.mesh()
        self.trainer = loop._trainer(run, None, devices)
        self.fit = Fit(
            data, devices, Progress(folder / "progress"), 0, folder / "log", lambda: False, budget
        )
        self.plan = loop._plans(run, data.labels)[1]
        self.steps = len(self.plan)
        self.info = loop._task_info(run, 1, self.steps)
        self.variables = self.trainer.init(jax.random.key(0), data.images.shape[1:])

    def __call__(self):
        self.fit.progress.clear()
        began = time.perf_counter()
        meter = tqdm(disable=True)
        trained = self.fit(
            self.trainer, self.variables, self.info, self.plan, self.steps, meter, ""
        )
        jax.block_until_ready(trained)
        return time.perf_counter() - began


def first_step(context: Context) -> Iterator[Result]:
    """From the start of a program to its first update, with an empty and with a filled cache."""
    with tempfile.TemporaryDirectory() as folder:

        def start():
            began = time.perf_counter()
            program(context, "first_update", COMPAT_JAX_CACHE=folder)
            return time.perf_counter() - began

        first = start()
        later = Timing(tuple(start() for _ in range(max(context.sizes.repeats // 5, 1))))
    share = later.median / first
    yield Result("first_step", "empty cache", first, "s", note="one start")
    yield Result(
        "first_step",
        "second start",
        later.median,
        "s",
        later.spread,
        len(later.seconds),
        None,
        share,
        "at most 0.4 of the first",
        share <= 0.4,
    )


def first_update(sizes: work.Sizes) -> None:
    """What the program that `first_step` starts does."""
    jax.block_until_ready(work.Training.create(sizes, "float32", 1000).advance(1))


def streaming(context: Context) -> Iterator[Result]:
    """Epochs over images that stay in array_record files, beside images on the device."""
    sizes = context.sizes
    count, budget, steps = sizes.streaming
    data = work.dataset(10, count // 10, sizes.image)
    epochs = max(1, round(steps * sizes.batch / count))
    run = work.run(sizes, "hoc", "float32", TaskSequence(10, 5, 5), epochs)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        on_disk = dataclasses.replace(data, images=_in_records(data.images, folder / "images"))
        sides = {
            "in memory": _Epochs(run, data, folder / "a"),
            "streamed": _Epochs(run, on_disk, folder / "b", budget),
        }
        timings = alternate(sides, max(sizes.repeats // 5, 2), 1)
    share = timings["in memory"].median / timings["streamed"].median
    for what, timing in timings.items():
        judged = what == "streamed"
        yield Result(
            "streaming",
            f"{what}, {count} images of {sizes.image} px",
            sides[what].steps * sizes.batch / timing.median,
            "images/s",
            timing.spread,
            len(timing.seconds),
            None,
            share if judged else None,
            "at least 0.9 of in memory" if judged else None,
            share >= 0.9 if judged else None,
            f"array_record on local disk, {budget >> 20} MiB on the device" if judged else "",
        )


def _in_records(images, path):
    """The images in an array_record file, raw."""
    from array_record.python import array_record_data_source, array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for image in images:
        writer.write(image.tobytes())
    writer.close()
    records = array_record_data_source.ArrayRecordDataSource(str(path))

    class Source:
        def __len__(self):
            return len(records)

        def __getitems__(self, positions):
            shape = images.shape[1:]
            contents = records.__getitems__(positions)
            return [{"image": np.frombuffer(x, np.uint8).reshape(shape)} for x in contents]

    return RecordImages(Source(), images.shape[1:])


def protocol(context: Context) -> Iterator[Result]:
    """Seven tasks of CIFAR-100's size, random pictures, for `hoc` and `er`."""
    sizes = context.sizes
    sequence = TaskSequence(100, 10, 15)
    data = work.dataset(100, 300, sizes.image)
    if context.clone is not None:
        each = _reference_step(context)
    for method in ("hoc", "er"):
        run = work.run(sizes, method, context.dtypes[-1], sequence, sizes.protocol)
        steps = sum(len(plan) for plan in loop._plans(run, data.labels))
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            chain = Chain(f"{folder}/chain")
            loop.train(run, data, chain, Progress(f"{folder}/progress"), work.mesh())
            seconds = time.perf_counter() - began
        note = "compilation and the chain included"
        if context.clone is not None:
            note += f"; the reference's steps alone would take {each * steps:.0f} s"
        yield Result(
            "protocol",
            f"{method} {run.dtype}, {steps} steps",
            seconds,
            "s",
            None,
            1,
            None,
            seconds,
            "at most 120 s",
            seconds <= 120,
            note,
        )


def _reference_step(context):
    """Seconds that the reference takes for a step of HOC, without its loader."""
    settings = {"batch": context.sizes.batch, "num_classes": context.sizes.num_prototypes}
    count = context.sizes.steps
    repeat = context.worker.prepare(
        "protocol", "step", variant="eager", steps=count, seed=0, **settings
    )
    return alternate({"torch": repeat}, 5)["torch"].median / count
