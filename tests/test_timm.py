"""Backbones against timm and torchvision themselves: the features, from the weights under their names.

Small networks of each family by default; the published sizes are slow.
"""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from networks import assert_same_bits, renamed
from reference_weights import zero_variables

from compat_jax.interop import from_torch, torch_files
from compat_jax.interop.families import resized_positions
from compat_jax.interop.weights import convert, fitted
from compat_jax.models import Backbone, Embedder
from compat_jax.models.convnext import ConvNeXt
from compat_jax.models.resnet import BasicBlock, Bottleneck, ResNet
from compat_jax.models.vit import VisionTransformer

timm = pytest.importorskip("timm", reason='timm is not installed: pip install "timm" torchvision')
torch = pytest.importorskip("torch", reason="PyTorch is not installed")
torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("default"),  # theirs, of their own code
]
TOKENS = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
VIT = {"width": 24, "depth": 2, "heads": 3, "patch": 4}
STAGES = ((1, 1, 2, 1), (8, 16, 24, 32))


def randomized(net, seed=0):
    """The network with weights of a size that keeps features finite, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in net.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith(("running_var", "gamma", "layer_scale")):
            tensor.copy_(noise.abs() / 2 + 0.5)
        elif tensor.ndim < 2:
            tensor.add_(0.1 * noise)
        elif name.endswith(("token", "pos_embed", "pos_embedding")):
            tensor.copy_(0.5 * noise)
        else:
            tensor.copy_(noise * (2 / tensor[0].numel()) ** 0.5)
    return net.eval()


def arrays(net):
    return {name: tensor.numpy() for name, tensor in net.state_dict().items()}


def timm_features(net, images):
    return net.forward_head(net.forward_features(images), pre_logits=True)


def without(*path):
    """Features of a network of torchvision, whose last layer is at this path."""

    def features(net, images):
        *parents, last = path
        parent = functools.reduce(getattr, parents, net)
        layer = getattr(parent, last)
        setattr(parent, last, torch.nn.Identity())
        found = net(images)
        setattr(parent, last, layer)
        return found

    return features


def relative_error(backbone, state, net, *, features, size):
    images = np.random.default_rng(1).normal(size=(2, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        expected = features(net, torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    embedder = Embedder(backbone)
    variables = from_torch(state, zero_variables(embedder, (size, size, 3)))
    apply = jax.jit(lambda v: embedder.apply(v, images, train=False).features)
    return np.abs(np.asarray(apply(variables)) - expected).max() / np.abs(expected).max()


def timm_vit(size, **more):
    from timm.models.vision_transformer import VisionTransformer as Theirs

    return Theirs(img_size=size, **TOKENS, **more)


def torchvision_vit(size):
    from torchvision.models.vision_transformer import VisionTransformer as Theirs

    return Theirs(size, 4, 2, 3, 24, 96, num_classes=5)


def timm_resnet_d(block, depths):
    from timm.models import resnet

    shape = {"stem_width": 4, "stem_type": "deep", "avg_down": True, "channels": STAGES[1]}
    return resnet.ResNet(getattr(resnet, block), depths, num_classes=5, **shape)


def timm_convnext():
    from timm.models.convnext import ConvNeXt as Theirs

    return Theirs(depths=STAGES[0], dims=STAGES[1], num_classes=5)


def torchvision_convnext():
    from torchvision.models.convnext import CNBlockConfig
    from torchvision.models.convnext import ConvNeXt as Theirs

    widths = [*STAGES[1], None]
    stages = [CNBlockConfig(*widths[n : n + 2], depth) for n, depth in enumerate(STAGES[0])]
    return Theirs(stages, num_classes=5)


def torchvision_resnet():
    from torchvision.models import resnet

    return resnet.ResNet(resnet.BasicBlock, [1, 2, 1, 1], num_classes=5)


def resnet_d(block, depths):
    return ResNet(block, depths, STAGES[1], stem="deep", average_down=True)


REGISTERS = {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True}
# ours, theirs, how to get their features, side of the pictures
SMALL = {
    "resnet, torchvision": (
        lambda: ResNet(BasicBlock, (1, 2, 1, 1)),
        torchvision_resnet,
        without("fc"),
        33,
    ),
    "resnet d, basic blocks": (
        lambda: resnet_d(BasicBlock, (1, 1, 1, 1)),
        lambda: timm_resnet_d("BasicBlock", (1, 1, 1, 1)),
        timm_features,
        66,  # odd maps of 17 and 9 pixels, whose windows of averages are cut
    ),
    "resnet d, bottlenecks": (
        lambda: resnet_d(Bottleneck, (1, 1, 1, 1)),
        lambda: timm_resnet_d("Bottleneck", (1, 1, 1, 1)),
        timm_features,
        32,
    ),
    "vit, timm": (
        lambda: VisionTransformer(**VIT, image_size=16),
        lambda: timm_vit(16),
        timm_features,
        16,
    ),
    "vit, torchvision": (
        lambda: VisionTransformer(**VIT, image_size=16),
        lambda: torchvision_vit(16),
        without("heads"),
        16,
    ),
    "dinov2, timm": (
        lambda: VisionTransformer(**VIT, image_size=16, layer_scale=1e-5),
        lambda: timm_vit(16, init_values=1e-5),
        timm_features,
        16,
    ),
    "dinov2 with registers, timm": (
        lambda: VisionTransformer(**VIT, image_size=16, registers=4, layer_scale=1e-5),
        lambda: timm_vit(16, **REGISTERS),
        timm_features,
        16,
    ),
    "convnext, timm": (lambda: ConvNeXt(*STAGES), timm_convnext, timm_features, 70),
    "convnext, torchvision": (
        lambda: ConvNeXt(*STAGES),
        torchvision_convnext,
        without("classifier", "2"),
        70,
    ),
}


@pytest.mark.parametrize("case", SMALL)
def test_features_are_theirs(case):
    backbone, net, features, size = SMALL[case]
    net = randomized(net())
    error = relative_error(backbone(), arrays(net), net, features=features, size=size)
    assert error < 1e-5


@pytest.mark.parametrize("case", SMALL)
def test_wrappers_are_stripped_and_the_classifier_left_out(case):
    backbone, net, _, size = SMALL[case]
    state, template = arrays(net()), zero_variables(Embedder(backbone(), 9), (size, size, 3))
    plain, fresh = convert(state, template)
    assert fresh == ("projection",)
    for prefix in ("module.", "_orig_mod.", "model.", "backbone.", "module._orig_mod.model."):
        wrapped, fresh = convert(renamed(state, lambda name, p=prefix: p + name), template)
        assert_same_bits(wrapped, plain)
        assert fresh == ("projection",)


@pytest.mark.parametrize("case", [c for c in SMALL if "torchvision" in c or "registers" in c])
def test_averaged_weights_are_taken_on_request(case, tmp_path):
    plain, averaged = (randomized(SMALL[case][1](), seed).state_dict() for seed in (0, 1))
    torch.save({"model": plain, "model_ema": averaged, "epoch": 3}, tmp_path / "a.pth")
    for ema, expected in ((False, plain), (True, averaged)):
        weights = torch_files.load(tmp_path / "a.pth", ema)
        assert_same_bits(weights.tensors, {n: t.numpy() for n, t in expected.items()})
        assert len(weights.notes) == 1


# --- names of other libraries


def facebooks_dinov2(state):
    """A state dict of timm's DINOv2 with registers as facebook writes it, its class position 1."""
    found = dict(state)
    found["register_tokens"] = found.pop("reg_token")
    found["pos_embed"] = np.concatenate([np.ones_like(state["cls_token"]), state["pos_embed"]], 1)
    return {n: a for n, a in found.items() if not n.startswith("head.")} | {
        "mask_token": np.zeros((1, 24), np.float32)
    }


