"""configs/photos.py: folders, weight files and starts by configuration, and by command."""

import importlib
import json

import drawn_photos
import numpy as np
import programs
import pytest
import tiny

from compat_jax import config as configs
from compat_jax import experiment
from compat_jax.chain import Chain
from compat_jax.data.ledger import LEDGER, Ledger
from compat_jax.errors import UserError
from compat_jax.interop.chains import export_version


def photos_config(folder, **overrides):
    """The shipped configuration, shrunken; keywords with __ for dots are overrides."""
    made = importlib.import_module("configs.photos").get_config(f"path={folder},size=8")
    made.update_from_flattened_dict(
        {
            "backbone.name": "one_conv",
            "num_prototypes": tiny.K,
            "epochs": 1,
            "batch_size": 8,
            "mesh": "data:1",
            **{k.replace("__", "."): v for k, v in overrides.items()},
        }
    )
    return made


def train(config, workdir, **more):
    """Train by configuration."""
    return experiment.train(config, workdir, tiny.session_of(config, progress=False), **more)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Photos, and a chain of one version."""
    root = tmp_path_factory.mktemp("shop")
    drawn_photos.draw(root / "photos", ["melon", "pear"], 10)
    done = train(photos_config(root / "photos"), root / "work")
    assert done.version == 0
    return root


def test_a_record_says_how_pictures_were_prepared_and_normalised(shop):
    record = Chain(shop / "work" / "chain").record(0)
    assert record.preparation["resize"] == "crop" and record.preparation["size"] == 8
    assert "upright by EXIF" in record.preparation["rules"]
    assert record.mean == (0.485, 0.456, 0.406)  # ImageNet's, where nothing says otherwise
    assert record.config["data"]["photos"]["path"] == str(shop / "photos")


def test_a_chain_evaluates_by_itself(shop):
    chain = Chain(shop / "work" / "chain")
    result = experiment.evaluate(chain, session=tiny.session(progress=False))
    assert result.main.matrix.shape == (1, 1) and "Closed set" in str(result)


def test_weights_put_a_backbone_onto_the_simplex(shop, tmp_path, capfd):
    pytest.importorskip("safetensors")
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "backbone.safetensors"
    export_version(Chain(shop / "work" / "chain"), 0, path)
    bare = {k: v for k, v in load_file(path).items() if not k.startswith(("fc1", "fc2"))}
    save_file(bare, path)  # a backbone alone, which says nothing about its pictures
    config = photos_config(shop / "photos", weights=str(path), adopt__epochs=2)
    with pytest.raises(UserError, match=r"does not say what images .*give mean and std") as caught:
        train(config, tmp_path / "work")
    assert caught.value.argument == "data.mean"
    config = photos_config(
        shop / "photos",
        weights=str(path),
        data__mean=(0.5,) * 3,
        data__std=(0.25,) * 3,
        adopt__freeze_backbone=1,
        adopt__lr=0.5,
    )
    done = train(config, tmp_path / "work")
    assert done.version == 0 and "size 8" in capfd.readouterr().err
    version = done.chain[0]
    assert version.record.method == "sce" and version.record.mean == (0.5,) * 3
    assert version.record.replaced_by == "imported from backbone.safetensors"
    # One epoch with a frozen backbone: its weights have the bits of the file, the projection moved.
    kernel = version.variables["params"]["backbone"]["conv1"]["kernel"]
    np.testing.assert_array_equal(kernel.transpose(3, 2, 0, 1), bare["backbone.conv1.weight"])
    assert train(config, tmp_path / "work").version is None  # the same file again is nothing new


def test_a_run_starts_from_any_version_of_any_chain(shop, tmp_path):
    drawn_photos.draw(tmp_path / "more", ["banana", "pear"], 10)
    start = f"{shop / 'work' / 'chain'}:-1"
    done = train(photos_config(tmp_path / "more", start=start), tmp_path / "work")
    assert done.chain.record(0).class_names == ("melon", "pear", "banana")
    config = tiny.config(
        overrides={**tiny.TRAIN, "backbone.arguments": {}}, start=start, backbone__name="one_conv"
    )
    record = done.chain.record(0)
    config.data.mean, config.data.std = record.mean, record.std
    with pytest.raises(
        UserError, match=r"prototype number 0 is 'melon' in the version that task 0"
    ):
        train(config, tmp_path / "sequence")


def test_a_run_that_starts_from_another_keeps_the_parts_of_its_photos(shop, tmp_path):
    start, before = f"{shop / 'work' / 'chain'}:0", Ledger.read(shop / "work" / LEDGER)
    config = photos_config(shop / "photos", start=start)
    assert train(config, tmp_path / "work").version is None  # all of it was learnt already
    after = Ledger.read(tmp_path / "work" / LEDGER)
    assert {d: row.part for d, row in after.rows.items()} == {
        d: row.part for d, row in before.rows.items()
    }


@pytest.mark.parametrize(
    ("overrides", "argument", "message"),
    [
        ({"start": "runs/chain"}, "start", "start is CHAIN:NUMBER"),
        ({"start": "runs/chain:1", "weights": "a.pt"}, "start", "both given"),
        ({"weights": "/nowhere.pt"}, None, "nowhere"),
        ({"data__photos__path": ""}, "data.photos.path", r"data\.photos\.path is missing"),
        ({"data__photos__path": "/nowhere"}, "data.photos.path", "no folder /nowhere"),
        ({"data__photos__aliases": "a"}, "data.photos.aliases", "aliases are written new=old"),
        ({"data__photos__splits__query": 0.9}, "data.photos.splits.validation", "nothing is left"),
        ({"data__photos__size": 0}, "data.photos.size", "size must be at least 1"),
        ({"optim__warmup": 1.0}, "optim.warmup", "warmup must be below the 1 epochs"),
        ({"keep": "best"}, "keep", "keep must be one of|unknown keep"),
        ({"adopt__lr": -1.0}, "adopt.lr", "lr must be above 0"),
    ],
)
def test_an_impossible_configuration_names_its_field(shop, tmp_path, overrides, argument, message):
    config = photos_config(shop / "photos", **overrides)
    with pytest.raises(UserError, match=message) as caught:
        train(config, tmp_path / "work")
    if argument:
        assert caught.value.argument == argument
    assert not (tmp_path / "work" / "chain").exists()


def test_a_misspelt_field_of_the_photos_is_named(shop):
    config = photos_config(shop / "photos")
    with config.unlocked():
        config.data.photos.sice = 9
    with pytest.raises(UserError, match=r"'sice'\. Did you mean 'size'\?"):
        configs.photos_of(config)


def test_the_command_trains_what_is_new_and_says_what_comes_next(tmp_path):
    drawn_photos.draw(tmp_path / "photos", ["melon", "pear"], 8)
    flags = tiny.flags({"backbone.name": "flat", "epochs": 1, "batch_size": 8, "mesh": "data:1"})
    config = f"--config=configs/photos.py:path={tmp_path / 'photos'},size=8"
    call = ("train", config, f"--workdir={tmp_path / 'work'}", *flags, "--noprogress")
    code, out, err = programs.call(*call, flat=True)
    assert code == 0, err
    assert "2 of them new (melon, pear); K = 1,024, 2 in use (room for 1,022 more)" in out
    assert (
        out.splitlines()[-1] == f"  python -m launch.evaluate --chain={tmp_path / 'work' / 'chain'}"
    )
    drawn_photos.draw(tmp_path / "photos", ["apple"], 2)
    (tmp_path / "photos" / "apple" / "bad.jpg").write_bytes(b"bad")
    code, out, err = programs.call(*call, flat=True)
    assert code == 2 and "bad.jpg is not a picture" in err and err.count("\n") == 1
    assert json.loads((tmp_path / "work" / "run.json").read_text())["num_prototypes"] == 1024
