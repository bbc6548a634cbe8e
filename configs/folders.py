"""Class folders as a planned sequence of tasks: your own, or a public data set as it is downloaded.

    python -m launch.train --config=configs/folders.py:path=photos --workdir=DIR
    python -m launch.train --config=configs/folders.py:data=omniglot,path=omniglot --workdir=DIR
    python -m launch.evaluate --chain=DIR/chain --metric=recall@1

`data` says what lies at `path`:

    folders        train/CLASS, query/CLASS and gallery/CLASS; 10 classes, then 15 a task, 64 pixels
    tiny_imagenet  tiny-imagenet-200: train, and val with the table val.tsv (docs/sequences.md makes it).
                   20 classes, then 30 a task, 64 pixels; closed set
    caltech101     101_ObjectCategories without BACKGROUND_Google: 11 classes, then 10 a task, 64 pixels;
                   retrieval among the last 30 classes, an open set
    omniglot       images_background (964 characters, called ALPHABET/CHARACTER): 64, then 150 a task, 28
                   pixels; retrieval among the 659 characters of images_evaluation, an open set
    grocery        GroceryStoreDataset/dataset, its 81 products: 21, then 10 a task, 64 pixels; retrieval
                   in test, a closed set

All but `folders` have 7 tasks, and one set of pictures as query and gallery: each picture leaves itself
out. One model learns all tasks; `replace=true` takes pre-trained ones at tasks 0, 2 and 4
(`--config.pretrained=CHAIN`, see configs/pretrain.py) and fine-tunes at the paper's rate.

Arguments: method=hoc|er|... (docs/methods.md), data=folders|tiny_imagenet|caltech101|omniglot|grocery,
path=FOLDER, size=PIXELS, initial=CLASSES, increment=CLASSES, backbone=resnet18, epochs=70,
replace=true|false, seed=0, optimizer=sgd|adamw|lars.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from compat_jax.errors import unknown
from configs.common import base_config, cifar_input, parse_arguments, source

ROLES = ("train", "query", "gallery")


def own(path: str) -> dict[str, Any]:
    """Return classes of the tasks and data sections of train/CLASS, query/CLASS and gallery/CLASS."""
    roles = {role: _folder(path, role) for role in ROLES}
    return {"tasks": (10, 15), "size": 64, **roles}


def tiny_imagenet(path: str) -> dict[str, Any]:
    """Return the same for tiny-imagenet-200; what lists boxes in a class folder is no picture."""
    val = source("table", path=_within(path, "val/val.tsv"))
    train = _folder(path, "train", exclude=("*_boxes.txt",))
    return {"tasks": (20, 30), "size": 64, **_retrieval(train, val)}


def caltech101(path: str) -> dict[str, Any]:
    """Return the same for 101_ObjectCategories."""
    retrieval, train = (
        _folder(path, "", exclude=("BACKGROUND_Google",), classes=classes)
        for classes in ((71, 101), (0, 71))
    )
    return {"tasks": (11, 10), "size": 64, **_retrieval(train, retrieval)}


def omniglot(path: str) -> dict[str, Any]:
    """Return the same for omniglot, whose alphabets hold the folders of their characters."""
    train, retrieval = (
        _folder(path, name, class_folders="path")
        for name in ("images_background", "images_evaluation")
    )
    return {"tasks": (64, 150), "size": 28, **_retrieval(train, retrieval)}


def grocery(path: str) -> dict[str, Any]:
    """Return the same for GroceryStoreDataset/dataset.

    Its products lie two or three folders deep, one of them elsewhere in test than in train.
    """
    train, retrieval = (_folder(path, name, class_folders="name") for name in ("train", "test"))
    return {"tasks": (21, 10), "size": 64, **_retrieval(train, retrieval)}


DATA: dict[str, Callable[[str], dict[str, Any]]] = {
    "folders": own,
    "tiny_imagenet": tiny_imagenet,
    "caltech101": caltech101,
    "omniglot": omniglot,
    "grocery": grocery,
}


def _folder(path, name, **fields):
    return source("folder", path=_within(path, name), **fields)


def _within(path, name):
    """A folder within the path; None without a path, so that the missing field is named."""
    return "/".join(filter(None, (path.rstrip("/"), name))) if path else None


def _retrieval(train, retrieval):
    return {"train": train, "query": retrieval, "gallery": retrieval}


def get_config(arguments: str | None = None) -> ConfigDict:
    """The configuration; see the module's docstring for the arguments."""
    args = parse_arguments(
        arguments,
        method="hoc",
        optimizer="sgd",
        data="folders",
        path="",
        size=0,
        initial=0,
        increment=0,
        backbone="resnet18",
        epochs=70,
        replace=False,
        seed=0,
    )
    if args.data not in DATA:
        raise unknown("data", args.data, DATA)
    layout = DATA[args.data]
    config = base_config(args.method, args.optimizer)
    config.seed, config.epochs, config.backbone.name = args.seed, args.epochs, args.backbone
    if args.optimizer == "sgd" and not args.replace:
        config.optim.lr, config.optim.min_lr = 0.01, 0.0001
    if args.data == "omniglot":  # room for more than its 964 characters
        config.num_prototypes = 2048
    initial, increment = layout(args.path)["tasks"]
    config.tasks = ConfigDict(
        {
            "initial": args.initial or initial,
            "increment": args.increment or increment,
            "rehearsal": 20,
            "first_loss": "method",
            "replace_at": (0, 2, 4) if args.replace else (),
        }
    )
    config.pretrained = ""
    roles = {role: layout(args.path)[role] for role in ROLES}  # each with fields of its own
    for section in roles.values():
        section["size"] = args.size or layout(args.path)["size"]
    config.data = ConfigDict({**roles, **cifar_input(), "pretraining_may_share": False})
    config.data.flip = args.data != "omniglot"  # a mirrored character is another one
    return config
