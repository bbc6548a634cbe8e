"""Bad input: one line, the remedy, exit code 2, and nothing written."""

import json
import re
import shutil

import numpy as np
import programs
import pytest
import tiny
from PIL import Image

from compat_jax import experiment
from compat_jax.chain import Chain
from compat_jax.errors import UserError
from launch.quickstart import configurations


def refused(work, message, workdir, argument=None):
    """`work` raises a UserError of one line, about this field, and leaves nothing behind."""
    with pytest.raises(UserError, match=message) as caught:
        work()
    assert "\n" not in str(caught.value)
    assert "--" not in str(caught.value) and "launch" not in str(caught.value)
    if argument is not None:
        assert caught.value.argument == argument
    assert not workdir.exists()


def train(config, workdir):
    return experiment.train(config, workdir, tiny.session_of(config))


def pretrain(config, workdir):
    return experiment.pretrain(config, workdir, tiny.session_of(config))


def train_refuses(tmp_path, message, argument=None, method="hoc", **overrides):
    config = tiny.config("glyphs", f"method={method},replace=false", **overrides)
    workdir = tmp_path / "run"
    refused(lambda: train(config, workdir), message, workdir, argument)


def pretrain_refuses(tmp_path, message, argument=None, **overrides):
    config = tiny.config("pretrain", "data=glyphs", tiny.PRETRAIN, **overrides)
    workdir = tmp_path / "models"
    refused(lambda: pretrain(config, workdir), message, workdir, argument)


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
    ("overrides", "message", "argument"),
    [
        (
            {"method": "hcc"},
            r"unknown method 'hcc'\. Did you mean 'hoc'\? Valid: align, .*, hoc, .*unibct",
            "method",
        ),
        (
            {"backbone__name": "resnet_smal"},
            r"unknown backbone 'resnet_smal'\. Did you mean 'resnet_small'\? Valid: .*vit_ti16",
            None,
        ),
        (
            {"backbone__arguments": {"widht": 4}},
            r"unknown argument of backbone 'resnet_small' 'widht'\. Did you mean 'width'\?",
            None,
        ),
        (
            {"num_prototypes": 5},
            "num_prototypes 5 is too small for 6 classes: use at least",
            "num_prototypes",
        ),
        ({"num_prototypes": 1}, "num_prototypes must be at least 2", "num_prototypes"),
        ({"epochs": 0}, "epochs must be at least 1 .*, got 0", "epochs"),
        ({"seed": -1}, "seed must be at least 0 and at most 4,294,967,295, got -1", "seed"),
        ({"dtype": "float16"}, "unknown dtype 'float16'", "dtype"),
        ({"label_order": "up"}, "unknown label_order 'up'", "label_order"),
        ({"mesh": "date:2"}, r"unknown mesh axis 'date'\. Did you mean 'data'\?", None),
        ({"mesh": "data:9"}, "mesh 'data:9' needs 9 devices, there are 8", None),
        (
            {"mesh": "data:3"},
            "batch_size 8 does not divide over 3 devices .*: use 6 or 9",
            None,
        ),
        ({"optim__lr": 0.0}, r"optimizer\.lr must be above 0, got 0\.0", "optim.lr"),
        (
            {"optim__decay": "packages"},
            r"unknown optimizer\.decay 'packages'\. Did you mean 'package'",
            "optim.decay",
        ),
        (
            {"loss__same_class": "excluded"},
            r"unknown hoc\.same_class 'excluded'\. Did you mean 'exclude'",
            "loss.same_class",
        ),
        ({"data__crop_padding": -1}, "crop_padding must be at least 0", "data.crop_padding"),
        ({"data__std": (0.1, 0.1, 0.0)}, r"std must lie in 0\.\.1, above 0: got", "data.std"),
        ({"data__std": (0.1, 0.1)}, "mean and std need one number per channel", "data.mean"),
        (
            {"tasks__initial": 7},
            r"tasks.initial must lie in 1\.\.6 \(the classes of the data\)",
            "tasks.initial",
        ),
        ({"tasks__initial": 0}, r"tasks\.initial must be at least 1", "tasks.initial"),
        (
            {"tasks__increment": 0},
            "tasks.increment must be at least 1 for 4 more classes, got 0",
            "tasks.increment",
        ),
        ({"tasks__rehearsal": -1}, r"tasks\.rehearsal must be at least 0", "tasks.rehearsal"),
        (
            {"data__train__source": "glyph"},
            r"unknown data source 'glyph'\. Did you mean 'glyphs'",
            "data.train.source",
        ),
        (
            {"data__train__look": "foto"},
            r"unknown look 'foto'\. Did you mean 'photo'",
            "data.train.look",
        ),
        (
            {"data__train__classes": (0, 9999)},
            "class .* asked for, but there are .* glyph classes",
            "data.train.classes",
        ),
        (
            {"data__query__size": 0},
            "size must be at least 1 and at most 8,192, got 0",
            "data.query.size",
        ),
        ({"data__query__size": 12}, r"8, 8, 3", None),
        ({"data__query__classes": (7, 10)}, "query and gallery have different classes", None),
        (
            {"method": "er"},
            r"method 'er' has no number 'lam', which is hoc's",
            "loss.lam",
        ),
        (
            {"method": "fd"},
            r"method 'fd' has no number 'lam', which is hoc's",
            "loss.lam",
        ),
        ({"save_every": -1}, "save_every must be at least 0", "save_every"),
        ({"device_budget_mb": -1}, "device_budget_mb must be at least 0", "device_budget_mb"),
        ({"pretrained": 3}, "pretrained must be a text, got 3", "pretrained"),
    ],
)
def test_train_refuses_a_value(tmp_path, overrides, message, argument):
    overrides = {"tasks__replace_at": (0,), **overrides} if "pretrained" in overrides else overrides
    config = tiny.config()
    with config.ignore_type(), config.unlocked():
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    workdir = tmp_path / "run"
    refused(lambda: train(config, workdir), message, workdir, argument)


