"""One step, a sequence of tasks, and the same on eight devices."""

import collections
import dataclasses
import functools
import json
import logging
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from compat_jax import losses
from compat_jax.chain import Chain
from compat_jax.data.tasks import batch_plan
from compat_jax.errors import Stopped, UserError
from compat_jax.mesh import along_data, make_mesh, replicated
from compat_jax.methods import METHODS
from compat_jax.retrieval import extract
from compat_jax.train import DeviceData, TaskInfo, loop
from compat_jax.train.step import Trainer, step_key

DATA = tiny.dataset()


@pytest.fixture(scope="module", autouse=True)
def backbone():
    with tiny.one_conv():
        yield


def train(method, folder, mesh=None, replace_at=(0,), replacements=None, **changes):
    """Chain and log of the tiny sequence."""
    if replacements is None:
        replacements = {task: tiny.start_of(method, seed=task) for task in replace_at}
    log = folder / "log.jsonl"
    chain = tiny.train(
        tiny.run(method, **changes),
        folder,
        DATA,
        mesh,
        replacements=replacements,
        log=log,
        config={"a": 1},
    )
    return chain, [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def traces():
    """How often the step of each method was traced since the module's first test."""
    return collections.Counter()


@pytest.fixture(scope="module")
def sequences(tmp_path_factory, traces):
    """Each method over three tasks, replaced at task 1."""
    loop._cached_trainer.cache_clear()  # another file of tests may have traced the step
    train_step = Trainer.train_step

    def counted(trainer, *arguments):
        traces[trainer.method.name] += 1
        return train_step(trainer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", counted)
        return {
            method: train(method, tmp_path_factory.mktemp(method), replace_at=(0, 1))
            for method in METHODS
        }


# Sequences


@pytest.mark.parametrize("method", METHODS)
def test_a_sequence_ends_as_one_version_a_task(sequences, method):
    chain, log = sequences[method]
    fixed = METHODS[method].fixed_simplex
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


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_traced_once_for_all_tasks(sequences, traces, method):
    assert traces[method] == 1


def test_training_learns(sequences):
    for method in ("sce", "er"):
        first, last = (line["loss"] for line in sequences[method][1][:2])
        assert last < first
    chain, _ = sequences["sce"]
    features = extract(chain.open(2), DATA.images)
    # By chance one in six; with the wrong label order or a frozen network not much more.
    own = features @ np.stack([features[DATA.labels == c].mean(0) for c in range(6)]).T
    assert (own.argmax(1) == DATA.labels).mean() > 0.5


def test_the_head_of_er_grows_and_keeps_what_it_learned(sequences):
    chain, _ = sequences["er"]
    heads = [chain.open(n).variables["params"]["fc2"]["kernel"] for n in chain.numbers()]
    assert [head.shape for head in heads] == [(16, 2), (16, 4), (16, 6)]
    run = tiny.run("er")
    start = loop._starting_variables(run, None, chain.open(1), 2, (8, 8, 3))
    head = start["params"]["fc2"]["kernel"]
    assert head.shape == (16, 6)
    np.testing.assert_array_equal(head[:, :4], heads[1])
    fresh = np.abs(head[:, 4:])
    assert fresh.min() > 0 and fresh.max() <= 1 / math.sqrt(16)  # as PyTorch draws a linear layer


def test_a_replaced_er_begins_with_a_fresh_head():
    run, model = tiny.run("er"), tiny.start_of("er")
    start = loop._starting_variables(run, None, model, 1, (8, 8, 3))
    head, pretrained = start["params"]["fc2"]["kernel"], model.variables["params"]["fc2"]["kernel"]
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
    shapes = [chain.open(n).variables["params"]["fc1"]["kernel"].shape for n in range(3)]
    assert shapes == [(16, 15), (24, 15), (24, 15)]


# One step


def prepared(method, mesh=None, task=1, fresh=False):
    """Trainer, state at the start of a task, previous model, data and plan, all on the mesh."""
    run, mesh = tiny.run(method), mesh or tiny.one_device()
    trainer = loop._trainer(run, None, mesh)  # with the program that `sequences` compiled
    if fresh:
        trainer = dataclasses.replace(trainer)
    plans = loop._plans(run, DATA.labels)
    start = tiny.start_of(method, seed=1)
    variables = loop._starting_variables(run, trainer, start, task, (8, 8, 3))
    state = trainer.create_state(variables, loop._task_info(run, task, len(plans[task])))
    previous = trainer.place(variables) if run.method.needs_previous else None
    data = jax.device_put(DeviceData(DATA.images, DATA.labels), replicated(mesh))
    plan = np.pad(plans[task], ((0, 6 - len(plans[task])), (0, 0)))
    return trainer, state, previous, data, jax.device_put(plan, along_data(mesh, 1))


def augmented(state, images):
    """What the step sees."""
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
    trainer, state, previous, data, plan = prepared("hoc")
    start = jax.tree.map(np.asarray, previous)
    for step in range(3):
        images = augmented(state, data.images[plan[step]])
        new = features(trainer, state.variables, images, train=True)
        old = features(trainer, start, images, train=False)
        rows = 15 - np.asarray(data.labels[plan[step]])  # class 0 is written to the last prototype
        expected = hoc_by_hand(new, old, rows, lam=0.1, mu=10.0)
        state, metrics = trainer.run_steps(state, previous, data, plan, step + 1)
        assert float(metrics.loss) == pytest.approx(expected, rel=1e-4)
    assert int(state.step) == 3
    chex.assert_trees_all_equal(previous, start)  # frozen
    assert not np.allclose(state.params["fc1"]["kernel"], start["params"]["fc1"]["kernel"])


def test_the_first_loss_of_a_task_is_against_the_version_before(tmp_path):
    def stop():
        return len(Chain(tmp_path / "chain")) == 2

    with pytest.raises(Stopped):
        tiny.train(
            tiny.run("hoc"),
            tmp_path,
            DATA,
            replacements={0: tiny.start_of("hoc")},
            save_every=1,
            log=tmp_path / "log.jsonl",
            should_stop=stop,
        )
    lines = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    logged = next(line for line in lines if line["task"] == 1 and line["step"] == 1)
    variables = Chain(tmp_path / "chain").open(0).variables
    trainer, state, _, data, plan = prepared("hoc")
    labels = DATA.labels[np.asarray(plan[0])]
    assert set(labels[:8]) == {0, 1} and set(labels[8:]) == {2, 3}  # half memory, half new
    images = augmented(state, data.images[plan[0]])
    new = features(trainer, variables, images, train=True)
    old = features(trainer, variables, images, train=False)
    expected = hoc_by_hand(new, old, 15 - labels, lam=0.1, mu=10.0)
    assert logged["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_rate_is_constant_within_an_epoch_and_follows_the_cosine():
    trainer, state, _, data, plan = prepared("sce", task=0)
    plan = jnp.broadcast_to(plan[:1], plan.shape)  # the same images in every step
    task = state.task.replace(epochs=jnp.int32(3), steps_per_epoch=jnp.int32(2))
    before = np.asarray(state.params["fc1"]["kernel"])

    def moved(step):
        then = state.replace(step=jnp.int32(step), task=task)
        new, _ = trainer.run_steps(jax.tree.map(jnp.copy, then), None, data, plan, step + 1)
        return np.asarray(new.params["fc1"]["kernel"]) - before

    # 0.001 + 0.049 (1 + cos(pi e / 3)) / 2 in epoch e, as shares of the first.
    cosine = [0.001 + 0.049 * (1 + math.cos(math.pi * e / 3)) / 2 for e in range(3)]
    for step in range(6):
        np.testing.assert_allclose(
            moved(step), moved(0) * cosine[step // 2] / 0.05, rtol=1e-3, atol=1e-6
        )
    assert np.abs(moved(0)).max() > 1e-3


def test_the_contract_of_a_step():
    trainer, state, previous, data, plan = prepared("hoc", task=0)
    batch = {"image": data.images[plan[0]], "label": data.labels[plan[0]]}
    new_state, metrics = jax.eval_shape(trainer.train_step, state, batch, previous)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    assert metrics._fields == ("loss", "accuracy")
    assert {(m.shape, m.dtype.name) for m in metrics} == {((), "float32")}


def test_a_step_may_compute_in_bfloat16_with_float32_weights(tmp_path, sequences):
    chain, log = train("sce", tmp_path, dtype="bfloat16")
    leaves = jax.tree.leaves(chain.open(2).variables)
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}
    exact = sequences["sce"][1][0]["loss"]
    assert log[0]["loss"] == pytest.approx(exact, rel=0.05) and log[0]["loss"] != exact


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
    trainer, state, previous, data, plan = prepared("hoc", eight)
    variables = jax.tree.map(np.asarray, state.variables)
    images = np.asarray(augmented(state, data.images[plan[0]]))
    rows = 15 - DATA.labels[np.asarray(plan[0])]
    state, metrics = trainer.run_steps(state, previous, data, plan, 1)

    def loss(part):
        new = jnp.float32(features(trainer, variables, images[part], train=True))
        old = jnp.float32(features(trainer, variables, images[part], train=False))
        return float(losses.hoc(new, old, rows[part]).mean())

    assert float(metrics.loss) == pytest.approx(loss(slice(None)), rel=1e-4)
    shards = np.mean([loss(slice(2 * i, 2 * i + 2)) for i in range(8)])
    assert abs(shards - float(metrics.loss)) > 0.1


@pytest.fixture(scope="module")
def loop_on_device():
    """As on an accelerator, where many steps are one dispatch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_dispatch_each_step", False)
        trainer, *_ = prepared("hoc", fresh=True)
        yield trainer


def test_many_steps_in_one_dispatch_give_what_single_steps_give(loop_on_device, monkeypatch):
    results = []
    for at_once in (True, False):
        monkeypatch.setattr(Trainer, "_dispatch_each_step", not at_once)
        trainer, state, previous, data, plan = prepared("hoc", task=2)
        trainer = loop_on_device if at_once else trainer
        state, first = trainer.run_steps(state, previous, data, plan, 2)
        state, rest = trainer.run_steps(state, previous, data, plan, 6)
        results.append((state, first, rest))
    assert int(results[0][0].step) == 6
    chex.assert_trees_all_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("at_once", [True, False])
def test_the_hot_path_moves_nothing_between_host_and_devices(loop_on_device, monkeypatch, at_once):
    monkeypatch.setattr(Trainer, "_dispatch_each_step", not at_once)
    trainer, state, previous, data, plan = prepared("hoc", task=2)
    trainer = loop_on_device if at_once else trainer
    state, _ = trainer.run_steps(state, previous, data, plan, 2)
    with jax.transfer_guard("disallow"):
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            jnp.add(state.step, np.ones(3, np.int32))  # the guard does work on this platform
        state, _ = trainer.run_steps(state, previous, data, plan, 5)
    assert int(state.step) == 5


def test_only_the_first_task_compiles(tmp_path, caplog):
    run, start, chain = tiny.run("er"), {0: tiny.start_of("er")}, Chain(tmp_path / "chain")
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
    assert dtypes.distillation_weight == ("float32", ())
    assert batch_plan(np.arange(4), np.zeros(0, int), 2, 1, 0, 0).dtype == np.int32
