"""What the configurations share: typed arguments, and the sections of a configuration."""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from compat_jax import methods
from compat_jax.config import backbone_arguments
from compat_jax.errors import UserError, unknown


def parse_arguments(text: str | None, **defaults: Any) -> ConfigDict:
    """Typed fields from the text behind the colon of `--config=FILE.py:key=value,key=value`.

    Args:
      text: e.g. "method=hoc,tasks=7"; a bare key is True.
      **defaults: every valid key with its default, whose type the value takes.

    Returns:
      A ConfigDict of all keys.

    Raises:
      UserError: unknown key (with the nearest), value of another type.
    """
    fields = dict(defaults)
    for part in filter(None, (text or "").split(",")):
        key, has_value, value = part.partition("=")
        if key not in defaults:
            raise unknown("argument of the configuration", key, defaults)
        fields[key] = _typed(key, value if has_value else "true", type(defaults[key]))
    return ConfigDict(fields)


def _typed(key, value, kind):
    if kind is bool:
        if value.lower() not in ("true", "false", "1", "0"):
            raise UserError(f"{key} must be true or false, got {value!r}")
        return value.lower() in ("true", "1")
    try:
        return kind(value)
    except ValueError as error:
        raise UserError(f"{key} must be {kind.__name__}, got {value!r}") from error


def tfds_source(name: str, split: str, **fields: Any) -> dict[str, Any]:
    """A data section that reads TFDS; what is left unset can still be set by a flag."""
    return {
        "source": "tfds",
        "name": name,
        "split": split,
        "size": 32,
        "data_dir": placeholder(str),
        "in_memory": True,
        "classes": placeholder(tuple),
        "per_class": placeholder(int),
        **fields,
    }


def base_config(method: str) -> ConfigDict:
    """The fields that every run has, with the reference's values.

    Source: `src/iamcl2r/params.py` and `src/iamcl2r/methods/hoc.py`.
    """
    return ConfigDict(
        {
            "method": method,
            "seed": 0,
            "num_prototypes": 1024,
            "label_order": "descending",
            "backbone": {
                "name": "resnet18",
                "arguments": {k: placeholder(int) for k in backbone_arguments()},
            },
            "dtype": "float32",
            "epochs": 70,
            "batch_size": 128,
            "save_every": 0,
            "device_budget_mb": 0,
            "mesh": "data:-1",
            "loss": dict(methods.get(method).arguments),
            "optim": {
                "lr": 0.001,
                "min_lr": 0.00001,
                "momentum": 0.9,
                "weight_decay": 5e-4,
                "decay": "package",
                "schedule": "cosine",
            },
        }
    )
