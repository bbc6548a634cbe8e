"""Weights to and from PyTorch: names, layouts, forms of a state dict, what does not fit."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import BACKBONES, assert_same_bits, network, random_variables, renamed, side
from reference_weights import zero_variables

from compat_jax import simplex
from compat_jax.errors import UserError
from compat_jax.interop import Misfit, from_torch, is_bare, to_torch
from compat_jax.interop.weights import overlap

# --- names and layouts


@pytest.mark.parametrize(
    ("backbone", "count", "names"),
    [
        (
            "resnet18",  # torchvision has 122 with its fc.weight and fc.bias
            120,
            [
                "conv1.weight",
                "bn1.running_mean",
                "layer2.0.downsample.0.weight",
                "layer2.0.downsample.1.num_batches_tracked",
                "layer4.1.bn2.bias",
            ],
        ),
        ("resnet50", 318, ["layer1.0.downsample.1.running_var", "layer3.5.conv3.weight"]),
        (
            "senet18",
            137,
            [
                "layer1.blocks.0.fc1.bias",
                "layer2.blocks.0.shortcut.0.weight",
                "layer4.blocks.1.bn2.running_var",
            ],
        ),
        (
            "regnet_y_400mf",
            514,
            [
                "layer3.blocks.6.se.se2.bias",
                "layer1.blocks.0.shortcut.1.weight",
                "layer4.blocks.11.conv2.weight",
            ],
        ),
        ("resnet32_cifar", 186, ["conv_1_3x3.weight", "bn_1.weight", "stage_3.4.conv_b.weight"]),
        ("vit_ti16", 150, ["cls_token", "pos_embed", "blocks.3.attn.proj.bias", "norm.weight"]),
        ("dinov2_s14", 174, ["blocks.11.ls2.gamma", "norm.bias"]),
        (
            "convnext_tiny",  # timm has 182 with its head.fc.weight and head.fc.bias
            180,
            [
                "stem.0.weight",
                "stages.1.downsample.1.bias",
                "stages.2.blocks.8.gamma",
                "stages.0.blocks.1.mlp.fc2.weight",
                "head.norm.weight",
            ],
        ),
        (
            "resnet18d",
            132,
            [
                "conv1.0.weight",
                "conv1.4.running_var",
                "conv1.6.weight",
                "layer2.0.downsample.2.bias",
            ],
        ),
    ],
)
def test_names_are_those_of_the_pytorch_modules(backbone, count, names):
    size = side(backbone)
    state = to_torch(zero_variables(network(backbone), (size, size, 3)))
    assert {f"backbone.{name}" for name in names} < state.keys()
    assert len(state) == count + 2
    assert state["fc1.weight"].shape[0] == 9
    assert state["fc2.weight"].shape == (10, 9)


def test_layouts():
    embedder = network("resnet18")
    variables = random_variables(embedder)
    state = to_torch(variables)
    stem = variables["params"]["backbone"]["conv1"]["kernel"]
    assert state["backbone.conv1.weight"].shape == (64, 3, 7, 7)
    assert state["backbone.conv1.weight"][60, 2, 1, 5] == stem[1, 5, 2, 60]
    projection = variables["params"]["projection"]["kernel"]
    assert state["fc1.weight"].shape == (9, 512)
    assert state["fc1.weight"][8, 500] == projection[500, 8]
    block = variables["batch_stats"]["backbone"]["layer4_1"]["bn2"]
    np.testing.assert_array_equal(state["backbone.layer4.1.bn2.running_var"], block["var"])
    tracked = state["backbone.bn1.num_batches_tracked"]
    assert tracked.dtype == np.int64
    assert tracked.shape == ()
    assert tracked == 0
    assert all(array.flags["C_CONTIGUOUS"] for array in state.values())


@pytest.mark.parametrize(
    ("backbone", "head"), [*((name, None) for name in BACKBONES), ("resnet_small", 6)]
)
def test_a_round_trip_returns_the_same_bits(backbone, head):
    embedder, size = network(backbone, projection=None if head else 9, head=head), side(backbone)
    variables = random_variables(embedder, size=size)
    state = to_torch(variables)
    back = from_torch(state, zero_variables(embedder, (size, size, 3)))
    assert_same_bits(back, variables)
    assert_same_bits(to_torch(back), state)


def test_only_the_layers_of_the_embedder_itself_are_renamed():
    """A ViT's own fc1 and fc2 stay, and so would a projection or head inside a backbone."""
    variables = random_variables(network("vit_ti16", head=6))
    state = to_torch(variables)
    own = variables["params"]
    np.testing.assert_array_equal(state["fc1.weight"], own["projection"]["kernel"].T)
    np.testing.assert_array_equal(state["fc2.weight"], own["head"]["kernel"].T)
    inner = own["backbone"]["blocks_3"]["mlp"]["fc1"]["kernel"]
    np.testing.assert_array_equal(state["backbone.blocks.3.mlp.fc1.weight"], inner.T)
    inside = {"params": {"backbone": {"head": {"kernel": np.zeros((2, 3), np.float32)}}}}
    assert set(to_torch(inside)) == {"backbone.head.weight"}


