"""Optimisers against their updates written out in float64, rates against numbers by hand."""

import dataclasses
import json
from pathlib import Path

import chex
import flat  # noqa: F401, registers the backbone
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from ml_collections import ConfigDict

from compat_jax import config as configs
from compat_jax import config_schema, models
from compat_jax.errors import UserError
from compat_jax.models import Embedder, init_variables
from compat_jax.training.optimizer import (
    OPTIMIZERS,
    Adamw,
    Lars,
    Sgd,
    layer_depths,
    learning_rate,
    make_optimizer,
)

GOLDEN = np.load(Path(__file__).parent / "golden" / "losses.npz")
SHAPES = {
    "conv": {"kernel": (3, 3, 2, 4), "bias": (4,)},
    "norm": {"scale": (4,), "bias": (4,)},
    "projection": {"kernel": (4, 7)},
}
KERNELS = [("conv", "kernel"), ("projection", "kernel")]
EVERY_KIND = pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.standard_normal(shape, np.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def torch_sgd(params, gradients, rates, momentum, decay, is_decayed):
    """torch.optim.SGD in float64: decay joins the gradient, the rate stays out of the buffer."""
    params = jax.tree.map(lambda x: x.astype(np.float64), params)
    buffer = None
    for gradient, rate in zip(gradients, rates, strict=True):
        for layer, weights in params.items():
            for name in weights:
                if is_decayed(layer, name):
                    gradient[layer][name] = gradient[layer][name] + decay * weights[name]
        step = gradient
        buffer = (
            step if buffer is None else jax.tree.map(lambda b, s: momentum * b + s, buffer, step)
        )
        params = jax.tree.map(lambda p, b, rate=rate: p - rate * b, params, buffer)
    return params


@pytest.mark.parametrize(
    ("decay", "is_decayed"),
    [
        ("package", lambda layer, name: (layer, name) in KERNELS),
        ("notebook", lambda layer, name: True),
    ],
)
def test_five_steps_as_pytorch(decay, is_decayed):
    settings = Sgd(lr=0.1, min_lr=0.01, momentum=0.9, weight_decay=0.05, decay=decay)
    optimizer = make_optimizer(settings)
    epochs = [0, 0, 1, 1, 2]
    rates = [0.1, 0.1, 0.0775, 0.0775, 0.0325]  # the cosine over three epochs
    params = random_tree(0)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for i, epoch in enumerate(epochs):
        gradient = random_tree(1 + i)
        updates, state = update(gradient, state, params, epoch=np.int32(epoch), epochs=np.int32(3))
        params = optax.apply_updates(params, updates)
    gradients = [random_tree(1 + i) for i in range(5)]
    expected = torch_sgd(random_tree(0), gradients, rates, 0.9, 0.05, is_decayed)
    jax.tree.map(lambda p, e: np.testing.assert_allclose(p, e, atol=2e-6), params, expected)


def test_package_leaves_vectors_out_of_the_decay():
    optimizer = make_optimizer(Sgd(lr=1.0, weight_decay=0.5, schedule="constant"))
    params = random_tree(0)
    nothing = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(nothing, optimizer.init(params), params, epoch=0, epochs=1)
    for layer, weights in updates.items():
        for name, update in weights.items():
            decay = 0.5 if (layer, name) in KERNELS else 0.0
            np.testing.assert_allclose(update, -decay * params[layer][name])


def test_a_transformation_of_optax_is_taken_as_it_is():
    theirs = optax.sgd(0.01, momentum=0.9, nesterov=True)
    params, gradient = random_tree(0), random_tree(1)
    ours = make_optimizer(theirs)
    expected, _ = theirs.update(gradient, theirs.init(params), params)
    updates, _ = ours.update(gradient, ours.init(params), params, epoch=1, epochs=3)
    chex.assert_trees_all_equal(updates, expected)


EPOCHS = [0, 0, 1, 1, 2]
RATES = [0.1, 0.1, 0.0775, 0.0775, 0.0325]  # from 0.1 to 0.01 over three epochs


def five_steps(settings, params):
    """Parameters after a step with each of five random gradients."""
    optimizer = make_optimizer(settings)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for i, epoch in enumerate(EPOCHS):
        position = {"epoch": np.int32(epoch), "epochs": np.int32(3)}
        updates, state = update(random_tree(1 + i), state, params, **position)
        params = optax.apply_updates(params, updates)
    return params


def leaves(tree):
    """(layer, name): float64 array."""
    return {(layer, name): x.astype(float) for layer, w in tree.items() for name, x in w.items()}


def assert_all_close(found, expected):
    for (layer, name), value in expected.items():
        np.testing.assert_allclose(found[layer][name], value, atol=3e-6)


@pytest.mark.parametrize("decay", ["package", "notebook"])
def test_adamw_is_algorithm_2_of_its_paper(decay):
    settings = Adamw(lr=0.1, min_lr=0.01, b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.2, decay=decay)
    found = five_steps(settings, random_tree(0))
    expected = leaves(random_tree(0))
    first, second = ({key: 0.0 for key in expected} for _ in range(2))
    for i, rate in enumerate(RATES):
        for key, gradient in leaves(random_tree(1 + i)).items():
            first[key] = 0.8 * first[key] + 0.2 * gradient
            second[key] = 0.95 * second[key] + 0.05 * gradient**2
            mean, square = first[key] / (1 - 0.8 ** (i + 1)), second[key] / (1 - 0.95 ** (i + 1))
            weight = 0.2 if decay == "notebook" or key in KERNELS else 0.0
            step = mean / (np.sqrt(square) + 1e-3) + weight * expected[key]
            expected[key] = expected[key] - rate * step
    assert_all_close(found, expected)


@pytest.mark.torch
@pytest.mark.slow
def test_adamw_is_pytorchs():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    settings = Adamw(lr=0.1, min_lr=0.01, weight_decay=0.2)
    found = five_steps(settings, random_tree(0))
    weights = {k: torch.tensor(v, requires_grad=True) for k, v in leaves(random_tree(0)).items()}
    groups = [
        {"params": [weights[k] for k in KERNELS], "weight_decay": 0.2},
        {"params": [v for k, v in weights.items() if k not in KERNELS], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for i, rate in enumerate(RATES):
        for key, gradient in leaves(random_tree(1 + i)).items():
            weights[key].grad = torch.tensor(gradient)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    assert_all_close(found, {key: x.detach().numpy() for key, x in weights.items()})


def test_lars_is_algorithm_1_of_its_paper():
    settings = Lars(lr=0.1, min_lr=0.01, momentum=0.8, trust=0.02, weight_decay=0.3)
    found = five_steps(settings, random_tree(0))
    expected = leaves(random_tree(0))
    velocity = {key: 0.0 for key in expected}
    for i, rate in enumerate(RATES):
        for key, gradient in leaves(random_tree(1 + i)).items():
            if key in KERNELS:
                gradient = gradient + 0.3 * expected[key]
                gradient *= 0.02 * np.linalg.norm(expected[key]) / np.linalg.norm(gradient)
            velocity[key] = 0.8 * velocity[key] + rate * gradient
            expected[key] = expected[key] - velocity[key]
    assert_all_close(found, expected)


def test_lars_moves_a_kernel_by_a_share_of_its_norm_whatever_the_gradient():
    params = random_tree(0)
    settings = Lars(lr=1.0, trust=0.01, weight_decay=0.0, schedule="constant")
    optimizer = make_optimizer(settings)
    for scale in (1e-4, 1.0, 1e4):
        gradient = jax.tree.map(lambda x, scale=scale: x * np.float32(scale), random_tree(1))
        updates, _ = optimizer.update(gradient, optimizer.init(params), params, epoch=0, epochs=1)
        for layer, name in KERNELS:
            moved = np.linalg.norm(updates[layer][name]) / np.linalg.norm(params[layer][name])
            assert moved == pytest.approx(0.01, rel=1e-4)


@EVERY_KIND
def test_clipping_acts_on_the_norm_of_all_gradients(kind):
    params, gradient = random_tree(0), random_tree(1)
    norm = np.sqrt(sum((x**2).sum() for x in leaves(gradient).values()))
    options = {"schedule": "constant", "weight_decay": 0.0}
    clipped, plain = make_optimizer(kind(clip=float(norm) / 4, **options)), kind(**options)
    plain = make_optimizer(plain)
    found, _ = clipped.update(gradient, clipped.init(params), params, epoch=0, epochs=1)
    quarter = jax.tree.map(lambda x: x / 4, gradient)
    expected, _ = plain.update(quarter, plain.init(params), params, epoch=0, epochs=1)
    chex.assert_trees_all_close(found, expected, rtol=1e-4)
    quarter, _ = clipped.update(quarter, clipped.init(params), params, epoch=0, epochs=1)
    chex.assert_trees_all_close(quarter, expected, rtol=1e-4)  # short ones stay


# Layers


def params_of(name, size):
    embedder = Embedder(models.Backbone(name, {}).build("float32"), 7)
    make = lambda key: init_variables(embedder, key, (size, size, 3))  # noqa: E731
    return jax.eval_shape(make, jax.random.key(0))["params"]


def test_depths_of_a_resnet_by_hand():
    depths = layer_depths(params_of("resnet18", 32))
    backbone = depths["backbone"]
    assert set(jax.tree.leaves(depths["projection"])) == {0}
    assert set(jax.tree.leaves([backbone["conv1"], backbone["bn1"]])) == {9}
    blocks = [f"layer{stage}_{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert [set(jax.tree.leaves(backbone[b])) for b in blocks] == [{d} for d in range(8, 0, -1)]
    assert len(backbone) == 10


def test_depths_of_a_vit_by_hand():
    depths = layer_depths(params_of("vit_ti16", 224))["backbone"]
    assert set(jax.tree.leaves(depths["blocks_11"])) == {1}
    assert set(jax.tree.leaves(depths["blocks_2"])) == {10}  # not after blocks_10
    assert set(jax.tree.leaves(depths["blocks_0"])) == {12}
    assert set(jax.tree.leaves(depths["norm"])) == {0}
    before = {k: v for k, v in depths.items() if not k.startswith("blocks_") and k != "norm"}
    assert len(before) == 3 and set(jax.tree.leaves(before)) == {13}  # patches, class, positions


@pytest.mark.parametrize(
    "names",
    [
        ["stem_0", "stages_0_blocks_0", "stages_0_blocks_9", "stages_0_blocks_10", "head_norm"],
        ["conv_1_3x3", "stage_1_0", "stage_1_1", "stage_2_0", "norm"],
        ["conv1", "layer1_blocks_0", "layer2_blocks_0", "layer2_blocks_1", "head"],
        ["rel_pos", "blocks_0", "blocks_1", "blocks_2", "fc_norm"],
    ],
)
def test_depths_by_the_names_of_other_families(names):
    params = {"backbone": {name: {"kernel": np.ones(2)} for name in names}}
    assert [layer_depths(params)["backbone"][n]["kernel"] for n in names] == [4, 3, 2, 1, 0]


def test_depths_of_nested_stages_and_of_names_that_say_nothing():
    nested = {"stages_1": {"downsample_0": 0, "blocks_0": 0, "blocks_1": 0}, "stages_0": {"x": 0}}
    expected = {"stages_1": {"downsample_0": 2, "blocks_0": 2, "blocks_1": 1}, "stages_0": {"x": 3}}
    assert layer_depths({"backbone": nested}) == {"backbone": expected}
    unknown = {"backbone": {"Conv_0": 0, "Dense_0": 0}, "head": 0}
    assert layer_depths(unknown) == {"backbone": {"Conv_0": 1, "Dense_0": 1}, "head": 0}


LAYERS = {
    "backbone": {"conv1": np.ones((2, 3), np.float32), "layer1_0": np.ones(2, np.float32)},
    "projection": np.ones((3, 2), np.float32),
}


@EVERY_KIND
def test_layers_decay_from_the_head_down(kind):
    options = {"schedule": "constant", "lr": 0.1, "weight_decay": 0.01}
    found, expected = (
        updates_of(kind(**options, layer_decay=decay), LAYERS, epochs=[0, 1])
        for decay in (0.5, 1.0)
    )
    for ours, plain in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours["projection"], plain["projection"], rtol=1e-6)
        backbone, plain = ours["backbone"], plain["backbone"]
        np.testing.assert_allclose(backbone["layer1_0"], plain["layer1_0"] / 2, rtol=1e-6)
        np.testing.assert_allclose(backbone["conv1"], plain["conv1"] / 4, rtol=1e-6)


def updates_of(settings, params, *, epochs):
    """The updates of a step in each of the epochs, at unchanged parameters."""
    optimizer = make_optimizer(settings)
    state, found, update = optimizer.init(params), [], jax.jit(optimizer.update)
    for epoch in epochs:
        position = {"epoch": np.int32(epoch), "epochs": np.int32(len(epochs))}
        updates, state = update(jax.tree.map(jnp.cos, params), state, params, **position)
        found.append(updates)
    return found


@EVERY_KIND
def test_a_frozen_backbone_keeps_its_bits_and_then_moves(kind):
    params = jax.tree.map(np.copy, LAYERS)
    params["backbone"]["conv1"][0] = [-0.0, 0.0, 1e-30]
    frozen = updates_of(kind(freeze_backbone=2), params, epochs=[0, 1, 2])
    free = updates_of(kind(), params, epochs=[0, 1, 2])
    for epoch, (ours, theirs) in enumerate(zip(frozen, free, strict=True)):
        np.testing.assert_array_equal(ours["projection"], theirs["projection"])
        moved = optax.apply_updates(params, ours)
        for name, before in params["backbone"].items():
            same = np.asarray(moved["backbone"][name]).tobytes() == before.tobytes()
            assert same == (epoch < 2), (epoch, name)
        if epoch == 2:
            chex.assert_trees_all_equal(ours, theirs)


# Rates


@EVERY_KIND
def test_the_warm_up_by_hand(kind):
    settings = kind(lr=0.8, min_lr=0.4, warmup=2)
    by_step = [
        float(learning_rate(settings, step // 4, 6, step=step, steps_per_epoch=4))
        for step in range(24)
    ]
    np.testing.assert_allclose(by_step[:8], 0.1 * np.arange(1, 9), rtol=1e-6)
    half = 0.2 * np.sqrt(0.5)
    cosine = np.repeat([0.8, 0.6 + half, 0.6, 0.6 - half], 4)  # over the four epochs left
    np.testing.assert_allclose(by_step[8:], cosine, rtol=1e-6)
    by_epoch = [float(learning_rate(settings, epoch, 6)) for epoch in range(6)]
    np.testing.assert_allclose(by_epoch, by_step[3::4], rtol=1e-6)


def test_a_warm_up_of_half_an_epoch():
    settings = Sgd(lr=1.0, warmup=0.5, schedule="constant")
    rates = [learning_rate(settings, s // 4, 2, step=s, steps_per_epoch=4) for s in range(8)]
    np.testing.assert_allclose(rates, [0.5, 1, 1, 1, 1, 1, 1, 1])


def test_updates_follow_the_warm_up_from_step_to_step():
    optimizer = make_optimizer(Sgd(lr=1.0, warmup=1, momentum=0.0, weight_decay=0.0))
    ones = {"kernel": np.ones(2, np.float32)}
    for step in range(3):
        position = {"epoch": 0, "epochs": 3, "step": step, "steps_per_epoch": 4}
        updates, _ = optimizer.update(ones, optimizer.init(ones), ones, **position)
        np.testing.assert_allclose(updates["kernel"], -(step + 1) / 4)


def test_a_warm_up_must_leave_an_epoch():
    Sgd(warmup=2).check_epochs(3)
    Sgd().check_epochs(1)
    with pytest.raises(UserError, match="warmup must be below the 2 epochs of a task, got 2") as e:
        Sgd(warmup=2).check_epochs(2)
    assert e.value.argument == "optimizer.warmup"


def test_cosine_of_the_reference():
    settings = Sgd(lr=0.001, min_lr=1e-5)
    rates = jax.jit(lambda e: learning_rate(settings, e, jnp.int32(70)))(jnp.arange(70))
    assert rates.dtype == jnp.float32
    np.testing.assert_allclose(rates, GOLDEN["lr/70_epochs"], rtol=1e-5)


def test_cosine_by_hand():
    settings = Sgd(lr=0.3, min_lr=0.1)
    rates = [float(learning_rate(settings, epoch, 4)) for epoch in range(5)]
    half = 0.1 * np.sqrt(0.5)
    np.testing.assert_allclose(rates, [0.3, 0.2 + half, 0.2, 0.2 - half, 0.1], rtol=1e-6)


def test_constant_rate():
    settings = Sgd(lr=0.3, schedule="constant")
    assert float(learning_rate(settings, jnp.int32(3), jnp.int32(4))) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 0.0}, "optimizer.lr must be above 0, got 0.0"),
        (
            {"lr": 0.1, "min_lr": 0.2},
            r"optimizer.min_lr must lie in \[0, optimizer.lr=0.1\], got 0.2",
        ),
        ({"min_lr": -1.0}, "optimizer.min_lr must be at least 0, got -1.0"),
        ({"momentum": 1.0}, r"optimizer.momentum must be at least 0 and below 1, got 1.0"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay must be at least 0, got -0.1"),
        ({"decay": "packages"}, "unknown optimizer.decay 'packages'. Did you mean 'package'"),
        ({"schedule": "cosin"}, "unknown optimizer.schedule 'cosin'. Did you mean 'cosine'"),
    ],
)
def test_settings_that_cannot_be(fields, message):
    with pytest.raises(UserError, match=message) as caught:
        Sgd(**fields)
    assert caught.value.argument == f"optimizer.{list(fields)[-1]}"


@EVERY_KIND
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 0.1, "min_lr": 0.2}, r"optimizer.min_lr must lie in \[0, optimizer.lr=0.1\]"),
        ({"warmup": -0.5}, "optimizer.warmup must be at least 0, got -0.5"),
        ({"layer_decay": 0.0}, "optimizer.layer_decay must be above 0 and at most 1, got 0.0"),
        ({"freeze_backbone": 1.5}, "optimizer.freeze_backbone must be a whole number, got 1.5"),
        ({"clip": -1.0}, "optimizer.clip must be at least 0, got -1.0"),
    ],
)
def test_common_settings_that_cannot_be(kind, fields, message):
    with pytest.raises(UserError, match=message) as caught:
        kind(**fields)
    assert caught.value.argument == f"optimizer.{list(fields)[-1]}"


