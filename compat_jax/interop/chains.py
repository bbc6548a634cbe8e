"""Chains of PyTorch's weight files, and weight files of a chain's versions."""

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from compat_jax import models
from compat_jax.chain import Chain, Record
from compat_jax.errors import UserError
from compat_jax.files import absolute
from compat_jax.interop import torch_files
from compat_jax.interop.families import renamed
from compat_jax.interop.image_settings import ImageSettings
from compat_jax.interop.tensors import shown
from compat_jax.interop.torch_files import WeightFile
from compat_jax.interop.weights import Misfit, convert, fitted, head_rows, overlap, to_torch
from compat_jax.models import Embedder
from compat_jax.models.layers import linear_init
from compat_jax.training import Run
from compat_jax.training.task import version_record

PathLike: TypeAlias = str | os.PathLike[str]
# Parts of a tensor's name without which weights are none of the backbones whose names begin so: what
# takes long to trace is only compared where it may fit.
_MARKS = {
    "convnext": "conv_dw.",
    "dinov2": "ls1.gamma",
    "dinov2_l": "blocks.23.",
    "regnet": ".se.se1.",
    "resnet101": "layer3.22.",
    "resnet152": "layer3.35.",
    "resnet18": "layer1.",
    "resnet34": "layer3.5.",
    "resnet50": "layer3.5.",
    "senet": "layer1.",
    "vit": "attn.qkv.",
    "vit_l": "blocks.23.",
}
_CHECKPOINT = re.compile(r"ckpt_(\d+)\.(pt|pth|bin|safetensors)")


@dataclasses.dataclass(frozen=True)
class Adopted:
    """Weights of a file as the variables of a network.

    Attributes:
      variables: {"params", "batch_stats"}.
      embedder: the network.
      head_classes: of a learnable head; None for a fixed simplex.
      fresh: layers that the weights lack, drawn from the run's seed.
      notes: sentences about what was changed to make them fit.
    """

    variables: dict[str, Any]
    embedder: Embedder
    head_classes: int | None
    fresh: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Imported(NamedTuple):
    """A version that a weight file has become.

    Attributes:
      number: in the chain.
      fresh: layers that were drawn anew, see `adopt`.
      notes: sentences about what was changed to make the weights fit.
    """

    number: int
    fresh: tuple[str, ...]
    notes: tuple[str, ...]


class Course(NamedTuple):
    """The course of a task sequence, which its checkpoints do not tell.

    Attributes:
      classes_seen: after each task, for a fixed simplex; a learnable head shows it.
      replace_at: tasks that started from a pre-trained model.
    """

    classes_seen: Sequence[int] = ()
    replace_at: Sequence[int] = ()


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
    state_dict, notes = fitted(state_dict, template)
    try:
        variables, fresh = convert(state_dict, template)
    except Misfit as error:
        raise _explained(error, state_dict, run, image_shape) from error
    key, params = jax.random.key(run.seed), variables["params"]
    for part in fresh:
        params[part] = {"kernel": linear_init(key, template["params"][part]["kernel"].shape)}
    return Adopted(variables, embedder, classes, fresh, notes)


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
    preparation: Mapping[str, Any] | None = None,
    append: bool = False,
) -> Imported:
    """Make a weight file the only version of a chain, or its next one: a pre-trained model.

    A chain that has this version already is left as it is.

    Args:
      weights: see `torch_files.load`.
      chain: empty, or made by this call before; any chain to append to.
      run: see `adopt`.
      image_shape: (height, width, channels) of the network's input.
      config: JSON values for the record; the run's settings by default.
      preparation: of the pictures, see `data.pictures.Preparation`.
      append: add it behind the versions that the chain has.

    Raises:
      UserError: the chain has other versions and `append` is not set, its versions are on another
        simplex, or the weights do not fit.
    """
    chain.sweep()
    adopted = adopt_file(weights, run, image_shape)
    record = pretrained_record(
        adopted, weights, run, image_shape=image_shape, config=config, preparation=preparation
    )
    number = _number_to_append(chain, record) if append else 0
    if not append:
        _check_others(chain, range(1))
    if not _has(chain, number, record, weights.path):
        chain.add(adopted.variables, record, number=number)
    return Imported(number, adopted.fresh, adopted.notes)


def pretrained_record(
    adopted: Adopted,
    weights: WeightFile,
    run: Run,
    *,
    image_shape: tuple[int, int, int],
    config: Mapping[str, Any] | None = None,
    preparation: Mapping[str, Any] | None = None,
) -> Record:
    """Describe the version that a weight file becomes.

    Args:
      adopted: its weights as variables.
      weights: the file.
      run: see `adopt`.
      image_shape: (height, width, channels) of the network's input.
      config: JSON values; the run's settings by default.
      preparation: of the pictures, see `data.pictures.Preparation`.
    """
    return _record(
        adopted,
        run,
        image_shape,
        task=None,
        classes_seen=adopted.head_classes or run.num_prototypes,  # at most; a file does not say
        parent=None,
        replaced_by=f"imported from {weights.path.name}",
        data_fingerprint=weights.sha256,
        config=run.describe() if config is None else config,
        preparation=preparation or {},
        fresh=adopted.fresh,
    )