@pytest.mark.parametrize(
    ("overrides", "message", "argument"),
    [
        ({"pretrain_classes": ()}, "class_counts needs numbers of classes", "pretrain_classes"),
        (
            {"pretrain_classes": (1, 4)},
            r"class_counts needs .* at least 2, got \(1, 4\)",
            "pretrain_classes",
        ),
        (
            {"pretrain_classes": (2, 5)},
            r"class_counts is \(2, 5\), but the data has 4 classes",
            "pretrain_classes",
        ),
        (
            {"pretrain_classes": (2, 4), "num_prototypes": 3},
            "num_prototypes 3 is too small for 4 classes",
            "num_prototypes",
        ),
        ({"backbone__name": "vgg"}, "unknown backbone 'vgg'", None),
    ],
)
def test_pretrain_refuses_a_value(tmp_path, overrides, message, argument):
    pretrain_refuses(tmp_path, message, argument, **overrides)


# Models to replace with


def test_replacements_need_models(tmp_path):
    train_refuses(
        tmp_path,
        r"tasks.replace_at=\(0, 2\) needs pre-trained models: pre-train some and give their chain",
        "pretrained",
        tasks__replace_at=(0, 2),
    )
    train_refuses(
        tmp_path,
        "no chain at .*/nowhere: training writes one",
        tasks__replace_at=(0, 2),
        pretrained=str(tmp_path / "nowhere"),
    )
    train_refuses(
        tmp_path,
        r"2 replacements \(tasks \(0, 2\)\), but .* has 1 models: pre-train more or shorten",
        "tasks.replace_at",
        tasks__replace_at=(0, 2),
        **models(tmp_path / "one"),
    )


def test_replacements_must_fit(tmp_path):
    one = models(tmp_path / "one")
    train_refuses(
        tmp_path,
        r"replacement at task 3, but the sequence has tasks 0\.\.2",
        "tasks.replace_at",
        tasks__replace_at=(3,),
        **one,
    )
    train_refuses(tmp_path, "replacement at task -1", tasks__replace_at=(-1,), **one)
    train_refuses(tmp_path, "tasks.replace_at names task 1 twice", tasks__replace_at=(1, 1), **one)
    train_refuses(
        tmp_path,
        "pre-trained with a fixed simplex, but method 'er' has a learnable head: pre-train .*'er'",
        "pretrained",
        tasks__replace_at=(0,),
        method="er",
        **one,
    )
    train_refuses(
        tmp_path,
        "the model for task 0 has num_prototypes=16, the run 32: all versions share one simplex",
        "num_prototypes",
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
        "pre-trained model 0 and query share 1 classes .*or set pretraining_may_share=True",
        "data.pretraining_may_share",
        tasks__replace_at=(0,),
        **models(tmp_path / "models", class_names=(class_names()[6],)),
    )


