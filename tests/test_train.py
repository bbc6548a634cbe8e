"""One step, a sequence of tasks, and the same on eight devices."""

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
from compat_jax.data.tasks import TaskSequence, batch_plan
from compat_jax.errors import Stopped, UserError
from compat_jax.mesh import along_data, make_mesh, replicated
from compat_jax.methods import METHODS, LossSettings
from compat_jax.train import DeviceData, TaskInfo, loop
from compat_jax.train.optimizer import OptimizerSettings
from compat_jax.train.step import Trainer, step_key

DATA = tiny.dataset()


def start_of(method, **changes):
    """A model to start from, so that no initialisation is compiled."""
    fields = {"task": None, **changes}
    if METHODS[method].fixed_simplex:
        return tiny.version(method="sce", **fields)
    return tiny.version(method="er", head_classes=3, feature_size=16, **fields)


def train(method, folder, mesh=None, replace_at=(0,), **changes):
    """Chain and log of the tiny sequence."""
    run = tiny.run(method, **changes)
    replacements = {task: start_of(method, seed=task) for task in replace_at}
    chain = tiny.train(
        run, folder, DATA, mesh, replacements=replacements, log=chain_log(folder), config={"a": 1}
    )
    return chain, [json.loads(line) for line in chain_log(folder).read_text().splitlines()]


def chain_log(folder):
    return folder / "log.jsonl"


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    """Each method over three tasks, replaced at task 1."""
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


def test_training_learns(tmp_path):
    optim = OptimizerSettings(lr=0.05, schedule="constant")
    one_task = {"sequence": TaskSequence(6, 6, 1), "epochs": 8, "optim": optim}
    _, log = train("sce", tmp_path, **one_task)
    assert log[0]["loss"] > 2 and log[-1]["loss"] < 0.75 * log[0]["loss"]
    assert log[-1]["accuracy"] > 0.6 > log[0]["accuracy"]


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
    run, model = tiny.run("er"), start_of("er")
    start = loop._starting_variables(run, None, model, 1, (8, 8, 3))
    head, pretrained = start["params"]["fc2"]["kernel"], model.variables["params"]["fc2"]["kernel"]
    assert head.shape == (16, 6) and pretrained.shape == (16, 3)
    assert not np.isclose(head[:, :3], pretrained).any()
    for name in ("conv1", "layer3_0"):
        chex.assert_trees_all_equal(
            start["params"]["backbone"][name], model.variables["params"]["backbone"][name]
        )


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
    wide = tiny.version(method="sce", task=None, backbone_arguments={"width": 8})
    sequence = TaskSequence(4, 2, 2)
    replacements = {0: start_of("hoc"), 1: wide}
    run = tiny.run(sequence=sequence, epochs=1)
    chain = tiny.train(run, tmp_path, DATA.select(range(4)), replacements=replacements)
    assert [chain.record(n).backbone_arguments for n in (0, 1)] == [{"width": 4}, {"width": 8}]
    shapes = [chain.open(n).variables["params"]["fc1"]["kernel"].shape for n in (0, 1)]
    assert shapes == [(16, 15), (32, 15)]


def test_pretraining_writes_models_to_replace_with(tmp_path):
    chain = tiny.pretrain(tiny.run("sce", epochs=1), tmp_path, config={"b": 2})
    record = chain.record(0)
    assert record.task is None and record.parent is None and record.replaced_by is None
    assert record.class_names == ("other0", "other1", "other2", "other3")
    assert record.label_order == "ascending" and record.config == {"b": 2}
    before = chain.open(0).sha256
    tiny.pretrain(tiny.run("sce", epochs=1), tmp_path)  # there already: nothing to do
    assert chain.open(0).sha256 == before and len(chain) == 1
    run = tiny.run(sequence=TaskSequence(2, 2, 1), epochs=1)
    loop.check_replacements(run, {0: chain.open(0)}, (8, 8, 3))


# One step


