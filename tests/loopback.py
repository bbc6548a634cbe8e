"""Servers on loopback that tests start and end."""

import contextlib
import socket
import subprocess
import time
import urllib.request

import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def served(command, first: urllib.request.Request, settings):
    """Run a server that is there once it answers a first request, with settings in the environment."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with pytest.MonkeyPatch.context() as patch, subprocess.Popen(command, **quiet) as process:
        for name, value in settings.items():
            patch.setenv(name, value)
        try:
            _ask(first, process)
            yield
        finally:
            process.kill()


def _ask(request, process):
    for _ in range(600):
        assert process.poll() is None
        try:
            urllib.request.urlopen(request).close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"no server at {request.full_url}")
