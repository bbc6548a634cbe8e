"""Stopped, killed, started again: the same bits as if nothing had happened."""

import errno
import json
import os
import random
import re
import shutil
import signal
import time
from functools import cache, partial

import flat  # noqa: F401, registers the backbone
import numpy as np
import programs
import pytest
import tiny
from orbax.checkpoint import v1 as ocp
from PIL import Image

from compat_jax import experiment
from compat_jax.chain import Chain
from compat_jax.errors import Stopped, UserError
from compat_jax.session import Session, never
from compat_jax.training.checkpoint import Checkpointer
from compat_jax.training.task import sequence_task

DATA = tiny.dataset()
CLASSES = DATA.num_classes


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
        **{"log_every": 10**6, **arguments},  # no lines by the clock
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Bits of the sequence run in one go, by method."""
    return {m: bits(train(tmp_path_factory.mktemp(m), m)) for m in ("hoc", "er")}


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def saved_state(folder):
    """The folder of the only saved state; its list lies beside it."""
    path, listed = sorted((folder / "progress").iterdir())
    assert listed.name == f"{path.name}.json"
    return path


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
    assert bits(train(tmp_path)) == unbroken["hoc"]


def test_a_kill_loses_no_more_than_the_steps_since_the_last_save(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        # One question before the task; from then on two a step: after it, and before the save.
        train(tmp_path, should_stop=Moment(7, KeyboardInterrupt), save_every=1)
    before = log_of(tmp_path)[-1]
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, should_stop=Moment(2, KeyboardInterrupt), save_every=1)
    assert (before["task"], before["step"]) == (0, 2)  # the third was done, not yet saved
    assert names(tmp_path / "progress") == ["task0-step2", "task0-step2.json"]


@pytest.mark.slow
def test_how_often_it_saves_changes_nothing(tmp_path, unbroken):
    for save_every in (1, 3, 1000):
        folder = tmp_path / str(save_every)
        assert bits(train(folder, save_every=save_every)) == unbroken["hoc"]


def test_what_a_killed_save_left_behind_does_no_harm(tmp_path, unbroken):
    with pytest.raises(Stopped):
        train(tmp_path, should_stop=Moment(3))
    saved = saved_state(tmp_path)
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
    saved = saved_state(tmp_path)
    for file in saved.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(UserError, match=rf"{saved} is damaged .*: remove it and the task begins"):
        train(tmp_path)
    shutil.rmtree(saved)  # its list is still there
    with pytest.raises(Stopped):
        train(tmp_path, should_stop=Moment(3))
    assert saved_state(tmp_path) == saved and any(saved.iterdir())
    assert bits(train(tmp_path)) == unbroken["hoc"]


def begun():
    """The state with which the tiny sequence begins."""
    run = tiny.run()
    sequence = run.tasks.sequence(DATA.num_classes)
    start = tiny.version()
    task = sequence_task(run, sequence, 0, DATA.labels, start=start, replaced=True)
    trainer = task.trainer(tiny.one_device())
    return trainer.create_state(task.starting_variables(trainer, (8, 8, 3)), task.info())


def test_a_flipped_byte_in_any_file_of_a_save_is_refused(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path, should_stop=Moment(3))
    saved, state = saved_state(tmp_path), begun()
    checkpointer = Checkpointer(saved.parent)
    assert int(checkpointer.restore(0, state).step) == 2
    files = [saved.with_name(f"{saved.name}.json"), *filter(os.path.isfile, saved.rglob("*"))]
    assert len(files) > 3

    def refused():
        with pytest.raises(UserError, match=rf"{saved} is damaged .*: remove it and the task beg"):
            checkpointer.restore(0, state)

    for file in files:
        content = file.read_bytes()
        for place in {0, len(content) // 2, len(content) - 1} if content else ():
            flipped = bytes([content[place] ^ 1])
            file.write_bytes(content[:place] + flipped + content[place + 1 :])
            refused()
        file.write_bytes(content + b"x")
        refused()
        file.write_bytes(content)
    (saved / "more").write_bytes(b"")
    refused()
    (saved / "more").unlink()
    files[-1].rename(tmp_path / "lost")
    refused()


def test_a_save_without_its_list_was_cut_off_and_the_task_begins_again(tmp_path, unbroken):
    with pytest.raises(Stopped):
        train(tmp_path, should_stop=Moment(3))
    saved, state = saved_state(tmp_path), begun()
    saved.with_name(f"{saved.name}.json").unlink()
    assert Checkpointer(saved.parent).restore(0, state) is state
    assert bits(train(tmp_path)) == unbroken["hoc"]


# The log


def without_rate(lines):
    clocks = ("images_per_second", "time")
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines]


@pytest.fixture(scope="module")
def unbroken_log(tmp_path_factory):
    """Lines of the sequence run in one go, by steps between saves."""

    @cache
    def log(save_every):
        folder = tmp_path_factory.mktemp(f"log{save_every}")
        train(folder, save_every=save_every)
        return without_rate(log_of(folder))

    return log


@pytest.mark.parametrize(("save_every", "moment"), [(0, 4), (0, 9), (1, 9), (3, 5), (3, 13)])
def test_the_log_of_a_killed_run_has_the_lines_of_an_unbroken_one(
    tmp_path, unbroken_log, save_every, moment
):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, should_stop=Moment(moment, KeyboardInterrupt), save_every=save_every)
    train(tmp_path, save_every=save_every)
    assert without_rate(log_of(tmp_path)) == unbroken_log(save_every)


def test_the_log_of_a_stopped_run_has_the_lines_of_an_unbroken_one(tmp_path, unbroken_log):
    for moment in (3, 5, 4):
        with pytest.raises(Stopped):
            train(tmp_path, should_stop=Moment(moment), save_every=3)
    train(tmp_path, save_every=3)
    assert without_rate(log_of(tmp_path)) == unbroken_log(3)


def test_a_stop_within_an_epoch_leaves_the_log_of_an_unbroken_run(tmp_path, unbroken_log):
    for moment in (2, 3, 4, 5):
        with pytest.raises(Stopped):
            train(tmp_path, should_stop=Moment(moment))
    train(tmp_path)
    assert without_rate(log_of(tmp_path)) == unbroken_log(0)


@pytest.mark.parametrize("moment", [2, 5, 7])
def test_lines_within_an_epoch_are_those_of_an_unbroken_run(tmp_path, moment):
    run = {"log_every": 2, "save_every": 3, "epochs": 1}
    train_long(tmp_path / "whole", **run)
    with pytest.raises(KeyboardInterrupt):
        train_long(tmp_path, should_stop=Moment(moment, KeyboardInterrupt), **run)
    with pytest.raises(Stopped):
        train_long(tmp_path, should_stop=Moment(3), **run)
    train_long(tmp_path, **run)
    whole = without_rate(log_of(tmp_path / "whole"))
    assert without_rate(log_of(tmp_path)) == whole
    # The means of lines within the epoch are over two steps, those at saves over three.
    assert [(line["step"], line["steps"]) for line in whole] == [(2, 2), (3, 3), (4, 1), (6, 3)]


def train_long(folder, epochs, **where):
    """One task of six steps."""
    run = tiny.run("sce", tasks=tiny.Tasks(CLASSES), epochs=epochs)
    return tiny.train(run, folder, DATA, replacements={0: tiny.version(method="sce")}, **where)


def test_a_line_of_which_the_state_was_not_saved_is_dropped_and_so_is_a_torn_one(
    tmp_path, unbroken_log, monkeypatch
):
    save, log = ocp.save, tmp_path / "log.jsonl"

    def killed(path, *arguments, **settings):
        if path.name == "task0-step3":
            raise KeyboardInterrupt
        save(path, *arguments, **settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ocp, "save", killed)
        train(tmp_path, save_every=3)
    assert [line["step"] for line in log_of(tmp_path)] == [2, 3]
    before = log.read_text()
    for cut in (0, 25):
        folder = tmp_path / str(cut)
        shutil.copytree(tmp_path / "progress", folder / "progress")
        for name in ("run.json", "log.jsonl"):
            shutil.copy(tmp_path / name, folder)
        (folder / "log.jsonl").write_text(before[: len(before) - cut] + "\n[]\n" * (cut == 0))
        train(folder, save_every=3)
        assert without_rate(log_of(folder)) == unbroken_log(3)


def test_a_version_trained_again_has_its_lines_once_and_leaves_the_others(tmp_path, unbroken_log):
    train(tmp_path)
    shutil.rmtree(tmp_path / "chain" / "0001")
    train(tmp_path)
    lines = sorted(without_rate(log_of(tmp_path)), key=lambda line: (line["task"], line["step"]))
    assert lines == unbroken_log(0)


def test_a_full_disk_keeps_what_was_saved_before(tmp_path, unbroken, monkeypatch):
    save, calls = ocp.save, []

    def full(path, tree, **settings):
        calls.append(path)
        if len(calls) == 3:
            raise ValueError(f"INTERNAL: Error writing {path}: No space left on device")
        save(path, tree, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(ocp, "save", full)
        with pytest.raises(UserError, match=r"cannot save to .*progress .*No space left on device"):
            train(tmp_path, save_every=1)
    assert names(tmp_path / "progress") == ["task0-step2", "task0-step2.json"]
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
            patch.setattr(ocp, "save", refuse)
        return False

    with monkeypatch.context() as patch, pytest.raises(UserError, match=refusal) as caught:
        train(tmp_path, should_stop=frozen, save_every=1 if step == "progress" else 1000)
    assert "Read-only file system" in str(caught.value)
    assert Chain(tmp_path / "chain").verify() == {0: None}
    assert bits(train(tmp_path)) == unbroken["hoc"]


# With configurations


def carried_out(config, workdir, should_stop=never):
    return experiment.train(config, workdir, tiny.session_of(config, should_stop=should_stop))


def test_data_that_vanished_is_named_and_the_chain_is_whole(tmp_path):
    config, pictures, workdir = tiny.config(), tmp_path / "pictures", tmp_path / "run"
    data = tiny.dataset(4, 8)
    for i, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
        (pictures / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(pictures / str(label) / f"{i}.png")
    config.backbone.name, config.backbone.arguments = "one_conv", {}
    config.data.train = {"source": "folder", "path": str(pictures), "size": 8}
    chain = Chain(workdir / "chain")
    with pytest.raises(Stopped):
        carried_out(config, workdir, lambda: chain.numbers() == [0])
    pictures.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"no folder .*pictures: it must hold one sub") as caught:
        carried_out(config, workdir)
    assert caught.value.argument == "data.train.path"
    assert chain.verify() == {0: None}


def test_a_folder_of_another_run_is_refused_with_the_differing_fields(tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(Stopped):
        carried_out(tiny.config(), workdir, Moment(1))
    identity = (workdir / "run.json").read_text()
    data = json.loads(identity)["data"]
    other = tiny.config(epochs=3, optim__lr=0.5, data__train__strength=0.5)
    with pytest.raises(UserError) as caught:
        carried_out(other, workdir)
    message = str(caught.value)
    assert message.startswith(f"{workdir} belongs to a run with other settings: ")
    for difference in (
        "epochs was 2, now 3",
        "optimizer.lr was 0.2, now 0.5",
        f"data.sha256 was {data['sha256']}, now ",
    ):
        assert difference in message
    assert message.endswith("or use another workdir") and "seed" not in message
    assert caught.value.argument == "workdir"
    assert (workdir / "run.json").read_text() == identity
    # What changes only how a run is computed may change.
    with pytest.raises(Stopped):
        carried_out(tiny.config(save_every=1, mesh="data:2"), workdir, Moment(1))


def test_other_models_to_replace_with_are_another_run(tmp_path):
    seen = {"mean": (0.7,) * 3, "std": (0.3,) * 3}
    described = tiny.record(method="sce", task=None, class_names=("a",), **seen)
    for name, seed in (("one", 1), ("two", 2)):
        Chain(tmp_path / name).add(tiny.variables(described, seed), described)
    config = tiny.config(pretrained=str(tmp_path / "one"), tasks__replace_at=(0,))
    with pytest.raises(Stopped):
        carried_out(config, tmp_path / "run", Moment(1))
    shutil.rmtree(tmp_path / "one")
    (tmp_path / "two").rename(tmp_path / "one")
    with pytest.raises(UserError, match=r"other settings: models\.0 was \w{64}, now \w{64}\."):
        carried_out(config, tmp_path / "run")


def test_a_damaged_identity_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json is damaged: use another workdir"):
        carried_out(tiny.config(), tmp_path)


# Programs, killed for real


start, call = partial(programs.start, flat=True), partial(programs.call, flat=True)
FLAGS = [
    "--config=configs/glyphs.py:method=hoc,replace=false",
    *tiny.flags(tiny.with_backbone("flat", tiny.TRAIN)),
]


def saved(workdir, task):
    """Return whether a state within a task has been saved."""
    found = [p.name for p in (workdir / "progress").glob("*")]
    return any(re.fullmatch(rf"task{task}-step\d+\.json", name) for name in found)


def interrupt(process, moment, how=signal.SIGKILL):
    """Send a signal when `moment()` comes; exit code and stderr."""
    with process:
        while process.poll() is None and not moment():
            time.sleep(0.002)
        assert process.poll() is None, process.communicate()
        process.send_signal(how)
        _, err = process.communicate(timeout=300)
    return process.returncode, err


def test_a_killed_run_ends_with_the_bits_of_an_unbroken_one(tmp_path):
    unbroken, workdir = Chain(tmp_path / "unbroken" / "chain"), tmp_path / "killed"
    code, out, err = call("train", *FLAGS, f"--workdir={tmp_path / 'unbroken'}")
    assert (
        code == 0
        and "error" not in err
        and "\r" not in err
        and out
        == (
            f"3 versions in {unbroken.path}\n"
            "next:\n"
            f"  python -m launch.evaluate --chain={unbroken.path}\n"
        )
    )
    command = ("train", *FLAGS, "--config.save_every=2", f"--workdir={workdir}", "--noprogress")
    chain = Chain(workdir / "chain")

    code, _ = interrupt(start(*command), lambda: saved(workdir, task=0))
    assert code == -signal.SIGKILL and chain.numbers() == []  # within a task
    code, _ = interrupt(start(*command), lambda: chain.numbers() == [0])
    assert code == -signal.SIGKILL and chain.numbers() == [0]  # between tasks
    code, err = interrupt(start(*command), lambda: saved(workdir, task=1), signal.SIGTERM)
    assert code == 75 and err == "stopped and saved; run the same command to resume\n"
    assert chain.numbers() == [0] and saved(workdir, task=1)

    code, _, err = call(*command)
    assert code == 0
    for line, task in zip(err.splitlines(), (1, 2), strict=True):  # the end of each, nothing else
        named = (
            rf"task {task}: version {task} of {chain.path} after {2 * task + 4} steps in \d+ s, "
        )
        assert re.fullmatch(named + r"loss -?\d+\.\d{3}, accuracy \d\.\d\d, [\d,]+ images/s", line)
    assert bits(chain) == bits(unbroken)
    assert chain.record(2) == unbroken.record(2)
    steps = {(line["task"], line["step"]) for line in log_of(workdir)}
    assert {(0, 4), (1, 6), (2, 8)} <= steps


@pytest.mark.slow
def test_a_killed_pretraining_ends_with_the_bits_of_an_unbroken_one(tmp_path):
    flags = (
        "--config=configs/pretrain.py:data=glyphs",
        *tiny.flags(tiny.with_backbone("flat", tiny.PRETRAIN)),
    )
    unbroken, workdir = Chain(tmp_path / "unbroken" / "chain"), tmp_path / "killed"
    assert call("pretrain", *flags, f"--workdir={tmp_path / 'unbroken'}")[0] == 0
    command = ("pretrain", *flags, "--config.save_every=1", f"--workdir={workdir}", "--noprogress")
    code, _ = interrupt(start(*command), lambda: saved(workdir, task=1))
    assert code == -signal.SIGKILL

    code, out, err = call(*command)
    chain = Chain(workdir / "chain")
    assert code == 0 and out.startswith(f"2 models in {chain.path}; next:\n")
    assert err.startswith(f"model 1: version 1 of {chain.path} after ") and err.count("\n") == 1
    assert bits(chain) == bits(unbroken) and len(set(bits(chain))) == 2
    for number in (0, 1):
        record = chain.record(number)
        assert (record.task, record.parent, record.replaced_by) == (None, None, None)
        assert (record.method, record.label_order) == ("sce", "ascending")
        assert len(record.class_names) == record.classes_seen == 2


@pytest.mark.slow
def test_killed_at_twenty_random_moments_it_ends_with_the_same_bits(tmp_path):
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

    def evaluated(cache, **changes):
        where = Session(mesh="data:1", cache=tmp_path / cache, **changes)
        return experiment.evaluate(chain, session=where)["identification"]

    with pytest.raises(Stopped):
        evaluated("cache", should_stop=Moment(2))
    assert any((tmp_path / "cache").iterdir())
    whole, result = evaluated("other"), evaluated("cache")
    np.testing.assert_array_equal(result.matrix, whole.matrix)
