"""Two real processes over loopback, each with four CPU devices, against one with a single device."""

import dataclasses
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import flat  # noqa: F401, registers the backbone
import jax
import numpy as np
import programs
import pytest
import tiny
from loopback import free_port
from PIL import Image

from compat_jax import experiment, hosts
from compat_jax.chain import Chain
from compat_jax.data import Dataset
from compat_jax.errors import UserError
from compat_jax.session import Session

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
from configs import iamcl2r

def get_config():
    config = iamcl2r.get_config("replace=false")
    config.backbone.name = "flat"
    config.num_prototypes, config.batch_size, config.epochs = 13, 16, 2
    config.optim.lr = 0.05
    config.data.flip, config.data.crop_padding = False, 1
    config.tasks.update(initial=3, increment=3, rehearsal=4)
    for role in ("train", "query", "gallery"):
        config.data[role] = {"source": "folder", "path": f"%s/{role}", "size": 8}
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures in class folders and the configuration of two tasks."""
    folder = tmp_path_factory.mktemp("hosts")
    other = tiny.dataset(4, 24, seed=1, name="other")
    parts = {"train": tiny.dataset(), "query": other.per_class(15)}
    parts["gallery"] = Dataset(other.images[::-1], other.labels[::-1], other.class_names).per_class(
        9
    )
    for role, data in parts.items():
        for i, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
            path = folder / role / data.class_names[label] / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    (folder / "config.py").write_text(CONFIG % folder)
    return folder


def start(program, *arguments, devices=1, **process):
    flags = [f"--{key}={value}" for key, value in process.items()]
    loopback = {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    return programs.start(program, *arguments, *flags, "--noprogress", flat=True, **loopback)


def start_two(program, *arguments):
    coordinator = f"127.0.0.1:{free_port()}"
    return [
        start(
            program,
            *arguments,
            devices=4,
            coordinator=coordinator,
            num_processes=2,
            process_id=i,
        )
        for i in range(2)
    ]


def finish(*processes, code=0):
    """Wait until all have ended with the same code; return what each printed."""
    ended = [(p.communicate(timeout=300), p.returncode) for p in processes]
    for (_, errors), returncode in ended:
        assert returncode == code, errors
    return [output for (output, _), _ in ended]


def training(folder, workdir):
    return ("train", f"--config={folder}/config.py", f"--workdir={folder / workdir}")


def evaluation(folder, workdir):
    return ("evaluate", f"--chain={folder / workdir / 'chain'}", "--metric=map")


@pytest.fixture(scope="module")
def one(folder):
    """This process, with one device."""
    config = runpy.run_path(str(folder / "config.py"))["get_config"]()
    config.mesh = "data:1"
    chain = experiment.train(config, folder / "one", tiny.session_of(config))
    results = experiment.evaluate(chain, metrics=["map"], session=Session(mesh="data:1"))
    return folder / "one", results["map"]


@pytest.fixture(scope="module")
def two(folder):
    """Two processes, stopped by a signal to the second one and started again."""
    mesh = ("--config.mesh=data:2,model:4", "--config.save_every=1")
    processes = start_two(*training(folder, "two"), *mesh)
    wait_for(folder / "two" / "progress", processes)
    processes[1].send_signal(signal.SIGTERM)
    finish(*processes, code=75)
    assert any((folder / "two" / "progress").iterdir())
    first, second = finish(*start_two(*training(folder, "two"), *mesh))
    assert "2 versions in " in first and "versions in" not in second
    first, second = finish(*start_two(*evaluation(folder, "two"), "--mesh=data:4,model:2"))
    assert "matrix.json" in first and "matrix" not in second
    return folder / "two"


def wait_for(path, processes):
    while not path.exists():
        assert all(p.poll() is None for p in processes), finish(*processes)
        time.sleep(0.02)


def test_two_processes_end_with_the_matrix_of_one(one, two):
    _, expected = one
    assert expected.matrix.shape == (2, 2) and (np.diag(expected.matrix) > 0.5).all()
    result = json.loads((two / "evaluation" / "matrix.json").read_text())["hoc"]
    np.testing.assert_allclose(result["matrix"], expected.matrix, rtol=1e-5)
    assert result["metric"] == "map" and result["replaced"] == [False, False]


def test_two_processes_end_with_the_variables_of_one(one, two):
    for number in range(2):
        a, b = (Chain(d / "chain").open(number) for d in (one[0], two))
        assert a.record == b.record
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5),
            a.variables,
            b.variables,
        )


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_two_processes_have_the_losses_of_one(one, two):
    """There a line an epoch, here a line a step."""
    steps = {(line["task"], line["step"]): line["loss"] for line in log_of(two)}
    for line in log_of(one[0]):
        last = line["step"]
        mean = np.mean([steps[line["task"], s + 1] for s in range(last - line["steps"], last)])
        np.testing.assert_allclose(mean, line["loss"], rtol=1e-4)


def test_first_process_writes_the_log_once(two):
    lines = log_of(two)
    positions = [(line["task"], line["step"]) for line in lines]
    assert positions == sorted(set(positions)) and positions[-1][0] == 1
    assert not list((two / "progress").iterdir())
    assert not [p for p in (two / "chain").iterdir() if p.name.startswith(".")]


OPEN = """
import sys, jax
from compat_jax.chain import Chain
assert jax.device_count() == 1
chains = [Chain(path, backbone="flat:Flat") for path in sys.argv[1:]]
assert [c.verify() for c in chains] == [{0: None, 1: None}] * 2
versions = [c.open(number) for number in (0, 1) for c in chains]
print(*[v.sha256 for v in versions])
"""


def test_chain_of_two_processes_opens_anywhere(one, two, tmp_path):
    """On one device, in another folder, beside another chain in the same program."""
    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(two / "chain", moved)
    done = subprocess.run(
        [sys.executable, "-c", OPEN, moved, one[0] / "chain"],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = [Chain(d / "chain").open(n).sha256 for n in (0, 1) for d in (two, one[0])]
    assert done.stdout.split() == expected


@pytest.mark.slow
def test_two_processes_killed_end_with_the_bits_of_an_unbroken_pair(folder):
    """Killed three times, one process or the other first; at last stopped and gone on alone."""
    flags = ("--config.mesh=data:2,model:4", "--config.save_every=1")
    finish(*start_two(*training(folder, "unbroken"), *flags))
    moments = random.Random(0)
    for kill in range(3):
        processes = start_two(*training(folder, "killed"), *flags)
        wait_for_line(folder / "killed" / "log.jsonl", processes)
        time.sleep(moments.uniform(0, 1))
        first = kill % 2
        for process in (processes[first], processes[1 - first]):
            process.kill()
            process.communicate()
            time.sleep(0.2)
        chain = Chain(folder / "killed" / "chain")
        assert all(chain.open(number) for number in chain.numbers())
    shutil.copytree(folder / "killed", folder / "alone")
    finish(*start_two(*training(folder, "killed"), *flags))
    expected, killed = (Chain(folder / name / "chain") for name in ("unbroken", "killed"))
    assert [killed.open(n).sha256 for n in (0, 1)] == [expected.open(n).sha256 for n in (0, 1)]
    # What two processes have saved, one goes on with, to rounding.
    finish(start(*training(folder, "alone"), devices=1, **{"config.mesh": "data:1"}))
    alone = Chain(folder / "alone" / "chain")
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5),
        alone.open(1).variables,
        expected.open(1).variables,
    )


def wait_for_line(path, processes):
    """Until the log has a line that was not there before."""
    before = path.stat().st_size if path.exists() else 0
    while not path.exists() or path.stat().st_size == before:
        assert all(p.poll() is None for p in processes), finish(*processes)
        time.sleep(0.02)


def test_mistake_is_reported_by_every_process(folder, two):
    """The first process alone looks at run.json; the others learn of it and do not hang."""
    processes = start_two(*training(folder, "two"), "--config.mesh=data:8", "--config.seed=5")
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2
        assert "belongs to a run with other settings: seed was 0, now 5" in errors


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("localhost:1", None, None), "go together: give all"),
        (("localhost:1", 2, 2), r"process_id must lie in 0\.\.1 for num_processes=2, got 2"),
    ],
)
def test_hosts_that_cannot_join(given, message):
    with pytest.raises(UserError, match=message):
        hosts.initialize(*given)


def test_hosts_that_come_too_late_are_no_mistake_of_the_user(monkeypatch):
    """The launcher gives up after exit code 2, and starts the program again after any other."""

    def wait(*_):
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out")

    monkeypatch.setattr(jax.distributed, "initialize", wait)
    with pytest.raises(jax.errors.JaxRuntimeError, match="DEADLINE_EXCEEDED"):
        hosts.initialize()


def test_hosts_stop_together_as_soon_as_one_is_asked_to(monkeypatch):
    asked, answers = [], iter([False, True])
    monkeypatch.setattr(hosts, "any_process", lambda own: asked.append(own) or next(answers))
    session = Session(should_stop=lambda: False)
    copy = dataclasses.replace(session, save_every=3)
    assert copy == dataclasses.replace(session, save_every=3)
    assert [session.should_stop(), copy.should_stop()] == [False, True]
    assert asked == [False, False], "once a question, also after the session was copied"
    assert not Session().should_stop() and len(asked) == 2, "nobody is asked where nobody can stop"


def test_one_process_needs_no_other():
    assert not hosts.is_distributed() and hosts.is_first()
    assert hosts.broadcast(True) and not hosts.any_process(False)
    done = []
    hosts.on_first(lambda: done.append(1))
    assert done == [1] and len(hosts.token()) == 8
    np.testing.assert_array_equal(hosts.gather(np.arange(3)), [0, 1, 2])