def test_models_with_a_gap_are_refused(tmp_path):
    chosen = models(tmp_path / "models", count=3)
    shutil.rmtree(tmp_path / "models" / "0001")
    train_refuses(
        tmp_path, r"models lacks 1 of its versions 0\.\.2", tasks__replace_at=(0, 2), **chosen
    )


def test_a_corrupt_model_is_named(tmp_path):
    chosen = models(tmp_path / "models")
    (tmp_path / "models" / "0000" / "record.json").write_text("{")
    train_refuses(
        tmp_path, "version 0 of .*models cannot be used", tasks__replace_at=(0,), **chosen
    )


# Data


def data_refused(tmp_path, path, message, argument="data.train.path"):
    config, workdir = from_folder(path), tmp_path / "run"
    refused(lambda: train(config, workdir), message, workdir, argument)


def test_folders_are_checked(tmp_path, folder):
    data_refused(tmp_path, tmp_path / "none", "no folder .*none: it must hold one sub-folder of")
    (tmp_path / "flat").mkdir()
    data_refused(tmp_path, tmp_path / "flat", "flat has no sub-folder")
    (folder / "c").mkdir()
    data_refused(tmp_path, folder, "class folder .*pictures/c is empty: add pictures or remove it")
    (folder / "c" / "0.png").write_text("not a picture")
    message = r"pictures/c/0\.png is not a picture that Pillow can read: remove or repair it"
    data_refused(tmp_path, folder, message, argument=None)


@pytest.mark.parametrize("role", ["train", "query", "gallery"])
def test_a_workdir_among_pictures_is_refused(tmp_path, folder, role):
    config = tiny.config()
    config.data[role] = {"source": "folder", "path": str(folder), "size": 8}
    for workdir in (folder / "run", folder / "a" / "run" / "hoc"):
        refused(lambda at=workdir: train(config, at), "use a workdir outside", workdir, "workdir")
    config.data[role] = {
        "source": "folder",
        "path": str(folder),
        "size": 8,
        "exclude": ("run", "c"),
    }
    (folder / "c").touch()
    with pytest.raises(UserError) as caught:
        train(config, folder / "c" / "run")
    assert "use a workdir outside" not in str(caught.value)  # but that c is a file


def test_missing_tfds_data_comes_with_the_line_that_prepares_it(tmp_path):
    config = tiny.config()
    config.data.train = {"source": "tfds", "name": "cifar100", "data_dir": str(tmp_path / "tfds")}
    with pytest.raises(UserError, match="cifar100 is not prepared in") as caught:
        train(config, tmp_path / "run")
    assert "download_and_prepare(" in str(caught.value)
    assert not (tmp_path / "run").exists() and not (tmp_path / "tfds").exists()


# Workdirs and chains


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"cannot write to {workdir}: "):
            train(tiny.config(), workdir)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_workdir_with_a_chain_of_unknown_origin_is_refused(tmp_path):
    models(tmp_path / "run" / "chain")
    with pytest.raises(UserError, match=r"has a chain but neither run.json nor pict") as caught:
        train(tiny.config(), tmp_path / "run")
    assert caught.value.argument == "workdir"


def test_paths_are_refused_before_any_data_is_read(tmp_path, monkeypatch):
    def read(*_):
        raise AssertionError("data was read")

    monkeypatch.setattr(experiment, "load", read)
    monkeypatch.chdir(tmp_path)
    for path in ("run[1]", "runs*/a", "what?", "{a}"):
        for work, config in (
            (train, tiny.config()),
            (pretrain, tiny.config("pretrain", "data=glyphs", tiny.PRETRAIN)),
        ):
            with pytest.raises(UserError, match="which checkpoints cannot be stored under"):
                work(config, path)
        chosen = {"tasks__replace_at": (0,), "pretrained": path}
        with pytest.raises(UserError, match="which checkpoints cannot be stored under"):
            train(tiny.config(**chosen), "run")
    for path in ("", "a\0b", "s4://a/b", "~no_such_user_here/a"):
        with pytest.raises(UserError):
            train(tiny.config(), path)
    assert not list(tmp_path.iterdir())


def test_another_number_of_prototypes_along_a_chain_is_refused(tmp_path):
    models(tmp_path / "run" / "chain", num_prototypes=32, feature_size=31)
    described = small_net()
    with pytest.raises(UserError, match="num_prototypes 16 differs from the chain's 32"):
        Chain(tmp_path / "run" / "chain").add(tiny.variables(described), described)


