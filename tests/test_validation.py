"""Validation within a task, the best weights, and both through kills."""

import dataclasses
import json

import flat  # noqa: F401, registers the backbone
import numpy as np
import pytest
import tiny

from compat_jax.chain import Chain
from compat_jax.data import Tasks
from compat_jax.errors import Stopped, UserError
from compat_jax.mesh import make_mesh
from compat_jax.meter import Meter
from compat_jax.retrieval import embed, recall_at_k
from compat_jax.training import Sgd, validation
from compat_jax.training.checkpoint import Checkpointer
from compat_jax.training.fit import Fit
from compat_jax.training.task import longest_plan, sequence_task
from compat_jax.training.validation import Validation
from compat_jax.training.workdir import Workdir

DATA = tiny.dataset()
HELD_OUT = tiny.dataset(per_class=5, seed=1)
EPOCHS = 4


def run_of(method="sce", **changes):
    """Learns so fast that the last weights are not always the best."""
    fields = {"backbone": "flat", "epochs": EPOCHS, "optimizer": Sgd(lr=1.0, min_lr=0.5)}
    return tiny.run(method, **{**fields, **changes})


def train(folder, run, held_out=HELD_OUT, data=DATA, **where):
    """The sequence of a run, by `Fit`."""
    session = tiny.session(**{"log_every": 10**6, **where})
    sequence, workdir = run.tasks.sequence(data.num_classes), Workdir(folder)
    fit, (longest, _) = (
        Fit(data, session, workdir, held_out),
        longest_plan(run, sequence, data.labels),
    )
    for index in range(len(sequence)):
        if index in workdir.chain.numbers():
            continue
        start = (
            workdir.chain.open(index - 1)
            if index
            else tiny.start_of(run.method.name, backbone="flat")
        )
        task = sequence_task(run, sequence, index, data.labels, start=start, replaced=not index)
        fit.publish(task, data, {}, meter=Meter(None, 0), longest=longest)
    return workdir.chain


def lines_of(folder):
    """Lines of validation, and the others without their clocks."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("images_per_second", None)
        assert line.pop("time").endswith("+00:00")
    found = [line for line in lines if "validation" in line]
    return found, [line for line in lines if "validation" not in line]


def bits(chain):
    return [version.sha256 for version in chain]


class Moment:
    """Stops, or kills, when asked for the n-th time."""

    def __init__(self, n, error=None):
        self.n, self.error = n, error

    def __call__(self):
        self.n -= 1
        if self.n == 0 and self.error:
            raise self.error
        return self.n <= 0


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """Folder and chain of a run without validation."""
    folder = tmp_path_factory.mktemp("without")
    return folder, train(folder, run_of(), None)


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    """The same with validation at every second step."""
    folder = tmp_path_factory.mktemp("validated")
    return folder, train(folder, run_of(), validate_every=2)


def test_validation_changes_no_bit_and_no_line(without, validated):
    assert bits(validated[1]) == bits(without[1])
    assert lines_of(validated[0])[1] == lines_of(without[0])[1] and not lines_of(without[0])[0]


def test_it_comes_every_few_steps_and_at_the_end(validated, tmp_path):
    lines, _ = lines_of(validated[0])
    assert [(line["task"], line["step"]) for line in lines] == [
        *((0, step) for step in (2, 4, 6, 8)),
        *((1, step) for step in (2, 4, 6, 8)),
        *((2, step) for step in (2, 4, 6, 8, 10, 12)),
    ]
    train(tmp_path, run_of(tasks=Tasks(6)))
    per_epoch = [(line["step"], line["epoch"]) for line in lines_of(tmp_path)[0]]
    assert per_epoch == [(6, 0), (12, 1), (18, 2), (24, 3)]


def test_the_measures_are_those_of_the_published_versions(validated):
    folder, chain = validated
    lines = lines_of(folder)[0]
    for task, version in enumerate(chain):
        last = [line["validation"] for line in lines if line["task"] == task][-1]
        seen = HELD_OUT.labels < 2 * (task + 1)
        images, labels = HELD_OUT.images[seen], HELD_OUT.labels[seen]
        features = embed(version, images)
        assert set(last) == {"accuracy", "recall@1"} | ({"cross"} if task else set())
        scores = features @ prototypes()[15 - np.arange(6)].T  # class 0 is the last prototype
        assert last["accuracy"] == pytest.approx((scores.argmax(1) == labels).mean(), abs=1e-6)
        assert last["recall@1"] == pytest.approx(by_hand(features, features, labels), abs=1e-6)
        if task:
            old = embed(chain[task - 1], images)
            assert last["cross"] == pytest.approx(by_hand(features, old, labels), abs=1e-6)
        assert version.record.learnt["validation"] == {"step": chain_steps(task), **last}


def chain_steps(task):
    return EPOCHS * (2, 2, 3)[task]


def prototypes():
    """Sixteen unit vectors, as far from each other as they can be, as the paper builds them."""
    v = (1 - np.sqrt(16)) / 15
    m = (1 + v) / 16
    rows = np.vstack([np.eye(15) - m, np.full((1, 15), v - m)])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def by_hand(query, gallery, labels):
    """Share of queries whose nearest other picture is of their class."""
    scores = query @ gallery.T
    np.fill_diagonal(scores, -np.inf)
    return (labels[scores.argmax(1)] == labels).mean()


def test_a_learnable_head_is_judged_by_its_classifier(tmp_path):
    chain = train(tmp_path, run_of("er"))
    for task, version in enumerate(chain):
        seen = HELD_OUT.labels < 2 * (task + 1)
        features = embed(version, HELD_OUT.images[seen])
        logits = features @ version.variables["params"]["head"]["kernel"]
        right = (logits.argmax(1) == HELD_OUT.labels[seen]).mean()
        found = version.record.learnt["validation"]["accuracy"]
        assert found == pytest.approx(right, abs=1e-6)


@pytest.mark.slow
def test_many_devices_and_small_batches_measure_the_same(tmp_path, validated):
    chain = train(tmp_path, run_of(), mesh=make_mesh("data:2,model:2"), batch_size=4)
    for found, expected in zip(chain, validated[1], strict=True):
        ours, theirs = (v.record.learnt["validation"] for v in (found, expected))
        assert ours == pytest.approx(theirs, abs=0.101)  # a picture or two of ten may flip


# The best weights


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    """Folder and chain of a run that keeps the best by recall@1."""
    folder = tmp_path_factory.mktemp("best")
    return folder, train(folder, kept(), validate_every=1)


def kept(keep="recall@1", **changes):
    return run_of(keep=keep, **changes)


@pytest.mark.parametrize("keep", ["accuracy", "recall@1", "cross"])
def test_the_last_of_the_best_weights_are_published(tmp_path, best, keep):
    folder, chain = best
    if keep != "recall@1":
        folder, chain = tmp_path, train(tmp_path, kept(keep), validate_every=1)
    lines, steps = lines_of(folder)[0], []
    for task, version in enumerate(chain):
        measure = "recall@1" if keep == "cross" and not task else keep
        own = [line for line in lines if line["task"] == task]
        scores = [line["validation"][measure] for line in own]
        expected = own[len(own) - 1 - int(np.argmax(scores[::-1]))]
        found = version.record.learnt["validation"]
        assert found == {"step": expected["step"], **expected["validation"]}
        seen = HELD_OUT.labels < 2 * (task + 1)
        features = embed(version, HELD_OUT.images[seen])
        labels = HELD_OUT.labels[seen]
        recall = recall_at_k(features, labels, features, labels, ks=(1,), same_set=True)[1]
        assert found["recall@1"] == pytest.approx(recall, abs=1e-6)
        steps.append(found["step"])
    assert any(step < chain_steps(task) for task, step in enumerate(steps))
    assert not list((folder / "progress").iterdir())


@pytest.mark.parametrize(
    ("save_every", "moment"),
    [
        (3, 7),
        pytest.param(3, 24, marks=pytest.mark.slow),
        *(pytest.param(n, m, marks=pytest.mark.slow) for n in (1, 3) for m in (3, 12, 16, 40)),
    ],
)
def test_killed_anywhere_the_same_weights_are_the_best(tmp_path, best, save_every, moment):
    where = {"validate_every": 1, "save_every": save_every}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, kept(), should_stop=Moment(moment, KeyboardInterrupt), **where)
    with pytest.raises(Stopped):
        train(tmp_path, kept(), should_stop=Moment(4), **where)
    chain = train(tmp_path, kept(), **where)
    assert bits(chain) == bits(best[1])
    assert [v.record.learnt for v in chain] == [v.record.learnt for v in best[1]]
    assert lines_of(tmp_path)[0] == lines_of(best[0])[0]


@pytest.mark.slow
def test_killed_between_the_weights_and_the_state_that_names_them(tmp_path, best, monkeypatch):
    save, calls = Checkpointer.save, []

    def killed(checkpointer, task, state, notes):
        calls.append(notes["best"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        save(checkpointer, task, state, notes)

    where = {"validate_every": 1, "save_every": 1}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpointer, "save", killed)
        train(tmp_path, kept(), **where)
    assert bits(train(tmp_path, kept(), **where)) == bits(best[1])


def test_damaged_best_weights_are_refused(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path, kept(), should_stop=Moment(5), validate_every=1)
    (listed,) = (tmp_path / "progress").glob("task0-best*.json")
    checkpointer, step = Checkpointer(tmp_path / "progress"), int(listed.stem.partition("best")[2])
    assert set(checkpointer.load_best(0, step)) == {"params", "batch_stats"}
    file = next(p for p in listed.with_suffix("").rglob("*") if p.is_file())
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(UserError, match=r"task0-best\d+ is damaged .*: remove .*progress and the"):
        checkpointer.load_best(0, step)


# Stops


def test_asked_to_stop_within_a_validation_it_saves_and_goes_on_with_it(
    tmp_path, monkeypatch, validated
):
    asked = []
    call = Validation.__call__

    def interrupted(exam, variables):
        if not asked:
            asked.append(True)
            raise validation.Interrupted
        return call(exam, variables)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="stopped and saved"):
        patch.setattr(Validation, "__call__", interrupted)
        train(tmp_path, run_of(), validate_every=2)
    assert [p.name for p in (tmp_path / "progress").glob("*.json")] == ["task0-step2.json"]
    chain = train(tmp_path, run_of(), validate_every=2)
    assert bits(chain) == bits(validated[1])
    assert lines_of(tmp_path)[0] == lines_of(validated[0])[0]


def test_a_long_validation_asks_between_its_batches(tmp_path):
    # One question after the first step, one before the save, then four between five batches.
    with pytest.raises(Stopped):
        train(tmp_path, run_of(), should_stop=Moment(4), validate_every=1, batch_size=2)
    assert [p.name for p in (tmp_path / "progress").glob("*.json")] == ["task0-step1.json"]
    assert not (tmp_path / "log.jsonl").exists()


# Refusals


def test_validation_that_does_not_fit_is_refused(tmp_path):
    other_size = tiny.dataset(per_class=2, size=12)
    other_names = tiny.dataset(per_class=2, name="other")
    one_picture = HELD_OUT.take(np.unique(HELD_OUT.labels, return_index=True)[1])
    refused = [
        (run_of(), other_size, r"validation has images of \[12, 12, 3\], the data of \[8, 8, 3\]"),
        (run_of(), other_names, "validation numbers its classes differently from the data"),
        (kept(), None, "keep='recall@1' chooses weights by validation, and there is no"),
        (kept(), one_picture, r"keep='recall@1' cannot choose weights of task 0: .* at least two"),
    ]
    for run, held_out, message in refused:
        with pytest.raises(UserError, match=message):
            train(tmp_path, run, held_out)
    assert Chain(tmp_path / "chain").numbers() == []


def test_what_cannot_be_measured_is_left_out(tmp_path):
    one_picture = HELD_OUT.take(np.unique(HELD_OUT.labels, return_index=True)[1])
    later = HELD_OUT.take(np.flatnonzero(HELD_OUT.labels >= 2))
    chain = train(tmp_path / "one", run_of(), one_picture)
    assert set(chain.record(2).learnt["validation"]) == {"step", "accuracy"}
    chain = train(tmp_path / "later", run_of(), later)
    assert "validation" not in chain.record(0).learnt and chain.record(1).learnt["validation"]


@pytest.mark.parametrize(
    "changes", [{"fresh": ("projection",)}, {"image_shape": (12, 12, 3)}, {"feature_size": 11}]
)
def test_a_version_without_a_gallery_to_search_is_no_version_before(changes):
    run = run_of(tasks=Tasks(6))
    start = tiny.start_of("sce", backbone="flat", task=0)
    task = sequence_task(run, run.tasks.sequence(6), 0, DATA.labels, start=start, replaced=False)
    trainer = task.trainer(tiny.one_device())
    before = dataclasses.replace(start, record=dataclasses.replace(start.record, **changes))
    for previous, seen in ((start, True), (before, False)):
        exam = Validation(HELD_OUT, task, trainer, tiny.session(), previous)
        assert ("cross" in exam.measures) == seen


def test_what_chose_the_weights_belongs_to_the_run():
    session = tiny.session(validate_every=7)
    assert validation.validation_identity(run_of(), HELD_OUT, session) == {}
    found = validation.validation_identity(kept(), HELD_OUT, session)["validation"]
    assert found == {"images": 30, "sha256": HELD_OUT.fingerprint(), "validate_every": 7}


def test_more_epochs_go_on_and_fewer_than_were_done_are_refused(tmp_path):
    run = run_of(tasks=Tasks(6), epochs=2)
    with pytest.raises(Stopped):
        train(tmp_path, run, None, should_stop=Moment(9))  # six steps a epoch, one question each
    fewer = dataclasses.replace(run, epochs=1)
    with pytest.raises(
        UserError, match=r"task 0 has done 1 epochs already, so it cannot end after 1"
    ):
        train(tmp_path, fewer, None)
    chain = train(tmp_path, dataclasses.replace(run, epochs=3), None)
    lines = lines_of(tmp_path)[1]
    assert [line["step"] for line in lines] == [6, 12, 18] and len(chain) == 1
    # The cosine of the epochs to come is that of three.
    cosine = [0.5 + 0.5 * (1 + np.cos(np.pi * e / 3)) / 2 for e in range(3)]
    assert lines[2]["lr"] == pytest.approx(cosine[2], rel=1e-5)
