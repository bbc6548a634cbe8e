"""Small networks with random weights, and a comparison of trees bit by bit."""

import jax
import numpy as np
from reference_weights import zero_variables

from compat_jax.models import Backbone, Embedder, registered

# Backbones of the library: all but those that other test files register.
BACKBONES = tuple(name for name in registered() if name not in ("flat", "one_conv"))


def network(name="resnet_small", projection=9, head=None, **arguments):
    """An embedder with `projection` feature columns and `head` classes; None leaves a layer out."""
    if name == "resnet_small":
        arguments = {"width": 4, **arguments}
    if name.startswith("vit"):
        arguments = {"patch": 8, "image_size": 32}
    backbone = Backbone(name, arguments).build()
    return Embedder(backbone, projection_size=projection, head_size=head)


def random_variables(embedder, seed=0):
    rng = np.random.default_rng(seed)
    zeros = zero_variables(embedder)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), zeros)


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def renamed(state, rename):
    return {rename(name): array for name, array in state.items()}
