"""Hours of the paper's protocol and of a month's upgrade, from rates that were measured or bounded."""

import json

import programs
import pytest

from compat_jax import hlo, slice_cost
from compat_jax.errors import UserError
from compat_jax.training import Run
from launch.benchmarks import costs, table, work
from launch.benchmarks.timing import Growth, Result
from launch.tpu import planning

# Milliseconds of a step, and pictures a second, by measure: HOC on two cores.
MEASURED = {
    "step": ("jax float32", 200.0, "ms"),
    "features": ("jax float32", 2000.0, "images/s"),
    "photo_step": ("jax bfloat16, resnet50, 224 px, batch 8", 1440.0, "ms"),
    "photo_features": ("jax bfloat16, resnet50, 224 px, batch 8", 25.0, "images/s"),
}
MACHINE = {"device": "1 x cpu (cpu)", "processor": "EPYC", "cores": 2}


def measured(names=MEASURED, sizes=None, more=()):
    """The content of a file of numbers."""
    lines = [
        Result(measure=name, what=what, value=value, unit=unit)
        for name, (what, value, unit) in MEASURED.items()
        if name in names
    ]
    what = "jax bfloat16, vit_s16, 224 px, batch 8"
    vit = Result(measure="photo_step", what=what, value=1.0, unit="ms")
    lines = [*lines, vit, *more, Result.not_run("step", "torch eager", "no clone")]
    parts = {"command": "c", "matmul": {}, "sizes": sizes or work.Sizes()}
    return json.loads(json.dumps(table.content(lines, machine=MACHINE, **parts)))


def planned(backbone="resnet18", image=32, chips="h100:1", **changes):
    """Return the JSON of a plan for a chip that needs 1 ms for a step, or 2 one by one."""
    program = {"fits": True, "bytes": 1, "batch": 128, "at_least": 1e-3, "one_by_one": 2e-3}
    names = ("training step", "features", "search")
    return {
        "plan": {"topology": chips, "devices": 1, "chip": "H100 SXM"},
        "run": {"method": "hoc", "backbone": backbone, "image": image, "dtype": "bfloat16"},
        "programs": [{**program, "name": name, **changes} for name in names],
    }


def rows(text):
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {line[0]: line[1:] for line in lines}


def test_the_steps_are_those_of_the_paper():
    # 3,000 pictures; then 4,500 new ones and 20 of each earlier class, in batches of 128.
    batches = [3000 // 128, *((4500 + 20 * earlier) // 128 for earlier in range(10, 100, 15))]
    assert batches == [23, 36, 39, 41, 43, 46, 48]
    assert costs.paper_steps() == 70 * sum(batches) == 19_320


def test_times_by_hand_from_measured_rates():
    found = rows(costs.table(costs.machines({"cpu.json": measured()})))
    assert found["work"] == ["2 cores, EPYC, measured"]
    assert found["training step of resnet18 at 32 px, pictures/s"] == ["640 (float32, batch 128)"]
    assert found["features of resnet50 at 224 px, pictures/s"] == ["25 (bfloat16, batch 8)"]
    times = [cells[0] for cells in [*found.values()][6:]]
    assert times == [
        "1.07 h",  # 19,320 x 0.2 s = 3,864 s
        "3.5 min",  # 7 x 60,000 / 2,000 = 210 s
        "50 h",  # 10 x 100,000 x 1.44 s / 8 = 180,000 s
        "11.1 h",  # 1,000,000 / 25 = 40,000 s
        "0",
        "1.11 h",  # 4,000 s
        "61.1 h",  # 220,000 s
        "50 h",
        "51.1 h",  # 184,000 s
    ]


def test_bounds_are_marked_and_stand_beside_what_was_measured():
    contents = {
        "cpu.json": measured(),
        "paper.json": planned(),
        "month.json": planned("resnet50", 224, at_least=0.128, one_by_one=0.256),
    }
    text = costs.table(costs.machines(contents))
    found = rows(text)
    assert found["rate"][1] == "H100 SXM (h100:1), bound"
    assert found["work"] == ["2 cores, EPYC, measured", "H100 SXM (h100:1), at least"]
    assert found["training step of resnet18 at 32 px, pictures/s"][1] == (
        "at most 128,000 (64,000; bfloat16, batch 128)"
    )
    assert found["full re-index of 1,000,000 pictures"][1] == "≥ 16.7 min (33.3 min)"
    assert found["until it answers, compatible"][1] == "≥ 16.7 min (33.3 min)"
    assert found["until the month's model answers, with a re-index"][1] == "≥ 33.3 min (1.11 h)"
    assert found["compatible: pictures embedded before the switch"] == ["0", "0"]
    assert "no chip has run it" in text


def test_files_of_one_machine_go_together_and_the_faster_type_counts():
    quicker = Result(measure="step", what="jax bfloat16", value=100.0, unit="ms")
    contents = {
        "a.json": measured(("step", "features"), more=[quicker]),
        "b.json": measured(("photo_step", "photo_features")),
    }
    (machine,) = costs.machines(contents)
    assert machine.rates[costs.STEP] == costs.Rate(0.1 / 128, "bfloat16", 128)
    assert machine.is_measured and set(machine.rates) == set(costs.WORKS)


def test_a_missing_measure_says_which_and_what_to_run():
    command = r"python -m launch.benchmark --only=step,features,photos --json=FILE gives it"
    without = {name for name in MEASURED if name != "photo_features"}
    with pytest.raises(UserError, match=f"no features of resnet50 at 224 px .*{command}"):
        costs.machines({"cpu.json": measured(without)})
    with pytest.raises(UserError, match=f"no training step of resnet18 at 32 px .*{command}"):
        costs.machines({"cpu.json": measured(sizes=work.TINY)})
    with pytest.raises(UserError) as refused:
        costs.machines({"paper.json": planned()})
    assert "h100:1" in str(refused.value) and "no training step of resnet50" in str(refused.value)
    assert "--config=configs/folders.py:size=224,backbone=resnet50 " in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            planned(fits=False),
            "no bound of the training step of resnet18 at 32 px, .* does not fit",
        ),
        (
            {
                **planned(),
                "programs": [{"name": "features", "fits": True, "bytes": 1, "batch": 8}],
            },
            "rates are not known",
        ),
        ({**MACHINE, "results": []}, "does not say the sizes"),
    ],
)
def test_files_that_hold_no_rate_are_refused(content, message):
    with pytest.raises(UserError, match=message):
        costs.machines({"some.json": content})


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "0.0123 s"),
        (59, "59 s"),
        (60, "1 min"),
        (3600, "1 h"),
        (345_599, "96 h"),
        (345_600, "4 days"),
        (1e9, "11,600 days"),
    ],
)
def test_times_in_the_unit_that_people_use(seconds, text):
    assert costs.duration(seconds) == text


