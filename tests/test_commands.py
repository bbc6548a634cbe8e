"""Bad input: one line, the remedy, exit code 2, and nothing written."""

import json

import numpy as np
import pytest
import tiny
from PIL import Image

from compat_jax.chain import Chain
from compat_jax.errors import UserError
from launch import runs
from launch.quickstart import configurations


def never():
    return False


def refused(work, message, workdir):
    """`work` raises a UserError of one line and leaves nothing behind."""
    with pytest.raises(UserError, match=message) as caught:
        work()
    assert "\n" not in str(caught.value)
    assert not workdir.exists()


def train_refuses(tmp_path, message, **overrides):
    config = tiny.config(**overrides)
    workdir = tmp_path / "run"
    refused(lambda: runs.train(config, workdir, never, bar=False), message, workdir)


def pretrain_refuses(tmp_path, message, **overrides):
    config = tiny.config("pretrain", "data=glyphs", tiny.PRETRAIN, **overrides)
    workdir = tmp_path / "models"
    refused(lambda: runs.pretrain(config, workdir, never, bar=False), message, workdir)


@pytest.fixture
def folder(tmp_path):
    """Class folders a and b with two pictures each."""
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(2):
            image = Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8))
            image.save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


def from_folder(path):
    """The same configuration with tasks from class folders."""
    config = tiny.config()
    config.data.train = {"source": "folder", "path": str(path), "size": 8}
    return config


def small_net(**changes):
    return tiny.record(backbone="resnet_small", backbone_arguments={"width": 4}, **changes)


def models(path, count=1, **changes):
    """A chain of models to replace with, that were never trained."""
    described = small_net(**{"method": "sce", "task": None, "class_names": ("a",), **changes})
    for number in range(count):
        Chain(path).add(tiny.variables(described, number), described)
    return {"pretrained": str(path)}


# A configuration's values


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"method": "hcc"}, r"unknown method 'hcc'\. Did you mean 'hoc'\? Valid: er, fd, hoc, sce"),
        (
            {"backbone__name": "resnet_smal"},
            r"unknown backbone 'resnet_smal'\. Did you mean 'resnet_small'\? Valid: .*vit_ti16",
        ),
        (
            {"backbone__arguments": {"widht": 4}},
            r"unknown argument of backbone 'resnet_small' 'widht'\. Did you mean 'width'\?",
        ),
        ({"num_prototypes": 5}, "num_prototypes 5 is too small for 6 classes: use at least"),
        ({"num_prototypes": 1}, "num_prototypes 1 is too small for 2 classes"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"seed": -1}, "seed must lie in 0"),
        ({"dtype": "float16"}, "unknown dtype 'float16'"),
        ({"label_order": "up"}, "unknown label_order 'up'"),
        ({"mesh": "date:2"}, r"unknown mesh axis 'date'\. Did you mean 'data'\?"),
        ({"mesh": "data:9"}, "mesh 'data:9' needs 9 devices, there are 8"),
        ({"mesh": "data:3"}, "batch_size 8 does not divide over 3 devices .*: use 6 or 9"),
        ({"optim__lr": 0.0}, "optim.lr must be positive, got 0.0"),
        ({"optim__decay": "packages"}, r"unknown optim\.decay 'packages'\. Did you mean 'package'"),
        ({"loss__same_class": "excluded"}, r"unknown loss\.same_class .* Did you mean 'exclude'"),
        ({"data__crop_padding": -1}, "data.crop_padding must not be negative"),
        ({"data__std": (0.1, 0.1, 0.0)}, "data.mean and data.std need one number a channel"),
        ({"tasks__initial": 7}, r"tasks.initial must lie in 1\.\.6 \(the classes of the data\)"),
        ({"tasks__initial": 0}, r"tasks.initial must lie in 1\.\.6"),
        ({"tasks__increment": 0}, "tasks.increment must be at least 1, got 0"),
        ({"tasks__rehearsal": -1}, "tasks.rehearsal must not be negative"),
        ({"data__train__source": "glyph"}, r"unknown data source 'glyph'\. Did you mean 'glyphs'"),
        ({"data__train__look": "foto"}, r"unknown look 'foto'\. Did you mean 'photo'"),
        ({"data__train__classes": (0, 9999)}, "class .* asked for, but there are .* glyph classes"),
        (
            {"data__query__classes": (5, 8), "data__gallery__classes": (5, 8)},
            r"tasks and query share 1 classes \(.\): choose other",
        ),
        ({"data__query__size": 12}, r"8, 8, 3"),
        ({"data__query__classes": (7, 10)}, "data.query and data.gallery have different classes"),
    ],
)
def test_train_refuses_a_value(tmp_path, overrides, message):
    train_refuses(tmp_path, message, **overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"pretrain_classes": ()}, "pretrain_classes needs numbers of classes"),
        ({"pretrain_classes": (1, 4)}, r"pretrain_classes needs .* at least 2, got \(1, 4\)"),
        ({"pretrain_classes": (2, 5)}, r"pretrain_classes is \(2, 5\), but the data has 4 classes"),
        (
            {"pretrain_classes": (2, 4), "num_prototypes": 3},
            "num_prototypes 3 is too small for 4 classes",
        ),
        ({"backbone__name": "vgg"}, "unknown backbone 'vgg'"),
    ],
)
def test_pretrain_refuses_a_value(tmp_path, overrides, message):
    pretrain_refuses(tmp_path, message, **overrides)


