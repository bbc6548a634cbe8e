"""BatchNorm folded into the kernels: the same features with fewer operations."""

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny
from networks import BACKBONES

from compat_jax.models import Backbone, Embedder
from compat_jax.models import conv as forms
from compat_jax.models.fold import fold_batch_norm
from compat_jax.models.layers import BatchNorm, Conv

# Backbones with BatchNorm: arguments, image side, number of normalisations left
CASES = {
    "regnet_y_400mf": ({}, 16, 0),
    "resnet18": ({}, 32, 0),
    "resnet18d": ({}, 32, 0),
    "resnet32_cifar": ({}, 16, 0),
    "resnet50": ({}, 32, 0),
    "resnet_small": ({"width": 4}, 16, 0),
    "senet18": ({}, 16, 8),  # each block normalises its input, which its shortcut takes as it is
}


def test_all_backbones_are_here():
    without = {"convnext_tiny", "dinov2_s14", "vit_s16", "vit_ti16"}  # BatchNorm
    assert {*BACKBONES} - {*CASES} == without


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow)
        if name in ("regnet_y_400mf", "resnet18d", "resnet50")
        else name
        for name in CASES
    ],
)
def test_features_are_the_same_with_fewer_normalisations(name, monkeypatch):
    monkeypatch.setattr(forms, "cpu_form", lambda *_: "native")  # the quickest to compile
    arguments, side, left = CASES[name]
    network = Embedder(Backbone(name, arguments).build(), projection_size=15)
    shape = (side, side, 3)
    variables = tiny.variables(
        tiny.record(backbone=name, backbone_arguments=arguments, image_shape=shape)
    )
    params = variables["params"]  # halved, since random residual branches add up to thousands
    variables["params"] = jax.tree_util.tree_map_with_path(
        lambda path, x: x / 2 if path[-1].key == "scale" else x, params
    )
    images = np.random.default_rng(0).standard_normal((2, *shape), np.float32)
    folded = fold_batch_norm(network, variables, shape)
    forward = jax.jit(
        lambda v: network.apply(v, images, train=False).features,
        compiler_options={"xla_backend_optimization_level": 0},
    )
    expected = np.asarray(forward(variables))
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(
        forward(folded), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()
    )
    names = [path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(folded)]
    assert names.count("mean") == names.count("var") == left


def test_variables_are_not_changed():
    network = Embedder(Backbone("resnet_small", {"width": 4}).build(), projection_size=15)
    variables = tiny.variables(
        tiny.record(backbone="resnet_small", backbone_arguments={"width": 4})
    )
    before = jax.tree.map(np.copy, variables)
    fold_batch_norm(network, variables, (8, 8, 3))
    jax.tree.map(np.testing.assert_array_equal, variables, before)


class Rectified(Conv):
    """A convolution that does more."""

    @nn.compact
    def __call__(self, x):
        return nn.relu(super().__call__(x))


class Stage(nn.Module):
    """A part of a network that a lifted scan repeats."""

    @nn.compact
    def __call__(self, x, _):
        return BatchNorm()(Conv(2, 1)(x), train=False), None


class Odd(nn.Module):
    """A network of one's own, whose norms and convolutions meet in another way.

    Attributes:
      form: a key of `ODD`.
    """

    form: str

    @nn.compact
    def __call__(self, x, train=False):
        if self.form == "stacked":
            many = nn.scan(Stage, length=3, variable_axes={True: 0}, split_rngs={"params": True})
            return many()(x, None)[0].mean((1, 2))
        conv = Conv(2, 1)
        norm = BatchNorm(epsilon=0.5) if self.form == "epsilon" else BatchNorm()
        if self.form == "subclass":
            conv = Rectified(2, 1)
        if self.form == "convolved twice":
            x = conv(x)
        made = conv(x)
        y = norm(x=made, train=self.form == "by batch")
        if self.form == "added":
            y += made
        if self.form == "two norms":
            y *= BatchNorm()(made, train)
        if self.form == "normalised twice":
            y += norm(nn.relu(x), train)
        if self.form == "returned":
            return y.mean((1, 2)), made
        return y.mean((1, 2))


# Forms, and the norms that are left
ODD = {
    "plain": 0,
    "epsilon": 0,
    "added": 1,
    "two norms": 2,
    "returned": 1,
    "convolved twice": 1,
    "normalised twice": 1,
    "by batch": 1,
    "subclass": 1,
    "stacked": 1,
}


@pytest.mark.parametrize("form", ODD)
def test_only_a_norm_that_alone_reads_its_convolution_is_folded(form):
    shape, rng, network = (3, 3, 2), np.random.default_rng(0), Odd(form)
    images = rng.standard_normal((2, *shape), np.float32)
    run = {} if form != "by batch" else {"mutable": ["batch_stats"]}
    variables = jax.tree.map(
        lambda x: rng.uniform(0.5, 2, x.shape).astype(np.float32),
        jax.eval_shape(lambda: network.init(jax.random.key(0), images)),
    )
    folded = fold_batch_norm(network, variables, shape)
    plain, quick = (jax.tree.leaves(network.apply(v, images, **run)) for v in (variables, folded))
    for one, other in zip(plain, quick, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5)
    names = [path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(folded)]
    assert names.count("var") == ODD[form]
