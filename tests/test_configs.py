"""Every configuration, shrunken, run for a step; and how its arguments are read."""

import dataclasses
import functools
import importlib
import itertools
import json
import operator
from pathlib import Path

import drawn_photos
import numpy as np
import pytest
import tiny
from absl import flags
from ml_collections import ConfigDict, config_flags

import compat_jax as cj
from compat_jax import config as configs
from compat_jax import config_schema, experiment, methods, models
from compat_jax.data import TaskSequence
from compat_jax.data.registry import source_fields
from compat_jax.errors import UserError
from compat_jax.training.optimizer import OPTIMIZERS
from configs.common import parse_arguments
from launch._help import values

FOLDER = Path(__file__).parents[1] / "configs"
FILES = sorted(
    p.stem for p in FOLDER.glob("*.py") if "\ndef get_config(" in p.read_text(encoding="utf-8")
)
ARGUMENTS = {
    "folders": ["", *(f"data={d},path=p" for d in ("tiny_imagenet", "omniglot", "grocery"))],
    "glyphs": ["", "method=er,replace=false,seed=3", "method=fd", "method=sce"],
    "iamcl2r": ["", "method=er,tasks=31", "replace=false", "method=fd", "method=sce"],
    "pairs": ["", "kind=data,method=bct", "kind=backbone,method=er", "kind=size,method=fd"],
    "photos": ["path=photos", "path=p,method=er,by=class", "path=p,optimizer=adamw,epochs=3"],
    "pretrain": [
        "",
        "method=er",
        "data=imagenet32",
        "data=folder,seed=2",
        "data=tiny_imagenet,path=p",
    ],
}


def load(file, arguments=""):
    return importlib.import_module(f"configs.{file}").get_config(arguments)


def cases():
    return [(file, arguments) for file in FILES for arguments in ARGUMENTS[file]]


def test_every_file_is_tried_here():
    assert sorted(ARGUMENTS) == FILES


@pytest.mark.parametrize(("file", "arguments"), cases())
def test_every_name_in_a_configuration_is_a_valid_one(file, arguments):
    config = load(file, arguments)
    classes = max(config.get("pretrain_classes", (100,)))
    run = configs.run_of(config)
    labels = np.repeat(np.arange(classes), 20)
    run.check(TaskSequence(classes, 10, 10), labels, tiny.one_device())
    assert config.backbone.name in models.registered() and config.method in methods.names()
    for role in ("train", "query", "gallery"):
        spec = config.data.get(role)
        if spec is not None:
            fields = {field.name for field in source_fields(spec["source"])}
            assert {k for k in spec if k != "source"} <= fields, spec["source"]
    assert (
        set(config.backbone.arguments)
        == set(config_schema.backbone_arguments())
        == {argument for name in models.registered() for argument in models.parameters(name)}
    )
    assert json.loads(config.to_json())["epochs"] == config.epochs


def shrink(config, folder):
    """Tiny data, a tiny network, and so few images that there is one step."""
    config.update_from_flattened_dict(
        {
            "backbone.name": "one_conv",
            "num_prototypes": 16,
            "epochs": 1,
            "batch_size": 8,
            "mesh": "data:1",
        }
    )
    if "photos" in config.data:
        drawn_photos.draw(folder, ["pear", "plum"], 7)
        config.data.photos.path, config.data.photos.size = str(folder), 8
        return config
    glyphs = {"source": "glyphs", "look": "photo", "seed": 0, "size": 8}
    config.data.train = {**glyphs, "classes": (0, 2), "per_class": 4}
    if "pretrain_classes" in config:
        config.pretrain_classes = (2,)
        return config
    for role in ("query", "gallery"):
        config.data[role] = {**glyphs, "classes": (6, 9), "per_class": 3}
    config.tasks.initial, config.tasks.replace_at = 2, ()
    return config


# The others train and are evaluated in test_protocols.py.
@pytest.mark.parametrize("file", [f for f in FILES if f not in ("folders", "pairs")])
def test_every_configuration_runs_a_step(file, tmp_path):
    config = shrink(load(file), tmp_path / "photos")
    work = experiment.pretrain if "pretrain_classes" in config else experiment.train
    done = work(config, tmp_path / "run", tiny.session_of(config))
    chain = getattr(done, "chain", done)
    assert chain.numbers() == [0]
    line, *validation = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 1 and len(validation) == ("photos" in config.data)
    record = chain.record(0)
    assert record.config["optim"]["lr"] == config.optim.lr
    assert record.config == configs.plain(config)


