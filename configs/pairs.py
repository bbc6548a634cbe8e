"""Two versions, old and new: the pairs in which compatible training is usually compared.

    python -m launch.train --config=configs/pairs.py:kind=class,method=hoc --workdir=DIR
    python -m launch.evaluate --chain=DIR/chain --metric=cmc@1,cmc@5,map

Both versions are trained from fresh weights on CIFAR-100 (TFDS_DATA_DIR): the old one by cross-entropy
(`tasks.first_loss`), the new one on all of it and against the old one, by the method. Queries are the
test pictures of all 100 classes, in a gallery of the same pictures: each leaves itself out. `kind` says
what the new version has more of:

    class     the first 50 classes, then all 100 (ml-fct, BT2; "extended class" elsewhere)
    data      30 % of the pictures of every class, then all ("extended data" of AdvBCT and MixBCT)
    backbone  as class, and another network, `new_backbone` (ResNet-18 -> ResNet-50, as openBCT and BT2)
    size      as class, and features of 128 numbers, then 256. The old version's are moved into the
              larger space by one matrix product (`launch.enlarge` moves galleries): simplex methods only

Compared with the tables of ml-fct and BT2 (`backbone=resnet50` there): the optimiser is SGD as in the
reference, 100 epochs in batches of 128 at 0.1; features of simplex methods have 128 numbers as there,
but those of methods with a learnable head are as wide as the backbone, and such a method can only
compare backbones of one width.

Arguments: method=hoc|er|... (docs/methods.md), kind=class|data|backbone|size, backbone=resnet18,
new_backbone=NAME, epochs=100, seed=0, optimizer=sgd|adamw|lars.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from compat_jax.config_schema import backbone_arguments
from compat_jax.errors import unknown
from configs.common import base_config, cifar_input, parse_arguments, tfds_source

KINDS = ("class", "data", "backbone", "size")
CLASSES = 100


def get_config(arguments: str | None = None) -> ConfigDict:
    """The configuration; see the module's docstring for the arguments."""
    args = parse_arguments(
        arguments,
        method="hoc",
        optimizer="sgd",
        kind="class",
        backbone="resnet18",
        new_backbone="",
        epochs=100,
        seed=0,
    )
    if args.kind not in KINDS:
        raise unknown("kind", args.kind, KINDS)
    config = base_config(args.method, args.optimizer)
    config.seed, config.epochs = args.seed, args.epochs
    config.backbone.name = args.backbone
    config.num_prototypes = 257 if args.kind == "size" else 129
    config.first_prototypes = 129 if args.kind == "size" else 0
    if args.optimizer == "sgd":
        config.optim.lr, config.optim.min_lr = 0.1, 0.0
    initial = CLASSES if args.kind == "data" else CLASSES // 2
    config.tasks = ConfigDict(
        {
            "initial": initial,
            "increment": CLASSES - initial,
            "everything": True,
            "first_share": 0.3 if args.kind == "data" else 1.0,
            "first_loss": "cross_entropy",
            "fresh_at": (1,),
        }
    )
    new = args.new_backbone or ("resnet50" if args.kind == "backbone" else "")
    config.fresh_backbone = ConfigDict(
        {"name": new, "arguments": {k: placeholder(int) for k in backbone_arguments()}}
    )
    config.data = ConfigDict(
        {
            "train": tfds_source("cifar100", "train"),
            "query": tfds_source("cifar100", "test"),
            "gallery": tfds_source("cifar100", "test"),
            **cifar_input(),
        }
    )
    return config