# --- the classifier


def test_the_fixed_classifier_is_written_as_the_prototypes():
    state = to_torch(zero_variables(network(projection=9)))
    np.testing.assert_allclose(state["fc2.weight"], simplex.prototypes(10), atol=1e-7)


def test_a_fixed_classifier_may_be_missing_but_not_another():
    embedder = network()
    template, variables = zero_variables(embedder), random_variables(embedder)
    state = to_torch(variables)
    prototypes = state.pop("fc2.weight")
    assert_same_bits(from_torch(state, template), variables)
    with pytest.raises(UserError, match="not the fixed simplex"):
        from_torch(state | {"fc2.weight": prototypes[::-1]}, template)
    with pytest.raises(UserError, match=r"shape \(12, 11\).*num_prototypes=10"):
        from_torch(state | {"fc2.weight": np.zeros((12, 11), np.float32)}, template)


def test_a_learnable_classifier_is_written_for_the_classes_seen():
    embedder = network(projection=None, head=6)
    variables = random_variables(embedder)
    kernel = variables["params"]["head"]["kernel"]
    state = to_torch(variables, classes_seen=4)
    np.testing.assert_array_equal(state["fc2.weight"], kernel[:, :4].T)
    assert "fc1.weight" not in state


# --- forms of a state dict


@pytest.mark.parametrize("backbone", ["resnet_small", "senet18", "vit_ti16"])
def test_prefix_of_ddp_and_infix_of_stages_make_no_difference(backbone):
    embedder = network(backbone)
    template, variables = zero_variables(embedder), random_variables(embedder)
    state = to_torch(variables)
    for form in (
        renamed(state, lambda n: f"module.{n}"),
        renamed(state, lambda n: n.replace(".blocks.", ".")),
        renamed(state, lambda n: n.replace("layer1.0.", "layer1.blocks.0.")),
    ):
        assert_same_bits(from_torch(form, template), variables)


@pytest.mark.parametrize(
    ("backbone", "classifier"),
    [("resnet_small", "fc"), ("resnet_small", "linear"), ("vit_ti16", "head")],
)
def test_a_backbone_alone_leaves_the_projection_as_it_is(backbone, classifier):
    embedder = network(backbone)
    variables, template = random_variables(embedder, 0), random_variables(embedder, 1)
    state = to_torch({**variables, "params": {"backbone": variables["params"]["backbone"]}})
    state = renamed(state, lambda n: n.removeprefix("backbone."))
    state |= {f"{classifier}.weight": np.zeros((1000, 8)), f"{classifier}.bias": np.zeros(1000)}
    assert is_bare(state)
    back = from_torch(state, template)
    assert_same_bits(back["params"]["backbone"], variables["params"]["backbone"])
    assert_same_bits(back["batch_stats"], variables["batch_stats"])
    assert_same_bits(back["params"]["projection"], template["params"]["projection"])


PREFIXES = ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module.model."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("backbone", ["resnet_small", "vit_ti16"])
def test_prefixes_of_wrappers_make_no_difference(backbone, prefix):
    embedder = network(backbone)
    template, variables = zero_variables(embedder), random_variables(embedder)
    state = to_torch(variables)
    assert_same_bits(from_torch(renamed(state, lambda n: prefix + n), template), variables)
    compiled = renamed(state, lambda n: n.replace("backbone.", "backbone._orig_mod.module."))
    assert_same_bits(from_torch(compiled, template), variables)
    alone = {n: a for n, a in state.items() if n.startswith("backbone.")}
    for form in (lambda n: prefix + n, lambda n: prefix + n.removeprefix("backbone.")):
        back = from_torch(renamed(alone, form), template)
        assert_same_bits(back["params"]["backbone"], variables["params"]["backbone"])


@pytest.mark.parametrize("prefix", ["encoder.", "net.", "models.", "module"])
def test_other_prefixes_are_not_stripped(prefix):
    with pytest.raises(Misfit) as caught:
        from_torch(renamed(STATE, lambda n: prefix + n), TEMPLATE)
    assert f"{prefix}backbone.conv1.weight" in caught.value.unknown


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", ["backbone.bn1.weight", "fc1.weight", "fc2.weight"])
def test_a_tensor_that_is_there_twice_is_refused(prefix, name):
    twice = f"{name} and {prefix}{name} are the same tensor"
    with pytest.raises(UserError, match=twice.replace(".", r"\.")):
        from_torch(STATE | {prefix + name: STATE[name]}, TEMPLATE)