def test_the_protocol_is_the_papers():
    seven, many = load("iamcl2r", "tasks=7"), load("iamcl2r", "tasks=31")
    for config, count, replaced in ((seven, 7, (0, 2, 4)), (many, 31, (0, 10, 20))):
        sequence = TaskSequence(100, config.tasks.initial, config.tasks.increment)
        assert len(sequence) == count and config.tasks.replace_at == replaced
        assert config.tasks.rehearsal == 20
    assert seven.num_prototypes == 1024 and seven.label_order == "descending"
    assert (seven.loss.lam, seven.loss.mu) == (0.1, 10.0)
    optim = seven.optim
    assert (optim.lr, optim.min_lr, optim.momentum, optim.weight_decay) == (1e-3, 1e-5, 0.9, 5e-4)
    assert (seven.epochs, seven.batch_size) == (70, 128)
    assert seven.data.train.per_class == 300
    assert (seven.data.query.split, seven.data.gallery.split) == ("train", "test")
    assert seven.data.mean == (0.5071, 0.4867, 0.4408)
    assert load("iamcl2r", "replace=false").tasks.replace_at == ()


def test_roles_of_the_embedded_glyphs_share_no_class():
    tasks, models_ = load("glyphs"), load("pretrain")
    spans = [tasks.data.train.classes, tasks.data.query.classes, models_.data.train.classes]
    spans.sort()
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert tasks.data.query.classes == tasks.data.gallery.classes
    assert tasks.data.query.seed != tasks.data.gallery.seed
    assert tasks.data.mean == models_.data.mean and tasks.data.std == models_.data.std


def test_settings_that_change_no_result_are_not_recorded():
    config = load("iamcl2r")
    before = configs.plain(config)
    config.update_from_flattened_dict(
        {
            "save_every": 7,
            "mesh": "data:1",
            "device_budget_mb": 9,
            **{f"data.{role}.in_memory": False for role in ("train", "query", "gallery")},
        }
    )
    assert configs.plain(config) == before
    assert not {"save_every", "mesh", "device_budget_mb"} & set(before)
    config.seed = 1
    assert configs.plain(config) != before


def test_the_record_names_the_type_that_auto_took():
    config = load("iamcl2r")
    config.dtype = "auto"
    assert configs.plain(config)["dtype"] == configs.run_of(config).dtype in models.DTYPES


# Fields: the schema, and who is at fault


@pytest.mark.parametrize(("file", "arguments"), cases())
def test_the_schema_lists_every_field_with_its_default(file, arguments):
    config, fields = load(file, arguments), {field.name: field for field in config_schema.schema()}
    for key in config.to_dict():
        assert any(name.partition(".")[0] == key for name in fields), key
    plain = config.to_dict()
    leaves = {
        f"{section}.{key}"
        for section in ("optim", "loss", "tasks")
        for key in plain.get(section, {})
    }
    leaves |= {f"data.{k}" for k, v in plain["data"].items() if not isinstance(v, dict)}
    photos = plain["data"].pop("photos", {})
    leaves |= {f"data.photos.splits.{k}" for k in photos.pop("splits", {})}
    leaves |= {f"data.photos.{k}" for k in photos}
    leaves |= {
        f"data.ROLE.{k}" for v in plain["data"].values() if isinstance(v, dict) for k in v
    } - {"data.ROLE.source"}
    assert leaves <= set(fields)
    assert all(field.rule.help for field in fields.values())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
@pytest.mark.parametrize("file", ["photos", "iamcl2r", "glyphs"])
def test_help_has_a_line_for_each_field_of_a_configuration(file, optimizer):
    config = load(file, f"optimizer={optimizer}")
    lines = [line.strip().partition(": ") for line in values(config_schema.schema(), config)]
    names = [name for name, _, _ in lines]
    assert len(set(names)) == len(names)
    own = {"optim.name", *(f"optim.{f.name}" for f in dataclasses.fields(OPTIMIZERS[optimizer]))}
    assert {name for name in names if name.startswith("optim.")} == own
    for name, _, text in lines:
        section = functools.reduce(lambda part, key: part[key], name.split("."), config)
        assert text.endswith(f"here {section!r})"), name


def test_help_passes_over_what_is_no_section():
    odd = ConfigDict({"data": 3, "tasks": "many", "optim": {"momentum": 0.5}, "own": {"x": 1}})
    (line,) = values(config_schema.schema(), odd)
    assert line.startswith("  optim.momentum: ") and line.endswith("here 0.5)")