def test_facebooks_dinov2_is_that_of_timm():
    from timm.models.vision_transformer import checkpoint_filter_fn

    state = facebooks_dinov2(arrays(randomized(timm_vit(16, **REGISTERS))))
    net = timm_vit(16, **{**REGISTERS}).eval()
    known = checkpoint_filter_fn({n: torch.from_numpy(a) for n, a in state.items()}, net)
    net.load_state_dict(known, strict=False)
    backbone = VisionTransformer(**VIT, image_size=16, registers=4, layer_scale=1e-5)
    assert relative_error(backbone, state, net, features=timm_features, size=16) < 1e-5


def test_facebooks_convnext_is_that_of_timm():
    from timm.models.convnext import checkpoint_filter_fn

    net = randomized(timm_convnext())
    state = {}
    for name, array in arrays(net).items():
        for theirs, own in (
            ("stem.", "downsample_layers.0."),
            (".blocks.", "."),
            ("conv_dw", "dwconv"),
            ("mlp.fc", "pwconv"),
            ("head.norm", "norm"),
            ("head.fc", "head"),
        ):
            name = name.replace(theirs, own)
        if ".downsample." in name:
            _, stage, _, rest = name.split(".", 3)
            name = f"downsample_layers.{stage}.{rest}"
        state[name] = array
    back = checkpoint_filter_fn({n: torch.from_numpy(a) for n, a in state.items()}, net)
    assert {n: tuple(a.shape) for n, a in back.items()} == {
        n: tuple(a.shape) for n, a in net.state_dict().items()
    }
    template = zero_variables(Embedder(ConvNeXt(*STAGES)))
    assert_same_bits(from_torch(state, template), from_torch(arrays(net), template))


