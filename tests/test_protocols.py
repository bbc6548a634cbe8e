"""Protocols: pairs of versions, class folders as they are downloaded, replacements of other networks."""

import functools
import importlib
import re
import subprocess
from pathlib import Path

import jax
import numpy as np
import programs
import pytest
import tiny
from PIL import Image

from compat_jax import experiment, methods, simplex
from compat_jax.chain import Chain
from compat_jax.data import Tasks, TaskSequence, from_folder
from compat_jax.errors import UserError
from compat_jax.models import Backbone, as_backbone
from compat_jax.training.sequence import check_replacements
from compat_jax.training.task import sequence_task

PAGE = Path(__file__).parents[1] / "docs" / "sequences.md"
DATA = tiny.dataset(4, 4)
KINDS = ("class", "data", "backbone", "size")
DATA_SETS = ("tiny_imagenet", "caltech101", "omniglot", "grocery")


def shrunken(file, arguments):
    """The configuration of a protocol on 4 classes of 4 pictures, with a network of one layer."""
    config = importlib.import_module(f"configs.{file}").get_config(arguments)
    config.update_from_flattened_dict(
        {
            **{"backbone.name": "one_conv", "num_prototypes": 16, "epochs": 1, "batch_size": 8},
            **{"mesh": "data:1", "optim.lr": 0.05, "optim.min_lr": 0.001, "data.flip": False},
        }
    )
    if file == "folders":
        for role in ("train", "query", "gallery"):
            config.data[role].size = 8
        config.tasks.initial = config.tasks.increment = 2
        return config
    for role, classes in (("train", (0, 4)), ("query", (0, 4)), ("gallery", (0, 4))):
        glyphs = {
            "source": "glyphs",
            "look": "photo",
            "size": 8,
            "classes": classes,
            "per_class": 4,
        }
        config.data[role] = {**glyphs, "seed": int(role == "train")}
    return config


