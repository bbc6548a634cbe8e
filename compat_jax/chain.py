"""The chain of model versions on disk.

A chain is a folder with one entry a version, `0000`, `0001`, …; an entry holds `record.json` and, in
`variables/`, an Orbax checkpoint. The record says all that is needed to rebuild the network and to
compare with others, so that opening needs nothing but the path, also when architectures differ along
the chain. It also lists size and SHA-256 of every file and the SHA-256 of the variables themselves:
an entry that was cut off or altered is named and refused before Orbax reads it, and the others stay
readable. Entries are written aside and renamed, so a reader never sees half of one; nothing in a
chain is ever executed.

In a bucket (gs://) nothing can be renamed: there an entry is one from when `record.json` is there,
which is created last, once, and names the folder `variables-TOKEN` that its writer filled.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import re
import threading
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from compat_jax import hosts, models
from compat_jax.errors import UserError
from compat_jax.files import absolute, create, first_line, in_bucket, sha256, walk
from compat_jax.methods import build_embedder, get_method

FORMAT = 1
# Orbax in two threads at once lost a file that was there (NOT_FOUND); two programs do not disturb each
# other.
_ORBAX = threading.Lock()
_ENTRY = re.compile(r"\d{4,9}")
_VARIABLES = re.compile(r"variables(-[0-9a-f]{8})?")
# What no version comes near: a record that claims more is not believed, nor memory asked for it.
_MAX_COUNT, _MAX_BYTES, _MAX_RECORD_BYTES = 2**31, 2**40, 2**26
_PACKAGES = ("compat_jax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclasses.dataclass(frozen=True)
class Record:
    """What a version says of itself.

    Attributes:
      method: name of the method that trained it.
      backbone: name of the backbone.
      backbone_arguments: of `models.create_backbone`.
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
      config: the whole configuration of the run.
      class_names: of a pre-trained model's classes.
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


@dataclasses.dataclass(frozen=True)
class Version:
    """An opened entry.

    Attributes:
      number: in the chain.
      record: what it says of itself.
      variables: {"params", "batch_stats"} as NumPy arrays.
      sha256: of the variables.
    """

    number: int
    record: Record
    variables: dict[str, Any]
    sha256: str

    def embedder(self, dtype: str = "float32") -> nn.Module:
        """The network whose variables these are."""
        record = self.record
        backbone = models.create_backbone(record.backbone, record.backbone_arguments, dtype)
        return build_embedder(
            get_method(record.method),
            backbone,
            record.num_prototypes,
            record.head_classes,
            models.DTYPES[dtype],
        )


class CorruptEntry(UserError):
    """An entry that is not what was written: cut off, altered, or of another format."""


def variables_sha256(variables: Mapping[str, Any]) -> str:
    """SHA-256 over names, shapes, dtypes and bits of all arrays, in the order of the names."""
    digest = hashlib.sha256()
    flat = traverse_util.flatten_dict(variables, sep="/")
    for name in sorted(flat):
        array = np.ascontiguousarray(flat[name])
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


