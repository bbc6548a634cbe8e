"""Growth of time and memory: exponents, points in the file of numbers, and charts drawn from them."""

import dataclasses
import json

import numpy as np
import programs
import pytest
from PIL import Image

from compat_jax.errors import UserError
from launch import benchmarks
from launch.benchmarks import charts, growth, table, work
from launch.benchmarks.sides import Context
from launch.benchmarks.timing import Growth, Result

COUNTS = (1000, 10_000, 100_000)


def power(exponent, fixed=0.0, of="images", what="time") -> Growth:
    return Growth(of, what, tuple((n, fixed + 1e-3 * n**exponent) for n in COUNTS))


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.31, 2.0])
def test_a_power_law_has_its_exponent(exponent):
    assert power(exponent).fitted == pytest.approx(exponent, abs=1e-9)
    assert power(exponent).last == pytest.approx(exponent, abs=1e-9)


def test_the_fit_is_that_of_least_squares():
    values = np.random.default_rng(0).uniform(1, 100, (20, 3))
    for row in values:
        grown = Growth("images", "time", tuple(zip(COUNTS, map(float, row), strict=True)))
        slope = np.polyfit(np.log(COUNTS), np.log(row), 1)[0]
        assert grown.fitted == pytest.approx(slope, abs=1e-9)
        assert grown.last == pytest.approx(np.log10(row[2] / row[1]), abs=1e-9)


def test_the_last_decade_is_judged_because_fixed_costs_hide_growth_before_it():
    squared = power(2.0, fixed=1e5)  # as large as the growth up to the second point
    line = growth.grown(squared)
    assert squared.fitted < 1.05 < squared.last
    assert (line.ratio, line.met) == (squared.last, False)
    assert line.goal == "exponent of the last decade at most 1.05"
    assert line.what == "images, 1,000 to 100,000: time"
    assert line.note == f"fitted over all points: {squared.fitted:.2f}"
    assert growth.grown(power(1.05 - 1e-6)).met
    assert growth.grown(power(1.0, what="memory")).unit == "MB"


def context(program, patch, **changes) -> Context:
    """Tiny sizes, and a function in the place of the one that starts a program for each point."""
    patch.setattr(growth, "program", program)
    sizes = dataclasses.replace(work.TINY, **changes)
    return Context(sizes=sizes, sizes_name="tiny", dtypes=(), variants=(), worker=None)


THINGS = ("images", "classes", "versions", "prototypes", "gallery rows")


def test_scaling_asks_a_program_for_each_point(monkeypatch):
    asked = []

    def program(_, part):
        asked.append(part)
        count = int(part.partition(":")[2])
        point = {"count": count, "time": 2.0 * count, "memory": 7 * count**2}
        return f"a line of something else\n{json.dumps(point)}\n"

    lines = list(growth.scaling(context(program, monkeypatch, repeats=3)))
    others = ("images", "classes", "versions", "gallery_rows")
    assert asked == [f"{kind}:{factor}" for kind in others for factor in (1, 10, 100)]
    found = {(line.growth.of, line.growth.what): line for line in lines}
    assert [*found] == [(of, what) for of in THINGS for what in ("time", "memory")]
    assert found["versions", "time"].growth.points == ((1, 2.0), (10, 20.0), (100, 200.0))
    assert found["versions", "time"].met and not found["versions", "memory"].met
    counts, sizes = zip(*found["prototypes", "memory"].growth.points, strict=True)
    assert counts == (10, 100, 1000) and sizes[2] > sizes[0] > 0


def test_a_point_of_the_search():
    point = growth.one_point(work.TINY, "gallery_rows", 10)
    assert point["count"] == 500 and point["time"] > 0 and point["memory"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "counts"), [("images", (8, 80)), ("classes", (2, 20)), ("versions", (1, 10))]
)
def test_points_of_training_and_evaluation(kind, counts):
    scaling = dataclasses.replace(work.TINY.scaling, trained=("one_conv", 8, 2))
    sizes = dataclasses.replace(work.TINY, backbone="one_conv", scaling=scaling)
    points = [growth.one_point(sizes, kind, factor) for factor in (1, 10)]
    assert tuple(point["count"] for point in points) == counts
    assert all(point["time"] > 0 and point["memory"] > 0 for point in points)


