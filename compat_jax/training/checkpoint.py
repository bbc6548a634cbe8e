"""Saved training states: a killed run resumes from here, to the same bits."""

import functools
import hashlib
import json
import os
import re
from collections.abc import Sequence
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


class Checkpointer:
    """Keeps the last saved state of the present task, in a folder of its own.

    Beside each state lies `NAME.json`, written last: size and SHA-256 of its files, and the metrics of
    steps that the log does not have yet. A state without it was cut off, a state that differs from it
    is refused.

    Args:
      path: of the folder.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = storage(path)

    def save(self, task: int, state: TrainState, pending: Sequence[Any] = ()) -> None:
        """Replace the saved state; the older one is removed only when this one is whole.

        Args:
          task: number of the task.
          state: to save.
          pending: JSON values that belong to it, see `pending`.

        Raises:
          UserError: the folder cannot be written to; the state saved before is still there.
        """
        name = f"task{task}-step{int(state.step)}"
        tree = _without_empty(serialization.to_state_dict(state))
        try:
            hosts.on_first(lambda: self._prepare(name))
            if not hosts.broadcast(self._is_whole(name)):
                # Several processes write a share each. A state without its list was cut off.
                tree = tree if hosts.is_distributed() else _on_host(tree)
                ocp.save(self.path / name, tree, overwrite=in_bucket(self.path))
                hosts.on_first(lambda: self._write_list(name, list(pending)))
            hosts.on_first(lambda: self._remove_others(name))
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise UserError(
                f"cannot save to {self.path} ({first_line(error)}): make room or free it, then "
                "run the same again to go on from the save before"
            ) from error

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
        saved = [m for m in self._saved() if int(m[1]) == task]
        if not saved:
            return state
        latest = max(saved, key=lambda m: int(m[2]))[0]
        tree = serialization.to_state_dict(state)
        try:
            self._verify(latest)
            loaded = self._load(latest, _without_empty(tree))
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise UserError(
                f"{self.path / latest} is damaged ({first_line(error)}): "
                "remove it and the task begins again"
            ) from error
        restored = serialization.from_state_dict(state, _with_empty(loaded, tree))
        return meshes.shard_like(restored, state)

    def pending(self, task: int, step: int) -> list[Any]:
        """Return the values that were saved beside the state of a step; [] if there is none."""
        name = f"task{task}-step{step}"
        return self._list(name)["pending"] if self._is_whole(name) else []

    def clear(self) -> None:
        """Remove all saved states: the task is in the chain now."""
        hosts.on_first(lambda: self._remove_others(None))

    def _load(self, name, tree):
        metadata: Any = ocp.metadata(self.path / name).metadata

        def template(path, leaf):
            shape = functools.reduce(lambda t, key: t[key.key], path, metadata).shape
            if shape != leaf.shape and not meshes.is_projection(path):
                name = "/".join(key.key for key in path)
                raise UserError(f"{name} has shape {shape}, but the run needs {leaf.shape}")
            return np.empty(shape, leaf.dtype)

        saved = set(traverse_util.flatten_dict(metadata, sep="/"))
        wanted = set(traverse_util.flatten_dict(tree, sep="/"))
        if saved != wanted:
            raise UserError(f"it holds {sorted(saved ^ wanted)[:3]}, which do not fit the run")
        return ocp.load(self.path / name, jax.tree_util.tree_map_with_path(template, tree))

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

    def _write_list(self, name, pending):
        body = {"files": self._listed(name), "pending": pending}
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

    def _remove_others(self, name):
        if not self.path.exists():
            return
        keep = {name, f"{name}.json"}
        paths = [p for p in self.path.iterdir() if p.name not in keep]
        for path in sorted(paths, key=lambda p: p.is_dir()):  # first the lists, then the states
            if path.is_dir():
                path.rmtree()
            else:
                path.unlink()


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
