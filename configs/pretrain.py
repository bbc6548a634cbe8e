"""The models that replace others in a sequence: the same network on more and more classes.

    python -m launch.pretrain --config=configs/pretrain.py:method=hoc,data=glyphs --workdir=DIR

Then `launch.train --config.pretrained=DIR/chain`. The reference's replacements are ResNet-18 on 100,
300 and 600 classes of ImageNet32, trained against the same 1024 prototypes: `data=imagenet32`
(TFDS imagenet_resized/32x32). `data=folder` takes class folders (`--config.data.train.path=`).

Classes are written to the prototypes in ascending order, those of the tasks in descending order, so
that the two share the simplex and no prototype.

Arguments: method=hoc|sce|fd (cross-entropy on the simplex)|er (learnable head),
data=glyphs|imagenet32|folder, seed=0, optimizer=sgd|adamw|lars.
"""

from ml_collections import ConfigDict

from compat_jax.errors import unknown
from configs import glyphs
from configs.common import base_config, parse_arguments, source, tfds_source

METHODS = ("hoc", "sce", "fd", "er")
DATA = ("glyphs", "imagenet32", "folder")


def get_config(arguments: str | None = None) -> ConfigDict:
    """The configuration; see the module's docstring for the arguments."""
    args = parse_arguments(arguments, method="hoc", optimizer="sgd", data="glyphs", seed=0)
    if args.method not in METHODS:
        raise unknown("method", args.method, METHODS)
    if args.data not in DATA:
        raise unknown("data", args.data, DATA)
    config = base_config(args.method if args.method == "er" else "sce", args.optimizer)
    config.seed = args.seed
    config.label_order = "ascending"
    config.optim.lr, config.optim.min_lr = 0.1, 0.001
    if args.data == "glyphs":
        glyphs.small_network(config)
        config.epochs = 6
        config.pretrain_classes = glyphs.PRETRAIN_CLASSES
        train = source(
            "glyphs",
            classes=(0, max(glyphs.PRETRAIN_CLASSES)),
            per_class=20,
            look="print",
            seed=1,
            size=glyphs.SIZE,
            photo_share=0.1,
        )
        config.data = ConfigDict({"train": train, **glyphs.input_fields()})
        return config
    config.epochs = 70
    config.pretrain_classes = (100, 300, 600)
    train = tfds_source("imagenet_resized/32x32", "train")
    if args.data == "folder":
        train = source("folder", size=32)
    config.data = ConfigDict(
        {
            "train": train,
            "mean": (0.5071, 0.4867, 0.4408),
            "std": (0.2675, 0.2565, 0.2761),
            "crop_padding": 4,
            "flip": True,
        }
    )
    return config
