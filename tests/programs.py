"""Programs of launch/, as children of a server that has imported what they need."""

import atexit
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    """That of a program: of this process now, and one simulated device."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


class Program:
    """A program of program_server.py, as `subprocess.Popen` shows one, with texts for its output."""

    def __init__(self, argv, *, flat: bool, given: dict[str, str]):
        # What JAX reads as it is imported is as it was when the server began.
        self._key = tuple(sorted((k, v) for k, v in given.items() if k.startswith("JAX_")))
        place = Path(tempfile.mkdtemp(dir=_outputs()))
        self._files = {name: str(place / name) for name in ("out", "err")}
        for file in self._files.values():  # there also if it is killed before it opens them
            Path(file).touch()
        self.args, self.returncode = argv, None
        request = {"argv": argv, "environment": given, "flat": flat, **self._files}
        self.pid = self._ask(request)

    def _ask(self, request):
        server = _server(self._key)
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        if not answer:
            _server.cache_clear()
        assert answer, f"the server of programs ended during {self.args}"
        return json.loads(answer)

    def poll(self, block=False) -> int | None:
        """Exit code, None while it runs."""
        if self.returncode is None:
            self.returncode = self._ask({"wait": self.pid, "block": block})
        return self.returncode

    def communicate(self, timeout=None) -> tuple[str, str]:
        """Stdout and stderr, when it has ended."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll(block=deadline is None) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.005)
        out, err = (Path(f).read_bytes().decode(errors="replace") for f in self._files.values())
        return out, err

    def send_signal(self, number) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.poll(block=True)


def start(program, *arguments, flat=False, **environ) -> Program:
    """`python -m launch.PROGRAM ...` on one simulated device; `flat` adds that backbone to it.

    Further keywords are environment variables.
    """
    argv = [f"launch.{program}", *map(str, arguments)]
    return Program(argv, flat=flat, given={**environment(), **environ})


def call(program, *arguments, flat=False) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a program that ends by itself."""
    with start(program, *arguments, flat=flat) as process:
        out, err = process.communicate()
    return process.returncode, out, err


@functools.cache
def _outputs() -> str:
    """A folder for what programs write, until this process ends."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _server(key):
    own = {k: v for k, v in environment().items() if not k.startswith("JAX_")}
    server = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "program_server.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**own, **dict(key)},
    )
    atexit.register(server.__exit__, None, None, None)
    return server


def call_alone(program, *arguments) -> tuple[int, str, str]:
    """The same by a process that imports everything itself."""
    done = subprocess.run(
        [sys.executable, "-m", f"launch.{program}", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr
