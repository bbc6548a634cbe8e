"""One step, a sequence of tasks, and the same on eight devices."""

import collections
import functools
import json
import logging
import math
import re

import chex
import flat  # noqa: F401, registers the backbone
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax import lax

from compat_jax import losses, methods, models
from compat_jax.chain import Chain
from compat_jax.data.tasks import Tasks, batch_plan
from compat_jax.errors import Diverged, Stopped, UserError
from compat_jax.identity import fingerprint
from compat_jax.mesh import along_data, make_mesh, replicated
from compat_jax.methods import Method, TaskStart
from compat_jax.models import Backbone
from compat_jax.retrieval import embed
from compat_jax.training import DeviceData, Feed, Sgd, TaskInfo, Trainer, pretrain
from compat_jax.training.step import step_key
from compat_jax.training.task import sequence_task

DATA = tiny.dataset()
OWN = ("er", "fd", "hoc", "sce")  # the others have test_rivals.py
# A number that no other file of tests trains with, so that none has traced these steps.
OPTIMIZER = Sgd(lr=0.05, min_lr=0.001, weight_decay=4e-4)


def tiny_run(method="hoc", **changes):
    return tiny.run(method, **{"optimizer": OPTIMIZER, **changes})


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def train(method, folder, mesh=None, replace_at=(0,), replacements=None, **changes):
    """Chain and log of the tiny sequence."""
    if replacements is None:
        replacements = {task: tiny.start_of(method, seed=task) for task in replace_at}
    chain = tiny.train(
        tiny_run(method, **changes),
        folder,
        DATA,
        mesh,
        replacements=replacements,
        config={"a": 1},
        log_every=10**6,  # no lines by the clock
    )
    return chain, log_of(folder)


@pytest.fixture(scope="module")
def traces():
    """How often the step of each method was traced since the module's first test."""
    return collections.Counter()


@pytest.fixture(scope="module")
def sequences(tmp_path_factory, traces):
    """Each method over three tasks, replaced at task 1."""
    train_step = Trainer.train_step

    def counted(trainer, *arguments):
        traces[trainer.method.name] += 1
        return train_step(trainer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", counted)
        return {
            method: train(method, tmp_path_factory.mktemp(method), replace_at=(0, 1))
            for method in OWN
        }


# Sequences


@pytest.mark.parametrize("method", OWN)
def test_a_sequence_ends_as_one_version_a_task(sequences, method):
    chain, log = sequences[method]
    fixed = methods.get(method).fixed_simplex
    records = [chain.record(n) for n in chain.numbers()]
    assert [r.task for r in records] == [0, 1, 2]
    assert [r.classes_seen for r in records] == [2, 4, 6]
    assert [r.parent for r in records] == [None, None, 1]
    assert [r.replaced_by is None for r in records] == [False, False, True]
    assert [r.head_classes for r in records] == ([None] * 3 if fixed else [2, 4, 6])
    assert {r.feature_size for r in records} == {15 if fixed else 16}
    assert {(r.method, r.seed, r.data_fingerprint) for r in records} == {
        (method, 0, DATA.fingerprint())
    }
    assert all(r.config == {"a": 1} for r in records)
    for number in chain.numbers():
        leaves = jax.tree.leaves(chain.open(number).variables)
        assert all(np.isfinite(leaf).all() for leaf in leaves)
    # Two epochs a task, of (new + memory) // 16 steps: 32, 32 + 8 and 32 + 16 images.
    assert [(line["task"], line["step"]) for line in log] == [
        *((0, 2), (0, 4)),
        *((1, 2), (1, 4)),
        *((2, 3), (2, 6)),
    ]
    assert all(np.isfinite(line["loss"]) and 0 <= line["accuracy"] <= 1 for line in log)
    assert all(line["images_per_second"] > 0 for line in log)
    assert [line["epoch"] for line in log] == [0, 1] * 3
    for line in log:  # half the cosine in the second epoch of two
        assert line["lr"] == pytest.approx([0.05, 0.0255][line["epoch"]], rel=1e-6)
    terms = {"hoc": {"cross_entropy", "contrast"}, "fd": {"cross_entropy", "distillation"}}
    assert all(set(line["terms"]) == terms.get(method, set()) for line in log)


@pytest.mark.parametrize("method", OWN)
def test_a_step_is_traced_once_for_all_tasks(sequences, traces, method):
    assert traces[method] == 1


def test_the_terms_of_a_loss_make_up_the_loss(sequences):
    for line in sequences["hoc"][1]:
        terms = line["terms"]
        total = 0.1 * terms["cross_entropy"] + 0.9 * terms["contrast"]
        assert line["loss"] == pytest.approx(total, rel=1e-5, abs=1e-6)
    weights = [0.0, 5.0, 5.0 * math.sqrt(2 / 4)]  # new classes to old ones
    for line in sequences["fd"][1]:
        terms = line["terms"]
        total = terms["cross_entropy"] + weights[line["task"]] * terms["distillation"]
        assert line["loss"] == pytest.approx(total, rel=1e-5, abs=1e-6)


def test_training_learns(sequences):
    for method in ("sce", "er"):
        first, last = (line["loss"] for line in sequences[method][1][:2])
        assert last < first
    chain, _ = sequences["sce"]
    features = embed(chain.open(2), DATA.images)
    # By chance one in six; with the wrong label order or a frozen network not much more.
    own = features @ np.stack([features[DATA.labels == c].mean(0) for c in range(6)]).T
    assert (own.argmax(1) == DATA.labels).mean() > 0.5


def task_of(method, index, start):
    """A task of the tiny sequence."""
    run = tiny_run(method)
    sequence = run.tasks.sequence(DATA.num_classes)
    return sequence_task(run, sequence, index, DATA.labels, start=start, replaced=False)


def started(method, index, start):
    """Variables at the start of a task."""
    task = task_of(method, index, start)
    return task.starting_variables(task.trainer(tiny.one_device()), (8, 8, 3))


def test_the_head_of_er_grows_and_keeps_what_it_learned(sequences):
    chain, _ = sequences["er"]
    heads = [chain.open(n).variables["params"]["head"]["kernel"] for n in chain.numbers()]
    assert [head.shape for head in heads] == [(16, 2), (16, 4), (16, 6)]
    start = started("er", 2, chain.open(1))
    head = start["params"]["head"]["kernel"]
    assert head.shape == (16, 6)
    np.testing.assert_array_equal(head[:, :4], heads[1])
    fresh = np.abs(head[:, 4:])
    assert fresh.min() > 0 and fresh.max() <= 1 / math.sqrt(16)  # as PyTorch draws a linear layer


def test_a_replaced_er_begins_with_a_fresh_head():
    model = tiny.start_of("er")
    start = started("er", 1, model)
    head, pretrained = (
        start["params"]["head"]["kernel"],
        model.variables["params"]["head"]["kernel"],
    )
    assert head.shape == (16, 6) and pretrained.shape == (16, 3)
    assert not np.isclose(head[:, :3], pretrained).any()
    chex.assert_trees_all_equal(start["params"]["backbone"], model.variables["params"]["backbone"])


def test_a_missing_version_is_trained_again_to_the_same_bits(sequences, tmp_path):
    whole, _ = sequences["hoc"]
    chain, _ = train("hoc", tmp_path, replace_at=(0, 1))
    for number in (1, 2):
        assert chain.open(number).sha256 == whole.open(number).sha256
    (tmp_path / "chain" / "0001").rename(tmp_path / "lost")
    train("hoc", tmp_path, replace_at=(0, 1))
    assert [chain.open(n).sha256 for n in range(3)] == [whole.open(n).sha256 for n in range(3)]


def test_a_corrupt_version_is_named_and_not_trained_from(tmp_path):
    chain, _ = train("hoc", tmp_path)
    (chain.path / "0002").rmtree()
    (chain.path / "0001" / "record.json").write_text("{")
    with pytest.raises(UserError, match=r"version 1 of .* cannot be used: record.json"):
        train("hoc", tmp_path)


def test_a_model_of_another_architecture_joins_the_sequence(tmp_path):
    wide = tiny.start_of("sce", backbone_arguments={"width": 24})
    chain, _ = train("sce", tmp_path, replacements={0: tiny.start_of("sce"), 1: wide})
    widths = [chain.record(n).backbone_arguments.get("width", 16) for n in range(3)]
    assert widths == [16, 24, 24]
    shapes = [chain.open(n).variables["params"]["projection"]["kernel"].shape for n in range(3)]
    assert shapes == [(16, 15), (24, 15), (24, 15)]


# One step


def prepared(method, mesh=None, task=1):
    """Trainer, state at the start of a task, frozen state, and feed, all on the mesh."""
    mesh, task = mesh or tiny.one_device(), task_of(method, task, tiny.start_of(method, seed=1))
    trainer = task.trainer(mesh)  # with the program that `sequences` compiled
    variables = task.starting_variables(trainer, (8, 8, 3))
    state = trainer.create_state(variables, task.info())
    frozen = task.freeze(trainer, variables, DATA)
    data = jax.device_put(DeviceData(DATA.images, DATA.labels), replicated(mesh))
    plan = np.pad(task.plan, ((0, 6 - task.steps), (0, 0)))
    return trainer, state, frozen, Feed(data, jax.device_put(plan, along_data(mesh, 1)))


def augmented(state, images):
    """Augment and normalise images as the step does."""
    preprocess = tiny.PREPROCESS
    return preprocess.normalize(preprocess.augment(step_key(state), images))


@functools.cache
def _forward(embedder, train):
    def forward(variables, images):
        return embedder.apply(variables, images, train=train, mutable=["batch_stats"])[0].features

    return jax.jit(forward)


def features(trainer, variables, images, train):
    return np.asarray(_forward(trainer.embedder, train)(variables, images), np.float64)


def hoc_by_hand(new, old, rows, lam, mu):
    """Mean HOC loss in float64, from the paper's sentences."""
    k, d = 16, 15
    v = (1 - np.sqrt(k)) / d
    m = (1 + v) / k
    prototypes = np.vstack([np.eye(d) - m, np.full((1, d), v - m)])
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    logits = new @ prototypes.T
    cross_entropy = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(new)), rows]
    new, old = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (new, old))
    similarity = mu * old @ new.T
    other = rows[:, None] != rows[None, :]
    contrast = np.log((np.exp(similarity) * other).sum(1)) - np.diag(similarity)
    return np.mean(lam * cross_entropy + (1 - lam) * contrast)


def test_the_loss_compares_with_the_model_that_the_task_started_from():
    trainer, state, frozen, feed = prepared("hoc")
    data, plan = feed
    start = jax.tree.map(np.asarray, frozen["previous"])
    for step in range(3):
        images = augmented(state, data.images[plan[step]])
        new = features(trainer, state.variables, images, train=True)
        old = features(trainer, start, images, train=False)
        rows = 15 - np.asarray(data.labels[plan[step]])  # class 0 is written to the last prototype
        expected = hoc_by_hand(new, old, rows, lam=0.1, mu=10.0)
        state, metrics = trainer.run_steps(state, frozen, feed, stop=step + 1)
        assert float(metrics.loss) == pytest.approx(expected, rel=1e-4)
    assert int(state.step) == 3
    chex.assert_trees_all_equal(frozen["previous"], start)
    assert not np.allclose(
        state.params["projection"]["kernel"], start["params"]["projection"]["kernel"]
    )


def test_the_first_loss_of_a_task_is_against_the_version_before(tmp_path):
    def stop():
        return len(Chain(tmp_path / "chain")) == 2

    with pytest.raises(Stopped):
        tiny.train(
            tiny_run("hoc"),
            tmp_path,
            DATA,
            replacements={0: tiny.start_of("hoc")},
            log_every=1,
            should_stop=stop,
        )
    lines = log_of(tmp_path)
    logged = next(line for line in lines if line["task"] == 1 and line["step"] == 1)
    variables = Chain(tmp_path / "chain").open(0).variables
    trainer, state, _, (data, plan) = prepared("hoc")
    labels = DATA.labels[np.asarray(plan[0])]
    assert set(labels[:8]) == {0, 1} and set(labels[8:]) == {2, 3}  # half memory, half new
    images = augmented(state, data.images[plan[0]])
    new = features(trainer, variables, images, train=True)
    old = features(trainer, variables, images, train=False)
    expected = hoc_by_hand(new, old, 15 - labels, lam=0.1, mu=10.0)
    assert logged["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_rate_is_constant_within_an_epoch_and_follows_the_cosine():
    trainer, state, frozen, (data, plan) = prepared("sce", task=0)
    feed = Feed(data, jnp.broadcast_to(plan[:1], plan.shape))  # the same images in every step
    task = state.task.replace(epochs=jnp.int32(3), steps_per_epoch=jnp.int32(2))
    before = np.asarray(state.params["projection"]["kernel"])

    def moved(step):
        then = state.replace(step=jnp.int32(step), task=task)
        copied = jax.tree.map(jnp.copy, then)
        new, _ = trainer.run_steps(copied, frozen, feed, stop=step + 1)
        return np.asarray(new.params["projection"]["kernel"]) - before

    # 0.001 + 0.049 (1 + cos(pi e / 3)) / 2 in epoch e, as shares of the first.
    cosine = [0.001 + 0.049 * (1 + math.cos(math.pi * e / 3)) / 2 for e in range(3)]
    for step in range(6):
        np.testing.assert_allclose(
            moved(step), moved(0) * cosine[step // 2] / 0.05, rtol=1e-3, atol=1e-6
        )
    assert np.abs(moved(0)).max() > 1e-3


def test_the_contract_of_a_step():
    trainer, state, frozen, (data, plan) = prepared("hoc", task=0)
    batch = {"image": data.images[plan[0]], "label": data.labels[plan[0]]}
    new_state, metrics = jax.eval_shape(trainer.train_step, state, batch, frozen)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    assert metrics._fields == ("loss", "accuracy", "broken", "terms")
    assert set(metrics.terms) == {"cross_entropy", "contrast"}
    broken = metrics.broken
    assert (broken.shape, broken.dtype) == ((), np.int32)
    floats = (metrics.loss, metrics.accuracy, *metrics.terms.values())
    assert {(m.shape, m.dtype.name) for m in floats} == {((), "float32")}


def test_a_step_may_compute_in_bfloat16_with_float32_weights(tmp_path, sequences):
    chain, log = train("sce", tmp_path, dtype="bfloat16")
    leaves = jax.tree.leaves(chain.open(2).variables)
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}
    exact = sequences["sce"][1][0]["loss"]
    assert log[0]["loss"] == pytest.approx(exact, rel=0.05) and log[0]["loss"] != exact


def test_the_type_that_auto_takes_is_in_the_record(tmp_path):
    run = tiny.run("sce", dtype="auto")
    assert run.dtype == run.describe()["dtype"] == models.computed_in("auto")


# Devices


@pytest.fixture(scope="module")
def eight():
    return make_mesh("data:8")


def test_eight_devices_give_what_one_gives(tmp_path, sequences, eight):
    (one, one_log), (many, many_log) = sequences["hoc"], train("hoc", tmp_path, eight, (0, 1))
    for key in ("loss", "accuracy"):
        np.testing.assert_allclose(
            [line[key] for line in many_log], [line[key] for line in one_log], rtol=1e-4
        )
    for number in range(3):
        chex.assert_trees_all_close(
            many.open(number).variables, one.open(number).variables, rtol=1e-3, atol=1e-4
        )


def test_statistics_and_contrast_see_the_whole_batch(eight):
    # What each device would get from its own two images is something else by far.
    trainer, state, frozen, feed = prepared("hoc", eight)
    data, plan = feed
    variables = jax.tree.map(np.asarray, state.variables)
    images = np.asarray(augmented(state, data.images[plan[0]]))
    rows = 15 - DATA.labels[np.asarray(plan[0])]
    state, metrics = trainer.run_steps(state, frozen, feed, stop=1)

    mean = jax.jit(lambda *given: losses.hoc(*given).mean())

    def loss(part):
        new = jnp.float32(features(trainer, variables, images[part], train=True))
        old = jnp.float32(features(trainer, variables, images[part], train=False))
        return float(mean(new, old, rows[part]))

    assert float(metrics.loss) == pytest.approx(loss(slice(None)), rel=1e-4)
    shards = np.mean([loss(slice(2 * i, 2 * i + 2)) for i in range(8)])
    assert abs(shards - float(metrics.loss)) > 0.1


def test_many_steps_in_one_dispatch_give_what_single_steps_give(monkeypatch):
    results = []
    for at_once in (True, False):  # at once as on an accelerator
        monkeypatch.setattr(Trainer, "dispatches_each_step", not at_once)
        trainer, state, frozen, feed = prepared("hoc", task=2)
        state, first = trainer.run_steps(state, frozen, feed, stop=2)
        state, rest = trainer.run_steps(state, frozen, feed, stop=6)
        results.append((state, first, rest))
    assert int(results[0][0].step) == 6
    chex.assert_trees_all_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("at_once", [True, False])
def test_the_hot_path_moves_nothing_between_host_and_devices(monkeypatch, at_once):
    monkeypatch.setattr(Trainer, "dispatches_each_step", not at_once)
    trainer, state, frozen, feed = prepared("hoc", task=2)
    state, _ = trainer.run_steps(state, frozen, feed, stop=2)
    with jax.transfer_guard("disallow"):
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            jnp.add(state.step, np.ones(3, np.int32))  # the guard does work on this platform
        state, _ = trainer.run_steps(state, frozen, feed, stop=5)
    assert int(state.step) == 5


def test_only_the_first_task_compiles(tmp_path, caplog):
    run, start, chain = tiny_run("er"), {0: tiny.start_of("er")}, Chain(tmp_path / "chain")
    with pytest.raises(Stopped):
        tiny.train(run, tmp_path, DATA, replacements=start, should_stop=lambda: len(chain) == 1)

    def compiled():
        return [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]

    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        jax.jit(lambda x: x + 1)(jnp.float32(1))
        assert compiled()  # it would be seen
        caplog.clear()
        tiny.train(run, tmp_path, DATA, replacements=start)
    assert len(chain) == 3 and compiled() == []


def test_a_task_is_scalars_so_that_another_compiles_nothing():
    info = TaskInfo.create(seed=2**32 - 1, index=3, epochs=2, steps_per_epoch=5, num_seen=8)
    dtypes = jax.tree.map(lambda x: (x.dtype.name, x.shape), info)
    assert dtypes.seed == ("uint32", ()) and dtypes.index == ("int32", ())
    assert dtypes.num_seen == ("int32", ())
    frozen = methods.get("fd").freeze(TaskStart({}, 2, 4, lambda: np.zeros((6, 15))))
    assert (frozen["weight"].dtype, frozen["weight"].shape) == (np.float32, ())
    assert (frozen["num_old"].dtype, frozen["num_old"].shape) == (np.int32, ())
    assert batch_plan(np.arange(4), np.zeros(0, int), 2, 1, 0, 0).dtype == np.int32


# Divergence


def strict_log_of(folder):
    """The log's lines, NaN and Infinity not among their values."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_a_learning_rate_far_too_large_is_refused_before_anything_is_published(tmp_path):
    run = tiny_run("sce", optimizer=Sgd(lr=1e6))
    named = (
        r"^task 0 diverged: the (loss is|weights are) not finite at step (\d+) \(epoch (\d+)\); "
    )
    with pytest.raises(Diverged, match=named) as caught:
        tiny.train(run, tmp_path, DATA, replacements={0: tiny.start_of("sce")}, save_every=1)
    step, epoch = (int(n) for n in re.match(named, str(caught.value)).groups()[1:])
    assert epoch == step // 2 and caught.value.argument == "optimizer.lr"
    assert "Lower the learning rate, and give the run another workdir" in str(caught.value)
    assert Chain(tmp_path / "chain").numbers() == []
    assert [line["step"] for line in strict_log_of(tmp_path)] == list(range(1, step + 1))
    # What was saved is from before; the same run ends in the same way.
    with pytest.raises(Diverged, match=re.escape(str(caught.value))):
        tiny.train(run, tmp_path, DATA, replacements={0: tiny.start_of("sce")}, save_every=1)


def broken_at(task_and_step, value):
    """Cross-entropy to which `value(features)` is added in one step."""

    def loss(inputs):
        task, step = inputs.frozen["task"], inputs.taught
        wrong = (task == task_and_step[0]) & (step == task_and_step[1])
        zero = lambda x: jnp.zeros(len(x))  # noqa: E731
        # A branch: `where` would differentiate what it does not choose.
        return inputs.cross_entropy() + lax.cond(wrong, value, zero, inputs.outputs.features)

    return Method(
        "broken",
        loss,
        freeze=lambda start: {"task": np.int32(start.num_old // 2)},
        teach=lambda forward, frozen, carried: carried["step"],
        init=lambda variables: {"step": jnp.int32(0)},
        update=lambda carried, variables, inputs: {"step": carried["step"] + 1},
    )


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    ("step", "value", "message"),
    [
        (3, lambda x: jnp.nan * x[:, 0], "the loss is not finite at step 3 (epoch 1)"),
        (0, lambda x: jnp.log(0 * x[:, 0]), "the loss is not finite at step 0 (epoch 0)"),
        # Without a gradient: the weights stay whole, and every later loss is finite again.
        (2, lambda x: lax.stop_gradient(x[:, 0] / 0), "the loss is not finite at step 2 (epoch 1)"),
        # The root of zero has no derivative: finite loss, broken weights, in the last step.
        (3, lambda x: jnp.sqrt(0 * x[:, 0]), "the weights are not finite at step 3 (epoch 1)"),
    ],
)
def test_the_step_that_broke_is_named(tmp_path, monkeypatch, at_once, step, value, message):
    monkeypatch.setattr(Trainer, "dispatches_each_step", not at_once)
    run = tiny.run(broken_at((1, step), value), backbone="flat")
    start = {0: tiny.start_of("sce", backbone="flat")}
    with pytest.raises(Diverged, match=re.escape(f"task 1 diverged: {message}; nothing of")):
        tiny.train(run, tmp_path, DATA, replacements=start)
    assert Chain(tmp_path / "chain").verify() == {0: None}
    done = [(line["task"], line["step"]) for line in strict_log_of(tmp_path)]
    assert done == [(0, 2), (0, 4), *[(1, 2)] * (step > 1)]


def test_a_pretrained_model_that_diverges_is_not_published(tmp_path):
    run = tiny.run("sce", backbone="flat", optimizer=Sgd(lr=1e6))
    with pytest.raises(Diverged, match=r"^model 0 diverged: the loss is not finite at step"):
        pretrain(run, DATA, tmp_path, class_counts=(6,), session=tiny.session())
    assert Chain(tmp_path / "chain").numbers() == [] and not (tmp_path / "progress").exists()


# Objects of the user's own


def test_a_transformation_of_optax_trains_like_the_settings_that_it_equals(tmp_path):
    ours = Sgd(lr=0.05, weight_decay=0.0, schedule="constant")
    theirs = optax.sgd(0.05, momentum=0.9)
    expected, _ = train("sce", tmp_path / "ours", optimizer=ours)
    found, _ = train("sce", tmp_path / "theirs", optimizer=theirs)
    for a, b in zip(found, expected, strict=True):
        chex.assert_trees_all_close(a.variables, b.variables, rtol=1e-4, atol=1e-5)
    described = json.loads((tmp_path / "theirs" / "run.json").read_text())["optimizer"]
    assert described == f"an optax transformation, {fingerprint(theirs)}"
    with pytest.raises(UserError, match=r"optimizer"):  # the run is another one
        train("sce", tmp_path / "theirs", optimizer=optax.sgd(0.06, momentum=0.9))


def test_an_optimiser_with_a_state_of_its_own_goes_on_to_the_same_bits(tmp_path):
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01))

    def trained(folder, **where):
        run = tiny.run("sce", backbone="flat", optimizer=adam)
        start = {0: tiny.start_of("sce", backbone="flat")}
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            return tiny.train(run, folder, DATA, replacements=start, **where)

    asked = iter(range(12))

    def kill():
        if next(asked, None) is None:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", should_stop=kill, save_every=1)
    assert any((tmp_path / "killed" / "progress").iterdir())
    killed, whole = trained(tmp_path / "killed"), trained(tmp_path / "whole")
    assert [v.sha256 for v in killed] == [v.sha256 for v in whole]
    losses = [line["loss"] for line in log_of(tmp_path / "whole")]
    assert losses[1] < losses[0]


def test_a_linen_module_trains_and_its_chain_opens_with_it(tmp_path):
    module = tiny.OneConv(width=12)
    chain = tiny.train(tiny_run("sce", backbone=module), tmp_path, DATA)
    record = chain.record(2)
    assert (record.backbone, record.backbone_arguments) == ("tiny:OneConv", {"width": 12})
    features = embed(chain[2], DATA.images)
    for given in (tiny.OneConv(width=12), "tiny:OneConv"):
        opened = Chain(chain.path, backbone=given)
        assert opened.verify() == {0: None, 1: None, 2: None}
        np.testing.assert_array_equal(embed(opened[2], DATA.images), features)
    alone = (
        f"version 2 of {chain.path} cannot be used: its backbone 'tiny:OneConv' is not registered "
        "here: hand it in, Chain(path, backbone=OneConv(width=12)), or its import path"
    )
    with pytest.raises(UserError, match=f"^{re.escape(alone)}$"):
        Chain(chain.path).open(2)
    wider = r"trained with the backbone .*'width': 12.*, but .*'width': 16.* was handed in$"
    with pytest.raises(UserError, match=wider):
        Chain(chain.path, backbone=tiny.OneConv(width=16)).open(2)


def test_a_module_by_its_import_path_trains_to_the_same_bits(tmp_path):
    by_path = Backbone("tiny:OneConv", {"width": 12})
    runs = {"path": by_path, "object": tiny.OneConv(width=12)}
    chains = [
        tiny.train(tiny_run("sce", backbone=given, tasks=Tasks(6)), tmp_path / name, DATA)
        for name, given in runs.items()
    ]
    assert chains[0][0].sha256 == chains[1][0].sha256
    assert chains[0].record(0) == chains[1].record(0)
