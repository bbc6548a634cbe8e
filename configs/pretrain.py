"""The models that replace others in a sequence: the same network on more and more classes.

    python -m launch.pretrain --config=configs/pretrain.py:method=hoc,data=glyphs --workdir=DIR

Then `launch.train --config.pretrained=DIR/chain`. The reference's replacements are ResNet-18 on 100,
300 and 600 classes of ImageNet32, trained against the same 1024 prototypes: `data=imagenet32`
(TFDS imagenet_resized/32x32). `data=tiny_imagenet` takes 34, 100 and 200 classes of Tiny-ImageNet at 32
pixels in their place (path=tiny-imagenet-200), `data=folder` class folders (path=FOLDER).

Classes are written to the prototypes in ascending order, those of the tasks in descending order, so
that the two share the simplex and no prototype.

All methods with a fixed simplex start from the same models, trained by cross-entropy on the simplex, and
all with a learnable head from the same others.

Arguments: method=hoc|er|... (docs/methods.md), data=glyphs|imagenet32|tiny_imagenet|folder, path=FOLDER,
size=32, backbone=resnet18, seed=0, optimizer=sgd|adamw|lars.
"""

from ml_collections import ConfigDict

from compat_jax import methods
from compat_jax.errors import unknown
from configs import folders, glyphs
from configs.common import base_config, cifar_input, parse_arguments, source, tfds_source

DATA = ("glyphs", "imagenet32", "tiny_imagenet", "folder")


def head_of(method: str) -> str:
    """Return the method that trains the models which a method starts from: sce or er, by its head."""
    return "sce" if methods.get(method).fixed_simplex else "er"


def get_config(arguments: str | None = None) -> ConfigDict:
    """The configuration; see the module's docstring for the arguments."""
    args = parse_arguments(
        arguments,
        method="hoc",
        optimizer="sgd",
        data="glyphs",
        path="",
        size=32,
        backbone="resnet18",
        seed=0,
    )
    if args.data not in DATA:
        raise unknown("data", args.data, DATA)
    config = base_config(head_of(args.method), args.optimizer)
    config.seed = args.seed
    config.label_order = "ascending"
    config.optim.lr, config.optim.min_lr = 0.1, 0.001
    if args.data == "glyphs":
        glyphs.small_network(config)
        config.epochs = 9
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
    config.backbone.name = args.backbone
    config.pretrain_classes = (100, 300, 600)
    train = tfds_source("imagenet_resized/32x32", "train", size=args.size)
    if args.data == "folder":
        train = source("folder", path=args.path or None, size=args.size)
    elif args.data == "tiny_imagenet":
        config.pretrain_classes = (34, 100, 200)
        train = {**folders.tiny_imagenet(args.path)["train"], "size": args.size}
    config.data = ConfigDict(
        {
            "train": train,
            **cifar_input(),
        }
    )
    return config