def shrunken_pair(kind, method="hoc"):
    config = shrunken("pairs", f"kind={kind},method={method}")
    initial = 4 if kind == "data" else 2
    config.tasks.initial, config.tasks.increment = initial, 4 - initial
    if kind == "data":
        config.tasks.first_share = 0.5
    if kind == "backbone":
        assert config.fresh_backbone.name == "resnet50"
        config.fresh_backbone.name, config.fresh_backbone.arguments.width = "one_conv", 8
    if kind == "size":
        config.first_prototypes = 8
    return config


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The chain of a kind of pair, trained when asked for, once."""

    @functools.cache
    def chain(kind):
        config = shrunken_pair(kind)
        session = tiny.session_of(config, progress=False)
        return experiment.train(config, tmp_path_factory.mktemp(kind), session)

    return chain


# Pictures that come later


def test_a_first_task_with_a_share_of_the_pictures():
    sequence = Tasks(initial=3, increment=0, first_share=0.3).sequence(3)
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), (10, 20, 1)))
    counts = np.bincount(labels)

    def learnt(task, rehearsal=None):
        plan = sequence.batch_plan(task, labels, rehearsal, batch_size=1, epochs=1, seed=0)
        shape = sequence.plan_shape(task, counts, rehearsal, batch_size=1)
        assert plan.shape == (shape[0], shape[1])
        return np.unique(plan)

    first, both = learnt(0), learnt(1)
    np.testing.assert_array_equal(np.bincount(labels[first]), [3, 6, 1])  # at least one of a class
    np.testing.assert_array_equal(both, np.arange(31))
    np.testing.assert_array_equal(learnt(1, rehearsal=0), np.setdiff1d(both, first))
    assert len(sequence) == 2 and sequence.num_seen(0) == 3 and not sequence.classes(1)


def test_the_memory_of_a_share_is_of_the_share():
    sequence, labels = TaskSequence(4, 2, 2, first_share=0.5), np.repeat(np.arange(4), 8)
    first = sequence.batch_plan(0, labels, 2, batch_size=8, epochs=1, seed=1)
    second = sequence.batch_plan(1, labels, 2, batch_size=8, epochs=50, seed=1)
    memory, new = second[:, :4], second[:, 4:]
    assert np.isin(memory, first).all() and len(np.unique(memory)) == 4  # 2 of each class
    assert not np.isin(new, first).any() and set(labels[np.unique(new)]) == {0, 1, 2, 3}


def test_shares_that_cannot_be():
    with pytest.raises(UserError, match=r"first_share must be above 0 and at most 1, got 0"):
        Tasks(first_share=0)
    sequence = Tasks(initial=2, first_share=0.9).sequence(2)
    with pytest.raises(UserError, match="task 1 brings no image") as caught:
        sequence.plan_shape(1, np.array([1, 2]), 20, batch_size=1)
    assert caught.value.argument == "tasks.first_share"


def test_settings_that_came_later_change_no_run_that_began_before():
    assert tiny.run().describe()["tasks"] == {"initial": 2, "increment": 2, "rehearsal": 4}
    assert "first_prototypes" not in tiny.run().describe()
    run = tiny.run(tasks=Tasks(everything=True, first_share=0.5))
    assert run.describe()["tasks"]["everything"] and run.rehearsal is None


# Fresh weights against the version before


@pytest.mark.parametrize("kind", ["class", "size"])
def test_the_old_version_of_a_pair_learns_by_cross_entropy_alone(pair, kind):
    methods = [pair(kind).record(number).method for number in (0, 1)]
    assert methods == ["sce", "hoc"]


def test_a_first_task_learns_by_the_method_unless_asked(tmp_path):
    def trained(method, folder, **fields):
        run = pair_run(method, tasks=Tasks(initial=2, increment=2, **fields))
        return tiny.train(run, tmp_path / folder, DATA)

    plain, asked = trained("hoc", "plain"), trained("hoc", "asked", first_loss="cross_entropy")
    simplex = trained("sce", "sce")
    assert [chain.record(0).method for chain in (plain, asked)] == ["hoc", "sce"]
    assert [chain.record(1).method for chain in (plain, asked)] == ["hoc", "hoc"]
    hashes = [chain.open(0).sha256 for chain in (plain, asked, simplex)]
    assert hashes[1] == hashes[2] != hashes[0]


def pair_run(method="hoc", **changes):
    fields = {"tasks": Tasks(initial=2, increment=2, everything=True), "epochs": 1, "batch_size": 8}
    return tiny.run(method, **{**fields, **changes})


def begun(run, teacher):
    """Trainer and frozen state of the second task, which starts from fresh weights."""
    labels, sequence = DATA.labels, run.tasks.sequence(4)
    task = sequence_task(run, sequence, 1, labels, start=None, replaced=True, teacher=teacher)
    trainer = task.trainer(tiny.one_device())
    variables = task.starting_variables(trainer, (8, 8, 3))
    return trainer, variables, task.freeze(trainer, variables, DATA)


def test_the_old_network_teaches_the_new_one(pair):
    old = pair("backbone").open(0)
    run = pair_run(backbone=Backbone("one_conv", {"width": 8}))
    trainer, variables, frozen = begun(run, old)
    assert (trainer.embedder.backbone.width, trainer.teaching_network.backbone.width) == (8, 16)
    assert variables["params"]["projection"]["kernel"].shape == (8, 15)
    for mine, theirs in zip(
        *map(jax.tree.leaves, (frozen["previous"], old.variables)), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)


def test_the_old_head_is_that_of_the_version_before():
    old = tiny.start_of("er", task=0)
    _, variables, frozen = begun(pair_run("bct"), old)
    kernel = old.variables["params"]["head"]["kernel"]
    np.testing.assert_array_equal(frozen["old_head"][:, :3], kernel)
    fresh = np.asarray(variables["params"]["head"]["kernel"])
    assert fresh.shape == (16, 4) and not np.isin(kernel, fresh).any()


@pytest.mark.parametrize("method", ["bct", "unibct"])
def test_a_learnable_head_compares_networks_of_one_width_only(method):
    sequence, wide = Tasks(2, 2).sequence(4), Backbone("one_conv", {"width": 8})
    for name in ("er", "independent", "hoc"):
        check_replacements(tiny.run(name), sequence, {1: wide}, (8, 8, 3))
    check_replacements(tiny.run(method), sequence, {1: Backbone("one_conv")}, (8, 8, 3))
    with pytest.raises(
        UserError, match=r"features of one_conv have 16 numbers, those of .* 8: method"
    ):
        check_replacements(tiny.run(method), sequence, {1: wide}, (8, 8, 3))


def test_fresh_weights_have_a_registered_name():
    module = tiny.OneConv(4)
    with pytest.raises(UserError, match="is no registered backbone"):
        check_replacements(tiny.run(), Tasks(2, 2).sequence(4), {1: as_backbone(module)}, (8, 8, 3))


# A larger simplex from the second version on


def test_the_first_version_of_a_smaller_simplex_is_moved(pair):
    chain = pair("size")
    small, moved = Chain(chain.path.parent / "first" / "chain"), chain.record(0)
    assert (small.record(0).feature_size, moved.feature_size) == (7, 15)
    assert moved.learnt["enlarged_from"] == 8
    turn = simplex.enlargement(8, 16, "descending")
    old, new = (v.variables["params"]["projection"]["kernel"] for v in (small[0], chain[0]))
    np.testing.assert_allclose(old @ turn, new, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "first", "message"),
    [
        ("er", 8, "needs a fixed simplex: method 'er' has a learnable head"),
        ("hoc", 16, "first_prototypes=16 must be at least 2 and below num_prototypes=16"),
    ],
)
def test_first_prototypes_that_cannot_be(method, first, message):
    with pytest.raises(UserError, match=message) as caught:
        tiny.run(method, first_prototypes=first)
    assert caught.value.argument == "first_prototypes"


# Models of several chains


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two chains, of two models of one network and of one of another, none of them trained."""
    root = tmp_path_factory.mktemp("models")
    for name, widths in (("narrow", (16, 16)), ("wide", (24,))):
        for seed, width in enumerate(widths):
            made = tiny.version(seed, method="sce", backbone_arguments={"width": width})
            Chain(root / name).add(made.variables, made.record)
    return root


