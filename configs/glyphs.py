"""IAM-CL2R on the embedded glyphs, no download: what `launch.quickstart` runs.

    python -m launch.train --config=configs/glyphs.py:method=hoc --workdir=DIR

A small network, 7 tasks, three pre-trained models of growing quality (`configs/pretrain.py:data=glyphs`)
that come in at tasks 0, 2 and 4. Pre-training reads mostly clean print; tasks and retrieval are noisy
photographs of characters of which no role shares one.

Arguments: method=hoc|er|... (docs/methods.md), replace=true|false, seed=0, optimizer=sgd|adamw|lars.
"""

import dataclasses

from ml_collections import ConfigDict

from compat_jax.data import Preprocess
from configs.common import base_config, parse_arguments, source

SIZE = 24
PRETRAIN_CLASSES = (120, 220, 600)
TASK_CLASSES = (1600, 1810)
RETRIEVAL_CLASSES = (2000, 2060)


def photographs(classes, per_class, seed):
    """Glyphs in the look of tasks and retrieval."""
    return source(
        "glyphs", classes=classes, per_class=per_class, look="photo", seed=seed, size=SIZE
    )


def small_network(config: ConfigDict) -> None:
    """Network and input of the glyph configurations."""
    config.num_prototypes = 1024
    config.backbone.name = "resnet_small"
    config.batch_size = 128


def input_fields() -> dict:
    """Normalisation and augmentation of glyphs: shifts, no mirror images."""
    return dataclasses.asdict(
        Preprocess(mean=(0.7,) * 3, std=(0.3,) * 3, crop_padding=2, flip=False)
    )


def get_config(arguments: str | None = None) -> ConfigDict:
    """The configuration; see the module's docstring for the arguments."""
    args = parse_arguments(arguments, method="hoc", optimizer="sgd", replace=True, seed=0)
    config = base_config(args.method, args.optimizer)
    small_network(config)
    config.seed = args.seed
    config.epochs = 8
    config.optim.lr = 0.2
    config.optim.min_lr = 0.002
    config.tasks = ConfigDict(
        {
            "initial": 30,
            "increment": 30,
            "rehearsal": 5,
            "first_loss": "method",
            "replace_at": (0, 2, 4) if args.replace else (),
        }
    )
    config.pretrained = ""
    config.data = ConfigDict(
        {
            "train": photographs(TASK_CLASSES, 40, 2),
            "query": photographs(RETRIEVAL_CLASSES, 170, 3),
            "gallery": photographs(RETRIEVAL_CLASSES, 20, 4),
            "pretraining_may_share": False,
            **input_fields(),
        }
    )
    return config