def test_a_fit_is_a_share_of_tensors():
    template = zero_variables(network(projection=None))
    assert overlap(STATE, template) == 1
    wide = zero_variables(network(projection=None, width=8))
    assert overlap(STATE, wide) < 0.1 < overlap(STATE, wide, shapes=False) == 1
    assert overlap(STATE, zero_variables(network("vit_ti16", projection=None))) == 0


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types_become_float32(dtype):
    embedder = network()
    state = {n: a.astype(dtype) for n, a in to_torch(random_variables(embedder)).items()}
    state["backbone.bn1.num_batches_tracked"] = np.int64(7)
    back = from_torch(state, zero_variables(embedder))
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {np.dtype(np.float32)}
    found = back["params"]["backbone"]["bn1"]["scale"]
    np.testing.assert_array_equal(found, state["backbone.bn1.weight"].astype(np.float32))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (lambda a: a.astype(np.int8), "holds int8 numbers, weights are not whole"),
        (lambda a: a.astype(np.int64), "holds int64 numbers, weights are not whole"),
        (lambda a: a.astype(bool), "holds bool numbers, weights are not whole"),
        (lambda a: a.astype(np.complex64), "holds complex64 numbers, weights are real"),
        (lambda a: a.astype("U1"), "holds str32 numbers"),
        (lambda a: np.where(a == a, np.nan, a), "holds 2 values that float32 does not have"),
        (lambda a: np.where(a == a, -np.inf, a), "holds 2 values that float32 does not have"),
        (lambda a: np.full(a.shape, 1e300), "holds 2 values that float32 does not have"),
    ],
)
def test_numbers_that_weights_cannot_have_are_refused(array, message):
    small = network()
    state, name = to_torch(random_variables(small)), "backbone.layer1.0.bn1.bias"
    state[name] = array(state[name])
    template = zero_variables(small)
    with pytest.raises(UserError, match=rf"tensor backbone\.layer1\.0\.bn1\.bias {message}"):
        from_torch(state, template)


# --- what does not fit

SMALL = network()
TEMPLATE = zero_variables(SMALL)
STATE = to_torch(TEMPLATE)
NAMES = sorted(n for n in STATE if n != "fc2.weight" and not n.endswith("num_batches_tracked"))


@settings(max_examples=50, deadline=None)
@given(
    missing=st.sets(st.sampled_from(NAMES), max_size=5),
    misshapen=st.sets(st.sampled_from(NAMES), max_size=5),
    unknown=st.sets(st.sampled_from(["fc3.weight", "backbone.layer9.weight", "old.bias"])),
)
def test_every_tensor_that_does_not_fit_is_named(missing, misshapen, unknown):
    state = {name: array for name, array in STATE.items() if name not in missing}
    state |= {name: np.zeros((1, *STATE[name].shape)) for name in misshapen - missing}
    state |= {name: np.zeros(2) for name in unknown}
    if not (missing or misshapen or unknown):
        assert_same_bits(from_torch(state, TEMPLATE), TEMPLATE)
        return
    with pytest.raises(UserError) as error:
        from_torch(state, TEMPLATE)
    groups = dict(part.split(": ", 1) for part in str(error.value).split("; ")[1:])
    assert set(groups.get("missing", "").split(", ")) - {""} == missing
    assert set(groups.get("unknown", "").split(", ")) - {""} == unknown
    for name in misshapen - missing:
        shape = STATE[name].shape
        assert f"{name} (wanted {shape}, found {(1, *shape)})" in groups["misshapen"]


def test_a_long_list_is_cut():
    with pytest.raises(UserError, match=r"missing: backbone\.bn1\.bias, .*, \.\.\. \(\d+ more\)"):
        from_torch({"backbone.conv1.weight": STATE["backbone.conv1.weight"]}, TEMPLATE)


def test_errors_name_tensors_as_the_file_and_the_network_do():
    embedder = network("senet18")
    state = renamed(to_torch(zero_variables(embedder)), lambda n: f"module.{n}")
    state["module.backbone.layer9.blocks.0.weight"] = np.zeros(3)
    del state["module.backbone.layer1.blocks.0.conv1.weight"]
    message = (
        r"missing: backbone\.layer1\.blocks\.0\.conv1\.weight; "
        r"unknown: module\.backbone\.layer9\.blocks\.0\.weight$"
    )
    with pytest.raises(UserError, match=message):
        from_torch(state, zero_variables(embedder))