def test_models_of_several_chains_come_in_turn(models):
    pretrained = f"{models}/narrow:0, {models}/wide:0,{models}/narrow"
    config = tiny.config(pretrained=pretrained, tasks__replace_at=(0, 1, 2, 4))
    found = experiment.load_replacements(config)
    widths = {t: v.backbone.arguments["width"] for t, v in found.items()}
    assert widths == {0: 16, 1: 24, 2: 16, 4: 16}
    assert [found[t].number for t in found] == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("fields", "argument", "message"),
    [
        ({"tasks__fresh_at": (1, 1)}, "tasks.fresh_at", "names task 1 twice"),
        (
            {"tasks__fresh_at": (0,), "tasks__replace_at": (0,)},
            "tasks.fresh_at",
            r"with tasks\.replace_at\) names task 0 twice",
        ),
        ({"tasks__replace_at": (0, 1)}, "tasks.replace_at", r"2 replacements .* has 1 models"),
        (
            {"tasks__fresh_at": (1,), "fresh_backbone__name": "resnet5"},
            "fresh_backbone.name",
            "unknown backbone 'resnet5'",
        ),
    ],
)
def test_beginnings_that_cannot_be(models, fields, argument, message):
    config = tiny.config("glyphs", "replace=false", pretrained=f"{models}/wide")
    with config.unlocked():
        for name, value in fields.items():
            section, _, key = name.rpartition("__")
            if section not in config:
                config[section] = {}
            config[section][key] = value
    with pytest.raises(UserError, match=message) as caught:
        experiment.load_replacements(config)
    assert caught.value.argument == argument


# Folders of classes at any depth


