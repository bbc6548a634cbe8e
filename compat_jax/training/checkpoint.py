"""Saved training states: a killed run resumes from here, to the same bits."""

import contextlib
import functools
import hashlib
import json
import os
import re
import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import serialization, traverse_util
from orbax.checkpoint import v1 as ocp

from compat_jax import hosts
from compat_jax import mesh as meshes
from compat_jax.errors import UserError
from compat_jax.files import first_line, in_bucket, sha256, storage, walk, write_json
from compat_jax.training.state import TrainState

_NAME = re.compile(r"task([0-9]+)-step([0-9]+)")
_NO_NOTES: Mapping[str, Any] = types.MappingProxyType({})


class _DoesNotFit(Exception):
    """A whole state of another network or optimiser."""


class Checkpointer:
    """Keeps the last saved state of the present task, and its best weights so far, in a folder.

    Beside each lies `NAME.json`, written last: size and SHA-256 of its files, and the notes that belong
    to it, such as the metrics of steps that the log does not have yet. A state without it was cut off,
    a state that differs from it is refused.

    Args:
      path: of the folder.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = storage(path)

    def save(self, task: int, state: TrainState, notes: Mapping[str, Any] = _NO_NOTES) -> None:
        """Replace the saved state; the older one is removed only when this one is whole.

        Args:
          task: number of the task.
          state: to save.
          notes: JSON values that belong to it, see `notes`. "best" names the step whose weights
            (`save_best`) are kept; others are removed.

        Raises:
          UserError: the folder cannot be written to; the state saved before is still there.
        """
        name, best = f"task{task}-step{int(state.step)}", notes.get("best")
        kept = {name} if best is None else {name, _best(task, best)}
        tree = _without_empty(serialization.to_state_dict(state))
        with self._located():
            self._store(name, tree, dict(notes))
            hosts.on_first(lambda: self._remove_others(kept))

    def save_best(self, task: int, step: int, variables: Any) -> None:
        """Save the weights of a step beside the state; earlier ones stay until the next `save`.

        Args:
          task: number of the task.
          step: of the task.
          variables: as a chain holds them.

        Raises:
          UserError: the folder cannot be written to.
        """
        name = _best(task, step)
        with self._located():
            hosts.on_first(lambda: self._remove({name, f"{name}.json"}))
            self._store(name, _without_empty(dict(variables)), {})

    def load_best(self, task: int, step: int) -> dict[str, Any]:
        """Return the weights that `save_best` saved.

        Raises:
          UserError: they are damaged or missing.
        """
        name = _best(task, step)
        try:
            self._verify(name)
            metadata: Any = ocp.metadata(self.path / name).metadata
            template = jax.tree.map(
                lambda leaf: np.empty(leaf.shape, leaf.dtype),
                metadata,
                is_leaf=lambda leaf: hasattr(leaf, "shape"),
            )
            loaded = ocp.load(self.path / name, template)
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise UserError(
                f"{self.path / name} is damaged ({first_line(error)}): "
                f"remove {self.path} and the task begins again"
            ) from error
        return {key: loaded.get(key, {}) for key in ("params", "batch_stats")}

    @contextlib.contextmanager
    def _located(self):
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise UserError(
                f"cannot save to {self.path} ({first_line(error)}): make room or free it, then "
                "run the same again to go on from the save before"
            ) from error

    def _store(self, name, tree, notes):
        hosts.on_first(lambda: self._prepare(name))
        if hosts.broadcast(self._is_whole(name)):
            return
        # Several processes write a share each. A state without its list was cut off.
        tree = tree if hosts.is_distributed() else _on_host(tree)
        ocp.save(self.path / name, tree, overwrite=in_bucket(self.path))
        hosts.on_first(lambda: self._write_list(name, notes))

    def restore(self, task: int, state: TrainState) -> TrainState:
        """Return the saved state of a task, or `state` itself if none is saved.

        The saved mesh may have had another model axis, whose projection has more or fewer columns of
        zeros behind its own.

        Args:
          task: number of the task.
          state: of the shapes and devices that the result gets.

        Raises:
          UserError: the saved state is damaged.
        """
        latest = self._latest(task)
        if latest is None:
            return state
        tree = serialization.to_state_dict(state)
        try:
            self._verify(latest)
            loaded = self._load(latest, _without_empty(tree))
        except _DoesNotFit as error:
            raise UserError(
                f"{self.path / latest} was saved with other settings ({error}): give them as they were, "
                "or remove it and the task begins again",
                "workdir",
            ) from error
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise UserError(
                f"{self.path / latest} is damaged ({first_line(error)}): "
                "remove it and the task begins again"
            ) from error
        restored = serialization.from_state_dict(state, _with_empty(loaded, tree))
        return meshes.shard_like(restored, state)

    def notes(self, task: int, step: int) -> dict[str, Any]:
        """Return the values that were saved with the state of a step; {} if there are none."""
        name = f"task{task}-step{step}"
        found = self._list(name)["pending"] if self._is_whole(name) else {}
        return found if isinstance(found, dict) else {}  # release 0.2 wrote a list

    def tasks(self) -> set[int]:
        """Return the numbers of the tasks that a state is saved of."""
        return {int(match[1]) for match in self._saved()}

    def clear(self) -> None:
        """Remove all saved states: the task is in the chain now."""
        hosts.on_first(lambda: self._remove_others(set()))

    def _load(self, name, tree):
        metadata: Any = ocp.metadata(self.path / name).metadata

        def template(path, leaf):
            shape = functools.reduce(lambda t, key: t[key.key], path, metadata).shape
            if shape != leaf.shape and not meshes.is_projection(path, leaf):
                name = "/".join(key.key for key in path)
                raise _DoesNotFit(f"{name} has shape {shape}, now {leaf.shape}")
            return np.empty(shape, leaf.dtype)

        saved = set(traverse_util.flatten_dict(metadata, sep="/"))
        wanted = set(traverse_util.flatten_dict(tree, sep="/"))
        if saved != wanted:
            raise _DoesNotFit(f"one of both has {', '.join(sorted(saved ^ wanted)[:3])}")
        return ocp.load(self.path / name, jax.tree_util.tree_map_with_path(template, tree))

    def _latest(self, task):
        saved = [m for m in self._saved() if int(m[1]) == task]
        return max(saved, key=lambda m: int(m[2]))[0] if saved else None

    def _saved(self):
        if not self.path.exists():
            return []
        names = [p.name for p in self.path.iterdir()]
        return [m for m in map(_NAME.fullmatch, names) if m and self._is_whole(m[0])]

    def _is_whole(self, name):
        return (self.path / f"{name}.json").exists() and (self.path / name).exists()

    def _prepare(self, name):
        self.path.mkdir(parents=True, exist_ok=True)
        if self._is_whole(name):
            return
        (self.path / f"{name}.json").unlink(missing_ok=True)
        if (self.path / name).exists():
            (self.path / name).rmtree()

    def _listed(self, name):
        folder = self.path / name
        return {
            str(p.relative_to(folder)): {"bytes": p.stat().length, "sha256": sha256(p)}
            for p in walk(folder)
        }

    def _write_list(self, name, notes):
        body = {"files": self._listed(name), "pending": notes}
        write_json(self.path / f"{name}.json", {**body, "sha256": _digest(body)})

    def _list(self, name):
        content = json.loads((self.path / f"{name}.json").read_text())
        body = {key: content[key] for key in ("files", "pending")}
        if content["sha256"] != _digest(body):
            raise UserError("its list of files was altered (SHA-256)")
        return body

    def _verify(self, name):
        if self._list(name)["files"] != self._listed(name):
            raise UserError("its files differ from those that were saved (SHA-256)")

    def _remove_others(self, names):
        if self.path.exists():
            kept = names | {f"{name}.json" for name in names}
            self._remove({p.name for p in self.path.iterdir()} - kept)

    def _remove(self, names):
        paths = [path for path in (self.path / name for name in names) if path.exists()]
        for path in sorted(paths, key=lambda p: p.is_dir()):  # first the lists, then the states
            if path.is_dir():
                path.rmtree()
            else:
                path.unlink()


def _best(task, step):
    return f"task{task}-best{step}"


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _on_host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def _without_empty(tree: Any) -> Any:
    """A state dict without its empty dicts, which Orbax has no leaf for."""
    if not isinstance(tree, dict):
        return tree
    cut = {k: _without_empty(v) for k, v in tree.items()}
    return {k: v for k, v in cut.items() if not (isinstance(v, dict) and not v)}


def _with_empty(tree: Any, like: Any) -> Any:
    """`tree` with the empty dicts that `like` has."""
    if not isinstance(like, dict):
        return tree
    return {k: _with_empty(tree.get(k, {}), v) for k, v in like.items()}