def trainer_of(run, mesh, width=4):
    return loop._cached_trainer(
        loop.run_key(run), "resnet_small", json.dumps({"width": width}), mesh
    )


def prepared(run, mesh, task=0):
    """Trainer, state at the start of a task, previous model, data and plan, all on the mesh."""
    start = start_of(run.method.name, seed=1)
    trainer = trainer_of(run, mesh)
    plans = loop._plans(run, DATA.labels)
    variables = loop._starting_variables(run, trainer, start, task, (8, 8, 3))
    state = trainer.create_state(variables, loop._task_info(run, task, len(plans[task])))
    previous = jax.device_put(variables, replicated(mesh))
    data = jax.device_put(DeviceData(DATA.images, DATA.labels), replicated(mesh))
    return trainer, state, previous, data, jax.device_put(plans[task], along_data(mesh, 1))


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
    run = tiny.run("hoc")
    trainer, state, previous, data, plan = prepared(run, tiny.one_device(), task=1)
    step = jax.jit(trainer.train_step)
    start = jax.tree.map(np.asarray, previous)
    for number in range(3):
        batch = {"image": data.images[plan[number]], "label": data.labels[plan[number]]}
        images = run.preprocess.normalize(run.preprocess.augment(step_key(state), batch["image"]))
        new = features(trainer, state.variables, images, train=True)
        old = features(trainer, previous, images, train=False)
        rows = 15 - np.asarray(batch["label"])  # the first class is written to the last prototype
        state, metrics = step(state, batch, previous)
        expected = hoc_by_hand(new, old, rows, lam=0.1, mu=10.0)
        assert float(metrics.loss) == pytest.approx(expected, rel=1e-4)
        assert int(state.step) == number + 1
    chex.assert_trees_all_equal(previous, start)  # frozen
    assert not np.allclose(state.params["fc1"]["kernel"], start["params"]["fc1"]["kernel"])


def test_the_first_loss_of_a_task_is_against_the_version_before(tmp_path):
    run = tiny.run("hoc", preprocess=dataclasses.replace(tiny.PREPROCESS, crop_padding=0))
    tiny.train(
        run,
        tmp_path,
        DATA,
        replacements={0: start_of("hoc")},
        save_every=1,
        log=chain_log(tmp_path),
    )
    lines = [json.loads(line) for line in chain_log(tmp_path).read_text().splitlines()]
    logged = next(line for line in lines if line["task"] == 1 and line["step"] == 1)
    version = Chain(tmp_path / "chain").open(0)
    labels = DATA.labels
    plan = loop._plans(run, labels)[1][0]
    assert set(labels[plan[:8]]) == {0, 1} and set(labels[plan[8:]]) == {2, 3}
    images = run.preprocess.normalize(jnp.asarray(DATA.images[plan]))
    trainer = trainer_of(run, tiny.one_device())
    new = features(trainer, version.variables, images, train=True)
    old = features(trainer, version.variables, images, train=False)
    expected = hoc_by_hand(new, old, 15 - labels[plan], lam=0.1, mu=10.0)
    assert logged["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_rate_is_constant_within_an_epoch_and_follows_the_cosine():
    optim = OptimizerSettings(lr=0.5, min_lr=0.1, momentum=0.0, weight_decay=0.0)
    run = tiny.run("sce", optim=optim, epochs=4)
    trainer, state, _, data, _ = prepared(run, tiny.one_device())
    images = run.preprocess.normalize(data.images[:16])
    update = jax.jit(trainer.update)

    def moved(step):
        state_then = state.replace(step=jnp.int32(step))
        new, _ = update(state_then, images, data.labels[:16], None)
        kernels = (s.params["fc1"]["kernel"] for s in (new, state))
        return float(np.abs(np.subtract(*kernels)).sum())

    # Two steps an epoch; 0.1 + 0.4 (1 + cos(pi e / 4)) / 2, as shares of the first.
    shares = [moved(step) / moved(0) for step in range(8)]
    cosine = [0.1 + 0.4 * (1 + math.cos(math.pi * e / 4)) / 2 for e in range(4)]
    expected = np.repeat(cosine, 2) / 0.5
    np.testing.assert_allclose(shares, expected, rtol=1e-4)


def test_a_step_may_compute_in_bfloat16_with_float32_weights(tmp_path, sequences):
    # Cross-entropy, since mu = 10 would multiply the rounding of features by ten.
    chain, log = train("sce", tmp_path, sequence=TaskSequence(2, 2, 1), dtype="bfloat16")
    leaves = jax.tree.leaves(chain.open(0).variables)
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}
    exact = sequences["sce"][1][0]["loss"]
    assert log[0]["loss"] == pytest.approx(exact, rel=0.05) and log[0]["loss"] != exact