# Records and configurations


def test_the_description_of_sgd_is_that_of_release_0_2():
    first = {"lr": 0.1, "min_lr": 1e-5, "momentum": 0.9, "weight_decay": 5e-4}
    first |= {"decay": "package", "schedule": "cosine"}
    assert Sgd(lr=0.1).describe() == first and list(Sgd().describe()) == list(first)
    assert Sgd(lr=0.1, warmup=2).describe() == {**first, "warmup": 2.0}


@EVERY_KIND
def test_a_description_makes_the_same_settings_again(kind):
    made = kind(lr=0.5, clip=1, freeze_backbone=3, layer_decay=0.75)
    described = made.describe()
    assert described.pop("name", "sgd") == made.name and OPTIMIZERS[made.name] is kind
    assert kind(**described) == made


@EVERY_KIND
def test_a_configuration_chooses_by_name(kind):
    made = kind(lr=0.5, warmup=0.5)
    section = {"name": made.name, **dataclasses.asdict(made)}
    assert configs.run_of(ConfigDict({"optim": section})).optimizer == made


@pytest.mark.parametrize(
    ("section", "argument", "message"),
    [
        (
            {"name": "adamw", "momentum": 0.9},
            "optim.momentum",
            "optimiser 'adamw' has no field 'momentum', which is lars and sgd's: choose",
        ),
        ({"b1": 0.9}, "optim.b1", "optimiser 'sgd' has no field 'b1', which is adamw's: choose"),
        ({"name": "adam"}, "optim.name", "unknown optimizer.name 'adam'. Did you mean 'adamw'"),
        ({"name": 3}, "optim.name", "unknown optimizer.name '3'"),
        ({"name": "lars", "thrust": 1}, "optim.thrust", "'thrust'. Did you mean 'trust'"),
        ({"name": "adamw", "b2": 1.0}, "optim.b2", "b2 must be at least 0 and below 1, got 1.0"),
    ],
)
def test_an_error_of_the_section_names_its_field(section, argument, message):
    with pytest.raises(UserError, match=message) as caught:
        configs.run_of(ConfigDict({"optim": section}))
    assert caught.value.argument == argument


