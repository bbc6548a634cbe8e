"""The folder of a run: its identity, its chain, its saved state, its log."""

import contextlib
import datetime
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from compat_jax import hosts
from compat_jax.chain import Chain
from compat_jax.data import listing
from compat_jax.data.dataset import Dataset
from compat_jax.data.ledger import LEDGER
from compat_jax.errors import Diverged, UserError
from compat_jax.files import absolute, in_bucket, storage, write_bytes, write_json
from compat_jax.models import GivenBackbone
from compat_jax.training.checkpoint import Checkpointer
from compat_jax.training.log import Log
from compat_jax.training.run import Run

# Settings that a run may change when it is told so, by the beginning of their names.
_ANY_TIME = ("optimizer", "epochs", "keep", "validate_every", "preprocess.")
_BETWEEN_VERSIONS = (
    "batch_size",
    "tasks.rehearsal",
    "dtype",
    "remat",
    "method",
    # What the state of an optimiser consists of.
    *(f"optimizer.{name}" for name in ("name", "clip", "decay", "layer_decay", "freeze_backbone")),
)


class Workdir:
    """The folder of a run: `run.json`, `chain/`, `progress/`, `log.jsonl`.

    Args:
      path: of the folder (local or gs://); made when the run claims it.
      backbone: the user's own, see `Chain`.
    """

    def __init__(self, path: str | os.PathLike[str], backbone: GivenBackbone | None = None):
        self.path = storage(path)
        self.chain = Chain(self.path / "chain", backbone)
        self.checkpointer = Checkpointer(self.path / "progress")
        self.log = Log(self.path / "log.jsonl")

    def check_writable(self) -> None:
        """Refuse a local folder that cannot be made or written to, without making it.

        Raises:
          UserError: something that is no folder is in the way, or permission is missing.
        """
        if in_bucket(self.path):
            return
        folder = self.path
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            raise UserError(f"cannot write to {self.path}: {folder} is no folder", "workdir")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"cannot write to {self.path}: no permission in {folder}", "workdir")

    def check_apart(self, pictures: str | os.PathLike[str], exclude: Sequence[str] = ()) -> None:
        """Refuse to lie within a folder of pictures, which would list the run's files among them.

        Args:
          pictures: path of the folder; one that is something else holds nothing.
          exclude: patterns of names that the folder passes over, see `listing.list_folder`.

        Raises:
          UserError: this folder is that one, or lies in it.
        """
        if listing.holds(pictures, self.path, exclude):
            raise UserError(
                f"{self.path} lies in the folder of pictures {absolute(pictures)}, where a run's files "
                "would be taken for pictures: use a workdir outside of it",
                "workdir",
            )

    def claim(self, identity: Mapping[str, Any], change: bool = False) -> None:
        """Write the run's identity into the folder, or check it against what is there.

        Also removes what killed writers left in the chain.

        Args:
          identity: JSON values that decide what the run computes.
          change: continue with changed settings, where they may change: the optimiser's numbers, the
            epochs, the augmentation and what is kept at any time; another optimiser, batch and rehearsal
            between two versions. `run.json` keeps what changed, when, and at which version.

        Raises:
          UserError: the folder belongs to another run (the differing values are named), or cannot be
            written to.
        """
        hosts.on_first(lambda: self._claim(identity, change))

    @contextlib.contextmanager
    def claimed(self, identity: Mapping[str, Any], change: bool = False) -> Iterator[None]:
        """Claim the folder for a block; one that is refused leaves settings and ledger as they were.

        A folder that the claim made does not stay either. A block that has added a version was not
        refused: what it wrote stays.

        Args:
          identity, change: see `claim`.

        Raises:
          UserError: see `claim`, and whatever the block raises.
        """
        before = {name: self._content(name) for name in ("run.json", LEDGER)}
        missing, versions = self._missing(), self.chain.numbers()
        self.claim(identity, change)
        try:
            yield
        except Diverged:
            raise
        except UserError:
            if self.chain.numbers() == versions:
                hosts.on_first(lambda: self._restore(before, missing))
            raise

    def _missing(self):
        """This folder and those around it that are not there, the innermost first."""
        if in_bucket(self.path):
            return []
        folders = (self.path, *self.path.parents)
        return list(itertools.takewhile(lambda folder: not folder.exists(), folders))

    def _content(self, name):
        path = self.path / name
        return path.read_bytes() if path.exists() else None

    def _restore(self, before, missing):
        """Put files and folders back; a version under way keeps the ledger that it learns from."""
        under_way = self.is_under_way()
        for name, content in before.items():
            if content is not None and not (under_way and name == LEDGER):
                write_bytes(self.path / name, content)
            elif content is None and not len(self.chain) and not under_way:
                (self.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError, ValueError):  # one that is not empty
            for folder in missing:
                folder.rmdir()

    def _claim(self, identity, change):
        path = self.path / "run.json"
        mine = json.loads(json.dumps(identity))
        if path.exists():
            try:
                theirs = dict(json.loads(path.read_text()))
            except (OSError, TypeError, ValueError) as error:
                raise UserError(f"{path} is damaged: use another workdir", "workdir") from error
            if "data_fingerprint" in theirs:
                raise UserError(
                    f"{self.path} was begun with release 0.1: finish it there, or use another workdir",
                    "workdir",
                )
            changes = theirs.pop("changes", [])
            kept = {"aliases": aliases} if (aliases := theirs.pop("aliases", {})) else {}
            differing = dict(_differences(theirs, mine))
            if differing:
                self._check_changes(differing, change)
                entry = {"version": len(self.chain), "time": _now(), "changed": differing}
                write_json(path, {**mine, **kept, "changes": [*changes, entry]})
            self.chain.sweep()
            return
        if self.chain.path.exists() and not (self.path / LEDGER).exists():
            raise UserError(
                f"{self.path} has a chain but neither run.json nor {LEDGER}: use another workdir",
                "workdir",
            )
        try:
            write_json(path, mine)
        except OSError as error:
            raise UserError(
                f"cannot write to {self.path}: {error.strerror or error}", "workdir"
            ) from error

    def is_under_way(self) -> bool:
        """Return whether a state is saved of a task that is not in the chain."""
        return not self.checkpointer.tasks() <= set(self.chain.numbers())

    def aliases(self) -> dict[str, str]:
        """Return the other names of classes that `remember` was given: {other name: class}."""
        return dict(json.loads((self.path / "run.json").read_text()).get("aliases", {}))

    def remember(self, aliases: Mapping[str, str]) -> None:
        """Keep other names of classes in `run.json`, for calls that do not give them again."""
        if self.aliases() != aliases:
            path = self.path / "run.json"
            write_json(path, {**json.loads(path.read_text()), "aliases": dict(aliases)})

    def _check_changes(self, differing, change):
        """Refuse settings that differ and may not, or that nobody said may."""
        named = [f"{name} was {a}, now {b}" for name, (a, b) in sorted(differing.items())]
        fixed = [n for n in differing if not n.startswith((*_ANY_TIME, *_BETWEEN_VERSIONS))]
        if change and not fixed:
            midway = [n for n in differing if n.startswith(_BETWEEN_VERSIONS)]
            if not midway or not self.is_under_way():
                return
            raise UserError(
                f"a version is being trained, and {', '.join(midway)} may change only between two "
                "versions: let it finish as it was first",
                "workdir",
            )
        remedy = "Give them as they were to go on with it, or use another workdir"
        if not fixed:
            remedy = "Give them as they were, or say that the run is to continue with the changes"
        raise UserError(
            f"{self.path} belongs to a run with other settings: {'; '.join(named[:6])}. {remedy}",
            "workdir" if fixed else "accept_changes",
        )


def data_identity(data: Dataset) -> dict[str, Any]:
    """Return the JSON values by which a run knows its data again."""
    return {"images": len(data), "classes": data.num_classes, "sha256": data.fingerprint()}


def recorded_settings(run: Run, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the settings that every record of a run gets: `config`, or the run's own.

    Raises:
      UserError: values that JSON cannot hold.
    """
    try:
        return json.loads(json.dumps(dict(config or run.describe()), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(f"config must be JSON values, finite ones: {error}", "config") from error


def _differences(theirs, mine, prefix=""):
    for key in {*theirs, *mine}:
        a, b = theirs.get(key), mine.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", (a, b)


def _now():
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
