"""Stopped, killed, started again: the same bits as if nothing had happened."""

import errno
import json
import os
import random
import re
import shutil
import signal
import time
from functools import partial

import numpy as np
import pytest
import tiny
from flat import Flat
from PIL import Image

from compat_jax import chain as chains
from compat_jax import models
from compat_jax.chain import Chain
from compat_jax.errors import Stopped, UserError
from compat_jax.train import progress as progresses
from launch import runs

DATA = tiny.dataset()


@pytest.fixture(scope="module", autouse=True)
def backbone():
    with tiny.one_conv():
        yield


def never():
    return False


def bits(chain):
    """SHA-256 of every version's variables."""
    return [chain.open(n).sha256 for n in chain.numbers()]


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def train(folder, method="hoc", **arguments):
    """The tiny sequence; it starts from a model, so that no initialisation is compiled."""
    fields = {} if method == "hoc" else {"method": "er", "head_classes": 3, "feature_size": 16}
    return tiny.train(
        tiny.run(method),
        folder,
        DATA,
        replacements={0: tiny.version(**fields)},
        log=folder / "log.jsonl",
        **arguments,
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Bits of the sequence run in one go, by method."""
    return {m: bits(train(tmp_path_factory.mktemp(m), m)) for m in ("hoc", "er")}


class Moment:
    """Says "stop" (or raises, as a kill would) when asked for the n-th time."""

    def __init__(self, n, error=None):
        self.n, self.error = n, error

    def __call__(self):
        self.n -= 1
        if self.n == 0 and self.error:
            raise self.error
        return self.n <= 0


# In the library


@pytest.mark.parametrize("method", ["hoc", "er"])
def test_stopped_at_any_step_it_goes_on_to_the_same_bits(tmp_path, unbroken, method):
    stops = 0
    for moment in (1, 4, 2, 7, 3):
        with pytest.raises(Stopped):
            train(tmp_path, method, should_stop=Moment(moment))
        stops += 1
    assert stops == 5
    assert bits(train(tmp_path, method)) == unbroken[method]
    assert not list((tmp_path / "progress").iterdir())


def test_a_stop_loses_no_step(tmp_path):
    for moment in (1, 3, 5, 4):
        with pytest.raises(Stopped):
            train(tmp_path, should_stop=Moment(moment))
    train(tmp_path)
    done = [(line["task"], line["step"]) for line in log_of(tmp_path)]
    assert done == sorted(set(done)) and done[-1] == (2, 6)


@pytest.mark.parametrize("moment", [2, 6, 9, 15])
def test_killed_at_any_step_it_goes_on_to_the_same_bits(tmp_path, unbroken, moment):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, should_stop=Moment(moment, KeyboardInterrupt), save_every=2)
    assert bits(train(tmp_path, save_every=2)) == unbroken["hoc"]


def test_a_kill_loses_no_more_than_the_steps_since_the_last_save(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        # One question before the task; from then on two a step: after it, and before the save.
        train(tmp_path, should_stop=Moment(7, KeyboardInterrupt), save_every=1)
    before = log_of(tmp_path)[-1]
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, should_stop=Moment(2, KeyboardInterrupt), save_every=1)
    saved = [p.name for p in (tmp_path / "progress").iterdir()]
    assert before["task"] == 0 and saved == [f"task0-step{before['step'] - 1}"]


def test_how_often_it_saves_changes_nothing(tmp_path, unbroken):
    for save_every in (1, 3, 1000):
        folder = tmp_path / str(save_every)
        assert bits(train(folder, save_every=save_every)) == unbroken["hoc"]


def test_what_a_killed_save_left_behind_does_no_harm(tmp_path, unbroken):
    with pytest.raises(Stopped):
        train(tmp_path, should_stop=Moment(3))
    (saved,) = (tmp_path / "progress").iterdir()
    half = saved.with_name(saved.name + ".orbax-checkpoint-tmp-123")
    shutil.copytree(saved, half)
    next(p for p in half.rglob("*") if p.is_file()).write_bytes(b"")
    (saved.parent / "task0-step3.orbax-checkpoint-tmp").mkdir()
    (saved.parent / "stray").write_text("")
    (tmp_path / "chain").mkdir()
    shutil.copytree(saved, tmp_path / "chain" / ".adding-0000-12345678")
    assert bits(train(tmp_path)) == unbroken["hoc"]
    assert not list((tmp_path / "progress").iterdir())


def test_a_damaged_save_is_named_with_the_remedy(tmp_path, unbroken):
    with pytest.raises(Stopped):
        train(tmp_path, should_stop=Moment(3))
    (saved,) = (tmp_path / "progress").iterdir()
    for file in saved.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(UserError, match=rf"{saved} is damaged .*: remove it and the task begins"):
        train(tmp_path)
    shutil.rmtree(saved)
    assert bits(train(tmp_path)) == unbroken["hoc"]


def test_a_full_disk_keeps_what_was_saved_before(tmp_path, unbroken, monkeypatch):
    save, calls = progresses.ocp.save, []

    def full(path, tree, **settings):
        calls.append(path)
        if len(calls) == 3:
            raise ValueError(f"INTERNAL: Error writing {path}: No space left on device")
        save(path, tree, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(progresses.ocp, "save", full)
        with pytest.raises(UserError, match=r"cannot save to .*progress .*No space left on device"):
            train(tmp_path, save_every=1)
    assert [p.name for p in (tmp_path / "progress").iterdir()] == ["task0-step2"]
    assert Chain(tmp_path / "chain").numbers() == []
    assert bits(train(tmp_path)) == unbroken["hoc"]


@pytest.mark.parametrize(
    ("step", "refusal"),
    [("progress", "cannot save to .*progress"), ("chain", "cannot write version 1 to .*chain")],
)
def test_a_folder_that_became_read_only(tmp_path, unbroken, monkeypatch, step, refusal):
    """Refused by name; the versions before it open, and with the folder free it goes on."""

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def frozen():
        if Chain(tmp_path / "chain").numbers():
            module = {"progress": progresses, "chain": chains}[step]
            patch.setattr(module.ocp, "save", refuse)
        return False

    with monkeypatch.context() as patch, pytest.raises(UserError, match=refusal) as caught:
        train(tmp_path, should_stop=frozen, save_every=1 if step == "progress" else 1000)
    assert "Read-only file system" in str(caught.value)
    assert Chain(tmp_path / "chain").verify() == {0: None}
    assert bits(train(tmp_path)) == unbroken["hoc"]


# With configurations


def test_data_that_vanished_is_told_and_the_chain_is_whole(tmp_path):
    config, pictures, workdir = tiny.config(), tmp_path / "pictures", tmp_path / "run"
    data = tiny.dataset(4, 8)
    for i, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
        (pictures / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(pictures / str(label) / f"{i}.png")
    config.backbone.name, config.backbone.arguments = "one_conv", {}
    config.data.train = {"source": "folder", "path": str(pictures), "size": 8}
    chain = Chain(workdir / "chain")
    with pytest.raises(Stopped):
        runs.train(config, workdir, lambda: chain.numbers() == [0], bar=False)
    pictures.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"no folder .*pictures: data\.\*\.path must hold"):
        runs.train(config, workdir, never, bar=False)
    assert chain.verify() == {0: None}


def test_a_folder_of_another_run_is_refused_with_the_differing_fields(tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(Stopped):
        runs.train(tiny.config(), workdir, Moment(1), bar=False)
    identity = (workdir / "run.json").read_text()
    other = tiny.config(epochs=3, optim__lr=0.5, data__train__strength=0.5)
    with pytest.raises(UserError) as caught:
        runs.train(other, workdir, never, bar=False)
    message = str(caught.value)
    assert message.startswith(f"{workdir} belongs to a run with other settings: ")
    for difference in (
        "epochs was 2, now 3",
        "optim.lr was 0.01, now 0.5",
        "data.train.strength was 1.0, now 0.5",
    ):
        assert difference in message
    assert message.endswith("or use another --workdir") and "seed" not in message
    assert (workdir / "run.json").read_text() == identity
    # What changes only how a run is computed may change.
    with pytest.raises(Stopped):
        runs.train(tiny.config(save_every=1, mesh="data:2"), workdir, Moment(1), bar=False)


def test_other_models_to_replace_with_are_another_run(tmp_path):
    described = tiny.record(method="sce", task=None, class_names=("a",))
    for name, seed in (("one", 1), ("two", 2)):
        Chain(tmp_path / name).add(tiny.variables(described, seed), described)
    config = tiny.config(pretrained=str(tmp_path / "one"), tasks__replace_at=(0,))
    with pytest.raises(Stopped):
        runs.train(config, tmp_path / "run", Moment(1), bar=False)
    shutil.rmtree(tmp_path / "one")
    (tmp_path / "two").rename(tmp_path / "one")
    with pytest.raises(UserError, match=r"other settings: models\.0 was \w{64}, now \w{64}\."):
        runs.train(config, tmp_path / "run", never, bar=False)


def test_a_damaged_identity_is_told(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json is damaged: use another --workdir"):
        runs.train(tiny.config(), tmp_path, never, bar=False)


# Programs, killed for real


def small(overrides):
    """Flags of a program that compiles in no time."""
    kept = {k: v for k, v in overrides.items() if k != "backbone.arguments"}
    return tiny.flags({**kept, "backbone.name": "flat"})


start, call = partial(tiny.start, flat=True), partial(tiny.call, flat=True)
FLAGS = ["--config=configs/glyphs.py:method=hoc,replace=false", *small(tiny.TRAIN)]


@pytest.fixture
def flat(monkeypatch):
    """What the programs know by that name."""
    monkeypatch.setitem(models.BACKBONES, "flat", Flat)


def saved(workdir, task):
    """Whether a state within a task has been saved."""
    names = [p.name for p in (workdir / "progress").glob("*")]
    return any(re.fullmatch(rf"task{task}-step\d+", name) for name in names)


def interrupt(process, moment, how=signal.SIGKILL):
    """Send a signal when `moment()` comes; exit code and stderr."""
    with process:
        while process.poll() is None and not moment():
            time.sleep(0.002)
        assert process.poll() is None, process.communicate()
        process.send_signal(how)
        _, err = process.communicate(timeout=300)
    return process.returncode, err


def test_a_killed_run_ends_with_the_bits_of_an_unbroken_one(tmp_path, flat):
    unbroken, workdir = Chain(tmp_path / "unbroken" / "chain"), tmp_path / "killed"
    code, out, err = call("train", *FLAGS, f"--workdir={tmp_path / 'unbroken'}")
    assert (
        code == 0
        and "error" not in err
        and out
        == (
            f"3 versions in {unbroken.path}; next:\n"
            f"  python -m launch.evaluate --chain={unbroken.path}\n"
        )
    )
    command = ("train", *FLAGS, "--config.save_every=1", f"--workdir={workdir}", "--noprogress")
    chain = Chain(workdir / "chain")

    code, _ = interrupt(start(*command), lambda: saved(workdir, task=0))
    assert code == -signal.SIGKILL and chain.numbers() == []  # within a task
    code, _ = interrupt(start(*command), lambda: chain.numbers() == [0])
    assert code == -signal.SIGKILL and chain.numbers() == [0]  # between tasks
    code, err = interrupt(start(*command), lambda: saved(workdir, task=1), signal.SIGTERM)
    assert code == 75 and err == "stopped and saved; the same command goes on\n"
    assert chain.numbers() == [0] and saved(workdir, task=1)

    code, _, err = call(*command)
    assert (code, err) == (0, "")
    assert bits(chain) == bits(unbroken)
    assert chain.record(2) == unbroken.record(2)
    steps = {(line["task"], line["step"]) for line in log_of(workdir)}
    assert {(0, 4), (1, 6), (2, 8)} <= steps


def test_a_killed_pretraining_ends_with_the_bits_of_an_unbroken_one(tmp_path, flat):
    flags = ("--config=configs/pretrain.py:data=glyphs", *small(tiny.PRETRAIN))
    unbroken, workdir = Chain(tmp_path / "unbroken" / "chain"), tmp_path / "killed"
    assert call("pretrain", *flags, f"--workdir={tmp_path / 'unbroken'}")[0] == 0
    command = ("pretrain", *flags, "--config.save_every=1", f"--workdir={workdir}", "--noprogress")
    code, _ = interrupt(start(*command), lambda: saved(workdir, task=1))
    assert code == -signal.SIGKILL

    code, out, err = call(*command)
    chain = Chain(workdir / "chain")
    assert (code, err) == (0, "") and out.startswith(f"2 models in {chain.path}; next:\n")
    assert bits(chain) == bits(unbroken) and len(set(bits(chain))) == 2
    for number in (0, 1):
        record = chain.record(number)
        assert (record.task, record.parent, record.replaced_by) == (None, None, None)
        assert (record.method, record.label_order) == ("sce", "ascending")
        assert len(record.class_names) == record.classes_seen == 2


@pytest.mark.slow
def test_killed_at_twenty_random_moments_it_ends_with_the_same_bits(tmp_path, flat):
    assert call("train", *FLAGS, f"--workdir={tmp_path / 'unbroken'}")[0] == 0
    unbroken = bits(Chain(tmp_path / "unbroken" / "chain"))
    moments, kills, ended = random.Random(0), 0, 0
    while kills < 20 or not ended:
        workdir = tmp_path / str(ended)
        flags = (*FLAGS, "--config.save_every=1", f"--workdir={workdir}", "--noprogress")
        log, began = workdir / "log.jsonl", time.time()
        with start("train", *flags) as process:
            # From its first own step on: before it, there is nothing to lose.
            while process.poll() is None and not (log.exists() and log.stat().st_mtime > began):
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 1.5))
            process.kill()
            _, err = process.communicate()
        if process.returncode == 0:
            assert bits(Chain(workdir / "chain")) == unbroken
            ended += 1
        else:
            assert process.returncode == -signal.SIGKILL, err
            kills += 1
            assert set(Chain(workdir / "chain").numbers()) <= {0, 1, 2}
            bits(Chain(workdir / "chain"))  # whole, every one


def test_an_evaluation_program_resumes_from_its_cache(tmp_path):
    chain = Chain(tmp_path / "chain")
    for task in range(2):
        described = tiny.record(task=task, config=tiny.config().to_dict())
        chain.add(tiny.variables(described, task), described)
    with pytest.raises(Stopped):
        runs.evaluate(chain, tmp_path / "out", mesh="data:1", should_stop=Moment(2), bar=False)
    whole = runs.evaluate(chain, tmp_path / "whole", mesh="data:1", bar=False)
    result = runs.evaluate(chain, tmp_path / "out", mesh="data:1", bar=False)
    np.testing.assert_array_equal(result.matrix, whole.matrix)
