"""The paper's protocol: fine-tuning on CIFAR-100 with model replacements, retrieval on CIFAR-10.

    python -m launch.train --config=configs/iamcl2r.py:method=hoc,tasks=7 --workdir=DIR
    python -m launch.evaluate --chain=DIR/chain

Reproduces IAM-CL2R of the paper and of miccunifi/iamcl2r (`configs/hoc_7tasks.yaml` and its
siblings). CIFAR comes through TFDS (TFDS_DATA_DIR); the models that replace others come from
`launch.pretrain` (`configs/pretrain.py`), whose chain is `--config.pretrained`. Without it
(`replace=false`) one model is fine-tuned all along: CL2R. Models of several chains, of any architecture,
replace each other in turn with `--config.pretrained=CHAIN:NUMBER,CHAIN:NUMBER,...`.

Arguments: method=hoc|er|... (docs/methods.md), tasks=7|31, replace=true|false, optimizer=sgd|adamw|lars.
"""

from ml_collections import ConfigDict

from compat_jax.errors import UserError
from configs.common import base_config, cifar_input, parse_arguments, tfds_source

_INCREMENTS = {7: 15, 31: 3}
_REPLACE_AT = {7: (0, 2, 4), 31: (0, 10, 20)}


def get_config(arguments: str | None = None) -> ConfigDict:
    """The configuration; see the module's docstring for the arguments."""
    args = parse_arguments(arguments, method="hoc", optimizer="sgd", tasks=7, replace=True)
    if args.tasks not in _INCREMENTS:
        raise UserError(f"tasks must be 7 or 31, got {args.tasks}")
    config = base_config(args.method, args.optimizer)
    config.tasks = ConfigDict(
        {
            "initial": 10,
            "increment": _INCREMENTS[args.tasks],
            "rehearsal": 20,
            "first_loss": "method",
            "replace_at": _REPLACE_AT[args.tasks] if args.replace else (),
        }
    )
    config.pretrained = ""
    config.data = ConfigDict(
        {
            "train": tfds_source("cifar100", "train", per_class=300),
            "query": tfds_source("cifar10", "train"),
            "gallery": tfds_source("cifar10", "test"),
            **cifar_input(),
            "pretraining_may_share": True,
        }
    )
    return config
