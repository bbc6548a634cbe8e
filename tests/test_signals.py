"""Ctrl-C saves and ends in good order; a second one ends at once. Broken compiled programs are swept."""

import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import programs
import pytest
import tiny

from launch import _cli

LONG = tiny.flags(
    tiny.with_backbone("flat", tiny.TRAIN),
    epochs=20_000,  # the plan of all steps is made at the start
    save_every=20_000,
)
# The program of test_resume.py, which is compiled once for both.
ARGUMENTS = ("--config=configs/glyphs.py:method=hoc,replace=false", "--noprogress", *LONG)


def started(folder):
    """A run in the middle of its first task."""
    process = programs.start("train", *ARGUMENTS, f"--workdir={folder}", flat=True)
    deadline = time.monotonic() + 120
    while not (folder / "log.jsonl").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it does not begin"
        time.sleep(0.1)
    return process


def test_ctrl_c_saves_and_the_same_command_resumes(tmp_path):
    process = started(tmp_path / "run")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, (out, err)
    lines = err.strip().splitlines()
    assert lines[-2:] == [
        "stopping: saves first; Ctrl-C again ends at once",
        "stopped and saved; run the same command to resume",
    ]
    (saved,) = (tmp_path / "run" / "progress").glob("task0-step*.json")
    step = int(saved.stem.rpartition("step")[2])
    assert step > 1
    resumed = programs.start("train", *ARGUMENTS, f"--workdir={tmp_path / 'run'}", flat=True)
    size = (tmp_path / "run" / "log.jsonl").stat().st_size
    deadline = time.monotonic() + 120
    while (tmp_path / "run" / "log.jsonl").stat().st_size <= size:
        assert resumed.poll() is None and time.monotonic() < deadline, resumed.communicate()
        time.sleep(0.1)
    resumed.kill()
    resumed.communicate()


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(tmp_path):
    process = started(tmp_path / "run")
    process.send_signal(signal.SIGSTOP)  # both are there before it can act on the first
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 75 and time.monotonic() - began < 30


# A program that asks for the signal, or does not yet, and then computes without Python.
BUSY = """
import hashlib, sys
from launch import _cli
stop = _cli.StopSignal()
if sys.argv[1] == "asked":
    stop()
try:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(float(sys.argv[2])))
except KeyboardInterrupt:
    raise SystemExit(9)
raise SystemExit(7 if stop() else 0)
"""


def busy(*arguments):
    """The program, at its computation."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_within_a_compilation_ctrl_c_is_answered_at_once_and_a_second_one_obeyed():
    process = busy("asked", "2e9")
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert process.stderr.readline() == "stopping: saves first; Ctrl-C again ends at once\n"
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert err == "\nstopped at once; the same command goes on from the last save\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_kept_until_the_run_asks(number):
    process = busy("asked", "1e6")
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_there_is_anything_to_save_a_signal_ends_the_program(number):
    process = busy("not yet", "1e6")
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 9


def test_compiled_programs_that_were_cut_off_are_swept(tmp_path):
    rng = np.random.default_rng(0)
    whole = zlib.compress(rng.bytes(5000))
    for number, content in enumerate((whole, whole[:-1], whole[:100], b"", whole[:-5] + b"xxxxx")):
        (tmp_path / f"program{number}-cache").write_bytes(content)
    (tmp_path / "other").write_bytes(b"")
    _cli.sweep_compiled(tmp_path)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == [".checked", "other", "program0-cache"]
    (tmp_path / "program5-cache").write_bytes(whole[:50])  # a later kill
    _cli.sweep_compiled(tmp_path)
    assert not (tmp_path / "program5-cache").exists()
    _cli.sweep_compiled(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_entries_checked_before_are_not_read_again(tmp_path):
    (tmp_path / "program0-cache").write_bytes(b"x" * 10)
    _cli.sweep_compiled(tmp_path)
    old = time.time() - 3600
    cut = tmp_path / "program1-cache"
    cut.write_bytes(zlib.compress(b"a" * 99)[:-1])
    os.utime(cut, (old, old))  # as if it had been there at the last check
    _cli.sweep_compiled(tmp_path)
    assert cut.exists()


SCRIPT = """
import sys
import tiny
import compat_jax as cj
try:
    cj.train(tiny.run(epochs=20_000), tiny.dataset(), sys.argv[1], session=tiny.session())
except KeyboardInterrupt as interrupt:
    print("interrupted:", interrupt)
    raise SystemExit(7)
"""


@pytest.mark.slow
def test_ctrl_c_in_a_script_saves_and_interrupts(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    folder = tmp_path / "run"
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    deadline = time.monotonic() + 120
    while not (folder / "log.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 7 and "interrupted: saved: call again to resume" in out, (out, err)
    assert list((folder / "progress").glob("task0-step*.json"))
