"""Backbones against the reference's own outputs, and against NumPy in double precision."""

import contextlib
import functools
import math
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from networks import BACKBONES, side
from reference_weights import reference_state, reference_variables, zero_variables

from compat_jax import simplex
from compat_jax.chain import Chain
from compat_jax.errors import UserError
from compat_jax.interop import from_torch, to_torch
from compat_jax.models import Backbone, Embedder, layers
from compat_jax.models import conv as convolution
from compat_jax.models.conv import Geometry, conv
from compat_jax.models.regnet import regnet_y_400mf
from compat_jax.models.resnet_cifar import BasicBlock, CifarResNet
from compat_jax.models.vit import VisionTransformer

# Half the compile time; the numbers are the same to rounding.
quick_jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)
GOLDEN = np.load(Path(__file__).parent / "golden" / "forward.npz")
IMAGES = GOLDEN["images_nchw"].transpose(0, 2, 3, 1)


def relative_error(found, expected):
    """Largest difference over largest value: features are compared as vectors."""
    expected = np.asarray(expected, np.float64)
    return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()


# Tolerances are a few times the distance of the reference's float32 from its own float64, which is
# 1e-5 for ResNet-18 in training mode, and for ResNet-50 1.2e-3: four images per batch, 1x1 maps.
@pytest.mark.parametrize(
    ("name", "in_training", "after_training"),
    [
        ("resnet18", 1e-4, 1e-5),
        pytest.param("resnet50", 5e-3, 5e-4, marks=pytest.mark.slow),
    ],
)
def test_resnets_give_the_features_of_the_reference(name, in_training, after_training):
    embedder = Embedder(Backbone(name).build(), projection_size=99)
    variables = reference_variables(embedder, name)

    evaluate = quick_jit(lambda v: embedder.apply(v, IMAGES, train=False).features)
    features = evaluate(variables)
    assert relative_error(features, GOLDEN[f"{name}/eval_features"]) < 1e-5
    assert relative_error(simplex.logits(features), GOLDEN[f"{name}/eval_logits"]) < 1e-5

    train = quick_jit(lambda v: embedder.apply(v, IMAGES, train=True, mutable=["batch_stats"]))
    outputs, updated = train(variables)
    assert relative_error(outputs.features, GOLDEN[f"{name}/train_features"]) < in_training

    after = evaluate({**variables, **updated})
    expected = GOLDEN[f"{name}/eval_features_after_train_pass"]
    assert relative_error(after, expected) < after_training


@pytest.mark.slow
def test_senet18_gives_the_features_of_the_reference():
    embedder = Embedder(Backbone("senet18").build())
    variables = reference_variables(embedder, "senet18", bare=True)
    features = quick_jit(lambda v: embedder.apply(v, IMAGES, train=False).features)(variables)
    assert relative_error(features, GOLDEN["senet18/eval_backbone"]) < 1e-5
    train = quick_jit(lambda v: embedder.apply(v, IMAGES, train=True, mutable=["batch_stats"])[0])
    assert relative_error(train(variables).features, GOLDEN["senet18/train_backbone"]) < 1e-5


@pytest.mark.slow
def test_regnet_y_400mf_gives_the_features_of_the_reference(monkeypatch):
    # Its grouped convolutions one by one take long to compile; they have a test of their own.
    monkeypatch.setattr(convolution, "cpu_form", lambda *_: "native")
    embedder = Embedder(Backbone("regnet_y_400mf").build())
    variables = reference_variables(embedder, "regnet_y_400mf", bare=True)
    train = quick_jit(lambda v: embedder.apply(v, IMAGES, train=True, mutable=["batch_stats"])[0])
    found = train(variables).features
    assert relative_error(found, GOLDEN["regnet_y_400mf/train_backbone"]) < 1e-4

    # With weights drawn at random the values grow to 1e4, and the sigmoids of the gates turn the
    # rounding of float32 into 1e-3: so ours is computed in float64. Its distance is the reference's
    # own rounding.
    with jax.enable_x64(True):
        wide = Embedder(regnet_y_400mf(dtype=jnp.float64), dtype=jnp.float64)
        variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), variables)
        images = jnp.asarray(IMAGES, jnp.float64)
        features = quick_jit(lambda v: wide.apply(v, images, train=False).features)(variables)
        assert relative_error(features, GOLDEN["regnet_y_400mf/eval_backbone"]) < 2e-4


