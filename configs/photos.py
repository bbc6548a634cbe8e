"""Your own photos, month after month: every call trains the next version on what is new.

    python -m launch.train --config=configs/photos.py:path=photos --workdir=runs/shop
    python -m launch.evaluate --chain=runs/shop/chain

`path` is a folder with one sub-folder of pictures per class, or a table (.csv, .parquet) with the
columns path and label. The first call makes version 0. Add photos or classes and give the same command
again: it makes the next version, and says so if nothing is new. New classes get the next free
prototypes, pictures of earlier classes are rehearsed, and the assignment of pictures to training,
validation, query and gallery is kept in WORKDIR/pictures.csv.

With `weights=FILE` (see configs/weights.md) version 0 puts a pre-trained backbone onto the simplex:
embed your gallery with it once, and never again after. Another `backbone` or `weights` later replaces
the model; old galleries stay searchable.

Arguments: method=hoc|er|... (docs/methods.md), path=DIR|FILE, size=224, backbone=resnet18, weights=FILE,
optimizer=sgd|adamw|lars, by=picture|class (closed or open set), epochs=20, batch=64, seed=0.
"""

import dataclasses

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from compat_jax.data import Preprocess
from compat_jax.data.ledger import Splits
from configs.common import base_config, parse_arguments


def get_config(arguments: str | None = None) -> ConfigDict:
    """The configuration; see the module's docstring for the arguments."""
    args = parse_arguments(
        arguments,
        path="",
        size=224,
        backbone="resnet18",
        weights="",
        method="hoc",
        optimizer="sgd",
        by="picture",
        epochs=20,
        batch=64,
        seed=0,
    )
    config = base_config(args.method, args.optimizer)
    config.seed = args.seed
    config.epochs, config.batch_size = args.epochs, args.batch
    config.backbone.name, config.weights, config.ema = args.backbone, args.weights, False
    if args.method == "hoc":
        # The paper's 0.1 is for long fine-tuning of pre-trained models; in short months it learns new
        # classes too slowly, and searched old galleries worse as well (docs/results.md).
        config.loss.lam = 0.5
    config.start = ""
    config.keep = "last"
    if args.optimizer == "sgd":
        # From scratch or onto the simplex a tenth is usual; fine-tuning what is there takes less.
        config.optim.lr, config.optim.min_lr = 0.01, 0.0001
    config.adopt = ConfigDict(
        {
            "epochs": placeholder(int),
            "lr": 0.1 if args.optimizer == "sgd" and not args.weights else placeholder(float),
            "freeze_backbone": placeholder(int),
        }
    )
    config.validate_every = 0
    config.tasks = ConfigDict({"rehearsal": 20})
    config.data = ConfigDict(
        {
            "photos": {
                "path": args.path,
                "size": args.size,
                "resize": "crop",
                "filter": "bicubic",
                "crop": 1.0,
                "on_bad": "stop",
                "aliases": "",
                "splits": {**dataclasses.asdict(Splits()), "by": args.by},
            },
            **dataclasses.asdict(Preprocess()),
            "mean": placeholder(tuple),
            "std": placeholder(tuple),
            "crop_padding": 0,
            "random_crop": 0.35,
        }
    )
    return config