def test_the_schema_lists_the_fields_of_each():
    found = [
        (f.name, f.meaning, f.default) for f in config_schema.schema() if f.name[:6] == "optim."
    ]
    names = {name for name, _, _ in found}
    assert names == {"optim.name"} | {
        f"optim.{f.name}" for kind in OPTIMIZERS.values() for f in dataclasses.fields(kind)
    }
    assert ("optim.lr", "learning rate of a task's first epoch", 0.001) in found
    assert ("optim.lr", "learning rate of a task's first epoch (lars)", 1.0) in found
    assert ("optim.momentum", "share of the last step that is kept (lars, sgd)", 0.9) in found
    assert sum(name == "optim.warmup" for name, _, _ in found) == 1


# A run


@pytest.mark.slow
def test_a_run_trains_by_adamw_and_thaws_its_backbone(tmp_path):
    optimizer = Adamw(lr=0.01, warmup=0.5, layer_decay=0.7, freeze_backbone=1, clip=1.0)
    preprocess = dataclasses.replace(tiny.PREPROCESS, jitter=0.3, random_crop=0.5)
    run = tiny.run("sce", backbone="flat", optimizer=optimizer, preprocess=preprocess, epochs=1)
    frozen = tiny.train(run, tmp_path / "frozen")
    # Another number of epochs, or of tasks, is the same program.
    free = tiny.train(dataclasses.replace(run, epochs=2), tmp_path / "free")
    described = json.loads((tmp_path / "free" / "run.json").read_text())
    assert described["optimizer"] == optimizer.describe()
    assert described["preprocess"] == preprocess.describe()
    for chain, moves in ((frozen, False), (free, True)):
        first, last = (chain.open(n).variables["params"] for n in (0, 2))
        same = jax.tree.map(np.array_equal, first["backbone"], last["backbone"])
        assert set(jax.tree.leaves(same)) == {not moves}
        kernels = [params["projection"]["kernel"] for params in (first, last)]
        assert not np.array_equal(*kernels)
