"""Weight files as a chain, and back: also after a kill, and onto a full disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from networks import assert_same_bits, network, random_variables, renamed
from reference_weights import zero_variables
from weight_bytes import MISSING

import compat_jax
from compat_jax import files
from compat_jax.chain import Chain, variables_sha256
from compat_jax.data import Preprocess
from compat_jax.data.pictures import Preparation
from compat_jax.errors import UserError
from compat_jax.interop import (
    ImageSettings,
    chains,
    starting_version,
    starting_version_of,
    to_torch,
    torch_files,
)
from compat_jax.interop.start import image_size_of, sized
from compat_jax.models import Backbone
from compat_jax.models.embedder import init_variables
from compat_jax.training import Run
from compat_jax.training.sequence import check_replacements

SHAPE = (32, 32, 3)
STATE = to_torch(zero_variables(network()))
ROOT = Path(compat_jax.__file__).parent.parent


def run(method="hoc", **fields):
    """A run whose network `network()` is."""
    defaults = {
        "backbone": Backbone("resnet_small", {"width": 4}),
        "preprocess": Preprocess((0.5,) * 3, (0.2,) * 3),
        "num_prototypes": 10,
        "seed": 3,
    }
    return Run(method=method, **{**defaults, **fields})


def import_folder(folder, chain, run, **more):
    chains.import_folder(folder, chain, run, image_shape=SHAPE, **more)


def import_file(path, chain, run):
    return chains.import_file(torch_files.load(path), chain, run, image_shape=SHAPE).fresh


@pytest.fixture
def folder(tmp_path):
    """Three checkpoints of a sequence, and another file."""
    made = tmp_path / "files"
    made.mkdir()
    for task in range(3):
        write(made / f"ckpt_{task}.safetensors", random_variables(network(), task))
    (made / "events.log").touch()
    return made


def write(path, variables):
    write_state(path, to_torch(variables))


def write_state(path, state):
    pytest.importorskip("safetensors", reason=MISSING["safetensors"])
    torch_files.write(path, state)


# --- import


def test_a_folder_of_checkpoints_becomes_a_chain_in_the_order_of_the_tasks(tmp_path):
    trained = [random_variables(network(), seed) for seed in range(11)]
    for task, variables in enumerate(trained):
        write(tmp_path / "files" / f"ckpt_{task}.safetensors", variables)
    chain = Chain(tmp_path / "chain")
    seen = [10 + 5 * t for t in range(11)]
    course = chains.Course(seen, replace_at=(0, 4))
    import_folder(tmp_path / "files", chain, run(), course=course)
    assert chain.require_whole().numbers() == list(range(11))
    for task in (0, 3, 4, 10):
        version = chain.open(task)
        assert_same_bits(version.variables, trained[task])
        record = version.record
        assert (record.task, record.classes_seen, record.feature_size) == (task, seen[task], 9)
        assert record.mean == (0.5,) * 3 and record.image_shape == SHAPE
        file = tmp_path / "files" / f"ckpt_{task}.safetensors"
        assert record.data_fingerprint == files.sha256(files.absolute(file))
    parents = [chain.record(n).parent for n in range(6)]
    assert parents == [None, 0, 1, 2, None, 4]


def test_a_growing_classifier_keeps_the_rows_of_each_file(tmp_path):
    for task, rows in enumerate((3, 5)):
        variables = random_variables(network(projection=None, head=rows))
        write(tmp_path / f"ckpt_{task}.safetensors", variables)
    chain = Chain(tmp_path / "chain")
    import_folder(tmp_path, chain, run("er"))
    for task, rows in enumerate((3, 5)):
        version = chain.open(task)
        assert version.record.head_classes == version.record.classes_seen == rows
        assert version.record.feature_size == 16
        assert version.variables["params"]["head"]["kernel"].shape == (16, rows)


def test_nothing_is_written_when_one_file_does_not_fit(folder, tmp_path):
    odd = {**STATE, "odd.weight": np.zeros(3, np.float32)}
    write_state(folder / "ckpt_1.safetensors", odd)
    chain = Chain(tmp_path / "chain")
    with pytest.raises(UserError, match=r"ckpt_1\.safetensors: .*unknown: odd\.weight"):
        import_folder(folder, chain, run())
    assert chain.numbers() == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "has no ckpt_0.pt"),
        (["ckpt_0.pt", "ckpt_2.pt"], r"checkpoints \[0, 2\].*0\.\.2"),
        (["ckpt_0.pt", "ckpt_0.safetensors"], r"checkpoints \[0, 0\]"),
    ],
)
def test_checkpoints_must_be_numbered_without_gaps(tmp_path, names, message):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=message):
        chains.checkpoints(tmp_path)


def test_a_single_file_becomes_a_pretrained_model(tmp_path):
    variables = random_variables(network())
    write(tmp_path / "a.safetensors", variables)
    chain = Chain(tmp_path / "chain")
    assert import_file(tmp_path / "a.safetensors", chain, run()) == ()
    version = chain.open(0)
    assert_same_bits(version.variables, variables)
    assert version.record.task is None
    assert version.record.replaced_by == "imported from a.safetensors"


@pytest.mark.parametrize(("method", "part"), [("hoc", "projection"), ("er", "head")])
def test_layers_that_a_bare_backbone_lacks_are_drawn_from_the_seed(tmp_path, method, part):
    state = to_torch(random_variables(network(projection=None)))
    state = renamed(state, lambda n: n.removeprefix("backbone."))
    write_state(tmp_path / "a.safetensors", state)
    drawn = []
    for number, seed in enumerate((3, 3, 4)):
        chain = Chain(tmp_path / f"chain{number}")
        assert import_file(tmp_path / "a.safetensors", chain, run(method, seed=seed)) == (part,)
        drawn.append(chain.open(0).variables["params"][part]["kernel"])
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 0.01


# --- a version to start from

HALF = ImageSettings(32, (0.5,) * 3, (0.2,) * 3)
START = {"num_prototypes": 10, "label_order": "descending", "seed": 3}
SMALL = Backbone("resnet_small", {"width": 4})


def backbone_alone(path, seed=0):
    """The weight file of a backbone with a classifier of its own, and its variables."""
    variables = random_variables(network(projection=None), seed)
    state = renamed(to_torch(variables), lambda n: f"module.{n.removeprefix('backbone.')}")
    write_state(path, state | {"module.fc.weight": np.zeros((1000, 16), np.float32)})
    return variables["params"]["backbone"]


def test_a_backbone_starts_with_a_projection_drawn_from_the_seed(tmp_path):
    file = tmp_path / "a.safetensors"
    params = backbone_alone(file)
    version, fresh, notes = starting_version(file, SMALL, **START, settings=HALF)
    assert fresh == version.record.fresh == ("projection",)
    assert_same_bits(version.variables["params"]["backbone"], params)
    record = version.record
    assert (version.number, record.task, record.parent) == (0, None, None)
    assert record.replaced_by == "imported from a.safetensors"
    assert record.data_fingerprint == files.sha256(files.absolute(file))
    assert (record.image_shape, record.mean, record.std) == (SHAPE, HALF.mean, HALF.std)
    assert record.preparation == Preparation(32).describe()
    assert record.check() and version.sha256 == variables_sha256(version.variables)
    assert notes == (
        "images: size 32 (as given), mean 0.5,0.5,0.5 (as given), std 0.2,0.2,0.2 (as given), "
        "crop 1 (by default), filter bicubic (by default), resize crop (by default)",
    )
    kernels = [
        starting_version(file, SMALL, **{**START, "seed": seed}, settings=HALF).version.variables[
            "params"
        ]["projection"]["kernel"]
        for seed in (3, 4)
    ]
    np.testing.assert_array_equal(version.variables["params"]["projection"]["kernel"], kernels[0])
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01


def test_the_file_says_what_its_images_are_and_what_is_given_wins(tmp_path):
    backbone_alone(tmp_path / "a.safetensors")
    config = {"input_size": [3, 32, 32], "mean": [0.4] * 3, "std": [0.2] * 3, "crop_pct": 0.875}
    text = json.dumps({"pretrained_cfg": {**config, "interpolation": "bilinear"}})
    (tmp_path / "config.json").write_text(text)
    own = starting_version(tmp_path / "a.safetensors", SMALL, **START)
    assert own.version.record.mean == (0.4,) * 3
    assert own.version.record.preparation == Preparation(32, "crop", "bilinear", 0.875).describe()
    assert "crop 0.875 (the file), filter bilinear (the file)" in own.notes[-1]
    given = ImageSettings(mean=(0.5,) * 3, crop=1.0)
    other = starting_version(tmp_path / "a.safetensors", SMALL, **START, settings=given)
    assert (other.version.record.mean, other.version.record.std) == ((0.5,) * 3, (0.2,) * 3)
    differences = ["mean 0.5,0.5,0.5 instead of 0.4,0.4,0.4", "crop 1 instead of 0.875"]
    assert [note.partition(", as ")[0] for note in other.notes[:2]] == differences
    assert "size 32 (the file), mean 0.5,0.5,0.5 (as given)" in other.notes[-1]


@pytest.mark.parametrize("crop", [{}, {"crop_pct": 1.0}, {"crop_pct": 0.95}])
def test_pictures_are_squashed_where_timm_squashes_them(tmp_path, crop):
    backbone_alone(tmp_path / "a.safetensors")
    config = {"input_size": [3, 32, 32], "mean": [0.4] * 3, "std": [0.2] * 3, **crop}
    text = json.dumps({"pretrained_cfg": {**config, "crop_mode": "squash"}})
    (tmp_path / "config.json").write_text(text)
    found = starting_version(tmp_path / "a.safetensors", SMALL, **START)
    assert found.version.record.preparation == Preparation(32, "squash").describe()
    assert "crop 1 (nothing is cropped)" in found.notes[-1]
    assert found.notes[-1].endswith("resize squash (the file)")
    differences = [note for note in found.notes if note.startswith("crop 1 instead of 0.95, as /")]
    assert len(differences) == (crop == {"crop_pct": 0.95})
    given = ImageSettings(resize="crop")
    other = starting_version(tmp_path / "a.safetensors", SMALL, **START, settings=given)
    share = crop.get("crop_pct", 1.0)
    assert other.version.record.preparation == Preparation(32, crop=share).describe()
    assert other.notes[-2].startswith("resize crop instead of squash, as /")


def test_a_resize_that_is_unknown_here_is_refused_until_one_is_given(tmp_path):
    backbone_alone(tmp_path / "a.safetensors")
    config = {"input_size": [3, 32, 32], "mean": [0.4] * 3, "std": [0.2] * 3, "crop_mode": "border"}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": config}))
    with pytest.raises(
        UserError, match=r"resized by 'border', .*: give resize=crop .* or resize=s"
    ):
        starting_version(tmp_path / "a.safetensors", SMALL, **START)
    given = ImageSettings(resize="squash")
    found = starting_version(tmp_path / "a.safetensors", SMALL, **START, settings=given)
    assert found.version.record.preparation["resize"] == "squash"
    assert found.notes[-2].startswith("resize squash instead of border, as /")


def test_a_version_is_not_started_from_images_that_nobody_knows(tmp_path):
    backbone_alone(tmp_path / "a.safetensors")
    for settings, missing in (
        (None, "size, mean and std"),
        (ImageSettings(mean=(0.5,) * 3), "size and std"),
        (ImageSettings(32, (0.5,) * 3), "std"),
    ):
        with pytest.raises(UserError, match=f"give {missing}, for weights of ImageNet") as caught:
            starting_version(tmp_path / "a.safetensors", SMALL, **START, settings=settings)
        assert caught.value.argument == missing.split(",")[0].split(" ")[0]


def test_an_exported_version_starts_with_its_own_projection(tmp_path):
    variables = random_variables(network())
    write(tmp_path / "a.safetensors", variables)
    version, fresh, _ = starting_version(tmp_path / "a.safetensors", SMALL, **START, settings=HALF)
    assert_same_bits(version.variables, variables)
    assert fresh == version.record.fresh == ()
    with pytest.raises(UserError, match="give the num_prototypes of the file"):
        starting_version(
            tmp_path / "a.safetensors", SMALL, **{**START, "num_prototypes": 12}, settings=HALF
        )


def test_a_learnable_head_is_started_too(tmp_path):
    backbone_alone(tmp_path / "a.safetensors")
    start = starting_version_of(tmp_path / "a.safetensors", run("er"), settings=HALF)
    assert start.fresh == ("head",) and start.version.record.feature_size == 16


def test_a_vit_is_made_for_the_size_of_the_images():
    assert sized("vit_ti16", HALF).arguments == {"image_size": 32}
    assert image_size_of(Backbone("vit_ti16", {"image_size": 64})) == ImageSettings(64)
    assert image_size_of(SMALL) == ImageSettings()
    given = Backbone("vit_ti16", {"image_size": 64, "patch": 8})
    assert sized(given, HALF) == given
    assert sized("resnet18", HALF).arguments == {}
    assert sized(tiny.OneConv(), HALF).module is not None


# --- several models in one chain


def append(path, chain, run):
    weights = torch_files.load(path)
    return chains.import_file(weights, chain, run, image_shape=SHAPE, append=True)


def test_a_file_is_appended_to_a_chain_once(tmp_path):
    chain, first, second = Chain(tmp_path / "chain"), tmp_path / "a.safetensors", tmp_path / "b.pt"
    write(first, random_variables(network()))
    with pytest.raises(UserError, match="no chain at"):
        append(first, chain, run())
    import_file(first, chain, run())
    wide = Backbone("resnet_small", {"width": 6})
    second = tmp_path / "b.safetensors"
    write(second, random_variables(network(width=6), 1))
    for _ in range(2):
        assert append(second, chain, run(backbone=wide)).number == 1
    assert chain.numbers() == [0, 1]
    assert [chain.record(n).backbone_arguments["width"] for n in (0, 1)] == [4, 6]
    with pytest.raises(UserError, match=r"there is a chain in .* already, with version 1"):
        import_file(first, chain, run())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_prototypes": 12}, "num_prototypes is 12 for the file and 10 in"),
        ({"label_order": "ascending"}, "label_order is ascending for the file and descending in"),
        ({"method": "er"}, "feature_size is 16 for the file and 9 in"),
    ],
)
def test_a_file_on_another_simplex_is_not_appended(tmp_path, fields, message):
    chain = Chain(tmp_path / "chain")
    write(tmp_path / "a.safetensors", random_variables(network()))
    import_file(tmp_path / "a.safetensors", chain, run())
    backbone_alone(tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=message):
        append(tmp_path / "b.safetensors", chain, run(**fields))
    assert chain.numbers() == [0]


# --- the same call again


def test_an_import_that_was_killed_goes_on(folder, tmp_path, monkeypatch):
    whole, killed = Chain(tmp_path / "whole"), Chain(tmp_path / "killed")
    import_folder(folder, whole, run())
    add, added = Chain.add, []

    def add_one(chain, *arguments, **keywords):
        if added:
            raise KeyboardInterrupt
        added.append(add(chain, *arguments, **keywords))

    with monkeypatch.context() as patch:
        patch.setattr(Chain, "add", add_one)
        with pytest.raises(KeyboardInterrupt):
            import_folder(folder, killed, run())
    with pytest.raises(UserError, match=r"lacks .*0\.\.1.* of its versions 0\.\.2"):
        killed.require_whole()
    import_folder(folder, killed, run())
    assert killed.numbers() == whole.numbers()
    assert [v.sha256 for v in killed] == [v.sha256 for v in whole]
    assert [v.record for v in killed] == [v.record for v in whole]


def test_the_same_import_again_changes_nothing_and_another_is_refused(folder, tmp_path):
    chain, other = Chain(tmp_path / "chain"), Chain(tmp_path / "other")
    import_folder(folder, chain, run())
    times = [p.stat().st_mtime_ns for p in sorted((tmp_path / "chain").rglob("*"))]
    import_folder(folder, chain, run())
    assert times == [p.stat().st_mtime_ns for p in sorted((tmp_path / "chain").rglob("*"))]
    with pytest.raises(UserError, match=r"version 0 is another than .* \(other: mean and config\)"):
        import_folder(folder, chain, run(preprocess=Preprocess((0.4,) * 3, (0.2,) * 3)))
    write(folder / "ckpt_1.safetensors", random_variables(network(), 7))
    with pytest.raises(UserError, match=r"version 1 is another than .* \(other: the file\)"):
        import_folder(folder, chain, run())
    (folder / "ckpt_2.safetensors").unlink()
    with pytest.raises(UserError, match=r"a chain in .* already, with version 2"):
        import_folder(folder, chain, run())
    first = folder / "ckpt_0.safetensors"
    import_file(first, other, run())
    assert import_file(first, other, run()) == () and len(other) == 1
    with pytest.raises(UserError, match=r"version 0 is another than .* the file's name"):
        import_file(folder / "ckpt_1.safetensors", other, run())


def test_how_the_pictures_of_a_folder_are_prepared_is_recorded(folder, tmp_path):
    """A chain of an earlier release, which does not say, stays as it is."""
    for other in (1, 2):
        (folder / f"ckpt_{other}.safetensors").unlink()
    cut = Preparation(32, "crop", "bilinear", 0.8).describe()
    chain, earlier = Chain(tmp_path / "chain"), Chain(tmp_path / "earlier")
    import_folder(folder, chain, run(), preparation=cut)
    assert [chain.record(n).preparation for n in chain.numbers()] == [cut]
    with pytest.raises(UserError, match=r"version 0 is another than .* \(other: preparation\)"):
        import_folder(folder, chain, run(), preparation={**cut, "crop": 0.9})
    import_folder(folder, earlier, run())
    import_folder(folder, earlier, run(), preparation=cut)
    assert not earlier.record(0).preparation


def test_a_model_of_another_normalisation_does_not_replace_one(tmp_path):
    sequence = tiny.run().tasks.sequence(tiny.CLASSES)
    shape = (tiny.SIZE, tiny.SIZE, 3)
    check_replacements(tiny.run(), sequence, {0: tiny.version()}, shape)
    for other in ({"mean": (0.485, 0.456, 0.406)}, {"std": (0.3, 0.3, 0.31)}):
        with pytest.raises(UserError, match=r"was trained with mean .* the run has mean") as caught:
            check_replacements(tiny.run(), sequence, {0: tiny.version(**other)}, shape)
        assert caught.value.argument == "pretrained"


# --- the true remedy


def alone(backbone, size=32, **arguments):
    """The state dict of a backbone without projection and head, as torchvision and timm have it."""
    embedder = network(backbone, projection=None, **arguments)
    state = to_torch(random_variables(embedder, size=size))
    return renamed(state, lambda n: n.removeprefix("backbone."))


@pytest.mark.parametrize(
    "backbone", ["resnet50", "resnet18d", "senet18", "regnet_y_400mf", "resnet32_cifar"]
)
def test_the_backbone_that_fits_is_named(backbone):
    fit = rf"^100% of its tensors are those of the backbone {backbone}, \d+% those of resnet18"
    with pytest.raises(UserError, match=fit) as caught:
        chains.adopt(alone(backbone), run(backbone="resnet18"), SHAPE)
    assert caught.value.argument == "backbone"


def test_the_remedy_fits_the_fault():
    def refused(message, state, argument=None, shape=SHAPE, **fields):
        with pytest.raises(UserError, match=message) as caught:
            chains.adopt(state, run(**fields), shape)
        assert caught.value.argument == argument

    vit = alone("vit_ti16") | {"pos_embed": np.zeros((1, 5, 192), np.float32)}
    vit["patch_embed.proj.weight"] = np.zeros((192, 3, 16, 16), np.float32)
    small = {"image_size": 32, "patch": 16}
    fit = r"100% of its tensors are those of the backbone vit_ti16 \(image_size=32\)"
    refused(fit, vit, "backbone", backbone=Backbone("vit_s16", small))
    wide = Backbone("resnet_small", {"width": 8})
    refused("its names are those of resnet_small, its shapes are not", STATE, backbone=wide)
    few = {name: a for name, a in STATE.items() if name != "fc2.weight"}
    refused("made with num_prototypes=10: give", few, "num_prototypes", num_prototypes=12)
    refused(r"num_prototypes=12 has \(12, 11\)", STATE, "num_prototypes", num_prototypes=12)
    part = {n: a for n, a in STATE.items() if not n.startswith("backbone.bn1.")}
    refused("the file is incomplete: save the whole", part)
    refused("its backbone fits: give the method", few, method="er")
    registers = {
        **alone("dinov2_s14", size=28),
        "register_tokens": np.zeros((1, 4, 384), np.float32),
    }
    dinov2 = Backbone("dinov2_s14", {"image_size": 28})
    refused(
        "give the backbone registers=4",
        registers,
        "backbone_arguments",
        (28, 28, 3),
        backbone=dinov2,
    )
    refused("no registered backbone has its names", {"w": np.zeros(2, np.float32)})


# --- export


def test_a_version_is_exported_with_its_image_settings(folder, tmp_path):
    chain = Chain(tmp_path / "chain")
    import_folder(folder, chain, run())
    last = to_torch(random_variables(network(), 2))
    written = chains.export_version(chain, -1, tmp_path / "new" / "b.safetensors")
    assert_same_bits(written, last)
    back = torch_files.load(tmp_path / "new" / "b.safetensors")
    assert_same_bits(back.tensors, last)
    assert (back.images.size, back.images.mean, back.images.std) == (32, (0.5,) * 3, (0.2,) * 3)


@pytest.mark.parametrize(
    "prepared",
    [
        Preparation(32),
        Preparation(32, "crop", "bilinear", 0.8),
        Preparation(32, "squash"),
        Preparation(32, "squash", "box", 0.8),
    ],
)
def test_an_exported_version_embeds_pictures_as_before(tmp_path, prepared):
    chain, out = Chain(tmp_path / "chain"), tmp_path / "b.safetensors"
    write(tmp_path / "a.safetensors", init_variables(network(), jax.random.key(0), SHAPE))
    weights = torch_files.load(tmp_path / "a.safetensors")
    described = prepared.describe()
    chains.import_file(weights, chain, run(), image_shape=SHAPE, preparation=described)
    chains.export_version(chain, 0, out)
    version = starting_version(out, SMALL, **START).version
    wide = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    np.testing.assert_array_equal(version.embed([wide]), chain[0].embed([wide]))
    cropped = 1.0 if prepared.resize == "squash" else prepared.crop
    assert version.record.preparation == {**described, "crop": cropped}
    timm = {"crop": "center", "squash": "squash"}[prepared.resize]
    with out.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    written = json.loads(header["__metadata__"]["pretrained_cfg"])
    assert (written["crop_mode"], written["crop_pct"]) == (timm, cropped)


def test_a_full_disk_leaves_the_good_file(folder, tmp_path, monkeypatch):
    chain, out = Chain(tmp_path / "chain"), tmp_path / "good.safetensors"
    import_file(folder / "ckpt_0.safetensors", chain, run())
    chains.export_version(chain, 0, out)
    good, write_bytes = out.read_bytes(), torch_files.write_bytes

    def full(path, content):
        if not content:  # before the work, the disk has room
            return write_bytes(path, content)
        (path.parent / f".{path.name}.part").write_bytes(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch_files, "write_bytes", full)
    with pytest.raises(UserError, match=r"cannot write .*good.* \(No space left on device\)"):
        chains.export_version(chain, 0, out)
    assert out.read_bytes() == good


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("/proc/b.safetensors", "cannot write to /proc"),
        ("/dev/null/b.safetensors", "cannot write to /dev/null"),
        ("gss://bucket/b.safetensors", "unknown kind of address 'gss://'"),
        ("{tmp}", "is no regular file"),
        ("{tmp}/fifo.safetensors", "is no regular file"),
        ("", "cannot be empty"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_chain_is_opened(
    tmp_path, out, message
):
    os.mkfifo(tmp_path / "fifo.safetensors")
    with pytest.raises(UserError, match=message):
        out = f"{tmp_path}.safetensors" if out == "{tmp}" else out.format(tmp=tmp_path)
        os.makedirs(out, exist_ok=True) if out == f"{tmp_path}.safetensors" else None
        chains.export_version(Chain(tmp_path / "no_chain"), 0, out)


def test_a_home_folder_is_expanded(folder, tmp_path, monkeypatch):
    chain = Chain(tmp_path / "chain")
    import_file(folder / "ckpt_0.safetensors", chain, run())
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    chains.export_version(chain, 0, "~/b.safetensors")
    assert (tmp_path / "home" / "b.safetensors").is_file() and not (tmp_path / "~").exists()
    assert torch_files.read("~/b.safetensors").keys() == STATE.keys()


IN_A_BUCKET = """
import sys
import fsspec
from fsspec.implementations.memory import MemoryFileSystem
from compat_jax.chain import Chain
from compat_jax.interop import chains, torch_files