def test_a_chain_of_models_says_that_it_needs_queries(tmp_path):
    models(tmp_path / "chain")
    chain, session = Chain(tmp_path / "chain"), tiny.session(cache=tmp_path / "out" / "cache")
    with pytest.raises(
        UserError, match=r"does not say what to query: give a configuration with data\.query and"
    ) as caught:
        experiment.evaluate(chain, session=session)
    assert caught.value.argument == "config"
    assert not (tmp_path / "out").exists()


def test_evaluation_refuses_a_mesh_before_any_data_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "load", None)
    described = small_net(config=json.loads(tiny.config().to_json()))
    Chain(tmp_path / "chain").add(tiny.variables(described), described)
    with pytest.raises(UserError, match=r"unknown mesh axis 'date'"):
        experiment.evaluate(Chain(tmp_path / "chain"), session=tiny.session(mesh="date:2"))


def test_the_quickstart_pre_trains_the_kind_of_head_that_it_needs():
    for method, kind in (("hoc", "sce"), ("er", "er"), ("fd", "sce"), ("bct", "er")):
        pretraining, sequence = configurations(method, seed=3)
        assert (pretraining.method, sequence.method) == (kind, method)
        assert pretraining.seed == sequence.seed == 3
        assert pretraining.num_prototypes == sequence.num_prototypes
        assert len(pretraining.pretrain_classes) == len(sequence.tasks.replace_at) == 3


# Programs

SWEEP = ("--config=configs/glyphs.py:replace=false", "--workdir=/proc/nowhere", "--noprogress")
SWEEPS = [
    (
        ["--grid=method=hoc;optim.lr=0.01", "--pretrained=runs/{metod}-{optim.lr}/chain"],
        "unknown name of the grid 'metod'. Did you mean 'method'? Valid: method, optim.lr. "
        "(flag --pretrained)",
    ),
    (
        ["--grid=method=hoc;optim.lr=0.01", "--over=sed"],
        "unknown name of the grid 'sed'. Did you mean 'seed'? Valid: method, optim.lr, seed. "
        "(flag --over)",
    ),
    (
        ["--grid=seed=0", "--config.epochs=1"],
        "error: --config.epochs is no flag of a sweep: put epochs=1 into --grid",
    ),
    (
        ["--grid=seed=0", "--config.optim.lr", "1"],
        "error: --config.optim.lr is no flag of a sweep: put optim.lr=... into --grid",
    ),
    (["--grid=methd=hoc;seed=0"], "tensorboard, validate_every, weights. (flag --grid)"),
    (["--grid=method=hcc;seed=0"], "unknown method 'hcc'. Did you mean 'hoc'?"),
    (["--grid=seed=x"], "seed must be int, got 'x' (flag --grid)"),
    (["--grid=optim.lr=0"], "optimizer.lr must be above 0, got 0.0 (flag --grid)"),
]
MISTAKES = [
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
        "unknown data 'glyf'. Did you mean 'glyphs'? Valid: folder, glyphs, imagenet32, tiny_imagenet.",
    ),
    (
        "evaluate",
        ["--chain=/nowhere", "--metric=mapp"],
        "unknown metric 'mapp'. Did you mean 'map'? Valid: identification, map, map@r, recall@1, "
        "recall@10, recall@5, tar@0.001, tar@0.01, verification. (flag --metric)",
    ),
    ("evaluate", ["--chain=/nowhere", "--batch_size=0"], "--batch_size=0"),
    (
        "evaluate",
        ["--chain=/nowhere", "--afterwards=procruste"],
        "unknown kind 'procruste'. Did you mean 'procrustes'? Valid: adapter, low_rank, procrustes, "
        "ridge, slerp. (flag --afterwards)",
    ),
    (
        "embed",
        ["--chain=/nowhere", "--pictures=README.md", "--out=/tmp/never.npz", "--skip=mk.py"],
        "features are read from .npz or .parquet, got 'mk.py' (flag --skip)",
    ),
    (
        "train",
        ["--workdir=x", "--config=configs/glyphs.py:replace=false", "--config.optim.lr=0"],
        "optimizer.lr must be above 0, got 0.0 (flag --config.optim.lr)",
    ),
    (
        "pretrain",
        ["--workdir=x", "--config=configs/pretrain.py:data=folder"],
        "data source 'folder' needs path (flag --config.data.train.path)",
    ),
    ("quickstart", ["--methods=hoc,err"], "unknown method 'err'. Did you mean 'er'?"),
    ("quickstart", ["--methods="], "--methods is empty: for example --methods=hoc,er"),
    ("quickstart", ["--seed=-1"], "--seed=-1"),
    *(("sweep", [*SWEEP, *flags], message) for flags, message in SWEEPS),
]
HELPS = [
    ("train", "Train versions of a chain"),
    ("pretrain", "Pre-train the models"),
    ("evaluate", "Try every version of a chain"),
    ("quickstart", "See the paper's claim on a laptop"),
]
OF_A_FILE = (
    ("train", "--config=configs/photos.py:path=shop,size=96", "--help"),
    ("train", "--config=configs/glyphs.py:method=er", "--config.optim.lr=0.5", "--help"),
)


