"""Hours of the paper's protocol and of a month's upgrade, from measured rates or from bounds.

A machine's rates come from files that `launch.benchmark --json` wrote, where they were measured, or
`launch.plan --json`, where they are bounds: no program can be faster, and none has been run.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from compat_jax import Tasks
from compat_jax.errors import UserError

# The paper's protocol: CIFAR-100, and CIFAR-10 as queries and gallery.
TASKS, EPOCHS, BATCH = Tasks(initial=10, increment=15, rehearsal=20), 70, 128
CLASSES, PER_CLASS, EVALUATED = 100, 300, 60_000
# The month: rehearsed pictures are among those of fine-tuning.
FINE_TUNED, MONTH_EPOCHS, GALLERY, BACKFILLED = 100_000, 10, 1_000_000, 0.1


class Work(NamedTuple):
    """A work whose rate is needed: what `program` of a network does with a picture of `image` px."""

    program: str
    backbone: str
    image: int

    def __str__(self) -> str:
        return f"{self.program} of {self.backbone} at {self.image} px"


STEP, FEATURES = Work("training step", "resnet18", 32), Work("features", "resnet18", 32)
PHOTO_STEP, PHOTO_FEATURES = (Work(name, "resnet50", 224) for name in ("training step", "features"))
WORKS = (STEP, FEATURES, PHOTO_STEP, PHOTO_FEATURES)


@dataclasses.dataclass(frozen=True)
class Rate:
    """Time of a work on a machine.

    Attributes:
      seconds: per picture; measured, or at least so many.
      dtype: of the computation.
      batch: pictures in a batch.
      one_by_one: seconds per picture with every kernel alone; None if the time was measured.
    """

    seconds: float
    dtype: str
    batch: int
    one_by_one: float | None = None


@dataclasses.dataclass(frozen=True)
class Machine:
    """A machine, and the rates that are known of it.

    Attributes:
      name: for the head of the table.
      source: the command that finds a missing rate.
      rates: by work.
    """

    name: str
    source: str
    rates: dict[Work, Rate] = dataclasses.field(default_factory=dict)

    @property
    def is_measured(self) -> bool:
        """Return whether the rates were measured."""
        return all(rate.one_by_one is None for rate in self.rates.values())


class Cost(NamedTuple):
    """A row of the table: a text, and how many pictures pass through which works."""

    text: str
    pictures: dict[Work, float]


def paper_steps() -> int:
    """Return the steps of the paper's seven tasks."""
    sequence, counts = TASKS.sequence(CLASSES), np.full(CLASSES, PER_CLASS)
    shapes = [
        sequence.plan_shape(task, counts, rehearsal=TASKS.rehearsal, batch_size=BATCH)
        for task in range(len(sequence))
    ]
    return EPOCHS * sum(batches for batches, _ in shapes)


def costs() -> list[Cost]:
    """Return the rows of the table."""
    steps, tasks = paper_steps(), len(TASKS.sequence(CLASSES))
    tuned, backfilled = {PHOTO_STEP: FINE_TUNED * MONTH_EPOCHS}, BACKFILLED * GALLERY
    share = f"{100 * BACKFILLED:.0f} %"
    return [
        Cost(
            f"the paper's {tasks} tasks: {EPOCHS} epochs each, {steps:,} steps of {BATCH}",
            {STEP: steps * BATCH},
        ),
        Cost(
            f"their evaluation: {EVALUATED:,} pictures embedded by each of {tasks} versions",
            {FEATURES: tasks * EVALUATED},
        ),
        Cost(f"a month: {MONTH_EPOCHS} epochs of {FINE_TUNED:,} pictures", tuned),
        Cost(f"full re-index of {GALLERY:,} pictures", {PHOTO_FEATURES: GALLERY}),
        Cost("compatible: pictures embedded before the switch", {}),
        Cost(f"compatible: backfill of {share} after it", {PHOTO_FEATURES: backfilled}),
        Cost(
            "until the month's model answers, with a re-index", {**tuned, PHOTO_FEATURES: GALLERY}
        ),
        Cost("until it answers, compatible", tuned),
        Cost(f"the same and a backfill of {share}", {**tuned, PHOTO_FEATURES: backfilled}),
    ]


def machines(contents: Mapping[str, Mapping[str, Any]]) -> list[Machine]:
    """Return the machines of files, each with all rates that the table needs.

    Args:
      contents: of the files, by path, see `table.read`. Files about one machine go together; of two
        rates of one work, the faster is taken.

    Raises:
      UserError: a rate is missing; the message says which, and what to run.
    """
    found: dict[str, Machine] = {}
    for path, content in contents.items():
        machine, rates = (_planned if "programs" in content else _measured)(path, content)
        machine = found.setdefault(machine.name, machine)
        for work, rate in rates:
            known = machine.rates.get(work)
            if work in WORKS and (known is None or rate.seconds < known.seconds):
                machine.rates[work] = rate
    for machine in found.values():
        for work in WORKS:
            if work not in machine.rates:
                command = machine.source.format(_ARGUMENTS[work[1:]])
                raise UserError(
                    f"{machine.name}: no {work} among these numbers; {command} gives it", "numbers"
                )
    return list(found.values())