# Devices


def test_eight_devices_give_what_one_gives(tmp_path, sequences):
    one, one_log = sequences["hoc"]
    eight, eight_log = train("hoc", tmp_path, make_mesh("data:8"), replace_at=(0, 1))
    np.testing.assert_allclose(
        [line["loss"] for line in eight_log], [line["loss"] for line in one_log], rtol=1e-4
    )
    for number in range(3):
        chex.assert_trees_all_close(
            eight.open(number).variables, one.open(number).variables, rtol=1e-3, atol=1e-4
        )


def test_statistics_and_contrast_see_the_whole_batch():
    # What each device would get from its own two images is something else by far.
    run = tiny.run("hoc")
    trainer, state, previous, data, plan = prepared(run, make_mesh("data:8"), task=1)
    batch = {"image": data.images[plan[0]], "label": data.labels[plan[0]]}
    _, metrics = jax.jit(trainer.train_step)(state, batch, previous)
    images = run.preprocess.normalize(run.preprocess.augment(step_key(state), batch["image"]))
    rows = jnp.asarray(15 - np.asarray(batch["label"]))

    def loss(part):
        new = features(trainer, state.variables, images[part], train=True)
        old = features(trainer, previous, images[part], train=False)
        return float(losses.hoc(jnp.float32(new), jnp.float32(old), rows[part]).mean())

    assert float(metrics.loss) == pytest.approx(loss(slice(None)), rel=1e-4)
    shards = np.mean([loss(slice(2 * i, 2 * i + 2)) for i in range(8)])
    assert abs(shards - float(metrics.loss)) > 0.5


def test_many_steps_in_one_dispatch_give_what_single_steps_give(monkeypatch):
    run = tiny.run("hoc")
    mesh = make_mesh("data:2", jax.devices()[:2])
    results = []
    for each in (True, False):
        monkeypatch.setattr(Trainer, "_dispatch_each_step", each)
        trainer, state, previous, data, plan = prepared(run, mesh, task=2)
        state, first = trainer.run_steps(state, previous, data, plan, 2)
        state, rest = trainer.run_steps(state, previous, data, plan, 6)
        results.append((state, first, rest))
    assert int(results[1][0].step) == 6
    chex.assert_trees_all_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("each", [True, False])
def test_the_hot_path_moves_nothing_to_or_from_the_devices(monkeypatch, each):
    monkeypatch.setattr(Trainer, "_dispatch_each_step", each)
    mesh = make_mesh("data:2", jax.devices()[:2])
    trainer, state, previous, data, plan = prepared(tiny.run("hoc"), mesh, task=2)
    state, _ = trainer.run_steps(state, previous, data, plan, 2)
    with jax.transfer_guard("disallow"):
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            jnp.add(state.step, np.ones(3, np.int32))  # the guard does work on this platform
        state, _ = trainer.run_steps(state, previous, data, plan, 5)
    assert int(state.step) == 5


