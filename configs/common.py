"""Shared by the configurations: typed arguments, and the sections of a configuration."""

import dataclasses
import inspect
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from compat_jax import methods
from compat_jax.config_schema import backbone_arguments
from compat_jax.data import Preprocess
from compat_jax.data.registry import source_fields
from compat_jax.errors import UserError, unknown
from compat_jax.training.optimizer import OPTIMIZERS


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


def source(source_name: str, /, **given: Any) -> dict[str, Any]:
    """Return a data section with every field of a source, so that a flag can set each of them.

    Args:
      source_name: name of the source.
      **given: fields that are set; the others have their defaults.

    Raises:
      UserError: unknown source or field.
    """
    fields = {field.name: field for field in source_fields(source_name)}
    for name in given:
        if name not in fields:
            raise unknown(f"field of data source {source_name!r}", name, fields)
    section: dict[str, Any] = {"source": source_name}
    for name, field in fields.items():
        value = given.get(name, field.default)
        unset = value is None or value is inspect.Parameter.empty
        section[name] = placeholder(_kind(field.kind)) if unset else value
    return section


def _kind(kind):
    """The Python type of a field that may be unset."""
    for found in (tuple, bool, int, float):
        if found.__name__ in str(kind):
            return found
    return str


def tfds_source(name: str, split: str, **fields: Any) -> dict[str, Any]:
    """Return a data section that reads TFDS, 32 pixels a side."""
    return source("tfds", name=name, split=split, **{"size": 32, **fields})


def cifar_input() -> dict[str, Any]:
    """Return normalisation and augmentation of pictures of 32 pixels, as the reference has them."""
    return dataclasses.asdict(Preprocess())


def base_config(method: str, optimizer: str = "sgd") -> ConfigDict:
    """The fields that every run has, with the reference's values.

    Args:
      method: name of the training method.
      optimizer: name of the optimiser, whose own fields and defaults the section `optim` gets.

    Raises:
      UserError: unknown name.

    Source: `src/iamcl2r/params.py` and `src/iamcl2r/methods/hoc.py`.
    """
    kind: Any = OPTIMIZERS.get(optimizer)
    if kind is None:
        raise unknown("optimizer", optimizer, OPTIMIZERS, "optim.name")
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
            "remat": "none",
            "epochs": 70,
            "batch_size": 128,
            "save_every": 0,
            "log_every": 0,
            "tensorboard": "",
            "device_budget_mb": 0,
            "mesh": "data:-1",
            "loss": dict(methods.get(method).arguments),
            "optim": {"name": optimizer, **dataclasses.asdict(kind())},
        }
    )