def test_older_names_of_torchvisions_vit():
    net = randomized(torchvision_vit(16))
    template = zero_variables(Embedder(VisionTransformer(**VIT, image_size=16)), (16, 16, 3))
    old = renamed(
        arrays(net), lambda n: n.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2")
    )
    assert "encoder.layers.encoder_layer_1.mlp.linear_2.bias" in old
    assert_same_bits(from_torch(old, template), from_torch(arrays(net), template))


# --- positions for another image size


@pytest.mark.parametrize(("old", "new"), [(37, 16), (4, 9), (7, 5), (3, 8)])
@pytest.mark.parametrize("prefix", [0, 1])
def test_positions_are_resampled_as_in_timm(old, new, prefix):
    from timm.layers import resample_abs_pos_embed

    rng = np.random.default_rng(0)
    given = rng.normal(size=(1, old * old + prefix, 6)).astype(np.float32)
    tensor = torch.from_numpy(given)
    expected = resample_abs_pos_embed(tensor, [new, new], num_prefix_tokens=prefix).numpy()
    found = resized_positions(given, new * new + prefix)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_vit_for_another_image_size_says_so():
    net = randomized(timm_vit(28))
    template = zero_variables(Embedder(VisionTransformer(**VIT, image_size=16)), (16, 16, 3))
    found, notes = fitted(arrays(net), template)
    assert found["pos_embed"].shape == (1, 17, 24)
    assert notes == ("50 positions were resampled (bicubic) to 17, for another image size",)
    assert fitted(found, template)[1] == ()


# --- the published sizes

TIMM = {
    **{name: name for name in ("resnet18d", "resnet34d", "resnet50d", "resnet101d", "resnet152d")},
    **{name: name for name in ("resnet34", "resnet101", "resnet152")},
    **{name: name for name in ("convnext_tiny", "convnext_small", "convnext_base")},
    "vit_ti16": "vit_tiny_patch16_224",
    "vit_s16": "vit_small_patch16_224",
    "vit_b16": "vit_base_patch16_224",
    "vit_l16": "vit_large_patch16_224",
    "dinov2_s14": "vit_small_patch14_dinov2",
    "dinov2_b14": "vit_base_patch14_dinov2",
    "dinov2_l14": "vit_large_patch14_dinov2",
}
BIG = ("resnet101", "resnet152", "convnext_small", "convnext_base", "vit_l", "dinov2_l")


@pytest.mark.parametrize(
    ("name", "registers"),
    [
        pytest.param(name, r, marks=pytest.mark.slow) if name.startswith(BIG) else (name, r)
        for name in TIMM
        for r in ((0, 4) if name.startswith("dinov2") else (0,))
    ],
)
def test_names_and_shapes_are_those_of_timm(name, registers):
    theirs = TIMM[name].replace("14_", f"14_reg{registers}_") if registers else TIMM[name]
    with torch.device("meta"):
        net = timm.create_model(theirs)
    shapes = {n: tuple(t.shape) for n, t in net.state_dict().items()}
    size = {"vit": 224, "din": 518}.get(name[:3], 32)
    arguments = {"image_size": size} if size > 32 else {}
    arguments |= {"registers": registers} if registers else {}
    embedder = Embedder(Backbone(name, arguments).build(), 9)
    zeros = {n: np.broadcast_to(np.float32(0), shape) for n, shape in shapes.items()}
    _, fresh = convert(zeros, zero_variables(embedder, (size, size, 3)))
    assert fresh == ("projection",)


