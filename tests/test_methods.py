"""Methods of one's own: plain objects with frozen and carried state, none of them registered."""

import dataclasses
import json
import re

import chex
import flat  # noqa: F401, registers the backbone
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from compat_jax import losses, methods
from compat_jax.chain import Chain
from compat_jax.errors import Stopped, UserError
from compat_jax.mesh import along_data, make_mesh, replicated
from compat_jax.methods import LossInputs, Method, TaskStart
from compat_jax.training import DeviceData, Feed
from compat_jax.training.task import sequence_task

DATA = tiny.dataset()


def ema_teacher(decay=0.9):
    """The previous model's place is taken by a running mean of the weights."""

    def teach(forward, frozen, carried):
        del frozen
        return forward(carried["teacher"]).features

    def loss(inputs):
        distance = losses.feature_distillation(inputs.outputs.features, inputs.taught)
        return inputs.cross_entropy() + distance

    def update(carried, variables, inputs):
        del inputs
        mean = jax.tree.map(lambda t, v: decay * t + (1 - decay) * v, carried["teacher"], variables)
        return {"teacher": mean, "steps": carried["steps"] + 1}

    def init(variables):
        return {"teacher": variables, "steps": jnp.int32(0)}

    return Method("ema", loss, teach=teach, init=init, update=update, arguments={"decay": decay})


def queue(size=24):
    """A contrast with the features of the last batches."""

    def init(variables):
        columns = variables["params"]["projection"]["kernel"].shape[1]
        return {
            "features": jnp.zeros((size, columns)),
            "classes": jnp.full(size, -1, jnp.int32),
        }

    def teach(forward, frozen, carried):
        del forward, frozen
        return carried

    def loss(inputs):
        scores = losses.normalize(inputs.outputs.features) @ inputs.taught["features"].T
        other = inputs.taught["classes"] != inputs.classes[:, None]
        return inputs.cross_entropy() + jnp.where(other, jnp.exp(scores), 0.0).mean(-1)

    def update(carried, variables, inputs):
        del variables
        newest = {"features": losses.normalize(inputs.outputs.features), "classes": inputs.classes}
        return jax.tree.map(lambda new, old: jnp.concatenate([new, old])[:size], newest, carried)

    return Method("queue", loss, init=init, teach=teach, update=update)


def backward_compatible(weight=1.0):
    """The old classifier judges the new features, and class means stay where they were."""

    def freeze(start: TaskStart):
        return {
            "classifier": start.variables["params"]["head"]["kernel"],
            "means": start.mean_features(),
            "num_old": np.int32(start.num_old),
        }

    def loss(inputs: LossInputs):
        features, frozen = inputs.outputs.features, inputs.frozen
        is_old = (inputs.classes < frozen["num_old"]).astype(jnp.float32)
        judged = losses.softmax_cross_entropy(
            features @ frozen["classifier"], inputs.classes, jnp.maximum(frozen["num_old"], 1)
        )
        drift = jnp.square(features - frozen["means"][inputs.classes]).mean(-1)
        return inputs.cross_entropy() + weight * is_old * (judged + drift)

    return Method("judged", loss, fixed_simplex=False, freeze=freeze, arguments={"weight": weight})


# Made once: equal objects share their compiled step.
METHODS = {"ema": ema_teacher(), "queue": queue(), "judged": backward_compatible()}


def start_of(name):
    return tiny.start_of("er" if name == "judged" else "sce", backbone="flat")


def train(name, folder, **where):
    """The tiny sequence by a method of one's own."""
    run = tiny.run(METHODS[name], backbone="flat")
    where["log_every"] = 10**6  # no lines by the clock
    return tiny.train(run, folder, DATA, replacements={0: start_of(name)}, **where)


def bits(chain):
    return [version.sha256 for version in chain]


def log_of(folder):
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    clocks = ("images_per_second", "time")
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Folder of each method's sequence run in one go, saving at every second step."""
    folders = {name: tmp_path_factory.mktemp(name) for name in METHODS}
    for name, folder in folders.items():
        train(name, folder, save_every=2)
    return folders


@pytest.mark.parametrize("name", METHODS)
def test_a_method_given_as_an_object_trains_and_its_chain_opens(unbroken, name):
    assert name not in methods.names()
    chain = Chain(unbroken[name] / "chain")
    assert chain.verify() == {0: None, 1: None, 2: None}
    record = chain.record(2)
    assert record.method == name
    assert record.method_arguments == dict(METHODS[name].arguments)
    assert record.head_classes == (6 if name == "judged" else None)
    assert all(np.isfinite(line["loss"]) for line in log_of(unbroken[name]))


