"""Chains from PyTorch's weight files, and files from the versions of a chain."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compat_jax import models
from compat_jax.chain import Chain, Record
from compat_jax.errors import UserError
from compat_jax.interop import torch_files
from compat_jax.interop.weights import from_torch, is_bare, to_torch
from compat_jax.methods import build_embedder, get_method
from compat_jax.models.layers import linear_init

_CHECKPOINT = re.compile(r"ckpt_(\d+)\.(pt|pth|safetensors)")


def checkpoints(folder: str | Path) -> list[Path]:
    """The files `ckpt_0.pt`, `ckpt_1.pt`, ... of a folder, as the reference writes them.

    Args:
      folder: that holds them; other files in it do not matter.

    Returns:
      Their paths, in the order of their numbers.

    Raises:
      UserError: none, a gap in the numbers, or a number twice.

    Source: `evaluate` in `src/iamcl2r/eval.py`.
    """
    matches = [(m, p) for p in Path(folder).iterdir() if (m := _CHECKPOINT.fullmatch(p.name))]
    numbers = sorted(int(match[1]) for match, _ in matches)
    if not numbers:
        raise UserError(
            f"{folder} has no ckpt_0.pt, ckpt_1.pt, ...: give a folder of them, or a file"
        )
    if numbers != list(range(len(numbers))):
        raise UserError(
            f"{folder} has checkpoints {numbers}, needed is each of 0..{max(numbers)} once: a chain "
            "has no gaps"
        )
    return [path for _, path in sorted(matches, key=lambda pair: int(pair[0][1]))]


def adopt(
    state_dict: Mapping[str, np.ndarray], shared: Record
) -> tuple[dict[str, Any], Record, list[str]]:
    """A state dict as a version: its variables and what the record says of their shapes.

    Args:
      state_dict: arrays by name, see `weights.from_torch`.
      shared: a record whose method, backbone with arguments, image shape, K and seed hold for it.

    Returns:
      The variables; `shared` with `feature_size` and `head_classes` of this network; and the names
      of the parts that the state dict lacks, which were drawn anew from the seed.

    Raises:
      UserError: tensors that do not fit that network.
    """
    method = get_method(shared.method)
    rows = [a.shape[0] for n, a in state_dict.items() if n.removeprefix("module.") == "fc2.weight"]
    head = None if method.fixed_simplex else (rows or [shared.num_prototypes])[0]
    backbone = models.create_backbone(shared.backbone, shared.backbone_arguments)
    embedder = build_embedder(method, backbone, shared.num_prototypes, head, jnp.float32)
    key = jax.random.key(shared.seed)
    variables = from_torch(state_dict, _template(embedder, tuple(shared.image_shape)))
    params = variables["params"]
    fresh = sorted(params.keys() - {"backbone"}) if is_bare(state_dict) else []
    for part in fresh:
        params[part] = {"kernel": linear_init(key, params[part]["kernel"].shape, jnp.float32)}
    last = params["fc1" if method.fixed_simplex else "fc2"]["kernel"]
    record = dataclasses.replace(
        shared,
        feature_size=last.shape[1 if method.fixed_simplex else 0],
        head_classes=head,
    )
    return variables, record, fresh


@functools.lru_cache(maxsize=4)
def _template(embedder, image_shape):
    """Names and shapes of an embedder's variables; a folder's files mostly share them."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(lambda x: embedder.init(jax.random.key(0), x, train=False), images)


def import_file(file: str | Path, chain: Chain, shared: Record) -> list[str]:
    """A weight file as the only version of a new chain: a pre-trained model.

    Args:
      file: see `torch_files.read`.
      chain: empty.
      shared: see `adopt`; its task is set to None, by which a pre-trained model is known.

    Returns:
      The parts that were drawn anew, see `adopt`.

    Raises:
      UserError: the chain has versions, or the file does not fit.
    """
    _require_empty(chain)
    variables, record, fresh = adopt(torch_files.read(file), shared)
    source = f"imported from {Path(file).name}"
    chain.add(variables, dataclasses.replace(record, task=None, parent=None, replaced_by=source))
    return fresh


def import_folder(
    folder: str | Path,
    chain: Chain,
    shared: Record,
    classes_seen: Sequence[int] = (),
    replace_at: Sequence[int] = (),
) -> None:
    """The checkpoints of a task sequence as the versions of a new chain, in their order.

    All files are checked before the first is added.

    Args:
      folder: see `checkpoints`.
      chain: empty.
      shared: see `adopt`.
      classes_seen: after each task; a learnable head tells by itself.
      replace_at: tasks that started from a pre-trained model.

    Raises:
      UserError: the chain has versions, or a file does not fit.
    """
    _require_empty(chain)
    files = checkpoints(folder)
    for file in files:
        _adopt_file(file, shared)
    for task, file in enumerate(files):
        variables, record = _adopt_file(file, shared)
        replaced = task in replace_at
        known = classes_seen[task] if task < len(classes_seen) else shared.classes_seen
        record = dataclasses.replace(
            record,
            task=task,
            classes_seen=known if record.head_classes is None else record.head_classes,
            parent=None if replaced or not task else task - 1,
            replaced_by="pre-trained file of the reference" if replaced else None,
        )
        chain.add(variables, record, number=task)


def export_version(chain: Chain, number: int, file: str | Path) -> dict[str, np.ndarray]:
    """A version of a chain as a weight file that the reference loads with `strict=True`.

    Args:
      chain: to take it from.
      number: of the version; negative counts from the end.
      file: see `torch_files.write`.

    Returns:
      What was written.

    Raises:
      UserError: no such version, or PyTorch is needed and not installed.
    """
    state_dict = to_torch(chain.open(number).variables)
    torch_files.write(file, state_dict)
    return state_dict


def _adopt_file(file, shared):
    try:
        variables, record, fresh = adopt(torch_files.read(file), shared)
        if fresh:
            raise UserError(f"holds a backbone alone, without {' and '.join(fresh)}")
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return variables, record


def _require_empty(chain):
    if chain.numbers():
        raise UserError(f"there is a chain in {chain.path} already: import into another folder")
