"""Progress where stderr is no terminal: plain lines, seldom."""

import pytest

from compat_jax import meter
from compat_jax.meter import Meter, track


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
