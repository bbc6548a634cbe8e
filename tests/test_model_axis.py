"""The simplex split over devices: `model:n`, on the eight simulated devices of the tests."""

import re

import chex
import flat  # noqa: F401, registers the backbone
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec

from compat_jax import losses, methods, simplex
from compat_jax import mesh as meshes
from compat_jax.data import Tasks
from compat_jax.errors import Stopped, UserError
from compat_jax.methods import TaskStart
from compat_jax.retrieval import embed
from compat_jax.training import DeviceData, Feed, TaskInfo, make_trainer

K = 12  # K - 1 = 11 columns divide over nothing: 16 over eight devices, 12 over four
MILLION = 1_000_000


def small_run(method="hoc", **changes):
    return tiny.run(method, backbone="flat", **changes)


def trainer(mesh, method="hoc", num_prototypes=K):
    run = small_run(method, num_prototypes=num_prototypes)
    return make_trainer(run, tiny.CLASSES, mesh)


def four_steps(text, method):
    """Losses, accuracies, and the state after four steps on a mesh."""
    mesh = meshes.make_mesh(text)
    one = trainer(mesh, method)
    variables = one.init(jax.random.key(0), (tiny.SIZE, tiny.SIZE, 3))
    info = TaskInfo.create(0, 1, epochs=2, steps_per_epoch=2, num_seen=4)
    state = one.create_state(variables, info)
    data = tiny.dataset()
    data = jax.device_put(DeviceData(data.images, data.labels), meshes.replicated(mesh))
    plan = np.random.default_rng(0).integers(0, 96, (4, 16)).astype(np.int32)
    plan = jax.device_put(plan, meshes.along_data(mesh, 1))
    feed = Feed(data, plan)
    frozen = one.shard(one.adapted.freeze(TaskStart(variables, 2, 4, lambda: np.zeros((6, 11)))))
    history = []
    for stop in range(1, 5):
        state, metrics = one.run_steps(state, frozen, feed, stop=stop)
        history.append([float(metrics.loss), float(metrics.accuracy)])
    return np.array(history), one, state


# The step


@pytest.fixture(scope="module")
def unsharded():
    return four_steps("data:1", "hoc")


