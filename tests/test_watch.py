"""Numbers while a task trains: lines of the log, texts of the bar, TensorBoard's files."""

import datetime
import json
import struct
import sys

import flat  # noqa: F401, registers the backbone
import numpy as np
import optax
import programs
import pytest
import tiny

from compat_jax.chain import Chain
from compat_jax.data import Tasks
from compat_jax.errors import UserError
from compat_jax.training import Trainer, watch
from compat_jax.training.watch import Span

DATA = tiny.dataset()
WITHOUT = ("time", "images_per_second")


def train(folder, method="sce", epochs=2, **where):
    """One task of six steps an epoch."""
    run = tiny.run(method, backbone="flat", tasks=Tasks(6), epochs=epochs)
    start = {0: tiny.start_of(method, backbone="flat")}
    return tiny.train(run, folder, DATA, replacements=start, **where)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same(lines):
    return [{k: v for k, v in line.items() if k not in WITHOUT} for line in lines]


@pytest.fixture(scope="module")
def by_epoch(tmp_path_factory):
    """Folder and chain of a run with a line an epoch."""
    folder = tmp_path_factory.mktemp("by_epoch")
    return folder, train(folder, log_every=10**6)


def test_a_line_says_when_where_and_how_fast(by_epoch):
    began = datetime.datetime.now(datetime.UTC)
    for epoch, line in enumerate(log_of(by_epoch[0])):
        assert list(line) == [
            *("task", "step", "epoch", "time", "lr", "loss", "terms", "accuracy"),
            *("images_per_second", "steps"),
        ]
        assert (line["task"], line["step"], line["epoch"]) == (0, 6 * (epoch + 1), epoch)
        written = datetime.datetime.fromisoformat(line["time"])
        assert abs((began - written).total_seconds()) < 600
        assert line["lr"] == pytest.approx([0.05, 0.0255][epoch], rel=1e-6)
        assert line["images_per_second"] > 0 and line["steps"] == 6


def test_lines_every_few_steps_change_no_other_line_and_no_bit(tmp_path, by_epoch):
    chain = train(tmp_path, log_every=4)
    assert [v.sha256 for v in chain] == [v.sha256 for v in by_epoch[1]]
    lines = log_of(tmp_path)
    assert [(line["step"], line["steps"]) for line in lines] == [(4, 4), (6, 6), (8, 2), (12, 6)]
    assert same(lines[1::2]) == same(log_of(by_epoch[0]))
    first, rest = lines[0]["loss"], 3 * lines[1]["loss"] - 2 * lines[0]["loss"]
    assert rest < first  # of six steps, the last two


def test_a_line_every_few_seconds_where_epochs_are_long(tmp_path, by_epoch, monkeypatch, capsys):
    monkeypatch.setattr(watch, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(watch, "NOTE_SECONDS", 0.0)
    chain = train(tmp_path)
    assert [v.sha256 for v in chain] == [v.sha256 for v in by_epoch[1]]
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == list(range(2 if cold(lines) else 1, 13))
    assert same([lines[-7], lines[-1]]) == same(log_of(by_epoch[0]))
    err = capsys.readouterr().err
    assert err.startswith("sce: 1 of 12 steps, task 0, loss ") and " 0 images/s" not in err
    assert "\r" not in err


def cold(lines):
    """Return whether the first step compiled: it has no line, since its rate is none."""
    return lines[0]["step"] == 2


def test_the_first_step_of_a_program_is_not_timed(tmp_path):
    train(tmp_path, log_every=1, epochs=1)
    rates = [line["images_per_second"] for line in log_of(tmp_path)]
    assert rates[0] is None and all(rate > 0 for rate in rates[1:])


@pytest.mark.parametrize("log_every", [4, 10**6])
def test_dispatches_of_any_length_give_the_same_lines_and_bits(tmp_path, monkeypatch, log_every):
    monkeypatch.setattr(Trainer, "dispatches_each_step", False)  # as on an accelerator
    stops, advance = [], Trainer.advance

    def counted(trainer, state, *arguments, stop, after):
        stops.append(stop)
        return advance(trainer, state, *arguments, stop=stop, after=after)

    monkeypatch.setattr(Trainer, "advance", counted)
    paced = train(tmp_path / "paced", log_every=log_every, epochs=3)
    # The first one compiles and is short, then each is twice as long while they are fast.
    expected = [1, 2, 4, 6, 12, 18] if log_every > 4 else [1, 2, 4, 6, 8, 12, 16, 18]
    assert stops == expected
    monkeypatch.setattr("compat_jax.training.fit._FAST", 0.0)
    single = train(tmp_path / "single", log_every=log_every, epochs=3)
    assert [v.sha256 for v in single] == [v.sha256 for v in paced]
    assert same(log_of(tmp_path / "single")) == same(log_of(tmp_path / "paced"))


def test_a_rate_counts_only_what_was_timed():
    span = Span()
    span.count(1, None)
    assert span.rate() is None
    span.count(3, 1.5)
    assert (span.steps, span.rate()) == (4, 2.0)


def test_an_optax_transformation_keeps_its_rate_to_itself(tmp_path):
    run = tiny.run("sce", backbone="flat", tasks=Tasks(6), epochs=1, optimizer=optax.sgd(0.01))
    tiny.train(run, tmp_path, DATA, replacements={0: tiny.start_of("sce", backbone="flat")})
    assert log_of(tmp_path)[-1]["lr"] is None


def test_without_a_bar_the_end_of_a_task_is_one_line(tmp_path, capsys):
    chain = train(tmp_path, epochs=1, progress=False)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"task 0: version 0 of {chain.path} after 6 steps in ")
    assert ", loss " in line and ", accuracy " in line and line.endswith(" images/s")