def test_only_the_first_task_compiles(tmp_path, caplog):
    run, chain = tiny.run("er"), Chain(tmp_path / "chain")
    start = {0: start_of("er")}

    def after_first_task():
        return len(chain) == 1

    with pytest.raises(Stopped):
        tiny.train(run, tmp_path, DATA, replacements=start, should_stop=after_first_task)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        jax.jit(lambda x: x + 1)(jnp.float32(1))
        assert any("Compiling" in r.getMessage() for r in caplog.records)  # it does log
        caplog.clear()
        tiny.train(run, tmp_path, DATA, replacements=start)
    assert len(chain) == 3
    assert [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()] == []
    (program,) = trainer_of(run, tiny.one_device())._programs.values()
    assert program._cache_size() == 1


def test_a_step_is_traced_once():
    run = tiny.run("fd")
    trainer, state, previous, data, plan = prepared(run, tiny.one_device(), task=1)
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(trainer.train_step, n=1))
    for number in range(4):
        batch = {"image": data.images[plan[number]], "label": data.labels[plan[number]]}
        state, _ = step(state, batch, previous)
        state = state.replace(task=state.task.replace(index=state.task.index + 1))


# Refused before any work


def refused(message, data=DATA, mesh=None, replacements=None, **changes):
    run = tiny.run(**changes)
    with pytest.raises(UserError, match=message):
        loop.train(run, data, None, None, mesh or tiny.one_device(), replacements)


def test_what_cannot_work_is_refused_before_any_work():
    refused("num_prototypes 5 is too small for 6 classes", num_prototypes=5)
    refused("epochs must be at least 1, got 0", epochs=0)
    refused("batch_size must be at least 1, got -2", batch_size=-2)
    refused("rehearsal must not be negative, got -1", rehearsal=-1)
    refused("seed must lie in 0..4294967295, got -1", seed=-1)
    refused("unknown label_order 'descendin'. Did you mean 'descending'", label_order="descendin")
    refused("unknown backbone 'resnet_smal'", backbone=loop.Backbone("resnet_smal"))
    refused("unknown argument .* 'widht'", backbone=loop.Backbone("resnet_small", {"widht": 4}))
    refused("unknown dtype 'float16'", dtype="float16")
    refused(
        "batch_size 12 does not divide over 8 devices .*: use 8 or 16",
        batch_size=12,
        mesh=make_mesh("data:8"),
    )


def test_batches_that_the_devices_cannot_share_are_refused_before_any_work():
    few = tiny.dataset(per_class=5)  # ten images a task: a batch of 16 shrinks to them
    refused("task 0 has batches of 10 images, which 8 devices", few, make_mesh("data:8"))
    refused("task 1 has batches of 0 images", batch_size=1)


def test_replacements_that_do_not_fit_are_refused_before_any_work():
    refused(
        r"replacement at task 3, but the sequence has tasks 0\.\.2",
        replacements={3: start_of("hoc")},
    )
    refused(
        "pre-trained with a learnable head, but method 'hoc' has a fixed simplex: .*method=hoc",
        replacements={1: start_of("er")},
    )
    refused(
        "has num_prototypes=32, the run 16",
        replacements={1: start_of("hoc", num_prototypes=32, feature_size=31)},
    )
    refused(
        r"takes images of \(16, 16, 3\), the tasks have \(8, 8, 3\)",
        replacements={1: start_of("hoc", image_shape=(16, 16, 3))},
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lam", 1.5),
        ("mu", 0.0),
        ("same_class", "exlude"),
        ("distillation", -1.0),
    ],
)
def test_losses_refuse_numbers_out_of_range(field, value):
    with pytest.raises(UserError, match=f"loss.{field}"):
        LossSettings(**{field: value})


def test_a_task_is_scalars_so_that_another_compiles_nothing():
    info = TaskInfo.create(seed=2**32 - 1, index=3, epochs=2, steps_per_epoch=5, num_seen=8)
    dtypes = jax.tree.map(lambda x: (x.dtype.name, x.shape), info)
    assert dtypes.seed == ("uint32", ()) and dtypes.index == ("int32", ())
    assert dtypes.distillation_weight == ("float32", ())
    assert batch_plan(np.arange(4), np.zeros(0, int), 2, 1, 0, 0).dtype == np.int32