@pytest.mark.parametrize("name", METHODS)
def test_killed_within_a_task_its_state_goes_on_to_the_same_bits(tmp_path, unbroken, name):
    asked = iter(range(18))

    def kill():
        if next(asked, None) is None:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        train(name, tmp_path, should_stop=kill, save_every=2)
    saved = sorted(p.name for p in (tmp_path / "progress").iterdir())
    assert saved[0].startswith("task2-step") and len(saved) == 2
    chain = train(name, tmp_path, save_every=2)
    assert bits(chain) == bits(Chain(unbroken[name] / "chain"))
    assert log_of(tmp_path) == log_of(unbroken[name])


# The state itself


def prepared(name, index=0, start=None, mesh=None):
    """Trainer, state and frozen state at the start of a task, and its feed."""
    run = tiny.run(METHODS[name], backbone="flat")
    sequence, start = run.tasks.sequence(DATA.num_classes), start or start_of(name)
    task = sequence_task(run, sequence, index, DATA.labels, start=start, replaced=False)
    mesh = mesh or tiny.one_device()
    trainer = task.trainer(mesh)
    variables = task.starting_variables(trainer, (8, 8, 3))
    frozen = task.freeze(trainer, variables, DATA)
    data = jax.device_put(DeviceData(DATA.images, DATA.labels), replicated(mesh))
    feed = Feed(data, jax.device_put(task.plan, along_data(mesh, 1)))
    return trainer, trainer.create_state(variables, task.info()), frozen, feed


def test_a_teacher_follows_the_weights_and_teaches():
    trainer, state, frozen, feed = prepared("ema")
    teacher = jax.tree.map(np.asarray, state.variables)
    chex.assert_trees_all_equal(state.carried["teacher"], teacher)
    for step in range(1, 4):
        state, _ = trainer.run_steps(state, frozen, feed, stop=step)
        new = jax.tree.map(np.asarray, state.variables)
        teacher = jax.tree.map(lambda t, v: 0.9 * t + 0.1 * v, teacher, new)
        chex.assert_trees_all_close(state.carried["teacher"], teacher, rtol=1e-5, atol=1e-6)
        assert int(state.carried["steps"]) == step
    images = trainer.preprocess.normalize(DATA.images[:8])
    taught = trainer.network.apply(teacher, images).features
    own = trainer.network.apply(new, images).features
    assert np.abs(taught - own).max() > 1e-3


def test_a_queue_holds_the_features_of_the_last_batches():
    trainer, state, frozen, feed = prepared("queue")
    state, _ = trainer.run_steps(state, frozen, feed, stop=3)
    labels = DATA.labels[np.asarray(feed.plan)]
    expected = np.concatenate([labels[2], labels[1]])[:24]
    np.testing.assert_array_equal(state.carried["classes"], expected)
    lengths = np.linalg.norm(state.carried["features"], axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)


def test_what_a_task_begins_with_is_frozen(unbroken):
    version = Chain(unbroken["judged"] / "chain").open(0)
    trainer, state, frozen, feed = prepared("judged", 1, version)
    classifier = np.asarray(frozen["classifier"])
    np.testing.assert_array_equal(classifier[:, :2], version.variables["params"]["head"]["kernel"])
    features = embed_raw(version, DATA.images)
    for number in range(4):  # the classes of this task too: the old model has not seen them
        mean = features[DATA.labels == number].mean(0)
        np.testing.assert_allclose(frozen["means"][number], mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(frozen["means"][4:], np.zeros((2, 16)))
    before = jax.tree.map(np.asarray, frozen)
    state, _ = trainer.run_steps(state, frozen, feed, stop=2)
    chex.assert_trees_all_equal(frozen, before)
    assert not np.allclose(state.params["head"]["kernel"], classifier)


def embed_raw(version, images):
    """Features that are not normalised."""
    pixels = tiny.PREPROCESS.normalize(images)
    return np.asarray(version.embedder().apply(version.variables, pixels, train=False).features)


def test_mean_features_of_a_simplex_have_its_columns_on_every_mesh():
    found = []

    def freeze(start):
        found.append(start.mean_features())
        return {}

    method = dataclasses.replace(methods.get("sce"), freeze=freeze)
    run = tiny.run(method, backbone="flat", num_prototypes=12)
    version = tiny.start_of("sce", backbone="flat", num_prototypes=12, feature_size=11)
    sequence = run.tasks.sequence(6)
    task = sequence_task(run, sequence, 2, DATA.labels, start=version, replaced=False)
    for mesh in (tiny.one_device(), make_mesh("data:2,model:4")):
        trainer = task.trainer(mesh)
        task.freeze(trainer, task.starting_variables(trainer, (8, 8, 3)), DATA)
    one, many = found
    assert one.shape == many.shape == (6, 11) and one.dtype == np.float32
    np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-5)
    mean = embed_raw(version, DATA.images[DATA.labels == 5]).mean(0)
    np.testing.assert_allclose(one[5], mean, rtol=1e-4, atol=1e-5)