FULL = {
    "resnet34": ("resnet34", {}, {}, 224),
    "resnet50d": ("resnet50d", {}, {}, 224),
    "vit_b16": ("vit_base_patch16_224", {}, {}, 224),
    "dinov2_s14": (
        "vit_small_patch14_reg4_dinov2",
        {"registers": 4, "image_size": 224},
        {"img_size": 224},
        224,
    ),
    "convnext_tiny": ("convnext_tiny", {}, {}, 224),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_features_of_the_published_size_are_those_of_timm(name):
    theirs, arguments, more, size = FULL[name]
    net = randomized(timm.create_model(theirs, **more))
    backbone = Backbone(name, arguments).build()
    error = relative_error(backbone, arrays(net), net, features=timm_features, size=size)
    assert error < 1e-4


@pytest.mark.slow
def test_features_of_torchvisions_vit_are_theirs():
    net = randomized(torchvision.models.vit_b_16())
    backbone = Backbone("vit_b16").build()
    error = relative_error(backbone, arrays(net), net, features=without("heads"), size=224)
    assert error < 1e-4


# --- configs/weights.md

ROWS = [
    [cell.strip(" `") for cell in line.strip("|").split("|")]
    for line in (Path(__file__).parents[1] / "configs" / "weights.md").read_text().splitlines()
    if line.startswith("| `")
]
NORMALISATION = {
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "halves": ((0.5,) * 3, (0.5,) * 3),
}


def test_the_table_of_torchvisions_files_is_right():
    rows = [row for row in ROWS if ".pth" in row[1] and "/" not in row[1]]
    assert len(rows) == 11
    known = {}
    for name in torchvision.models.list_models(module=torchvision.models):
        for entry in torchvision.models.get_model_weights(name):
            known[entry.url.rpartition("/")[2]] = entry
    for _, file, megabytes, crop, features in rows:
        entry = known[file.partition("`")[0]]
        images = entry.transforms()
        assert images.crop_size == [224] and images.interpolation.value == "bilinear"
        assert (tuple(images.mean), tuple(images.std)) == NORMALISATION["ImageNet"]
        assert float(crop) == round(224 / images.resize_size[0], 3)
        assert int(megabytes) == round(entry.meta["_file_size"])
        assert int(features) in (512, 768, 1024, 2048)


def test_the_table_of_timms_files_is_right():
    rows = [row for row in ROWS if len(row) == 6]
    assert len(rows) == 17
    for name, file, size, normalisation, crop, features in rows:
        config = timm.get_pretrained_cfg(file, allow_unregistered=False)
        assert TIMM.get(name, name) == file.partition(".")[0]
        assert config.hf_hub_id == f"timm/{file}"
        assert config.license == "apache-2.0"
        assert config.input_size == (3, int(size), int(size))
        assert (config.mean, config.std) == NORMALISATION[normalisation]
        assert (config.crop_pct, config.interpolation) == (float(crop), "bicubic")
        with torch.device("meta"):
            assert int(features) == timm.create_model(file.partition(".")[0]).num_features


def test_the_table_of_dinov2_is_right():
    rows = [row for row in ROWS if row[0].startswith("dinov2")]
    assert len(rows) == 3
    for name, *files, _ in rows:
        size = {"s": "small", "b": "base", "l": "large"}[name[7]]
        for file, kind in zip(files, ("", "reg4_"), strict=True):
            config = timm.get_pretrained_cfg(f"vit_{size}_patch14_{kind}dinov2.lvd142m")
            assert config.url == f"https://dl.fbaipublicfiles.com/dinov2/{file}"
            assert (config.input_size, config.crop_pct) == ((3, 518, 518), 1.0)
            assert (config.mean, config.std) == NORMALISATION["ImageNet"]
