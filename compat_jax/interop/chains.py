"""Chains of PyTorch's weight files, and weight files of a chain's versions."""

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from compat_jax import models
from compat_jax.chain import Chain, Record
from compat_jax.errors import UserError
from compat_jax.files import absolute
from compat_jax.interop import torch_files
from compat_jax.interop.image_settings import ImageSettings
from compat_jax.interop.tensors import shown
from compat_jax.interop.torch_files import WeightFile
from compat_jax.interop.weights import Misfit, convert, head_rows, overlap, to_torch
from compat_jax.models import Embedder
from compat_jax.models.layers import linear_init
from compat_jax.training import Run
from compat_jax.training.task import version_record

PathLike: TypeAlias = str | os.PathLike[str]
_CHECKPOINT = re.compile(r"ckpt_(\d+)\.(pt|pth|bin|safetensors)")


@dataclasses.dataclass(frozen=True)
class Adopted:
    """Weights of a file as the variables of a network.

    Attributes:
      variables: {"params", "batch_stats"}.
      embedder: the network.
      head_classes: of a learnable head; None for a fixed simplex.
      fresh: layers that the weights lack, drawn from the run's seed.
    """

    variables: dict[str, Any]
    embedder: Embedder
    head_classes: int | None
    fresh: tuple[str, ...]


def checkpoints(folder: PathLike) -> list[Path]:
    """List the files `ckpt_0.pt`, `ckpt_1.pt`, ... of a folder, as the reference writes them.

    Args:
      folder: that has them; its other files do not matter.

    Returns:
      Their paths, in the order of their numbers.

    Raises:
      UserError: none, a gap in the numbers, or a number twice.

    Source: `evaluate` in `src/iamcl2r/eval.py`.
    """
    files = Path(absolute(folder)).iterdir()
    matches = [(m, p) for p in files if (m := _CHECKPOINT.fullmatch(p.name))]
    numbers = sorted(int(match[1]) for match, _ in matches)
    if not numbers:
        raise UserError(
            f"{folder} has no ckpt_0.pt, ckpt_1.pt, ...: give a folder of them, or a file"
        )
    if numbers != list(range(len(numbers))):
        raise UserError(
            f"{folder} has checkpoints {numbers[:40]}, needed is each of 0..{max(numbers)} once: a "
            "chain has no gaps"
        )
    return [path for _, path in sorted(matches, key=lambda pair: int(pair[0][1]))]


def adopt(
    state_dict: Mapping[str, np.ndarray], run: Run, image_shape: tuple[int, int, int]
) -> Adopted:
    """Turn a state dict into the variables of a run's network.

    Args:
      state_dict: arrays by name, see `weights.from_torch`.
      run: its method, backbone, `num_prototypes`, `label_order` and seed hold for the weights.
      image_shape: (height, width, channels) of the network's input.

    Raises:
      UserError: tensors that do not fit that network, with what would fit.
    """
    method = run.given_method
    classes = None
    if not method.fixed_simplex:
        classes = head_rows(state_dict) or run.num_prototypes
    head = method.head(run.num_prototypes, run.label_order, classes or 0)
    embedder = head.embedder(run.given_backbone.build(), jnp.float32)
    template = _template(embedder, image_shape)
    try:
        variables, fresh = convert(state_dict, template)
    except Misfit as error:
        raise _explained(error, state_dict, run, image_shape) from error
    key, params = jax.random.key(run.seed), variables["params"]
    for part in fresh:
        params[part] = {"kernel": linear_init(key, template["params"][part]["kernel"].shape)}
    return Adopted(variables, embedder, classes, fresh)


def adopt_file(weights: WeightFile, run: Run, image_shape: tuple[int, int, int]) -> Adopted:
    """Turn a weight file into the variables of a run's network.

    Args:
      weights: see `torch_files.load`.
      run: see `adopt`.
      image_shape: (height, width, channels) of the network's input.

    Raises:
      UserError: naming the file; see `adopt`.
    """
    try:
        return adopt(weights.tensors, run, image_shape)
    except UserError as error:
        raise torch_files.named(weights.path, error) from error