# Models to replace with


def test_replacements_need_models(tmp_path):
    train_refuses(
        tmp_path,
        r"tasks.replace_at=\(0, 2\) needs pre-trained models: make them with launch.pretrain",
        tasks__replace_at=(0, 2),
    )
    train_refuses(
        tmp_path,
        "no chain at .*/nowhere: launch.train writes one",
        tasks__replace_at=(0, 2),
        pretrained=str(tmp_path / "nowhere"),
    )
    train_refuses(
        tmp_path,
        r"2 replacements \(tasks \(0, 2\)\), but .* has 1 models: pre-train more or shorten",
        tasks__replace_at=(0, 2),
        **models(tmp_path / "one"),
    )


def test_replacements_must_fit(tmp_path):
    one = models(tmp_path / "one")
    train_refuses(
        tmp_path,
        r"replacement at task 3, but the sequence has tasks 0\.\.2: change tasks.replace_at",
        tasks__replace_at=(3,),
        **one,
    )
    train_refuses(tmp_path, "replacement at task -1", tasks__replace_at=(-1,), **one)
    train_refuses(tmp_path, "tasks.replace_at names task 1 twice", tasks__replace_at=(1, 1), **one)
    train_refuses(
        tmp_path,
        "pre-trained with a fixed simplex, but method 'er' has a learnable head: .*method=er",
        tasks__replace_at=(0,),
        method="er",
        **one,
    )
    train_refuses(
        tmp_path,
        "the model for task 0 has num_prototypes=16, the run 32: all versions share one simplex",
        tasks__replace_at=(0,),
        num_prototypes=32,
        **one,
    )
    train_refuses(
        tmp_path,
        r"the model for task 0 takes images of \(16, 16, 3\), the tasks have \(8, 8, 3\)",
        tasks__replace_at=(0,),
        **models(tmp_path / "large", image_shape=(16, 16, 3)),
    )


def test_a_model_may_not_have_seen_the_classes_of_retrieval(tmp_path):
    from compat_jax.data.glyphs import class_names

    train_refuses(
        tmp_path,
        "pre-trained model 0 and query share 1 classes .*or set data.pretraining_may_share=True",
        tasks__replace_at=(0,),
        **models(tmp_path / "models", class_names=(class_names()[6],)),
    )


def test_a_corrupt_model_is_named(tmp_path):
    chosen = models(tmp_path / "models")
    (tmp_path / "models" / "0000" / "record.json").write_text("{")
    train_refuses(
        tmp_path, "version 0 of .*models cannot be used", tasks__replace_at=(0,), **chosen
    )


# Data


def data_refused(tmp_path, path, message):
    config, workdir = from_folder(path), tmp_path / "run"
    refused(lambda: runs.train(config, workdir, never, bar=False), message, workdir)


def test_folders_are_checked(tmp_path, folder):
    data_refused(tmp_path, tmp_path / "none", "no folder .*none: data.*.path must hold one")
    (tmp_path / "flat").mkdir()
    data_refused(tmp_path, tmp_path / "flat", "flat has no sub-folder")
    (folder / "c").mkdir()
    data_refused(tmp_path, folder, "class folder .*pictures/c is empty: add pictures or remove it")
    (folder / "c" / "0.png").write_text("not a picture")
    data_refused(tmp_path, folder, r"pictures/c/0\.png is not a picture: remove it or repair it")


def test_missing_tfds_data_comes_with_the_line_that_prepares_it(tmp_path):
    config = tiny.config()
    config.data.train = {"source": "tfds", "name": "cifar100", "data_dir": str(tmp_path / "tfds")}
    with pytest.raises(UserError, match="cifar100 is not prepared in") as caught:
        runs.train(config, tmp_path / "run", never, bar=False)
    assert "download_and_prepare(" in str(caught.value)
    assert not (tmp_path / "run").exists() and not (tmp_path / "tfds").exists()


# Workdirs and chains


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"cannot write to {workdir}: "):
            runs.train(tiny.config(), workdir, never, bar=False)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_workdir_with_a_chain_of_unknown_origin_is_refused(tmp_path):
    models(tmp_path / "run" / "chain")
    with pytest.raises(UserError, match=r"has a chain but no run.json: use another --workdir"):
        runs.train(tiny.config(), tmp_path / "run", never, bar=False)