for name in ("gs", "gcs"):
    fsspec.register_implementation(name, MemoryFileSystem, clobber=True)
written = chains.export_version(Chain(sys.argv[1]), 0, "gs://bucket/folder/b.safetensors")
found = torch_files.load("gs://bucket/folder/b.safetensors")
assert all((found.tensors[name] == written[name]).all() for name in written)
assert [*MemoryFileSystem.store] == ["gs://bucket/folder/b.safetensors"]
"""


def test_a_version_is_exported_to_a_bucket_and_read_there(folder, tmp_path):
    pytest.importorskip("gcsfs", reason="gcsfs is not installed: pip install gcsfs")
    chain = Chain(tmp_path / "chain")
    import_file(folder / "ckpt_0.safetensors", chain, run())
    command = [sys.executable, "-c", IN_A_BUCKET, chain.path]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment["STORAGE_EMULATOR_HOST"] = "http://localhost:1"  # nothing is asked for credentials
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "gs:").exists()


# --- the programs

NETWORK = ["--backbone=resnet_small", "--backbone_arguments=width=4", "--num_prototypes=10"]
IMAGES = ["--size=32", "--mean=0.5,0.4,0.3", "--std=0.2,0.2,0.2"]
CUT = ["--crop=0.8", "--filter=bilinear"]
CONFIG = ["--config=configs/iamcl2r.py:tasks=7"]
REFUSED = [
    ([], "give size, mean and std, for weights of ImageNet mostly mean 0.485,0.456,0.406"),
    (["--size=32", "--mean=0.5,0.5,0.5"], "give std, for weights"),
    (["--size=32", "--mean=123,116,103", "--std=58,57,57"], "mean must lie in 0..1"),
    (["--size=32", "--mean=a,b,c", "--std=1,1,1"], "mean needs numbers like"),
    ([*IMAGES, "--size=100000"], "size must be a whole number from 1 to 8192"),
    ([*IMAGES, "--method=hoq"], "unknown method 'hoq'. Did you mean 'hoc'?"),
    ([*IMAGES, "--backbone_arguments=width=x"], "backbone_arguments needs key=number"),
    ([*IMAGES, "--ema"], "holds no averaged (EMA) weights by name: leave ema out (flag --ema)"),
    ([*IMAGES, "--num_prototypes=12"], "give the num_prototypes of the file"),
    ([*IMAGES, "--out=/proc/x"], "cannot write to /proc/x"),
    ([*IMAGES, "--weights=/nowhere"], "no weight file at /nowhere"),
]
# Runs each command in a child of a process that has imported what it needs, but started nothing.
PROGRAMS = """
import json, os, runpy, sys, tempfile, traceback, warnings
import compat_jax.config, compat_jax.experiment, compat_jax.interop.chains, compat_jax.report
import launch._cli
warnings.simplefilter("ignore", DeprecationWarning)  # of the fork: JAX has not started any thread yet
ended = []
for program, *flags in json.loads(sys.stdin.read()):
    streams = [tempfile.TemporaryFile() for _ in "oe"]
    child = os.fork()
    if not child:
        for number, stream in enumerate(streams, 1):
            os.dup2(stream.fileno(), number)
        sys.argv = [program, *flags]
        code = 0
        try:
            runpy.run_module(f"launch.{program}", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 99
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)  # to take the interpreter down would take longer than the program
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = [os.pread(s.fileno(), os.fstat(s.fileno()).st_size, 0).decode() for s in streams]
    ended.append([code, *said])