def draw(path, count=4):
    """Write blocky pictures of a class, the same for the same path."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(sum(map(ord, path.name)))
    look = rng.integers(0, 2, (4, 4, 1))
    for i in range(count):
        picture = np.kron(160 * look, np.ones((2, 2, 3))) + rng.integers(0, 60, (8, 8, 3))
        Image.fromarray(picture.astype(np.uint8)).save(path / f"{path.name}_{i}.png")


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    """The public data sets, as they are laid out after a download, of a few small pictures."""
    root = tmp_path_factory.mktemp("downloads")
    for role, names in (("train", "abcd"), ("query", "xy"), ("gallery", "xy")):
        for name in names:
            draw(root / "folders" / role / name)
    tiny_imagenet, words = root / "tiny_imagenet", ("n01", "n02", "n03", "n04")
    for word in words:
        draw(tiny_imagenet / "train" / word / "images")
        (tiny_imagenet / "train" / word / f"{word}_boxes.txt").write_text("0 0 1 1")
    draw(tiny_imagenet / "val" / "images")
    rows = [f"images_{i}.png\t{word}\t0\t0\t9\t9" for i, word in enumerate(words)]
    (tiny_imagenet / "val" / "val_annotations.txt").write_text("\n".join(rows))
    for name in ("BACKGROUND_Google", "accordion", "anchor", "ant", "barrel", "bass", "beaver"):
        draw(root / "caltech101" / name)
    for part, letters in (("background", "ab"), ("evaluation", "c")):
        for letter in letters:
            for number in ("character01", "character02"):
                draw(root / "omniglot" / f"images_{part}" / letter / number)
    for part in ("train", "test"):
        moved = "Vegetables/Mushroom/Brown-Cap" if part == "test" else "Vegetables/Brown-Cap"
        for name in ("Fruit/Apple/Gala", "Fruit/Apple/Pink-Lady", "Fruit/Banana", moved):
            draw(root / "grocery" / part / name)
    return root


@pytest.mark.parametrize(
    ("name", "fields", "classes"),
    [
        ("caltech101", {"exclude": ("BACK*", "b*")}, ("accordion", "anchor", "ant")),
        ("omniglot/images_background", {}, ("a", "b")),
        (
            "omniglot/images_background",
            {"class_folders": "path"},
            ("a/character01", "a/character02", "b/character01", "b/character02"),
        ),
        ("grocery/test", {"class_folders": "name"}, ("Banana", "Brown-Cap", "Gala", "Pink-Lady")),
        ("tiny_imagenet/train", {"exclude": ("*.txt", "n03", "n04")}, ("n01", "n02")),
    ],
)
def test_which_folders_are_classes(downloads, name, fields, classes):
    assert from_folder(downloads / name, **fields).class_names == classes


def test_two_folders_of_one_name_are_refused(downloads):
    with pytest.raises(
        UserError, match=r"'a/character01' and 'b/character01' .* have the same class"
    ):
        from_folder(downloads / "omniglot" / "images_background", class_folders="name")


# Every protocol, shrunken


def test_the_page_lists_every_protocol():
    found = set(re.findall(r"^\| `configs/(\w+)\.py:(\S+?)`", PAGE.read_text(), re.M))
    expected = {("iamcl2r", f"tasks={n}{r}") for n in (7, 31) for r in ("", ",replace=false")}
    expected |= {("pairs", f"kind={kind}") for kind in KINDS}
    expected |= {("folders", "path=PATH")}
    expected |= {("folders", f"data={name},path=PATH") for name in DATA_SETS}
    assert found == expected
    for file, arguments in found:
        importlib.import_module(f"configs.{file}").get_config(arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_trains_and_is_evaluated(kind, pair):
    chain = pair(kind)
    assert [r.classes_seen for r in map(chain.record, (0, 1))] == [4 if kind == "data" else 2, 4]
    record = chain.record(1)
    assert record.replaced_by == "one_conv with fresh weights" and record.parent is None
    assert record.method == "hoc"  # against the old version
    session = tiny.session(progress=False)
    result = experiment.evaluate(chain, metrics=["cmc@1", "map"], session=session)["map"]
    assert result.matrix.shape == (2, 2) and not result.incomparable
    closed, own = result.notes
    assert closed.startswith("Closed set") and own.startswith("16 of 16 query pictures")
    again = experiment.train(shrunken_pair(kind), chain.path.parent, session)
    assert again.numbers() == [0, 1]  # nothing is trained again


@pytest.mark.parametrize("method", sorted(set(methods.names()) - {"hoc"}))
@pytest.mark.slow
def test_every_method_trains_a_pair(method, tmp_path):
    for kind in ("class", "data"):
        config = shrunken_pair(kind, method)
        chain = experiment.train(config, tmp_path / kind, tiny.session_of(config, progress=False))
        assert chain.record(1).method == method and chain.numbers() == [0, 1]


@pytest.mark.parametrize("data", ["folders", *DATA_SETS])
def test_a_downloaded_data_set_trains_and_is_evaluated(data, downloads, tmp_path):
    config = shrunken("folders", f"data={data},path={downloads / data}")
    if data == "caltech101":
        config.data.train.classes = (0, 4)
        config.data.query.classes = config.data.gallery.classes = (4, 6)
    if data == "tiny_imagenet":  # by the line that the page gives
        (line,) = re.findall(r"^\(printf .* > val\.tsv$", PAGE.read_text(), re.M)
        subprocess.run(["bash", "-c", line], cwd=downloads / data / "val", check=True)
    session = tiny.session_of(config, progress=False)
    chain = experiment.train(config, tmp_path, session)
    assert [r.classes_seen for r in map(chain.record, chain.numbers())] == [2, 4]
    found = experiment.evaluate(chain, session=session).main
    setting = "Closed" if data in ("tiny_imagenet", "grocery") else "Open"
    assert found.notes[0].startswith(f"{setting} set")


SMALL_PAIRS = """
import test_protocols

def get_config(arguments=None):
    return test_protocols.small_pair_of(arguments)
"""


def small_pair_of(arguments):
    """The configuration of `SMALL_PAIRS`, for the programs of other processes."""
    config = shrunken("pairs", arguments)
    config.backbone.name = "flat"
    config.tasks.initial, config.tasks.increment = 2, 2
    return config


@pytest.mark.slow
def test_a_sweep_runs_over_protocols(downloads, tmp_path):
    (tmp_path / "pairs.py").write_text(SMALL_PAIRS)
    fields = "backbone=flat;epochs=1;num_prototypes=16;batch_size=8;size=8;initial=2;increment=2"
    calls = {
        "pairs": (f"--config={tmp_path}/pairs.py", "--grid=kind=class;method=hoc,independent"),
        "folders": (
            f"--config=configs/folders.py:data=omniglot,path={downloads / 'omniglot'}",
            f"--grid=method=hoc,er;{fields};mesh=data:1",
        ),
    }
    for name, flags in calls.items():
        code, out, err = programs.call(
            *("sweep", *flags, f"--workdir={tmp_path / name}", "--noprogress"), flat=True
        )
        assert code == 0, err
        assert out.count("cell ") == 2 and out.splitlines()[-3].split()[:2] == ["method", "runs"]