def import_file(
    weights: WeightFile,
    chain: Chain,
    run: Run,
    *,
    image_shape: tuple[int, int, int],
    config: Mapping[str, Any] | None = None,
) -> tuple[str, ...]:
    """Make a weight file the only version of a chain: a pre-trained model.

    A chain that has this version already is left as it is.

    Args:
      weights: see `torch_files.load`.
      chain: empty, or made by this call before.
      run: see `adopt`.
      image_shape: (height, width, channels) of the network's input.
      config: JSON values for the record; the run's settings by default.

    Returns:
      The layers that were drawn anew, see `adopt`.

    Raises:
      UserError: the chain has other versions, or the weights do not fit.
    """
    chain.sweep()
    adopted = adopt_file(weights, run, image_shape)
    record = _record(
        adopted,
        run,
        image_shape,
        task=None,
        classes_seen=adopted.head_classes or run.num_prototypes,  # at most; a file does not say
        parent=None,
        replaced_by=f"imported from {weights.path.name}",
        data_fingerprint=weights.sha256,
        config=run.describe() if config is None else config,
    )
    _check_others(chain, range(1))
    if not _has(chain, 0, record, weights.path):
        chain.add(adopted.variables, record, number=0)
    return adopted.fresh


def import_folder(
    folder: PathLike,
    chain: Chain,
    run: Run,
    *,
    image_shape: tuple[int, int, int],
    classes_seen: Sequence[int] = (),
    replace_at: Sequence[int] = (),
    config: Mapping[str, Any] | None = None,
) -> None:
    """Make the checkpoints of a task sequence the versions of a chain, in their order.

    All files are checked before the first is added. Call again after a kill: versions that were added
    are not added again, if they came from the same files.

    Args:
      folder: see `checkpoints`.
      chain: empty, or begun by this call before.
      run: see `adopt`.
      image_shape: (height, width, channels) of the network's input.
      classes_seen: after each task, for a fixed simplex; a learnable head shows it.
      replace_at: tasks that started from a pre-trained model.
      config: JSON values for the records; the run's settings by default.

    Raises:
      UserError: the chain has other versions, or a file does not fit.
    """
    files = checkpoints(folder)
    _check_others(chain, range(len(files)))
    chain.sweep()

    def adopted(task):
        weights = torch_files.load(files[task])
        made = adopt_file(weights, run, image_shape)
        if made.fresh:
            raise UserError(f"{weights.path} holds a backbone alone, without {_and(made.fresh)}")
        replaced = task in replace_at
        seen = classes_seen[task] if task < len(classes_seen) else run.num_prototypes
        record = _record(
            made,
            run,
            image_shape,
            task=task,
            classes_seen=made.head_classes or seen,
            parent=None if replaced or not task else task - 1,
            replaced_by="pre-trained file of the reference" if replaced else None,
            data_fingerprint=weights.sha256,
            config=run.describe() if config is None else config,
        )
        return made.variables, record

    wanted = {task: adopted(task)[1] for task in range(len(files))}
    missing = [t for t, record in wanted.items() if not _has(chain, t, record, files[t])]
    # From the last to the first: a chain that was begun lacks its first versions, and is refused as
    # one with a gap where it is used.
    for task in reversed(missing):
        variables, record = adopted(task)
        if record != wanted[task]:
            raise UserError(f"{files[task]} was changed while it was read: start again")
        chain.add(variables, record, number=task)


def export_version(chain: Chain, number: int, file: PathLike) -> dict[str, np.ndarray]:
    """Write a version of a chain as a weight file that the reference loads with `strict=True`.

    Args:
      chain: to take it from.
      number: of the version; negative counts from the end.
      file: local or in a bucket, see `torch_files.encode`; it appears whole or not at all.

    Returns:
      What was written.

    Raises:
      UserError: a file that cannot be written, no such version, or PyTorch or safetensors is missing.
    """
    path = torch_files.check_writable(file)
    version = chain.open(number)
    record, state_dict = version.record, to_torch(version.variables)
    height, width, _ = record.image_shape
    images = ImageSettings(height if height == width else None, record.mean, record.std)
    torch_files.write_content(path, torch_files.encode(path, state_dict, images))
    return state_dict