# Counts of torchvision and timm without their classifiers; of the reference's modules for the rest.
PARAMETERS = {
    "resnet18": 11_689_512 - 513_000,
    "resnet50": 25_557_032 - 2_049_000,
    "senet18": 11_255_224,
    "regnet_y_400mf": 5_710_512,
    "resnet32_cifar": 464_154 - 650,
    "vit_s16": 22_050_664 - 385_000,
    "vit_ti16": 5_717_416 - 193_000,
    "resnet18d": 11_708_744 - 513_000,
    "dinov2_s14": 22_056_576 - 384,  # facebook's has a mask_token
    "convnext_tiny": 28_589_128 - 769_000,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
    size = {"vit": 224, "din": 518}.get(name[:3], 32)
    arguments, shape = ({"image_size": size} if size > 32 else {}), (size, size, 3)
    params = zero_variables(Embedder(Backbone(name, arguments).build()), shape)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[name]


def sized(name):
    """Arguments of a backbone for pictures of `side(name)` pixels."""
    return {"image_size": side(name)} if name.startswith(("vit", "dinov2")) else {}


@pytest.mark.parametrize("name", BACKBONES)
def test_dtype_is_of_the_computation_and_parameters_stay_float32(name):
    backbone = Backbone(name, sized(name)).build("bfloat16")
    embedder = Embedder(backbone, projection_size=7, dtype=jnp.bfloat16)
    key, images = jax.random.key(0), IMAGES[:, : side(name), : side(name)]
    outputs, variables = jax.eval_shape(
        lambda x: embedder.init_with_output(key, x, train=True), images
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    assert outputs.features.shape == (4, 7)
    assert outputs.features.dtype == jnp.bfloat16


# --- convolutions (their forms have tests of their own)


def numpy_conv(x, kernel, *, stride=1, padding=0, groups=1):
    """Convolve by the definition, in double precision."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    size, _, _, out_channels = kernel.shape
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
    windows = windows[:, ::stride, ::stride]
    inputs, outputs = x.shape[-1] // groups, out_channels // groups
    parts = [
        np.einsum(
            "bpqchw,hwco->bpqo",
            windows[:, :, :, g * inputs : (g + 1) * inputs],
            kernel[..., g * outputs : (g + 1) * outputs],
        )
        for g in range(groups)
    ]
    return np.concatenate(parts, -1)


compiled_conv = quick_jit(conv, static_argnames=("stride", "padding", "groups", "form"))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow)
        if name.startswith(("convnext", "dinov2", "regnet", "resnet18d"))
        else name
        for name in BACKBONES
    ],
)
def test_the_chosen_forms_equal_the_native_convolution(name, monkeypatch):
    """Compare every convolution that the backbone makes of 32x32 pixels, on random inputs."""
    calls = set()

    def record(x, kernel, **geometry):
        calls.add((x.shape[1:], kernel.shape, Geometry(**geometry)))
        return conv(x, kernel, **geometry)

    monkeypatch.setattr(layers, "conv", record)
    backbone, images = Backbone(name, sized(name)).build(), IMAGES[:, : side(name), : side(name)]
    jax.eval_shape(lambda x: backbone.init(jax.random.key(0), x, False), images)
    assert calls
    rng = np.random.default_rng(0)
    for shape, kernel_shape, geometry in calls:
        form = convolution.cpu_form((2, *shape), kernel_shape, geometry)
        if form == "native":
            continue
        x = rng.normal(size=(2, *shape)).astype(np.float32)
        scale = math.sqrt(2 / math.prod(kernel_shape[:3]))
        kernel = (rng.normal(size=kernel_shape) * scale).astype(np.float32)
        settings = geometry._asdict()
        chosen = compiled_conv(x, kernel, **settings)
        native = compiled_conv(x, kernel, **settings, form="native")
        assert relative_error(chosen, native) < 1e-5, (form, shape, kernel_shape)


# --- CL2R's ResNet-32


def test_option_a_shortcut_takes_every_second_pixel_and_pads_channels_with_zeros():
    block = BasicBlock(features=4, stride=2)
    x = jnp.arange(32.0).reshape(1, 4, 4, 2)
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), x, False))
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    found = block.apply(variables, x, False)  # both convolutions and norms give zero
    np.testing.assert_array_equal(found[0, :, :, :2], [[[0, 1], [4, 5]], [[16, 17], [20, 21]]])
    np.testing.assert_array_equal(found[0, :, :, 2:], np.zeros((2, 2, 2)))


def numpy_cifar_resnet(state, images, depth):
    """Compute CL2R's network in double precision, in evaluation mode, from a PyTorch state dict."""

    def layer(x, conv_name, norm_name, stride=1):
        kernel = state[f"{conv_name}.weight"].transpose(2, 3, 1, 0)
        gamma, beta, mean, var = (
            state[f"{norm_name}.{leaf}"].astype(np.float64)
            for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        convolved = numpy_conv(x, kernel, stride=stride, padding=1)
        return (convolved - mean) / np.sqrt(var + 1e-5) * gamma + beta

    x = np.maximum(layer(images, "conv_1_3x3", "bn_1"), 0)
    for stage in (1, 2, 3):
        for index in range(depth):
            name = f"stage_{stage}.{index}"
            stride = 2 if stage > 1 and index == 0 else 1
            out = np.maximum(layer(x, f"{name}.conv_a", f"{name}.bn_a", stride=stride), 0)
            out = layer(out, f"{name}.conv_b", f"{name}.bn_b")
            if stride == 2:
                x = x[:, ::2, ::2]
                x = np.concatenate([x, np.zeros_like(x)], -1)
            x = np.maximum(out + x, 0)
    return x.mean((1, 2))


def test_resnet32_cifar_is_the_network_of_cl2r():
    embedder = Embedder(CifarResNet(depth=5))
    state = reference_state(embedder, "resnet32_cifar", bare=True)
    variables = from_torch(state, zero_variables(embedder))
    images = IMAGES[:2, :16, :16]
    found = quick_jit(lambda v: embedder.apply(v, images, train=False).features)(variables)
    assert relative_error(found, numpy_cifar_resnet(state, images, depth=5)) < 1e-5


# --- vision transformers


def numpy_vit(state, images, heads, patch):
    """Compute a pre-norm transformer in double precision from a state dict with timm's names."""
    state = {name: array.astype(np.float64) for name, array in state.items()}

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return unit * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attention(x, name):
        query, key, value = np.split(linear(x, f"{name}.qkv"), 3, axis=-1)
        width = x.shape[-1] // heads
        mixed = np.empty_like(x)
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            scores = query[..., own] @ key[..., own].swapaxes(1, 2) / math.sqrt(width)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            mixed[..., own] = weights @ value[..., own]
        return linear(mixed, f"{name}.proj")

    erf = np.vectorize(math.erf)
    kernel = state["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    tokens = numpy_conv(images, kernel, stride=patch)
    tokens = tokens.reshape(len(images), -1, tokens.shape[-1]) + state["patch_embed.proj.bias"]
    first = np.broadcast_to(state["cls_token"], (len(images), 1, tokens.shape[-1]))
    x = np.concatenate([first, tokens], 1) + state["pos_embed"]
    depth = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks."))
    for index in range(depth):
        name = f"blocks.{index}"
        x = x + attention(norm(x, f"{name}.norm1"), f"{name}.attn")
        hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        x = x + linear(hidden * (1 + erf(hidden / math.sqrt(2))) / 2, f"{name}.mlp.fc2")
    return norm(x, "norm")[:, 0]


def test_vit_is_a_pre_norm_transformer_with_a_class_token():
    backbone = VisionTransformer(width=24, depth=3, heads=3, patch=4, image_size=12)
    embedder = Embedder(backbone)
    state = reference_state(embedder, "vit", bare=True, image_shape=(12, 12, 3))
    variables = from_torch(state, zero_variables(embedder, (12, 12, 3)))
    images = IMAGES[:3, 4:16, 4:16]
    expected = numpy_vit(state, images, heads=3, patch=4)
    for train in (False, True):
        found = quick_jit(lambda v, t=train: embedder.apply(v, images, train=t).features)(variables)
        assert relative_error(found, expected) < 1e-5


def test_vit_has_the_names_and_shapes_of_timm():
    names = to_torch(zero_variables(Embedder(Backbone("vit_s16").build()), (224, 224, 3)))
    shapes = {name.removeprefix("backbone."): array.shape for name, array in names.items()}
    assert len(shapes) == 150  # timm's 152 without head.weight and head.bias
    assert shapes["cls_token"] == (1, 1, 384)
    assert shapes["pos_embed"] == (1, 197, 384)
    assert shapes["patch_embed.proj.weight"] == (384, 3, 16, 16)
    assert shapes["blocks.11.attn.qkv.weight"] == (1152, 384)
    assert shapes["blocks.0.mlp.fc1.bias"] == (1536,)
    assert shapes["blocks.5.norm2.weight"] == (384,)
    assert shapes["norm.bias"] == (384,)


def test_vit_takes_only_pictures_of_its_size():
    embedder = Embedder(Backbone("vit_ti16", {"patch": 4, "image_size": 32}).build())
    variables = zero_variables(embedder)
    with pytest.raises(UserError, match="32x32 pixels, got 24x24"):
        jax.eval_shape(lambda v: embedder.apply(v, IMAGES[:, :24, :24], train=False), variables)


@pytest.mark.parametrize("arguments", [{"image_size": 100}, {"patch": 0}, {"patch": 5}])
def test_vit_needs_whole_patches(arguments):
    with pytest.raises(UserError, match="no multiple of patch"):
        Backbone("vit_s16", arguments).build()


def test_the_small_resnet_needs_a_width():
    with pytest.raises(UserError, match="width is 1: use 2 or more"):
        Backbone("resnet_small", {"width": 1}).build()


# --- modules of Flax NNX


class NnxConv(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, width, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)

    def __call__(self, images, train: bool):
        x = self.norm(self.conv(images), use_running_average=not train)
        return nnx.relu(x).mean((1, 2))


def test_a_bridged_nnx_module_trains_and_is_recorded_by_its_own_name(tmp_path):
    run = tiny.run(backbone=nnx.bridge.to_linen(NnxConv, width=16), epochs=1)
    chain = tiny.train(run, tmp_path, tiny.dataset(classes=2))
    again = Chain(chain.path, backbone=nnx.bridge.to_linen(NnxConv, width=16)).open(0)
    stats = again.variables["batch_stats"]["backbone"]["norm"]
    assert np.abs(stats["mean"]).max() > 1e-3, "it was told that it is trained"
    assert again.record.backbone == f"{__name__}:NnxConv"
    assert again.record.backbone_arguments == {"width": 16}
    with pytest.raises(UserError, match=r"was trained with the backbone .*NnxConv \{'width': 16\}"):
        Chain(chain.path, backbone=nnx.bridge.to_linen(NnxConv, width=8)).open(0)


# --- the mode of a backbone


class OtherMode(nn.Module):
    """Takes `training`, and so would never hear of it."""

    @nn.compact
    def __call__(self, images, training=False):
        return images.mean((1, 2))


class NoMode(nn.Module):
    """Takes no mode, with or without running statistics."""

    has_stats: bool

    @nn.compact
    def __call__(self, images):
        x = images.mean((1, 2))
        return nn.BatchNorm(use_running_average=True)(x) if self.has_stats else x


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (
            OtherMode(),
            r"backbone OtherMode takes 'training' in place of 'train': call the argument",
        ),
        (NoMode(True), r"backbone NoMode has running statistics, but is not told when to update"),
        (NoMode(False), None),
    ],
)
def test_a_backbone_that_would_not_hear_that_it_is_trained_is_refused(backbone, message):
    embedder, images = Embedder(backbone, 3), jnp.ones((2, 4, 4, 3))
    variables = jax.eval_shape(lambda: embedder.init(jax.random.key(0), images))

    def apply(variables, train):
        found, _ = embedder.apply(variables, images, train=train, mutable=["batch_stats"])
        return found.features

    assert jax.eval_shape(lambda v: apply(v, False), variables).shape == (2, 3)
    refused = (
        contextlib.nullcontext() if message is None else pytest.raises(UserError, match=message)
    )
    with refused:
        assert jax.eval_shape(lambda v: apply(v, True), variables).shape == (2, 3)
    empty = {"batch_stats": {}, **variables}  # as a training step hands it in
    with refused:
        assert jax.eval_shape(lambda v: apply(v, True), empty).shape == (2, 3)


# --- what a backbone may return and ask for

IMAGES_2 = jax.ShapeDtypeStruct((2, 6, 6, 3), jnp.float32)


class Returns(nn.Module):
    """Returns something made of the pooled features and of the map."""

    kind: str

    @nn.compact
    def __call__(self, images):
        x = nn.Dense(4)(images)
        pooled = x.mean((1, 2))
        return {
            "map": x,
            "tuple": (pooled, x),
            "dict": {"features": pooled},
            "whole": pooled.astype(jnp.int32),
            "one picture": pooled[0],
            "sum of the batch": pooled.sum(0, keepdims=True),
            "none": None,
        }[self.kind]


@pytest.mark.parametrize(
    ("kind", "returned"),
    [
        ("map", r"float32\[2, 6, 6, 4\]"),
        ("tuple", "a value of type tuple"),
        ("dict", "a value of type dict"),
        ("whole", r"int32\[2, 4\]"),
        ("one picture", r"float32\[4\]"),
        ("sum of the batch", r"float32\[1, 4\]"),
        ("none", "a value of type NoneType"),
    ],
)
def test_a_backbone_that_does_not_return_pooled_features_is_refused(kind, returned):
    message = (
        rf"^backbone Returns returned {returned} for a batch of 2, where one array float\[batch"
    )
    with pytest.raises(UserError, match=message) as caught:
        jax.eval_shape(lambda x: Embedder(Returns(kind), 3).init(jax.random.key(0), x), IMAGES_2)
    assert caught.value.argument == "backbone"


class Dropping(nn.Module):
    """Drops features in training."""

    @nn.compact
    def __call__(self, images, train):
        return nn.Dropout(0.1, deterministic=not train)(nn.Dense(4)(images.mean((1, 2))))


class NnxDropping(nnx.Module):
    """The same in Flax NNX, with a stream of random numbers of its own or without."""

    def __init__(self, has_stream: bool, *, rngs: nnx.Rngs):
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs if has_stream else None)

    def __call__(self, images, train: bool):
        return self.dropout(self.dense(images.mean((1, 2))), deterministic=not train)


class Faulty(nn.Module):
    """Raises an error of its own."""

    @nn.compact
    def __call__(self, images):
        raise ValueError("my own fault")


@pytest.mark.parametrize(
    "backbone",
    [
        Dropping(),
        nnx.bridge.to_linen(NnxDropping, has_stream=False),
        nnx.bridge.to_linen(NnxDropping, has_stream=True),
    ],
)
def test_a_backbone_that_asks_for_random_numbers_is_refused(backbone):
    embedder = Embedder(backbone, 3)

    def train_once(images):
        variables = embedder.init(jax.random.key(0), images)
        return embedder.apply(variables, images, train=True, mutable=["batch_stats"])[0]

    message = r"^backbone (Nnx)?Dropping asks for random numbers, and backbones get none: leave out"
    with pytest.raises(UserError, match=message) as caught:
        jax.eval_shape(train_once, IMAGES_2)
    assert caught.value.argument == "backbone"


def test_errors_of_a_backbones_own_stay_what_they_are():
    with pytest.raises(ValueError, match=r"^my own fault"):
        jax.eval_shape(lambda x: Embedder(Faulty(), 3).init(jax.random.key(0), x), IMAGES_2)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (Returns("map"), r"backbone Returns returned float32\[1, 8, 8, 4\] for a batch of 1"),
        (Dropping(), "backbone Dropping asks for random numbers"),
    ],
)
def test_a_run_refuses_a_backbone_against_the_contract_in_one_line(tmp_path, backbone, message):
    with pytest.raises(UserError, match=message):
        tiny.train(tiny.run(backbone=backbone, epochs=1), tmp_path, tiny.dataset(classes=2))