print(json.dumps(ended))
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A folder of three checkpoints, and how each program ended on it: code, output, complaint."""
    here = tmp_path_factory.mktemp("programs")
    for task in range(3):
        write(here / "files" / f"ckpt_{task}.safetensors", random_variables(network(), task))
    one = ["import_torch", f"--weights={here / 'files' / 'ckpt_1.safetensors'}", *NETWORK]
    second = ["import_torch", f"--weights={here / 'files' / 'ckpt_2.safetensors'}", *NETWORK]
    every = ["import_torch", f"--weights={here / 'files'}", *NETWORK, *CONFIG]
    out = here / "b.safetensors"
    commands = {
        "import": [*one, f"--out={here / 'chain'}", *IMAGES, "--resize=squash"],
        "export": ["export_torch", f"--chain={here / 'chain'}", f"--out={out}"],
        # The exported file says what its images are.
        "again": ["import_torch", f"--weights={out}", f"--out={here / 'again'}", *NETWORK],
        "append": [*second, f"--out={here / 'chain'}", *IMAGES, "--append"],
        "differs": [
            "import_torch",
            f"--weights={out}",
            f"--out={here / 'differs'}",
            *NETWORK,
            *CONFIG,
        ],
        "folder": [*every, f"--out={here / 'folder'}"],
        "flags": [*every, f"--out={here / 'flags'}", *IMAGES, *CUT, "--method=sce"],
        **{f"refused {n}": [*one, f"--out={here / 'no'}", *f] for n, (f, _) in enumerate(REFUSED)},
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAMS],
        input=json.dumps(list(commands.values())),
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    return here, dict(zip(commands, json.loads(done.stdout), strict=True))


def test_the_programs_import_and_export(programs):
    here, ended = programs
    for name in ("import", "export", "again"):
        code, said, complaint = ended[name]
        assert code == 0, complaint
        assert ("1 model in" in said) == (name != "export")
    told = "images: size 32 (the flags), mean 0.5,0.4,0.3 (the flags), std 0.2,0.2,0.2 (the flags)"
    assert told in ended["import"][1]
    assert "images: size 32 (the file), mean 0.5,0.4,0.3 (the file)" in ended["again"][1]
    for name, whose in (("import", "flags"), ("again", "file")):
        assert f"resize squash (the {whose})\n" in ended[name][1]
    records = [Chain(here / name).record(0) for name in ("chain", "again")]
    assert [r.preparation for r in records] == [Preparation(32, "squash").describe()] * 2
    file = here / "files" / "ckpt_1.safetensors"
    assert_same_bits(torch_files.read(here / "b.safetensors"), torch_files.read(file))
    assert Chain(here / "again").record(0).mean == (0.5, 0.4, 0.3)
    assert Chain(here / "again").open(0).sha256 == Chain(here / "chain").open(0).sha256


def test_a_configuration_that_differs_from_the_file_is_noted(programs):
    _, ended = programs
    code, said, complaint = ended["differs"]
    assert code == 0, complaint
    assert "note: mean 0.5071,0.4867,0.4408 instead of 0.5,0.4,0.3, as " in said
    assert "mean 0.5071,0.4867,0.4408 (the configuration)" in said


def test_two_imported_models_stand_in_one_chain(programs):
    here, ended = programs
    code, said, complaint = ended["append"]
    assert code == 0 and "version 1 in" in said, complaint
    records = [Chain(here / "chain").record(n) for n in (0, 1)]
    assert [r.replaced_by for r in records] == [
        f"imported from ckpt_{n}.safetensors" for n in (1, 2)
    ]
    assert all(r.preparation["size"] == 32 for r in records)


def test_the_program_takes_the_images_of_a_configuration_and_flags_over_it(programs):
    here, ended = programs
    for name in ("folder", "flags"):
        code, said, complaint = ended[name]
        assert code == 0 and "3 versions in" in said, complaint
        whose = "the configuration" if name == "folder" else "the flags"
        assert f"({whose}), std " in said
    a, b = (Chain(here / name).record(2) for name in ("folder", "flags"))
    assert (a.method, a.mean, a.classes_seen) == ("hoc", (0.5071, 0.4867, 0.4408), 40)
    assert (b.method, b.mean, b.config["data"]["query"]["size"]) == ("sce", (0.5, 0.4, 0.3), 32)
    assert a.replaced_by and a.config["num_prototypes"] == 10
    prepared = [(r.preparation["size"], r.preparation["crop"]) for r in (a, b)]
    assert prepared == [(32, 1.0), (32, 0.8)] and b.preparation["filter"] == "bilinear"


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_the_program_refuses_in_one_line(programs, number):
    here, ended = programs
    code, _, complaint = ended[f"refused {number}"]
    assert code == 2 and REFUSED[number][1] in complaint, complaint
    assert complaint.count("\n") == 1
    assert not Chain(here / "no").numbers()
