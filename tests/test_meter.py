"""Progress where stderr is no terminal: plain lines, seldom."""

import io
import sys
import time

import pytest

from compat_jax import meter
from compat_jax.meter import Meter, counted, track


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [100.0]
    monkeypatch.setattr(meter.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_ten_seconds_and_one_at_the_end(clock, capsys):
    with Meter("hoc", 100) as shown:
        shown.skip(20)
        for _ in range(30):
            clock[0] += 1
            shown.say("loss 2.5")
            shown.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "hoc: 30 of 100 steps, loss 2.5, about 70 s left",
        "hoc: 40 of 100 steps, loss 2.5, about 60 s left",
        "hoc: 50 of 100 steps, loss 2.5, about 50 s left",
    ]


def test_short_work_and_work_without_a_label_are_silent(clock, capsys):
    assert list(track(range(5), "short", "things")) == [0, 1, 2, 3, 4]
    with Meter(None, 5) as shown:
        clock[0] += 60
        shown.update(5)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "total", "left"), [(10, 9, "80 s"), (10, 91, "15 min"), (100, 91, "2.5 h")]
)
def test_time_left_is_in_units_that_one_reads(seconds, total, left, clock, capsys):
    shown = Meter("hoc", total)
    clock[0] += seconds
    shown.update()
    assert capsys.readouterr().err == f"hoc: 1 of {total} steps, about {left} left\n"


def test_time_left_is_measured_from_where_the_work_is_like_what_is_left(clock, capsys):
    shown = Meter("hoc", 20)
    clock[0] += 100  # a compilation
    shown.update()
    shown.restart()
    shown.speak()
    for _ in range(10):
        clock[0] += 1
        shown.update()
    assert capsys.readouterr().err.splitlines() == [
        "hoc: 1 of 20 steps, about 32 min left",
        "hoc: 1 of 20 steps",
        "hoc: 11 of 20 steps, about 9 s left",
    ]


def test_a_line_of_its_own_is_printed_also_where_nothing_is_shown(capsys):
    with Meter(None, 5) as shown:
        shown.print("done")
        shown.speak()
    assert capsys.readouterr().err == "done\n"


def test_a_line_is_not_said_twice_and_an_unknown_total_is_none(capsys, monkeypatch):
    monkeypatch.setattr(meter, "SECONDS", 0.0)
    with Meter("embedding", 0, units="pictures") as shown:
        shown.update(3)
        shown.update(2)
    assert capsys.readouterr().err == "embedding: 3 pictures\nembedding: 5 pictures\n"


def test_a_line_comes_also_where_nothing_is_done_yet(monkeypatch):
    monkeypatch.setattr(meter, "SILENCE", 0.01)
    # Not capsys, which loses what another thread writes while it is read.
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Meter("hoc", 7) as shown:
        shown.say("compiling")
        while not (said := sys.stderr.getvalue()).endswith("\n"):
            time.sleep(0.001)
    assert said in ("hoc: 0 of 7 steps\n", "hoc: 0 of 7 steps, compiling\n")


def test_one_thing_is_no_plural():
    said = [counted(1, "row"), counted(1200, "row"), counted(1, "class"), counted(0, "class")]
    assert said == ["1 row", "1,200 rows", "1 class", "0 classes"]