def test_the_loss_is_measured_once_for_its_own_lines_and_for_the_growth(monkeypatch):
    here = context(None, monkeypatch, repeats=3)
    own = list(growth.large_k(here))
    again = list(growth.large_k(here))
    assert [line.value for line in own] == [line.value for line in again]
    assert [line.what for line in own] == ["K = 10", "K = 100", "K = 1000"]


def written(folder, results) -> str:
    path = str(folder / "numbers.json")
    found = {"machine": {}, "command": "c", "matmul": {}, "sizes": work.TINY}
    table.write(path, table.content(results, **found))
    return path


def test_charts_are_drawn_again_from_the_file_of_numbers(tmp_path):
    exponents = {"time": 1.0, "memory": 0.5}
    both = [
        power(exponent, of=of, what=what)
        for of in ("images", "gallery rows")
        for what, exponent in exponents.items()
    ]
    results = [*map(growth.grown, both), Result.not_run("step", "torch", "no torch")]
    path = written(tmp_path, results)
    assert charts.growths([table.read(path)]) == both
    names = charts.write(charts.folder(f"{tmp_path}/drawn"), charts.growths([table.read(path)]))
    assert names == ["growth.png", "growth-images.png", "growth-gallery-rows.png"]
    sizes = []
    for name in names:
        with Image.open(tmp_path / "drawn" / name) as drawn:
            sizes.append(drawn.size)
    assert sizes[0][1] > sizes[1][1] > 300 and sizes[1] == sizes[2]  # two rows, and one


def test_a_chart_shows_the_points_and_proportional_growth():
    drawn = charts.draw([power(1.0), power(0.5, what="memory"), power(2.0, of="versions")])
    time, other, memory, empty = drawn.axes
    dashed, measured = time.lines
    assert [*measured.get_xdata()] == [*COUNTS]
    assert [*measured.get_ydata()] == pytest.approx([1, 10, 100])
    assert [*dashed.get_ydata()] == pytest.approx([1, 10, 100])
    assert time.get_title(loc="left") == "last exponent 1.00"
    assert other.get_title(loc="left") == "last exponent 2.00"
    assert [*memory.lines[0].get_ydata()] == pytest.approx(
        [n * 1e-3 * 100_000**0.5 / 100_000 / 1e6 for n in COUNTS]
    )
    assert (time.get_ylabel(), memory.get_ylabel()) == ("time, s", "memory, MB")
    assert (memory.get_xlabel(), empty.axison) == ("images", False)
    assert [text.get_text() for text in memory.get_xticklabels()] == ["1k", "10k", "100k"]
    assert {time.get_xscale(), time.get_yscale()} == {"log"}


def test_numbers_without_growth_say_what_measures_it(tmp_path):
    path = written(tmp_path, [Result(measure="step", what="jax float32", value=1.0)])
    with pytest.raises(UserError, match=r"no growth .*--only=scaling --json=FILE measures it"):
        charts.growths([table.read(path)])
    (tmp_path / "other.json").write_text("[]")
    for name, message in (("other.json", "holds no numbers"), ("none.json", "cannot read")):
        with pytest.raises(UserError, match=message):
            table.read(str(tmp_path / name))


@pytest.mark.slow
def test_flags_that_do_not_go_together_are_refused(tmp_path):
    for flags, message in (
        (["--charts=drawn", "--only=step"], "charts are of scaling, which --only leaves out"),
        (["--numbers=some.json"], "draw --charts=FOLDER or print --costs"),
        (["--costs"], "--numbers=FILE,..."),
    ):
        code, out, err = programs.call("benchmark", *flags)
        assert (code, out) == (2, "") and message in err


@pytest.mark.slow
def test_each_point_is_measured_in_a_program_of_its_own(monkeypatch):
    monkeypatch.setattr(growth, "KINDS", ("gallery_rows",))
    time, memory = benchmarks.measure(["scaling"], sizes_name="tiny")
    assert [count for count, _ in time.growth.points] == [50, 500, 5000]
    assert all(value > 1e6 for _, value in memory.growth.points)  # with its compiled program
    assert time.met is None  # tiny sizes prove nothing
