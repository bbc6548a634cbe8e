"""Measures of training: a step, an epoch, the first step, streaming and the whole protocol."""

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from compat_jax import Dataset, Run, Session, Tasks, Version, train
from compat_jax.data.streaming import RecordImages
from compat_jax.meter import Meter
from compat_jax.training.fit import Fit
from compat_jax.training.task import sequence_task
from compat_jax.training.workdir import Workdir
from launch.benchmarks import work
from launch.benchmarks.flops import forward_flops, hoc_step_flops
from launch.benchmarks.sides import Context, best_reference, program, reference_sides
from launch.benchmarks.timing import Result, Timing, alternate, seconds_of


def step(context: Context) -> Iterator[Result]:
    """Measure a step of HOC, beside the reference."""
    sizes = context.sizes
    sides, counts = {}, {}
    for dtype in context.dtypes:
        one = work.Training.create(sizes, dtype)
        sides[f"jax {dtype}"] = seconds_of(lambda one=one: one.advance(sizes.steps))
        shape = one.data.images.shape[1:]
        forward = forward_flops(one.trainer.network, one.frozen["previous"], shape)
        counts[f"jax {dtype}"] = hoc_step_flops(forward)
    needed = sizes.batch * next(iter(counts.values()))
    settings = {"batch": sizes.batch, "num_classes": sizes.num_prototypes, "seed": 0}
    others, refused = reference_sides(context, "step", steps=sizes.steps, **settings)
    timings = alternate({**sides, **others}, sizes.repeats, settle=True)
    for name, timing in timings.items():
        dtype = name.removeprefix("jax ")
        ratio, goal, met = None, None, None
        if name in sides:
            ratio, goal, met = _step_goal(dtype, timing.median / sizes.steps, timings)
        yield Result.of(
            "step",
            name,
            timing,
            value=1e3 * timing.median / sizes.steps,
            unit="ms",
            flops=needed * sizes.steps / timing.median,
            ratio=ratio,
            goal=goal,
            met=met,
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
        limit, against, name = 0.9, best.median, "the fastest variant of torch"
    ours = timings[f"jax {dtype}"].median
    if dtype != "float32" and not newer:
        return ours / against, None, None
    return ours / against, f"at most {limit} of {name}", ours / against <= limit


def epoch(context: Context) -> Iterator[Result]:
    """Measure a task's epochs with memory and augmentation, and the share of the steps in them."""
    sizes = context.sizes
    first, new, per_class, epochs = sizes.epoch
    data = work.dataset(first + new, per_class, sizes.image)
    run = work.run(sizes, Tasks(initial=first, increment=new), epochs)
    one = work.Training.create(sizes)
    with tempfile.TemporaryDirectory() as folder:
        epoch_of = Epochs(run, data, folder, start=work.version(sizes))
        timings = alternate(
            {
                "steps": seconds_of(lambda: one.advance(epoch_of.steps)),
                "epochs": epoch_of,
            },
            max(sizes.repeats // 5, 2),
            1,
        )
    share = timings["steps"].median / timings["epochs"].median
    yield Result.of(
        "epoch",
        f"{epochs} epochs of {epoch_of.steps // epochs} steps",
        timings["epochs"],
        value=1e3 * timings["epochs"].median / epochs,
        unit="ms",
        ratio=share,
        goal="at least 0.97 of the time in the steps",
        met=share >= 0.97,
        note="compared with as many steps dispatched without the loop around them",
    )


class Epochs:
    """Run all epochs of task 1 as training does, saves included; return the seconds.

    Args:
      run: what to compute.
      data: the images.
      folder: for the saves.
      start: version that the task starts from.
      budget: bytes of images that may lie on a device; 0 for no limit.

    Attributes:
      steps: of all epochs.
    """

    def __init__(
        self, run: Run, data: Dataset, folder: str | Path, *, start: Version, budget: int = 0
    ):
        session = Session(mesh=work.mesh(), device_budget=budget)
        self._fit = Fit(data, session, Workdir(folder))
        sequence = run.tasks.sequence(data.num_classes)
        self._task = sequence_task(
            run, sequence, 1, labels=data.labels, start=start, replaced=False
        )
        self.steps = self._task.steps

    def __call__(self) -> float:
        """Run them and return the seconds."""
        self._fit.workdir.checkpointer.clear()
        began = time.perf_counter()
        trained = self._fit(self._task, Meter(None, 0), self.steps).variables
        jax.block_until_ready(trained)
        return time.perf_counter() - began


def first_step(context: Context) -> Iterator[Result]:
    """Measure the time from the start of a program to its first update, without and with a cache."""
    with tempfile.TemporaryDirectory() as folder:

        def start():
            began = time.perf_counter()
            program(context, "first_update", COMPAT_JAX_CACHE=folder)
            return time.perf_counter() - began

        first = start()
        later = Timing(tuple(start() for _ in range(max(context.sizes.repeats // 5, 1))))
    share = later.median / first
    yield Result(measure="first_step", what="empty cache", value=first, unit="s")
    yield Result.of(
        "first_step",
        "filled cache",
        later,
        ratio=share,
        goal="at most 0.33 of that with an empty cache",
        met=share <= 0.33,
    )


def first_update(sizes: work.Sizes) -> None:
    """Do one update, in a process that `first_step` starts."""
    jax.block_until_ready(work.Training.create(sizes).advance(1))


def streaming(context: Context) -> Iterator[Result]:
    """Measure epochs over images in array_record files, beside images on the device."""
    sizes = context.sizes
    count, budget, steps = sizes.streaming
    data = work.dataset(10, count // 10, sizes.image)
    epochs = max(1, round(steps * sizes.batch / count))
    run, start = work.run(sizes, Tasks(initial=5, increment=5), epochs), work.version(sizes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        on_disk = dataclasses.replace(data, images=_in_records(data.images, folder / "images"))
        sides = {
            "in memory": Epochs(run, data, folder / "a", start=start),
            "streamed": Epochs(run, on_disk, folder / "b", start=start, budget=budget),
        }
        timings = alternate(sides, max(sizes.repeats // 5, 2), 1)
    share = timings["in memory"].median / timings["streamed"].median
    for what, timing in timings.items():
        judged = what == "streamed"
        yield Result.of(
            "streaming",
            f"{what}, {count} images of {sizes.image} px",
            timing,
            value=sides[what].steps * sizes.batch / timing.median,
            unit="images/s",
            ratio=share if judged else None,
            goal="at least 0.9 of the rate in memory" if judged else None,
            met=share >= 0.9 if judged else None,
            note=f"array_record on local disk, {budget >> 20} MiB on the device" if judged else "",
        )


def _in_records(images, path):
    """Write the images, uncompressed, to an array_record file, and read them from it."""
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
    """Measure seven tasks of the size of CIFAR-100, on random images, for `hoc` and `er`."""
    epochs, per_class, least = context.sizes.protocol
    num_prototypes = max(context.sizes.num_prototypes, least)
    sizes = dataclasses.replace(context.sizes, num_prototypes=num_prototypes)
    tasks = Tasks(initial=10, increment=15)
    data = work.dataset(100, per_class, sizes.image)
    if context.places.clone is not None:
        each = _reference_step(context)
    for method in ("hoc", "er"):
        run = work.run(sizes, tasks, epochs, method=method, dtype=context.dtypes[-1])
        steps = _steps(run, data)
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            train(run, data, folder, session=Session(mesh=work.mesh()))
            seconds = time.perf_counter() - began
        note = "including compilation and the chain"
        if context.places.clone is not None:
            note += f"; the steps of the reference alone would take {each * steps:.0f} s"
        yield Result(
            measure="protocol",
            what=f"{method} {run.dtype}, {steps} steps",
            value=seconds,
            unit="s",
            ratio=seconds,
            goal="at most 120 s",
            met=seconds <= 120,
            note=note,
        )


def _steps(run, data):
    """Count the steps of all tasks."""
    sequence, counts = run.tasks.sequence(data.num_classes), data.counts()
    kept, batch = run.tasks.rehearsal, run.batch_size
    shapes = [
        sequence.plan_shape(task, counts, rehearsal=kept, batch_size=batch)
        for task in range(len(sequence))
    ]
    return run.epochs * sum(batches for batches, _ in shapes)


def _reference_step(context):
    """Measure the seconds of a step of HOC of the reference, without its loader."""
    settings = {"batch": context.sizes.batch, "num_classes": context.sizes.num_prototypes}
    count = context.sizes.steps
    repeat = context.worker.prepare(
        "protocol", "step", variant="eager", steps=count, seed=0, **settings
    )
    return alternate({"torch": repeat}, 5)["torch"].median / count