# Of launch.plan: a step takes as long with few pictures in all, which then fit onto every device.
_ARGUMENTS = {
    STEP[1:]: "configs/iamcl2r.py:replace=false --images=30000 --classes=100",
    PHOTO_STEP[1:]: "configs/folders.py:size=224,backbone=resnet50 --images=12800 --classes=100",
}


def _planned(path, content):
    plan, run = content["plan"], content["run"]
    several = f"{plan['devices']} x " if plan["devices"] > 1 else ""
    machine = Machine(
        f"{several}{plan['chip']} ({plan['topology']})",
        f"python -m launch.plan --topology={plan['topology']} --config={{}} "
        "--config.dtype=bfloat16 --json=FILE",
    )
    return machine, _bounds(path, content["programs"], run)


def _bounds(path, programs, run) -> Iterator[tuple[Work, Rate]]:
    for program in programs:
        work = Work(program["name"], run["backbone"], run["image"])
        if work not in WORKS:
            continue
        if not program["fits"] or "at_least" not in program:
            reason = "its chip's rates are not known" if program["fits"] else "it does not fit"
            raise UserError(f"{path}: no bound of the {work}, for {reason}", "numbers")
        least, alone = (program[key] / program["batch"] for key in ("at_least", "one_by_one"))
        yield work, Rate(least, run["dtype"], program["batch"], alone)


def _measured(path, content):
    if "sizes" not in content:
        raise UserError(
            f"{path} does not say the sizes of what was measured: measure again", "numbers"
        )
    device = content["device"]
    name = f"{content['cores']} cores, {content['processor']}" if "(cpu)" in device else device
    command = "python -m launch.benchmark --only=step,features,photos --json=FILE"
    return Machine(name, command), _rates(content["results"], content["sizes"])


# By measure: the program, and whether the line names its backbone and image size.
_MEASURES = {
    "step": ("training step", False),
    "features": ("features", False),
    "photo_step": ("training step", True),
    "photo_features": ("features", True),
}


def _rates(results, sizes) -> Iterator[tuple[Work, Rate]]:
    for line in results:
        side, _, dtype = line["what"].partition(",")[0].partition(" ")
        if line["measure"] not in _MEASURES or side != "jax" or not line["value"]:
            continue
        program, is_photo = _MEASURES[line["measure"]]
        of = sizes["photos"] if is_photo else sizes
        backbone, image = _network(line["what"]) if is_photo else (of["backbone"], of["image"])
        if program == "features":
            batch = of["batch"] if is_photo else of["feature_batch"]
            seconds = 1 / line["value"]
        else:
            batch = of["batch"]
            seconds = line["value"] / 1e3 / batch
        yield Work(program, backbone, image), Rate(seconds, dtype, batch)


def _network(what: str) -> tuple[str, int]:
    """Return backbone and pixels of a line such as "jax float32, resnet50, 224 px, batch 8"."""
    _, backbone, pixels, _ = what.split(", ")
    return backbone, int(pixels.removesuffix(" px"))


def table(found: Sequence[Machine]) -> str:
    """Write the rates, and the hours that follow from them, as two tables.

    Args:
      found: machines with all rates, see `machines`.
    """
    sources = ["measured" if machine.is_measured else "at least" for machine in found]
    heads = [f"{m.name}, {source}" for m, source in zip(found, sources, strict=True)]
    rates = [
        [f"{work}, pictures/s", *(_per_second(machine.rates[work]) for machine in found)]
        for work in WORKS
    ]
    rows = [[cost.text, *(_time(machine, cost) for machine in found)] for cost in costs()]
    lines = [
        *_markdown(["rate", *(h.replace("at least", "bound") for h in heads)], rates),
        "",
        *_markdown(["work", *heads], rows),
    ]
    if "at least" in sources:
        lines += [
            "",
            "At least: a bound from FLOP, memory and links; no chip has run it. In brackets: every "
            "kernel alone,\nall its data in main memory; launches and latencies come on top. Reading "
            "the pictures is in no\nnumber.",
        ]
    else:
        lines += ["", "Reading the pictures is in no number."]
    return "\n".join(lines)


def _markdown(head, rows):
    return [
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _per_second(rate):
    how = f"{rate.dtype}, batch {rate.batch}"
    if rate.one_by_one is None:
        return f"{_digits(1 / rate.seconds)} ({how})"
    return f"at most {_digits(1 / rate.seconds)} ({_digits(1 / rate.one_by_one)}; {how})"


def _time(machine, cost):
    if not cost.pictures:
        return "0"
    seconds = [n * machine.rates[work].seconds for work, n in cost.pictures.items()]
    if machine.is_measured:
        return duration(sum(seconds))
    alone = [n * machine.rates[work].one_by_one for work, n in cost.pictures.items()]
    return f"≥ {duration(sum(seconds))} ({duration(sum(alone))})"


def duration(seconds: float) -> str:
    """Write a time in the unit that people would use: "57.4 min", "9.02 h", "5.3 days"."""
    units = ((345_600, 86_400, "days"), (3600, 3600, "h"), (60, 60, "min"), (0, 1, "s"))
    size, unit = next((size, unit) for least, size, unit in units if seconds >= least)
    return f"{_digits(seconds / size)} {unit}"


def _digits(value):
    """Three digits: more would be of the measure's noise, or of the bound's slack."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"