class Chain:
    """A chain of versions in a folder (local or gs://).

    Args:
      path: of the folder; made by the first `add`.
    """

    def __init__(self, path: str | epath.Path):
        self.path = absolute(path)

    def __len__(self) -> int:
        return len(self.numbers())

    def numbers(self) -> list[int]:
        """Numbers of the entries, ascending."""
        if not self.path.is_dir():
            return []
        if in_bucket(self.path):
            found = [p.parent for p in self.path.glob("*/record.json")]
        else:
            found = self.path.iterdir()
        return sorted(int(p.name) for p in found if _ENTRY.fullmatch(p.name))

    def require(self) -> "Chain":
        """This chain, if it has an entry.

        Raises:
          UserError: no folder or no entry.
        """
        if not self.numbers():
            raise UserError(
                f"no chain at {self.path}: launch.train writes one to WORKDIR/chain, "
                "launch.pretrain to its --workdir"
            )
        return self

    def add(self, variables: Mapping[str, Any], record: Record, number: int | None = None) -> int:
        """Append a version; it appears only when complete.

        Args:
          variables: {"params", "batch_stats"} of arrays.
          record: what to say of it.
          number: that the version must get; None for the next free one.

        Returns:
          The number of the new version.

        Raises:
          UserError: K differs from the chain's, another program added this number first, or the
            folder cannot be written to. The chain is then what it was.
        """
        numbers = self.numbers()
        _checked(record)
        if numbers:
            self._check_fits(record, numbers[0])
        if number is None:
            number = numbers[-1] + 1 if numbers else 0
        if hosts.first_says(self._has(number)):
            raise self._taken(number)
        final, token = self.path / f"{number:04d}", hosts.token()
        if in_bucket(self.path):
            folder = aside = final / f"variables-{token}"
        else:
            aside = self.path / f".adding-{number:04d}-{token}"
            folder = aside / "variables"
        host, published = jax.tree.map(hosts.whole, dict(variables)), []

        def publish():
            text = _encode(number, record, host, folder)
            if in_bucket(self.path):
                if not create(final / "record.json", text.encode()):
                    raise self._taken(number)
            else:
                (aside / "record.json").write_text(text)
                aside.rename(final)  # refuses an entry that appeared meanwhile: it is not empty
            published.append(number)

        try:
            hosts.first_does(lambda: self.path.mkdir(parents=True, exist_ok=True))
            with _ORBAX:  # several processes write a share each
                ocp.save(folder, _without_empty(dict(variables) if hosts.several() else host))
            hosts.first_does(publish)
        except Exception as error:  # Orbax and TensorStore raise many kinds
            if self._has(number):
                raise self._taken(number) from error
            raise UserError(
                f"cannot write version {number} to {self.path} ({first_line(error)}): "
                "make room or choose another folder; the versions before it are untouched"
            ) from error
        finally:
            if hosts.is_first() and not published:
                _remove(aside)
        return number

    def record(self, number: int) -> Record:
        """What a version says of itself, without reading its variables.

        Raises:
          CorruptEntry: see `open`.
        """
        return self._read(number)[0]

    def open(self, number: int) -> Version:
        """A version with its variables, after checking every byte.

        Args:
          number: of the version; negative counts from the end.

        Raises:
          UserError: no such version.
          CorruptEntry: missing, cut off or altered files, or a format this release does not know.
        """
        numbers = self.require().numbers()
        known = number in numbers if number >= 0 else -number <= len(numbers)
        if not known:
            raise UserError(f"no version {number} in {self.path}: it has {_ranges(numbers)}")
        number = number if number >= 0 else numbers[number]
        record, content = self._read(number)
        folder = self.path / f"{number:04d}"
        try:
            _check_files(folder, content["files"])
            with _ORBAX:
                variables = ocp.load(
                    folder / _variables_folder(content["files"]), _template(content["variables"])
                )
            variables = {k: variables.get(k, {}) for k in ("params", "batch_stats")}
            if variables_sha256(variables) != content["variables_sha256"]:
                raise UserError("the variables differ from those that were added (SHA-256)")
        except UserError as error:
            raise CorruptEntry(f"{self._name(number)}: {error}") from error
        except Exception as error:  # many kinds: Orbax, TensorStore, a forged list
            raise CorruptEntry(f"{self._name(number)}: {first_line(error)}") from error
        return Version(number, record, variables, content["variables_sha256"])

    def verify(self) -> dict[int, str | None]:
        """Opens every version: {number: None if it is whole, else what is wrong with it}."""
        return {number: self._problem(number) for number in self.require().numbers()}

    def _has(self, number):
        entry = self.path / f"{number:04d}"
        return (entry / "record.json" if in_bucket(entry) else entry).exists()

    def _problem(self, number):
        try:
            self.open(number)
        except UserError as error:
            return str(error)
        return None

    def _name(self, number):
        return f"version {number} of {self.path} cannot be used"

    def _taken(self, number):
        return UserError(
            f"version {number} of {self.path} was added by another program; nothing was "
            "overwritten: run one program a chain, or start again to go on from that version"
        )

    def _check_fits(self, record, first):
        before = self.record(first)
        if before.num_prototypes != record.num_prototypes:
            raise UserError(
                f"num_prototypes {record.num_prototypes} differs from the chain's "
                f"{before.num_prototypes} ({self.path}): all versions share one simplex; "
                f"use num_prototypes={before.num_prototypes} or another workdir"
            )

    def _read(self, number):
        path = self.path / f"{number:04d}" / "record.json"
        try:
            if path.stat().length > _MAX_RECORD_BYTES:
                raise UserError("record.json is too large")
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise UserError(
                    f"its format is {content['format']!r:.80}, this release reads {FORMAT}: "
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
            return _checked(Record(**fields)), content
        except UserError as error:
            raise CorruptEntry(f"{self._name(number)}: {error}") from error
        except Exception as error:  # whatever a forged record may raise
            raise CorruptEntry(
                f"{self._name(number)}: record.json is missing or broken ({first_line(error)})"
            ) from error


def _checked(record):
    """The record, if its values are of the kind and size that a version's can be."""
    for name in ("method", "backbone", "label_order", "data_fingerprint"):
        _expect(isinstance(getattr(record, name), str), name, getattr(record, name))
    for name, least in (("feature_size", 1), ("num_prototypes", 1), ("classes_seen", 0)):
        _expect(_is_count(getattr(record, name), least), name, getattr(record, name))
    for name in ("head_classes", "task", "parent"):
        value = getattr(record, name)
        _expect(value is None or _is_count(value, 0), name, value)
    shape = record.image_shape
    _expect(len(shape) == 3 and all(_is_count(n, 1) for n in shape), "image_shape", shape)
    for name in ("mean", "std"):
        value = getattr(record, name)
        numbers = all(isinstance(x, int | float) and math.isfinite(x) for x in value)
        _expect(len(value) == shape[2] and numbers, name, value)
    return record


def _is_count(value, least):
    return type(value) is int and least <= value < _MAX_COUNT


def _expect(holds, name, value):
    if not holds:
        raise UserError(f"a version's {name} cannot be {value!r:.80}")


def _without_empty(tree):
    return {k: v for k, v in tree.items() if v}


def _encode(number, record, host, folder):
    flat = traverse_util.flatten_dict(host, sep="/")
    body = {
        "format": FORMAT,
        "number": number,
        "record": dataclasses.asdict(record),
        "packages": {name: importlib.metadata.version(name) for name in _installed(_PACKAGES)},
        "variables": {
            name: {"shape": list(a.shape), "dtype": a.dtype.name} for name, a in flat.items()
        },
        "variables_sha256": variables_sha256(host),
        "files": {
            str(p.relative_to(folder.parent)): {"bytes": p.stat().length, "sha256": sha256(p)}
            for p in walk(folder)
        },
    }
    body = json.loads(json.dumps(body))
    return json.dumps({**body, "record_sha256": _json_sha256(body)}, indent=1)


def _installed(names):
    for name in names:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        yield name


def _json_sha256(body):
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _variables_folder(files):
    """Name of the one folder that all files of an entry are in."""
    (name,) = {relative.partition("/")[0] for relative in files}
    return name


def _check_files(folder, files):
    for relative, expected in files.items():
        top = relative.partition("/")[0]
        if ".." in epath.Path(relative).parts or not _VARIABLES.fullmatch(top):
            raise UserError(f"it lists a file outside itself, {relative!r:.80}")
        path = folder / relative
        if not path.exists():
            raise UserError(f"{relative} is missing")
        if path.stat().length != expected["bytes"]:
            raise UserError(
                f"{relative} has {path.stat().length} bytes instead of {expected['bytes']}"
            )
        if sha256(path) != expected["sha256"]:
            raise UserError(f"{relative} was altered (SHA-256)")


def _template(specs):
    """What Orbax is to read, as arrays that take no memory."""
    flat, total = {}, 0
    for name, spec in specs.items():
        shape, dtype = spec["shape"], np.dtype(spec["dtype"])
        if not all(_is_count(n, 0) for n in shape) or not jnp.issubdtype(dtype, np.number):
            raise UserError(f"{name} cannot have shape {shape!r:.80} and dtype {dtype}")
        total += math.prod(shape) * dtype.itemsize
        if total > _MAX_BYTES:
            raise UserError(f"{name} of shape {shape!r:.80} is too large")
        flat[name] = np.broadcast_to(np.zeros((), dtype), shape)
    return traverse_util.unflatten_dict(flat, sep="/")


def _remove(folder):
    try:
        if folder.exists():
            folder.rmtree()
    except OSError:
        pass  # a read-only file system; readers pass over it


def _ranges(numbers):
    return f"{numbers[0]}..{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