@pytest.mark.parametrize(("file", "arguments"), cases())
def test_every_configuration_may_augment_and_log(file, arguments):
    config = load(file, arguments)
    assert {field.name for field in dataclasses.fields(cj.Preprocess)} <= set(config.data)
    assert {"log_every", "tensorboard", "save_every", "mesh", "remat"} <= set(config)


def test_the_defaults_of_the_configurations_are_those_of_the_library():
    fields = {field.name: field for field in reversed(config_schema.schema())}  # SGD's come first
    config = load("iamcl2r")
    for section in ("optim", "tasks"):
        for key, value in config[section].items():
            if key != "replace_at":  # a replacement needs models
                assert fields[f"{section}.{key}"].default == value, key
    for key in ("mean", "std", "crop_padding", "flip"):
        assert fields[f"data.{key}"].default == config.data[key]
    for key in ("epochs", "batch_size", "num_prototypes", "label_order", "seed", "dtype"):
        assert fields[key].default == config[key], key
    assert dict(methods.get("hoc").arguments) == config.loss.to_dict()


def test_fields_that_are_left_out_have_their_defaults():
    assert configs.run_of(ConfigDict()) == cj.Run()
    assert configs.session_of(ConfigDict()) == cj.Session()
    assert experiment.load_replacements(ConfigDict()) == {}
    some = ConfigDict({"method": "er", "optim": {"lr": 0.5}, "tasks": {"initial": 3}})
    assert configs.run_of(some) == cj.Run(
        method="er", optimizer=cj.Sgd(lr=0.5), tasks=cj.Tasks(initial=3)
    )


@pytest.mark.parametrize(
    ("config", "argument", "message"),
    [
        (
            {"optim": {"ler": 1}},
            "optim.ler",
            r"unknown field of optim\w* 'ler'\. Did you mean 'lr'\?",
        ),
        ({"tasks": {"intial": 1}}, "tasks.intial", r"unknown .* 'intial'\. Did you mean 'initial'"),
        ({"loss": {"lamb": 1}}, "loss.lamb", r"unknown .* 'lamb'\. Did you mean 'lam'\?"),
        (
            {"loss": {"weight": 1}},
            "loss.weight",
            "method 'hoc' has no number 'weight', which is fd's",
        ),
        ({"loss": {"lam": 1.5}}, "loss.lam", r"lam must be at least 0 and at most 1, got 1\.5"),
        ({"method": "fd", "loss": {"weight": -1}}, "loss.weight", "weight must be at least 0"),
        ({"method": 3}, "method", "method must be a text, got 3"),
        ({"backbone": {"name": 3}}, "backbone.name", r"backbone\.name must be a text, got 3"),
        ({"backbone": "resnet18"}, "backbone", "backbone must be a section of fields, got 'resn"),
        ({"optim": {"lr": "big"}}, "optim.lr", "lr must be a finite number, got 'big'"),
        ({"optim": {"lr": 10**400}}, "optim.lr", "lr must be a finite number"),
        ({"epochs": 2.5}, "epochs", r"epochs must be a whole number, got 2\.5"),
        ({"data": {"flip": "no"}}, "data.flip", "flip must be true or false, got 'no'"),
    ],
)
def test_an_error_of_a_configuration_names_its_field(config, argument, message):
    with pytest.raises(UserError, match=message) as caught:
        configs.run_of(ConfigDict(config))
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("argument", "role", "field"),
    [
        ("optimizer.lr", None, "optim.lr"),
        ("hoc.lam", None, "loss.lam"),
        ("fd.weight", None, "loss.weight"),
        ("mean", None, "data.mean"),
        ("crop_padding", None, "data.crop_padding"),
        ("pretraining_may_share", None, "data.pretraining_may_share"),
        ("size", None, "data.train.size"),
        ("path", "query", "data.query.path"),
        ("source", "train", "data.train.source"),
        ("tasks.initial", None, "tasks.initial"),
        ("num_prototypes", None, "num_prototypes"),
        ("mesh", None, "mesh"),
        ("workdir", None, "workdir"),
        ("k", None, None),
        (None, None, None),
        (None, "train", None),
    ],
)
def test_an_argument_of_the_library_is_found_as_a_field(argument, role, field):
    assert configs.field_of(argument, role) == field
    with pytest.raises(UserError, match="no") as caught, configs.located(role):
        raise UserError("no", argument)
    assert caught.value.argument == field