def stopped_on(mesh, name, folder):
    """Stop within the first task."""
    log = folder / "log.jsonl"

    def stop():
        return log.exists() and len(log.read_text().splitlines()) == 2

    with pytest.raises(Stopped):
        train(name, folder, mesh=make_mesh(mesh), should_stop=stop, save_every=1)
    assert (folder / "progress" / "task0-step3.json").exists()


def test_carried_weights_go_on_with_another_model_axis(tmp_path, unbroken):
    stopped_on("data:2,model:4", "ema", tmp_path)
    chain = train("ema", tmp_path)
    for found, expected in zip(chain, Chain(unbroken["ema"] / "chain"), strict=True):
        chex.assert_trees_all_close(found.variables, expected.variables, rtol=1e-3, atol=1e-4)


def test_carried_features_go_on_with_another_model_axis(tmp_path, unbroken):
    stopped_on("data:2,model:4", "queue", tmp_path)
    chain = train("queue", tmp_path)
    for found, expected in zip(chain, Chain(unbroken["queue"] / "chain"), strict=True):
        chex.assert_trees_all_close(found.variables, expected.variables, rtol=1e-3, atol=1e-4)


def test_the_teacher_is_the_running_mean_of_the_weights():
    method, rng = METHODS["ema"], np.random.default_rng(0)
    weights = [{"w": rng.normal(size=3).astype(np.float32)} for _ in range(4)]
    carried = method.init(weights[0])
    for later in weights[1:]:
        carried = method.update(carried, later, None)
    expected = sum(
        share * w["w"] for share, w in zip([0.729, 0.081, 0.09, 0.1], weights, strict=True)
    )
    np.testing.assert_allclose(carried["teacher"]["w"], expected, rtol=1e-6)
    assert int(carried["steps"]) == 3


def test_terms_are_watched_and_change_no_bit(tmp_path, unbroken):
    plain = METHODS["ema"]

    def loss(inputs):
        total = plain.loss(inputs)
        return total, {"half": total / 2, "constant": jnp.float32(3)}

    watched = dataclasses.replace(plain, loss=loss, terms=("half", "constant"))
    run = tiny.run(watched, backbone="flat")
    chain = tiny.train(run, tmp_path, DATA, replacements={0: start_of("ema")})
    assert bits(chain) == bits(Chain(unbroken["ema"] / "chain"))
    for line in log_of(tmp_path):
        assert line["terms"]["half"] == pytest.approx(line["loss"] / 2, rel=1e-5)
        assert line["terms"]["constant"] == 3


def test_terms_that_are_not_those_that_were_named_are_refused():
    plain = METHODS["ema"]
    for names, terms in ((("a",), {"b": 1}), ((), {"b": 1}), (("a", "b"), {"b": 1})):
        method = dataclasses.replace(plain, loss=lambda inputs, t=terms: (inputs, t), terms=names)
        with pytest.raises(
            UserError, match=r"method 'ema' names the terms .* but its loss returns"
        ):
            method.losses(0.0)
    named = dataclasses.replace(plain, loss=lambda inputs: inputs, terms=("a",))
    with pytest.raises(UserError, match=r"names the terms \['a'\], but its loss returns \[\]"):
        named.losses(0.0)


INPUTS = LossInputs(None, None, None, np.zeros(8, int), None, None, None)  # of eight images


@pytest.mark.parametrize("shape", [(), (1,), (8, 1), (8, 8)])
def test_a_loss_that_is_not_one_value_an_image_is_refused(shape):
    method = Method("wide", lambda inputs: jnp.zeros(shape))
    message = rf"method 'wide': its loss returns shape {re.escape(str(list(shape)))} for 8 images"
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: method.losses(INPUTS))


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (
            {"n": np.float32(0), "q": np.ones(2, np.float32)},
            r"carried\['n'\] from int32\[\] into float32\[\]",
        ),
        (
            {"n": np.int32(0), "q": np.ones(3, np.float32)},
            r"carried\['q'\] from float32\[2\] into float32\[3\]",
        ),
        ({"n": np.int32(0)}, r"carried\['q'\] from float32\[2\] into not there"),
    ],
)
def test_carried_state_that_changes_its_form_is_refused(after, message):
    before = {"n": np.int32(0), "q": np.ones(2, np.float32)}
    method = Method("grows", LossInputs.cross_entropy, update=lambda *_: after)
    with pytest.raises(UserError, match=rf"method 'grows': its update turns {message}"):
        method.updated(before, {}, INPUTS)
    same = dataclasses.replace(method, update=lambda carried, *_: {**carried, "n": np.int32(7)})
    assert same.updated(before, {}, INPUTS)["n"] == 7