# TensorBoard


def events(folder):
    """Scalars (tag, step, value) and tags of pictures in event files, in order."""
    from tensorboardX.proto import event_pb2

    scalars, pictures = [], []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            for value in event.summary.value:
                if value.HasField("image"):
                    pictures.append((value.tag, value.image.height, value.image.width))
                else:
                    scalars.append((value.tag, event.step, value.simple_value))
    return scalars, pictures


def test_tensorboard_gets_what_the_log_gets_and_a_batch(tmp_path, by_epoch):
    pytest.importorskip("tensorboardX")
    chain = train(tmp_path / "run", tensorboard=tmp_path / "board", log_every=10**6)
    assert [v.sha256 for v in chain] == [v.sha256 for v in by_epoch[1]]
    scalars, pictures = events(tmp_path / "board" / "task0")
    assert {tag for tag, *_ in scalars} == {"lr", "loss", "accuracy", "images_per_second"}
    losses = [(step, value) for tag, step, value in scalars if tag == "loss"]
    assert losses == [(line["step"], np.float32(line["loss"])) for line in log_of(tmp_path / "run")]
    assert len(pictures) == 1 and pictures[0][0] == "batch"


def test_terms_have_a_curve_each(tmp_path):
    pytest.importorskip("tensorboardX")
    train(tmp_path / "run", "hoc", epochs=1, tensorboard=str(tmp_path / "board"))
    tags = {tag for tag, *_ in events(tmp_path / "board" / "task0")[0]}
    assert {"terms/cross_entropy", "terms/contrast"} <= tags


def test_without_tensorboardx_one_reads_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match="not installed: pip install tensorboardX") as caught:
        train(tmp_path / "run", tensorboard=tmp_path / "board")
    assert caught.value.argument == "tensorboard"
    assert not (tmp_path / "board").exists()


# Divergence


@pytest.mark.slow
def test_an_exploding_run_ends_with_exit_code_2_and_publishes_nothing(tmp_path):
    flags = tiny.flags(tiny.with_backbone("flat", tiny.TRAIN), optim__lr=1e6)
    config = "--config=configs/glyphs.py:method=sce,replace=false"
    code, out, err = programs.call(
        "train", config, *flags, f"--workdir={tmp_path}", "--noprogress", flat=True
    )
    assert (code, out) == (2, "")
    assert err.startswith("error: task 0 diverged: the loss is not finite at step ")
    assert err.endswith("(flag --config.optim.lr)\n") and err.count("\n") == 1
    assert Chain(tmp_path / "chain").numbers() == []


def test_settings_that_watch_are_checked():
    for name in ("log_every", "validate_every"):
        with pytest.raises(UserError, match=name):
            tiny.session(**{name: -1})