@pytest.fixture(scope="module")
def ended():
    """(exit code, stdout, stderr) by (program, flags) of all programs that end at once."""
    commands = [(program, *flags) for program, flags, _ in MISTAKES]
    commands += [(program, "--help") for program, _ in HELPS] + list(OF_A_FILE)
    return {command: programs.call(*command) for command in commands}


@pytest.mark.parametrize(("program", "words"), HELPS)
def test_help_says_what_a_program_is_for(ended, program, words):
    code, out, err = ended[program, "--help"]
    assert (code, err) == (0, "")
    assert out.startswith(words) and f"python -m launch.{program}" in out
    assert re.search(r"--(\[no\])?progress: show progress bars", out)
    if program in ("train", "pretrain"):
        assert "optim.lr: learning rate of a task's first epoch (above 0, default 0.001)" in out


def test_help_of_a_configuration_lists_its_fields_and_values(ended):
    for command in OF_A_FILE:
        assert ended[command][0] == 0 and not ended[command][2]
    photos, glyphs = (ended[command][1] for command in OF_A_FILE)
    assert "Your own photos, month after month" in photos  # the file's own words
    size = (
        "data.photos.size: side of the pictures in pixels (at least 1 and at most 8,192, here 96)"
    )
    assert size in photos
    assert "loss.lam: weight of the cross-entropy (at least 0 and at most 1, here 0.5)" in photos
    assert "data.ROLE" not in photos and "hot_refresh)" not in photos
    assert "optim.lr: learning rate of a task's first epoch (above 0, here 0.5)" in glyphs
    assert (
        "data.query.look: clean print, or distorted photographs (photo | print, here 'photo')"
        in glyphs
    )
    assert "loss." not in glyphs.partition("Its fields")[2]


@pytest.mark.parametrize(("program", "flags", "message"), MISTAKES)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(ended, program, flags, message):
    code, out, err = ended[program, *flags]
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and err.startswith("error: ")
    assert message in err


def test_a_program_on_its_own_says_the_same(ended):
    for command in (("train", "--wrkdir=x"), ("evaluate", "--help")):
        assert programs.call_alone(*command) == ended[command]


def test_train_and_evaluate_say_what_they_wrote(tmp_path):
    chain = Chain(tmp_path / "run" / "chain")
    for task in range(2):
        described = small_net(task=task, config=json.loads(tiny.config().to_json()))
        chain.add(tiny.variables(described, task), described)
    flags = [f"--chain={chain.path}", "--noprogress"]
    code, out, err = programs.call("evaluate", *flags)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("d-Simplex-HOC: identification %, rows = query version")
    assert lines[1].split() == ["0", "1"]
    assert lines[4].startswith("AC ")
    evaluation = chain.path.parent / "evaluation"
    names = ("matrix.json", "matrices.png", "average_accuracy.png")
    assert lines[5:] == [str(evaluation / name) for name in names]
    assert all((evaluation / name).exists() for name in names)
    # Several metrics, into a folder each.
    several = programs.call(
        "evaluate", *flags, "--metric=identification,recall@1", f"--out={tmp_path}/o"
    )
    assert (several[0], several[2]) == (0, "")
    assert several[1].splitlines()[:5] == lines[:5]
    for name, folder in (("identification", "identification"), ("recall@1", "recall_at_1")):
        written = json.loads((tmp_path / "o" / folder / "matrix.json").read_text())
        assert written["hoc"]["metric"] == name
        assert f"d-Simplex-HOC: {name} %, rows = query version" in several[1]
        assert str(tmp_path / "o" / folder / "matrices.png") in several[1]
    alone = json.loads((evaluation / "matrix.json").read_text())
    assert json.loads((tmp_path / "o" / "identification" / "matrix.json").read_text()) == alone