def _record(adopted, run, image_shape, **lineage):
    return version_record(
        run,
        adopted.embedder,
        image_shape,
        backbone=run.given_backbone,
        head_classes=adopted.head_classes,
        **lineage,
    )


def _check_others(chain, numbers):
    others = set(chain.numbers()) - set(numbers)
    if others:
        raise UserError(
            f"there is a chain in {chain.path} already, with version {min(others)}: import into "
            "another folder"
        )


def _has(chain: Chain, number: int, record: Record, file: PathLike) -> bool:
    """Return whether a version was imported before, from the same file with the same settings."""
    if number not in chain.numbers():
        return False
    found, wanted = (_plain(r) for r in (chain.record(number), record))
    different = [name for name in wanted if found.get(name) != wanted[name]]
    if different:
        what = {"data_fingerprint": "the file", "replaced_by": "the file's name"}
        names = _and([what.get(name, name) for name in different])
        raise UserError(
            f"there is a chain in {chain.path} already, whose version {number} is another than "
            f"{file} now gives (other: {names}): import into another folder"
        )
    return True


def _plain(record):
    return json.loads(json.dumps(dataclasses.asdict(record)))


@functools.lru_cache(maxsize=16)
def _template(embedder: nn.Module, image_shape: tuple[int, int, int]) -> Mapping[str, Any]:
    """Names and shapes of an embedder's variables; a folder's files mostly share them."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(lambda x: embedder.init(jax.random.key(0), x, train=False), images)


def _explained(error: Misfit, state_dict, run, image_shape) -> UserError:
    """The error with the remedy that the names and shapes of the weights point to."""
    own = _template(_bare(run.given_backbone), image_shape)
    fit, names_fit = (overlap(state_dict, own, shapes) for shapes in (True, False))
    shapes = [found for _, found in error.misshapen.values()]
    only_shapes = not error.missing and not error.unknown
    if fit == 1 and only_shapes and [len(shape) for shape in shapes] == [2]:
        remedy = f"the file was made with num_prototypes={shapes[0][0] + 1}: give that"
        return UserError(f"{error}; {remedy}", "num_prototypes")
    faults = (*error.unknown, *error.misshapen, *error.missing)
    remedy = ""
    if fit < 0.9:
        fits = {label: overlap(state_dict, t) for label, t in _candidates(image_shape)}
        best = max(fits, key=lambda label: fits[label])
        if fits[best] > max(fit, 0.5):
            return UserError(
                f"{fits[best]:.0%} of its tensors are those of the backbone {best}, {fit:.0%} those "
                f"of {run.given_backbone.name} (not {shown(faults[0])}, for one): give that backbone",
                "backbone",
            )
        remedy = f"no registered backbone has its names ({', '.join(models.registered())})"
    if names_fit == 1 and fit < 1:
        remedy = f"its names are those of {run.given_backbone.name}, its shapes are not: give the "
        remedy += "arguments of the backbone and the size of the images that it was made with"
    elif fit == 1:
        method = run.given_method.name
        remedy = f"its backbone fits: give the method and num_prototypes that it has, not {method}"
    elif names_fit > 0.5 and not error.unknown and not error.misshapen:
        remedy = "the file is incomplete: save the whole state_dict()"
    remedy = remedy or "its backbone is a variant: register yours, or leave out what is unknown"
    return UserError(f"{error}; {remedy}")


def _candidates(image_shape: tuple[int, int, int]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Templates of all registered backbones, for images of this size where they need one."""
    for name in models.registered():
        label, arguments, shape = name, {}, image_shape
        if "image_size" in models.parameters(name):
            side = math.ceil(image_shape[0] / 16) * 16
            arguments, shape = {"image_size": side}, (side, side, 3)
            label = f"{name} (image_size={side})"
        yield label, _template(_bare(models.Backbone(name, arguments)), shape)


def _bare(backbone: models.Backbone) -> Embedder:
    return Embedder(backbone.build(), None, None, jnp.float32)


def _and(names):
    return " and ".join(names)