@pytest.mark.parametrize(
    ("text", "columns"),
    [("data:2", 11), ("data:1,model:8", 16), ("data:2,model:4", 12)],
)
def test_split_step_equals_the_unsplit_one(unsharded, text, columns):
    expected, _, reference = unsharded
    history, one, state = four_steps(text, "hoc")
    np.testing.assert_allclose(history, expected, rtol=1e-5)
    kernel = state.params["projection"]["kernel"]
    momentum = state.opt_state[1].trace["projection"]["kernel"]
    for array in (kernel, momentum):
        assert array.shape == (16, columns)
        assert array.sharding.spec == PartitionSpec(None, "model")
        assert np.abs(array[:, : K - 1]).max() > 0
        np.testing.assert_array_equal(array[:, K - 1 :], 0)
    for ours, theirs in zip(
        jax.tree.leaves(one.stored(state.variables)),
        jax.tree.leaves(reference.variables),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_initial_weights_are_the_same_on_every_mesh():
    key, shape = jax.random.key(3), (8, 8, 3)
    variables = [
        t.stored(t.init(key, shape))
        for t in (trainer(meshes.make_mesh(text)) for text in ("data:1", "data:2,model:4"))
    ]
    jax.tree.map(np.testing.assert_array_equal, *variables)


def written():
    """A method of one's own that knows nothing of padding, and would be wrong with more columns."""

    def freeze(start):
        assert start.variables["params"]["projection"]["kernel"].shape == (16, K - 1)
        return {"previous": start.variables, "means": start.mean_features().astype(np.float32)}

    def teach(forward, frozen, carried):
        return forward(frozen["previous"]).features + carried["mean"]

    def loss(inputs):
        features = inputs.outputs.features
        away = jnp.square(features - inputs.frozen["means"][inputs.classes]).mean(-1)
        spread = jax.nn.logsumexp(simplex.logits(features), axis=-1)
        return losses.hoc(features, inputs.taught, inputs.targets) + away + spread

    def init(variables):
        return {"teacher": variables, "mean": jnp.zeros(K - 1)}

    def update(carried, variables, inputs):
        assert variables["params"]["projection"]["kernel"].shape == (16, K - 1)
        teacher = jax.tree.map(lambda t, v: 0.9 * t + 0.1 * v, carried["teacher"], variables)
        return {"teacher": teacher, "mean": inputs.outputs.features.mean(0)}

    return methods.Method("written", loss, freeze=freeze, teach=teach, init=init, update=update)


def test_a_method_of_ones_own_gives_the_same_on_a_model_axis():
    expected, _, reference = four_steps("data:1", written())
    history, one, state = four_steps("data:2,model:4", written())
    np.testing.assert_allclose(history, expected, rtol=1e-5)
    teacher = state.carried["teacher"]
    assert teacher["params"]["projection"]["kernel"].sharding.spec == PartitionSpec(None, "model")
    for ours, theirs in (
        (one.stored(state.variables), reference.variables),
        (one.stored(teacher), reference.carried["teacher"]),
        (state.carried["mean"], reference.carried["mean"]),
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs
        )
    chex.assert_trees_all_equal_shapes(one.shapes((8, 8, 3))[0].carried, state.carried)


@pytest.mark.parametrize("name", methods.names())
def test_a_method_of_the_library_gets_the_columns_as_they_are(name):
    one = trainer(meshes.make_mesh("data:2,model:4"), name)
    assert one.adapted is one.method


# The losses


@pytest.mark.parametrize("num_prototypes", [pytest.param(2, marks=pytest.mark.slow), 9])
def test_added_columns_change_neither_loss_nor_gradient(num_prototypes):
    rng = np.random.default_rng(num_prototypes)
    new, old = rng.normal(size=(2, 6, num_prototypes - 1)).astype(np.float32)
    labels = rng.integers(0, num_prototypes, 6)
    wider = [np.pad(x, ((0, 0), (0, 3))) for x in (new, old)]

    def mean(new, old, k=None):
        return losses.hoc(new, old, labels, num_prototypes=k).mean()

    differentiated = jax.jit(jax.value_and_grad(mean), static_argnums=2)
    expected, gradient = differentiated(new, old)
    loss, wide_gradient = differentiated(*wider, num_prototypes)
    own = num_prototypes - 1
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(wide_gradient[:, :own], gradient, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(wide_gradient[:, own:], 0)


def test_what_stands_in_added_columns_does_not_matter():
    features = np.array([[1.0, -2.0, np.nan, 7.0]], np.float32)  # K = 3
    expected = simplex.logits(features[:, :2])
    body, last = simplex.split_logits(features, 3)
    np.testing.assert_allclose(body, [[*expected[0, :2], -np.inf, -np.inf]], rtol=1e-6)
    np.testing.assert_allclose(last, expected[:, 2], rtol=1e-6)
    np.testing.assert_allclose(
        [simplex.label_logit(features, jnp.array([row]), 3)[0] for row in range(3)],
        expected[0],
        rtol=1e-6,
    )


@pytest.mark.parametrize(("num_prototypes", "size"), [(2, 1), (7, 6), (7, 9)])
def test_nearest_row_is_the_argmax_of_the_logits(num_prototypes, size):
    features = np.random.default_rng(0).normal(size=(50, size)).astype(np.float32)
    features[0] = 0  # all scores equal: the first of them
    rows = simplex.nearest_row(features, num_prototypes)
    expected = simplex.logits(features[:, : num_prototypes - 1]).argmax(-1)
    np.testing.assert_array_equal(rows, expected)
    assert rows.dtype == jnp.int32 and {0, num_prototypes - 1} <= set(rows.tolist())


@pytest.mark.parametrize("num_prototypes", [1, 7])
def test_classes_that_the_features_cannot_hold(num_prototypes):
    with pytest.raises(UserError, match=r"size 5 hold a simplex of 2\.\.6 classes, got num_pr"):
        simplex.split_logits(np.zeros((1, 5), np.float32), num_prototypes)


# A million classes, compiled and not run


def compiled(text):
    one = trainer(meshes.make_mesh(text), num_prototypes=MILLION)
    data = DeviceData(
        jax.ShapeDtypeStruct((96, 8, 8, 3), jnp.uint8), jax.ShapeDtypeStruct((96,), jnp.int32)
    )
    plan = jax.ShapeDtypeStruct((4, 16), jnp.int32)
    return one.lower(*one.shapes((8, 8, 3)), Feed(data, plan)).compile()


def collectives(text):
    """(operation, dimensions of a result) for every collective of a compiled program."""
    found = []
    for line in text.splitlines():
        operation = re.search(
            r" (all-gather|all-reduce|all-to-all|reduce-scatter)(-start)?\(", line
        )
        if operation:
            shapes = re.findall(r"\w+\[([\d,]*)\]", line[: operation.start()])
            found += [(operation[1], [int(n) for n in s.split(",") if n]) for s in shapes]
    return found


@pytest.fixture(scope="module")
def split_in_8():
    return compiled("model:8")


def test_memory_of_a_device_is_an_eighth(split_in_8):
    whole, part = compiled("data:1").memory_analysis(), split_in_8.memory_analysis()
    # The projection, its momentum and the frozen one of the previous model, 64 MB each.
    assert whole.argument_size_in_bytes > 3 * 16 * 4 * (MILLION - 1)
    for name in ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes"):
        ratio = getattr(part, name) / getattr(whole, name)
        assert 0.1 < ratio < 0.15, name
    assert part.alias_size_in_bytes > 0.99 * part.output_size_in_bytes  # the state is donated


def test_no_device_gathers_features_or_logits(split_in_8):
    found = collectives(split_in_8.as_text())
    assert ("all-reduce", [16]) in found  # the row sum of 16 images
    assert max(np.prod(shape, dtype=int) for _, shape in found) < MILLION // 100
    gathers = [shape for operation, shape in found if operation == "all-gather"]
    # Labels, the backbone's 16 averages, and 8 candidates an image for the nearest prototype.
    assert sorted(gathers) == [[16], [16, 8], [16, 8], [16, 16], [16, 16]]


def test_contrast_gathers_columns_it_owns_only():
    """With the batch split as well, a device sees all images, of its own columns."""
    widest = MILLION // 4
    found = collectives(compiled("data:2,model:4").as_text())
    assert max(shape[-1] for _, shape in found if shape) == widest
    assert {operation for operation, shape in found if widest in shape} <= {
        "all-gather",
        "all-reduce",
        "reduce-scatter",
    }
    assert max(np.prod(shape, dtype=int) for _, shape in found) <= 16 * widest


# The chain


@pytest.fixture(scope="module")
def one_task():
    return small_run(num_prototypes=K, tasks=Tasks(initial=6, rehearsal=4))


@pytest.fixture(scope="module")
def chain(one_task, tmp_path_factory):
    return tiny.train(one_task, tmp_path_factory.mktemp("one-device"))


def assert_same_version(chain, expected):
    a, b = chain.open(0), expected.open(0)
    assert a.record == b.record and a.record.feature_size == K - 1
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4),
        a.variables,
        b.variables,
    )