def test_another_number_of_prototypes_along_a_chain_is_refused(tmp_path):
    models(tmp_path / "run" / "chain", num_prototypes=32, feature_size=31)
    described = small_net()
    with pytest.raises(UserError, match="num_prototypes 16 differs from the chain's 32"):
        Chain(tmp_path / "run" / "chain").add(tiny.variables(described), described)


def test_a_chain_of_models_says_that_it_needs_queries(tmp_path):
    models(tmp_path / "chain")
    with pytest.raises(UserError, match=r"does not say what to query: give --config=FILE.py"):
        runs.evaluate(Chain(tmp_path / "chain"), tmp_path / "out", bar=False)
    assert not (tmp_path / "out").exists()


def test_the_quickstart_pre_trains_the_kind_of_head_that_it_needs():
    for method, kind in (("hoc", "sce"), ("er", "er"), ("fd", "sce")):
        pretraining, sequence = configurations(method, seed=3)
        assert (pretraining.method, sequence.method) == (kind, method)
        assert pretraining.seed == sequence.seed == 3
        assert pretraining.num_prototypes == sequence.num_prototypes
        assert len(pretraining.pretrain_classes) == len(sequence.tasks.replace_at) == 3


# Programs


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("train", "Train a sequence of tasks"),
        ("pretrain", "Pre-train the models"),
        ("evaluate", "Try every version of a chain"),
        ("quickstart", "See the paper's claim on a laptop"),
    ],
)
def test_help_says_what_a_program_is_for(program, words):
    code, out, err = tiny.call(program, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(words) and f"python -m launch.{program}" in out
    assert "--[no]progress: show progress bars" in out


def program_refuses(program, flags, message):
    code, out, err = tiny.call(program, *flags)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and err.startswith("error: ")
    assert message in err


@pytest.mark.parametrize(
    ("program", "flags", "message"),
    [
        ("train", [], "--workdir is missing: for example --workdir=runs/hoc"),
        ("pretrain", [], "--workdir is missing: for example --workdir=runs/models"),
        ("evaluate", [], "--chain is missing: for example --chain=runs/hoc/chain"),
        ("train", ["--wrkdir=x"], "Unknown command line flag 'wrkdir'. Did you mean: workdir ?"),
        ("train", ["--workdir=x", "y"], "unknown argument 'y': flags begin with --, see --help"),
        (
            "train",
            ["--workdir=x", "--config.epohcs=3"],
            "unknown field of the configuration: 'epohcs' Did you mean \"epochs\"",
        ),
        (
            "train",
            ["--workdir=x", "--config=configs/glyphs.py", "--config.optim.ler=3"],
            "unknown field of the configuration: 'ler' Did you mean \"lr\"",
        ),
        (
            "train",
            ["--workdir=x", "--config=configs/glyphs.py:metod=hoc"],
            "unknown argument of the configuration 'metod'. Did you mean 'method'? Valid: method,",
        ),
        (
            "train",
            ["--workdir=x", "--config=configs/iamcl2r.py:tasks=8"],
            "error: tasks must be 7 or 31, got 8",
        ),
        ("train", ["--workdir=x", "--config.epochs=x"], "--config.epochs=x: invalid literal"),
        (
            "train",
            ["--workdir=x", "--config=configs/none.py"],
            "no configuration file 'configs/none.py': configs/ has some to start from",
        ),
        (
            "pretrain",
            ["--workdir=x", "--config=configs/pretrain.py:data=glyf"],
            "unknown data 'glyf'. Did you mean 'glyphs'? Valid: folder, glyphs, imagenet32.",
        ),
        (
            "evaluate",
            ["--chain=/nowhere", "--metric=mapp"],
            "unknown metric 'mapp'. Did you mean 'map'? Valid: identification, map, recall@1.",
        ),
        ("evaluate", ["--chain=/nowhere", "--batch_size=0"], "--batch_size=0"),
        ("quickstart", ["--methods=hoc,err"], "unknown method 'err'. Did you mean 'er'?"),
        ("quickstart", ["--methods="], "--methods is empty: for example --methods=hoc,er"),
        ("quickstart", ["--seed=-1"], "--seed=-1"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(program, flags, message):
    program_refuses(program, flags, message)


def test_train_and_evaluate_say_what_they_wrote(tmp_path):
    chain = Chain(tmp_path / "run" / "chain")
    for task in range(2):
        described = small_net(task=task, config=json.loads(tiny.config().to_json()))
        chain.add(tiny.variables(described, task), described)
    code, out, err = tiny.call("evaluate", f"--chain={chain.path}", "--noprogress")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("d-Simplex-HOC: identification %, rows = query version")
    assert lines[1].split() == ["0", "1"]
    assert lines[4].startswith("AC ")
    evaluation = chain.path.parent / "evaluation"
    names = ("matrix.json", "matrices.png", "average_accuracy.png")
    assert lines[5:] == [str(evaluation / name) for name in names]
    assert all((evaluation / name).exists() for name in names)
