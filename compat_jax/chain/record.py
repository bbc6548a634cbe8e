"""The record of a version: a JSON text that says all that is needed to rebuild and compare it."""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh

from compat_jax.data.pictures import Preparation
from compat_jax.errors import UserError
from compat_jax.extraction import (
    Embedding,
    embed_pictures,
    preparation_of,
    rightly_prepared,
)
from compat_jax.mesh import make_mesh
from compat_jax.methods import Head, head_of
from compat_jax.models import DTYPES, Backbone, computed_in

FORMAT = 2
# Format 1 had other names for two layers and did not record a method's own numbers.
FORMATS = (1, 2)
FORMAT_1_LAYERS = {"fc1": "projection", "fc2": "head"}
# Sanity limits: larger claims are rejected before any memory is allocated.
MAX_COUNT, MAX_BYTES, MAX_RECORD_BYTES = 2**31, 2**40, 2**26
_PACKAGES = ("compat_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclasses.dataclass(frozen=True)
class Record:
    """Description of a version.

    Attributes:
      method: name of the method that trained it.
      backbone: name of the backbone, or the import path of the user's own.
      backbone_arguments: of the backbone, JSON values.
      image_shape: (height, width, channels) of its input.
      mean: channel means of the input normalisation, in 0..1.
      std: channel deviations, in 0..1.
      feature_size: of the features that retrieval compares.
      num_prototypes: K of the simplex.
      label_order: which prototype a class was written to.
      head_classes: classes of the learnable head; None for a fixed simplex.
      task: number of the task it ended; None for a pre-trained model.
      classes_seen: how many classes it has been trained on in its sequence.
      parent: number of the version it was fine-tuned from; None for a first or a replaced one.
      replaced_by: description of the pre-trained model it started from; None when fine-tuned.
      data_fingerprint: SHA-256 of the training data.
      seed: of the run.
      config: all settings of the run, JSON values.
      class_names: of the classes seen, in the order of their numbers; () where unknown.
      method_arguments: the method's own numbers, JSON values.
      preparation: how pictures were brought to their size, see `data.pictures.Preparation`; {} where
        unknown.
      aliases: other names of classes, see `data.class_register.Register`.
      learnt: what is new in the version, JSON values: classes, pictures, rehearsal, validation.
      fresh: layers that were drawn at random and not trained yet: a version that has some is to start
        from, not to search with.
    """

    method: str
    backbone: str
    backbone_arguments: Mapping[str, Any]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    feature_size: int
    num_prototypes: int
    label_order: str
    head_classes: int | None
    task: int | None
    classes_seen: int
    parent: int | None
    replaced_by: str | None
    data_fingerprint: str
    seed: int
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    method_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    preparation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    learnt: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fresh: tuple[str, ...] = ()

    @property
    def head(self) -> Head:
        """Return the head that the version's variables fill."""
        return head_of(self.num_prototypes, self.label_order, self.head_classes)

    def check(self) -> "Record":
        """Return the record if every value is of the kind and size that a version's can be.

        Raises:
          UserError: naming the value.
        """
        for name in ("method", "backbone", "label_order", "data_fingerprint"):
            _expect(isinstance(getattr(self, name), str), name, getattr(self, name))
        for name, least in (("feature_size", 1), ("num_prototypes", 1), ("classes_seen", 0)):
            _expect(is_count(getattr(self, name), least), name, getattr(self, name))
        for name in ("head_classes", "task", "parent"):
            value = getattr(self, name)
            _expect(value is None or is_count(value, 0), name, value)
        mappings = ("backbone_arguments", "method_arguments", "config", "preparation", "learnt")
        for name in (*mappings, "aliases"):
            _expect(isinstance(getattr(self, name), Mapping), name, getattr(self, name))
        shape = self.image_shape
        _expect(len(shape) == 3 and all(is_count(n, 1) for n in shape), "image_shape", shape)
        for name in ("mean", "std"):
            value = getattr(self, name)
            numbers = all(isinstance(x, int | float) and math.isfinite(x) for x in value)
            _expect(len(value) == shape[2] and numbers, name, value)
        for name in ("class_names", "fresh"):
            value = getattr(self, name)
            _expect(all(isinstance(n, str) for n in value), name, value)
        pairs = self.aliases.items()
        _expect(all(isinstance(n, str) for pair in pairs for n in pair), "aliases", self.aliases)
        return self


@dataclasses.dataclass(frozen=True)
class Version:
    """An opened entry of a chain.

    Attributes:
      number: in the chain.
      record: its description.
      variables: {"params", "batch_stats"} as NumPy arrays.
      sha256: of the variables as they are stored.
      backbone: its backbone.
      home: folder of the chain that it was opened from; None where no chain holds it.
    """

    number: int
    record: Record
    variables: dict[str, Any] = dataclasses.field(repr=False)
    sha256: str
    backbone: Backbone
    home: epath.Path | None = dataclasses.field(default=None, repr=False, compare=False)
    _ready: dict[Any, Embedding] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields without what was made ready on devices, which is made again."""
        return {**self.__dict__, "_ready": {}}

    def embedder(self, dtype: str = "float32") -> nn.Module:
        """Build the network that these variables fill.

        Args:
          dtype: "float32", "bfloat16" or "auto", of the computation; see `Run`.
        """
        dtype = computed_in(dtype)
        return self.record.head.embedder(self.backbone.build(dtype), DTYPES[dtype])

    @property
    def untrained(self) -> str:
        """Say which layers were drawn at random and never trained, so that it cannot answer; or ""."""
        if not self.record.fresh:
            return ""
        layers = ", ".join(self.record.fresh[:3])
        return (
            f"version {self.number} has layers that were never trained ({layers}): train it before it "
            "answers"
        )

    def embed(
        self,
        pictures: Any,
        *,
        preparation: Preparation | None = None,
        mesh: Mesh | None = None,
        batch_size: int = 256,
        dtype: str = "float32",
        progress: str | None = None,
    ) -> np.ndarray:
        """Embed pictures, prepared exactly as in training.

        Args:
          pictures: one picture, or any number of them: the path of a file, a folder or a pattern; a PIL
            image; uint8[h, w], [h, w, 1], [h, w, 3] or [h, w, 4] of any size; a list or a generator of
            these, in which a path is never a pattern; uint8[n, h, w, 3]; or a `Dataset`.
          preparation: how pictures are brought to the version's size; as its record says by default.
          mesh: devices to spread each batch over; one device by default.
          batch_size: pictures per batch; on CPUs large pictures go in fewer, to save memory. Less than a
            batch is padded to 1, 8 or 64, so that few programs are compiled, once each.
          dtype: of the network's computation: "float32", "bfloat16" or "auto"; see `Run`.
          progress: label of a progress bar; None for none.

        Returns:
          float32[n, feature_size], rows of norm 1 (a zero feature stays zero).

        Raises:
          UserError: what is no picture, or pictures of another size where neither the record nor
            `preparation` says how they become the version's.
        """
        mesh, dtype = mesh or make_mesh("data:1", jax.devices()[:1]), computed_in(dtype)
        if (mesh, dtype) not in self._ready:
            self._ready[mesh, dtype] = Embedding(self, mesh, dtype)
        prepare = preparation_of(self.record, preparation)
        return embed_pictures(
            self._ready[mesh, dtype],
            rightly_prepared(pictures, prepare),
            prepare=prepare,
            batch_size=batch_size,
            progress=progress,
        )


def variables_sha256(variables: Mapping[str, Any]) -> str:
    """Return the SHA-256 over names, shapes, dtypes and bits of all arrays, in the order of names."""
    digest = hashlib.sha256()
    flat = traverse_util.flatten_dict(variables, sep="/")
    for name in sorted(flat):
        array = np.ascontiguousarray(flat[name])
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def encode(
    number: int, record: Record, variables: Mapping[str, Any], files: Mapping[str, Any]
) -> str:
    """Write a version's record as JSON.

    Args:
      number: of the version.
      record: its description.
      variables: {"params", "batch_stats"} as NumPy arrays.
      files: {path within the entry: {"bytes", "sha256"}}.
    """
    flat = traverse_util.flatten_dict(variables, sep="/")
    body = {
        "format": FORMAT,
        "number": number,
        "record": dataclasses.asdict(record),
        "packages": {name: importlib.metadata.version(name) for name in _installed(_PACKAGES)},
        "variables": {
            name: {"shape": list(a.shape), "dtype": a.dtype.name} for name, a in flat.items()
        },
        "variables_sha256": variables_sha256(variables),
        "files": files,
    }
    body = json.loads(json.dumps(body, allow_nan=False))
    return json.dumps({**body, "record_sha256": _json_sha256(body)}, indent=1)


def decode(text: str, number: int) -> tuple[Record, dict[str, Any]]:
    """Read a version's record.

    Args:
      text: as `encode` wrote it; format 1 is read too.
      number: that the version must have.

    Returns:
      The record, and everything that was written.

    Raises:
      UserError: another format, altered text, or values that no version can have. Other errors, of
        a forged text, pass through.
    """
    content = json.loads(text)
    if content["format"] not in FORMATS:
        raise UserError(
            f"its format is {content['format']!r:.80}, this release reads {FORMATS}: "
            f"use the release that wrote it ({content.get('packages')!s:.200})"
        )
    body = {k: v for k, v in content.items() if k != "record_sha256"}
    if content["record_sha256"] != _json_sha256(body):
        raise UserError("record.json was altered (SHA-256)")
    if content["number"] != number:
        raise UserError(f"it was added as version {content['number']!r:.80}")
    fields = dict(content["record"])
    for name in ("image_shape", "mean", "std", "class_names"):
        fields[name] = tuple(fields[name])
    fields["fresh"] = tuple(fields.get("fresh", ()))
    return Record(**fields).check(), content


def is_count(value: Any, least: int) -> bool:
    """Return whether a value is a whole number from `least` up to the sanity limit."""
    return type(value) is int and least <= value < MAX_COUNT


def _expect(holds, name, value):
    if not holds:
        raise UserError(f"a version's {name} cannot be {value!r:.80}")


def _installed(names):
    for name in names:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        yield name


def _json_sha256(body):
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
