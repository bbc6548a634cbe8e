"""Small networks with random weights, and a comparison of trees bit by bit."""

import jax
import numpy as np
from reference_weights import zero_variables

from compat_jax.models import Backbone, Embedder

# One backbone of each family, deep enough to have all kinds of its blocks; their larger sisters differ
# in numbers alone and are counted in test_timm.py.
BACKBONES = (
    *("convnext_tiny", "dinov2_s14", "regnet_y_400mf", "resnet18", "resnet32_cifar", "resnet50"),
    *("resnet18d", "resnet_small", "senet18", "vit_s16", "vit_ti16"),
)


def side(name):
    """The side of the pictures that `network(name)` is for."""
    return 28 if name.startswith("dinov2") else 32


def network(name="resnet_small", projection=9, head=None, **arguments):
    """An embedder with `projection` feature columns and `head` classes; None leaves a layer out."""
    if name == "resnet_small":
        arguments = {"width": 4, **arguments}
    if name.startswith("vit"):
        arguments = {"patch": 8, "image_size": 32}
    if name.startswith("dinov2"):
        arguments = {"image_size": 28, **arguments}
    backbone = Backbone(name, arguments).build()
    return Embedder(backbone, projection_size=projection, head_size=head)


def random_variables(embedder, seed=0, size=32):
    rng = np.random.default_rng(seed)
    zeros = zero_variables(embedder, (size, size, 3))
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), zeros)


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def renamed(state, rename):
    return {rename(name): array for name, array in state.items()}