def import_folder(
    folder: PathLike,
    chain: Chain,
    run: Run,
    *,
    image_shape: tuple[int, int, int],
    course: Course | None = None,
    config: Mapping[str, Any] | None = None,
    preparation: Mapping[str, Any] | None = None,
) -> None:
    """Make the checkpoints of a task sequence the versions of a chain, in their order.

    All files are checked before the first is added. Call again after a kill: versions that were added
    are not added again, if they came from the same files.

    Args:
      folder: see `checkpoints`.
      chain: empty, or begun by this call before.
      run: see `adopt`.
      image_shape: (height, width, channels) of the network's input.
      course: of the sequence; by default, nothing was replaced, and K classes may have been seen.
      config: JSON values for the records; the run's settings by default.
      preparation: of the pictures, see `data.pictures.Preparation`.

    Raises:
      UserError: the chain has other versions, or a file does not fit.
    """
    files, course = checkpoints(folder), course or Course()
    _check_others(chain, range(len(files)))
    chain.sweep()

    def adopted(task):
        weights = torch_files.load(files[task])
        made = adopt_file(weights, run, image_shape)
        if made.fresh:
            raise UserError(f"{weights.path} holds a backbone alone, without {_and(made.fresh)}")
        replaced, told = task in course.replace_at, course.classes_seen
        seen = told[task] if task < len(told) else run.num_prototypes
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
            preparation=preparation or {},
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
    known = {name: record.preparation.get(name) for name in ("crop", "filter", "resize")}
    size = height if height == width else None
    images = ImageSettings(size, record.mean, record.std, **known)
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


def _number_to_append(chain, record):
    """The number of a version behind the others; of the same file's, if that is the last."""
    numbers = chain.require_whole().numbers()
    last = chain.record(-1)
    same_file = last.data_fingerprint == record.data_fingerprint
    if same_file and last.replaced_by == record.replaced_by:
        return numbers[-1]
    if last.image_shape[2] != record.image_shape[2]:
        raise UserError(
            f"the versions of {chain.path} take pictures of {last.image_shape[2]} channels, the file "
            f"of {record.image_shape[2]}: give mean and std of as many channels, or another folder",
            "mean",
        )
    for name in ("num_prototypes", "label_order", "feature_size"):
        mine, theirs = getattr(record, name), getattr(last, name)
        if mine != theirs:
            raise UserError(
                f"{name} is {mine} for the file and {theirs} in {chain.path}: versions of one chain "
                "share it, import into another folder or give the chain's",
                "num_prototypes" if name != "label_order" else name,
            )
    return numbers[-1] + 1


def _has(chain: Chain, number: int, record: Record, file: PathLike) -> bool:
    """Return whether a version was imported before, from the same file with the same settings."""
    if number not in chain.numbers():
        return False
    found, wanted = (_plain(r) for r in (chain.record(number), record))
    # Chains of earlier releases have neither preparation nor fresh.
    newer = [name for name in ("preparation", "fresh") if not found.get(name)]
    wanted = {name: value for name, value in wanted.items() if name not in newer}
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


@functools.lru_cache(maxsize=64)
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
    if "reg_token" in {name.rpartition(".")[2] for name in faults}:
        remedy = (
            "file and network differ in registers: give the backbone registers=4, or 0 without any"
        )
        return UserError(f"{error}; {remedy}", "backbone_arguments")
    remedy = ""
    if fit < 0.9:
        fits = {label: overlap(state_dict, t) for label, t in _candidates(image_shape, state_dict)}
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


def _candidates(
    image_shape: tuple[int, int, int], state_dict: Mapping[str, Any]
) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Templates of the registered backbones that may fit, for images of this size if they need one."""
    names = "\n".join(renamed(state_dict))
    has_registers = "reg_token" in names
    for name in models.registered():
        if any(name.startswith(key) and mark not in names for key, mark in _MARKS.items()):
            continue
        label, arguments, shape = name, {}, image_shape
        if "image_size" in models.parameters(name):
            # Rounded up to whole patches, of DINOv2 or of other ViTs.
            patch = 14 if "registers" in models.parameters(name) else 16
            side = math.ceil(image_shape[0] / patch) * patch
            arguments, shape = {"image_size": side}, (side, side, 3)
            if has_registers and patch == 14:
                arguments["registers"] = 4
            label = f"{name} ({', '.join(f'{k}={v}' for k, v in arguments.items())})"
        yield label, _template(_bare(models.Backbone(name, arguments)), shape)


def _bare(backbone: models.Backbone) -> Embedder:
    return Embedder(backbone.build(), None, None, jnp.float32)


def _and(names):
    return " and ".join(names)