# Overrides

# ml_collections loads the file in an old way.
old_import = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def parsed(*argv):
    """The configuration that a program would get."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["program", *argv])
    values(["program", *argv])
    return values.config


@old_import
@pytest.mark.parametrize(("file", "arguments"), cases())
def test_every_field_can_be_overridden(file, arguments):
    config = load(file, arguments)
    unset = {"data_dir": "/data", "path": "/photos", "classes": (3, 7), "per_class": 5}
    unset |= {"width": 16, "patch": 4, "image_size": 32, "registers": 4, "in_memory": False}
    unset |= {"mean": (0.5,) * 3, "std": (0.2,) * 3, "epochs": 2, "lr": 0.5, "freeze_backbone": 1}
    unset |= {"split": "val"}
    fields = dict(config.items(preserve_field_references=False))
    leaves, rest = {}, [("", fields)]
    while rest:
        prefix, section = rest.pop()
        for key, value in section.items():
            if isinstance(value, ConfigDict) and len(value):
                rest.append((f"{prefix}{key}.", value))
            else:
                leaves[prefix + key] = unset[key] if value is None else value
    given = f"--config=configs/{file}.py" + (f":{arguments}" if arguments else "")
    overridden = parsed(given, *(f"--config.{key}={value}" for key, value in leaves.items()))
    for key, value in leaves.items():
        assert operator.attrgetter(key)(overridden) == value, key
    json.dumps(configs.plain(overridden)), json.dumps(configs.plain(config))


@old_import
def test_overriding_one_role_leaves_the_others_alone():
    data = parsed(
        "--config=configs/iamcl2r.py",
        "--config.data.query.data_dir=/here",
        "--config.data.gallery.classes=(0, 5)",
    ).data
    assert (data.query.data_dir, data.query.classes) == ("/here", None)
    assert (data.gallery.data_dir, data.gallery.classes) == (None, (0, 5))
    assert (data.train.data_dir, data.train.per_class) == (None, 300)


@old_import
def test_a_backbone_is_chosen_with_its_arguments():
    config = parsed(
        "--config=configs/iamcl2r.py",
        "--config.backbone.name=vit_ti16",
        "--config.backbone.arguments.patch=4",
        "--config.backbone.arguments.image_size=32",
    )
    run = configs.run_of(config)
    assert run.given_backbone.name == "vit_ti16"
    assert run.given_backbone.arguments == {"patch": 4, "image_size": 32}
    run.check(TaskSequence(100, 10, 15), np.repeat(np.arange(100), 20), tiny.one_device())
    assert dict(load("iamcl2r").backbone.arguments)["patch"] is None


# The text behind the colon


def test_arguments_take_the_type_of_their_default():
    args = parse_arguments("a=7,b=0.5,c,d=x", a=1, b=1.0, c=False, d="y", e=3)
    assert args.to_dict() == {"a": 7, "b": 0.5, "c": True, "d": "x", "e": 3}
    assert parse_arguments(None, a=1).a == 1 and parse_arguments("", a=1).a == 1
    for text, value in (("true", True), ("False", False), ("1", True), ("0", False)):
        assert parse_arguments(f"c={text}", c=not value).c is value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("taks=7", r"unknown argument of the configuration 'taks'\. Did you mean 'tasks'\?"),
        ("nothing=7", r"unknown argument .* 'nothing'\. Valid: replace, tasks\."),
        ("tasks=seven", "tasks must be int, got 'seven'"),
        ("tasks", "tasks must be int, got 'true'"),
        ("replace=maybe", "replace must be true or false, got 'maybe'"),
    ],
)
def test_wrong_arguments_are_refused_with_the_right_ones(text, message):
    with pytest.raises(UserError, match=message):
        parse_arguments(text, tasks=7, replace=True)


@pytest.mark.parametrize("file", FILES)
def test_an_unknown_argument_of_a_file_is_refused(file):
    with pytest.raises(UserError, match=r"unknown argument .* 'metod'\. Did you mean 'method'\?"):
        load(file, "metod=hoc")
    with pytest.raises(UserError, match="unknown method 'hcc'"):
        configs.run_of(load(file, "method=hcc"))


@pytest.mark.parametrize("file", FILES)
def test_a_file_says_what_it_is_and_how_to_run_it(file):
    doc = importlib.import_module(f"configs.{file}").__doc__
    assert f"configs/{file}.py" in doc and "python -m launch." in doc
    assert "Arguments: method=" in doc
