"""Meshes by text, on the eight simulated devices of the tests."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from compat_jax import mesh as meshes
from compat_jax.errors import UserError


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("data:-1", {"data": -1, "model": 1}),
        ("data:2, model:4", {"data": 2, "model": 4}),
        ("model:-1", {"data": 1, "model": -1}),
        ("", {"data": 1, "model": 1}),
    ],
)
def test_sizes_by_text(text, sizes):
    assert meshes.parse_mesh(text) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("date:2", r"unknown mesh axis 'date'\. Did you mean 'data'\? Valid: data, model\."),
        ("data:two", "needs a size like data:2.*got 'data:two'"),
        ("data", "needs a size like data:2"),
        ("data:0", "needs a size like data:2"),
        ("data:-2", "needs a size like data:2"),
        ("data:--1", "needs a size like data:2"),
        ("data:1.5", "needs a size like data:2"),
        ("data:-1,model:-1", "only one mesh axis can be -1"),
    ],
)
def test_texts_that_are_no_mesh(text, message):
    with pytest.raises(UserError, match=message):
        meshes.parse_mesh(text)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("data:-1", (8, 1)),
        ("data:-1,model:2", (4, 2)),
        ("data:2,model:-1", (2, 4)),
        ("data:4", (4, 1)),
        ("", (1, 1)),
    ],
)
def test_meshes_of_eight_devices(text, shape):
    mesh = meshes.make_mesh(text)
    assert mesh.axis_names == ("data", "model")
    assert mesh.devices.shape == shape


def test_mesh_of_given_devices():
    mesh = meshes.make_mesh(devices=jax.devices()[2:4])
    assert set(mesh.devices.flat) == set(jax.devices()[2:4])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data:16", "mesh 'data:16' needs 16 devices, there are 8"),
        ("data:4,model:4", "needs 16 devices, there are 8"),
        ("data:-1,model:3", "8 devices do not divide by 3"),
    ],
)
def test_meshes_that_do_not_fit_the_devices(text, message):
    with pytest.raises(UserError, match=message):
        meshes.make_mesh(text)


def test_shardings():
    mesh = meshes.make_mesh("data:4,model:2")
    array = np.zeros((8, 12))
    assert meshes.replicated(mesh).shard_shape(array.shape) == (8, 12)
    assert meshes.along_data(mesh).shard_shape(array.shape) == (2, 12)
    assert meshes.along_data(mesh, axis=1).shard_shape(array.shape) == (8, 3)
    assert meshes.along_data(mesh, axis=1).spec == PartitionSpec(None, "data")


def test_what_an_optimiser_keeps_of_a_projections_rows_is_no_projection():
    mesh = meshes.make_mesh("data:1,model:2")
    params = {"projection": {"kernel": np.ones((6, 3), np.float32)}}
    state = optax.adafactor(0.1, min_dim_size_to_factor=2).init(params)
    shapes = {leaf.shape for leaf in jax.tree.leaves(meshes.shard((params, state), mesh, 4))}
    assert shapes == {(), (1,), (3,), (6,), (6, 4)}


@pytest.mark.parametrize(
    ("batch_size", "remedy"), [(12, "use 8 or 16"), (4, "use 8$"), (127, "use 120 or 128")]
)
def test_batch_that_does_not_divide(batch_size, remedy):
    mesh = meshes.make_mesh("data:8")
    with pytest.raises(UserError, match=f"batch_size {batch_size} .* 8 devices.*{remedy}"):
        meshes.check_batch(mesh, batch_size)


def test_batch_that_divides():
    mesh = meshes.make_mesh("data:4,model:2")
    assert meshes.check_batch(mesh, 12) is None
    assert [meshes.round_up(mesh, b) for b in (1, 4, 5, 12)] == [4, 4, 8, 12]
