"""Progress of long work: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

SECONDS = 10.0  # between plain lines
SILENCE = 10.0  # before the first one, if no unit is done

T = TypeVar("T")


class Meter:
    """Counts units of work on stderr; a context manager.

    Args:
      label: what is counted; None shows nothing.
      total: units in all; 0 where nobody knows.
      units: name of the units.
      keep: leave the bar on the terminal at the end.
    """

    def __init__(self, label: str | None, total: int, *, units: str = "steps", keep: bool = True):
        self.label, self.total, self.units = label, total, units
        self.done, self.note, self._said = 0, "", ""
        self._first, self._began, self._spoke = 0, time.monotonic(), time.monotonic()
        self._since = self._began  # from when on the speed is measured
        self._bar: Any = None
        if label is not None and sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=label, unit=f" {units}", leave=keep)
        # Before the first unit is done a program may compile for minutes.
        self._alarm = threading.Timer(SILENCE, self._speak)
        self._alarm.daemon = True
        if label is not None and self._bar is None:
            self._alarm.start()

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: Any) -> None:
        self._alarm.cancel()
        if self._bar is not None:
            self._bar.close()
        elif time.monotonic() - self._began >= SECONDS:
            self._speak()

    def skip(self, count: int) -> None:
        """Count units that were done before, or that say nothing about the speed of the others."""
        self._first += count
        self.done += count
        if self._bar is not None:
            self._bar.update(count)

    def update(self, count: int = 1) -> None:
        """Count units done."""
        self._alarm.cancel()
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._spoke >= SECONDS:
            self._speak()

    def restart(self) -> None:
        """Measure the speed from here on: what was done so far was no measure of it."""
        self._first, self._since = self.done, time.monotonic()

    def say(self, note: str) -> None:
        """Set the text behind the numbers."""
        self.note = note
        if self._bar is not None:
            self._bar.set_postfix_str(note)

    def print(self, line: str) -> None:
        """Print a line of its own, also where nothing else is shown."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)
            self._said = self._line()  # which would say it again

    def speak(self) -> None:
        """Print the plain line at once, where there is no bar."""
        if self._bar is None:
            self._speak()

    def _speak(self) -> None:
        self._spoke = time.monotonic()
        line = self._line()
        if self.label is not None and line != self._said:
            print(line, file=sys.stderr, flush=True)
        self._said = line

    def _line(self) -> str:
        seconds, fresh = self._spoke - self._since, self.done - self._first
        left = (self.total - self.done) * seconds / fresh if fresh else 0.0
        counted = f"{self.done} of {self.total}" if self.total else f"{self.done}"
        parts = [f"{self.label}: {counted} {self.units}", self.note]
        if fresh and self.done < self.total:
            parts.append(f"about {duration(left)} left")
        return ", ".join(filter(None, parts))


def track(items: Sequence[T], label: str | None, units: str) -> Iterator[T]:
    """Yield items and count them.

    Args:
      items: to go through.
      label: see `Meter`.
      units: name of the items.
    """
    with Meter(label, len(items), units=units, keep=False) as meter:
        for item in items:
            yield item
            meter.update()


def duration(seconds: float) -> str:
    """Say a time in units that one reads."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def counted(number: int, unit: str) -> str:
    """Say a number of things: "1 row", "1,200 rows", "3 classes"."""
    plural = "" if number == 1 else "es" if unit.endswith("s") else "s"
    return f"{number:,} {unit}{plural}"