def test_versions_and_features_are_the_same_whatever_the_mesh(one_task, chain, tmp_path):
    mesh = meshes.make_mesh("data:2,model:4")
    assert_same_version(tiny.train(one_task, tmp_path, mesh=mesh), chain)
    images = tiny.dataset().images
    version = chain.open(0)
    split, whole = (embed(version, images, mesh=m, batch_size=50) for m in (mesh, None))
    assert split.shape == (96, K - 1)
    np.testing.assert_allclose(split, whole, atol=1e-5)


def test_task_that_was_stopped_goes_on_with_another_model_axis(one_task, chain, tmp_path):
    mesh = meshes.make_mesh("data:2,model:4")
    stop = iter([False, False, True, True])
    with pytest.raises(Stopped):
        tiny.train(one_task, tmp_path, mesh=mesh, should_stop=lambda: next(stop))
    saved = sorted(p.name for p in (tmp_path / "progress").iterdir())
    assert saved == ["task0-step2", "task0-step2.json"]
    assert_same_version(tiny.train(one_task, tmp_path), chain)


def test_learnable_head_is_on_every_device():
    """`er` has no simplex to split: the model axis only shares the backbone's images."""
    assert not methods.get("er").fixed_simplex
    expected, _, _ = four_steps("data:1", "er")
    history, _, _ = four_steps("data:2,model:4", "er")
    np.testing.assert_allclose(history, expected, rtol=1e-5)