def plan_of(costs_of):
    return planning.Plan(
        topology="h100:1",
        devices=1,
        chip=hlo.CHIPS["NVIDIA H100 80GB HBM3"],
        run=Run(method="hoc", backbone="resnet18", batch_size=128, dtype="bfloat16"),
        image_shape=(32, 32, 3),
        batches={"training step": 128, "features": 256},
        costs=costs_of,
    )


def test_the_bounds_of_a_plan_are_read_back(tmp_path):
    product = hlo.Kernel("p", "product", flops={"bf16": 989.4e9})  # a millisecond
    programs = [
        slice_cost.Cost(name, 1, 2, 3, hlo.Program((product,)))
        for name in ("training step", "features", "search")
    ]
    plan_of(programs).write(str(tmp_path / "new" / "plan.json"))
    content = table.read(str(tmp_path / "new" / "plan.json"))
    assert content["programs"][2] == {
        "name": "search",
        "fits": True,
        "bytes": 6,
        "at_least": pytest.approx(1e-3),
        "one_by_one": pytest.approx(1e-3),
        "limit": "FLOP",
    }
    month = planned("resnet50", 224)
    (machine,) = costs.machines({"plan.json": content, "month.json": month})
    assert machine.rates[costs.FEATURES].seconds == pytest.approx(1e-3 / 256)
    assert machine.rates[costs.STEP].batch == 128 and not machine.is_measured


def test_a_program_that_does_not_fit_has_no_bound():
    plan = plan_of([slice_cost.Cost("features", too_large="needs 24.54G")])
    (program,) = plan.content()["programs"]
    assert program == {"name": "features", "fits": False, "bytes": 0, "batch": 256}
    assert plan.too_large == ["features"]


def test_one_command_draws_and_prints_what_files_hold(tmp_path):
    grown = Growth("images", "time", ((10, 1.0), (100, 10.0), (1000, 99.0)))
    line = Result(measure="scaling", what="images", value=99.0, growth=grown)
    (tmp_path / "cpu.json").write_text(json.dumps(measured(more=[line])))
    (tmp_path / "plan.json").write_text(json.dumps(planned()))
    (tmp_path / "month.json").write_text(json.dumps(planned("resnet50", 224)))
    numbers = ",".join(str(tmp_path / f"{name}.json") for name in ("cpu", "plan", "month"))
    flags = (f"--numbers={numbers}", "--costs", f"--charts={tmp_path}/drawn")
    code, out, err = programs.call("benchmark", *flags)
    assert (code, err) == (0, "")
    assert rows(out)["compatible: pictures embedded before the switch"] == ["0", "0"]
    assert [*(tmp_path / "drawn").iterdir()] and f"wrote {tmp_path}/drawn/growth-images.png" in out


@pytest.mark.parametrize("program", ["benchmark", "plan"])
@pytest.mark.slow
def test_help_teaches_how_to_get_the_costs(program):
    code, out, _ = programs.call(program, "--help")
    assert code == 0 and "--costs" in out and "launch.plan --topology=h100:1" in out
    assert "--numbers" in out and "--json" in out
