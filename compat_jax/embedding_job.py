"""Embed a long list of pictures in parts that are saved as they are done, on one or many hosts."""

import hashlib
import io
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath

from compat_jax.chain import Version
from compat_jax.data.pictures import BadPictures
from compat_jax.data.reading import ON_BAD, check_pictures, in_order
from compat_jax.errors import Stopped, UserError
from compat_jax.extraction import checked_shard
from compat_jax.features_file import (
    Features,
    check_paths,
    check_suffix,
    made_by,
    read_features,
    write_features,
)
from compat_jax.fields import Field, Rule, checked
from compat_jax.files import in_bucket, read_sealed, write_sealed
from compat_jax.mesh import make_mesh
from compat_jax.meter import Meter
from compat_jax.models import computed_in
from compat_jax.session import never

_PART = Field("part", int, Rule("pictures per part", low=1, high=10**7), 4096)
_ON_BAD = Field("on_bad", str, Rule("files that are no pictures", choices=ON_BAD), "stop")
_STATS = 64  # files that a thread looks at in a row


class EmbeddingJob:
    """The pictures of a file of features, in parts.

    Args:
      version: that embeds.
      files: paths of the pictures, the same list on every host.
      out: file to write, see `features_file`.
      part: pictures per part.
      on_bad: "stop" refuses files that are no pictures; "skip" leaves them out.
      shard: (number of this host, number of hosts).

    Raises:
      UserError: no pictures, another suffix, a shard out of range, `part` or `on_bad` against its rule,
        or a path that the file cannot hold.
    """

    def __init__(
        self,
        version: Version,
        files: Sequence[str],
        out: str | os.PathLike[str],
        *,
        part: int = 4096,
        on_bad: str = "stop",
        shard: tuple[int, int] = (0, 1),
    ):
        if not files:
            raise UserError(
                "no pictures to embed: give a folder, a pattern or a table that has some (new ones, if "
                "others are to be skipped)",
                "pictures",
            )
        self.version, self.files = version, list(files)
        self.part, self.on_bad = checked(_PART, part), checked(_ON_BAD, on_bad)
        self.out, self.shard = check_suffix(out), checked_shard(shard)
        check_paths(self.out, self.files)
        self.parts = self.out.parent / f".{self.out.name}.parts"
        self.listed = _digest(self.files)
        described = f"{version.sha256} {version.record.preparation} {on_bad} {part}"
        self.key = f"{described} {self.listed} stamped"

    def __len__(self) -> int:
        return -(-len(self.files) // self.part)

    def run(
        self,
        *,
        should_stop: Callable[[], bool] = never,
        batch_size: int = 64,
        dtype: str = "float32",
        progress: str | None = None,
    ) -> Features | None:
        """Embed the parts of this host that are missing; merge them once all hosts' are there.

        A part of which a picture has another size or time of change than when it was embedded is
        embedded again.

        Args:
          should_stop: asked between parts.
          batch_size: pictures per batch.
          dtype: of the network's computation: "float32", "bfloat16" or "auto"; see `Run`.
          progress: label of a progress bar; None for none.

        Returns:
          What was written; None while parts of other hosts are missing.

        Raises:
          Stopped: it was asked to stop; the parts that were done are saved.
          UserError: files that are no pictures, with on_bad "stop"; or the file is there with features
            of other pictures, of these before they changed, of another version or in another dtype.
        """
        dtype = computed_in(dtype)
        done = self._done(dtype)
        if done is not None:
            return done
        own = range(self.shard[0], len(self), self.shard[1])
        with Meter(progress, sum(map(self._count, own)), units="pictures") as meter:
            for number in own:
                if self._is_done(number, dtype):
                    meter.skip(self._count(number))
                    continue
                if should_stop():
                    raise Stopped
                content = self._embed(number, batch_size, dtype)
                write_sealed(self._path(number), content, self._key(number, dtype))
                meter.update(self._count(number))
        found = [self._read(number, dtype) for number in range(len(self))]
        if any(part is None for part in found):
            return None
        return self._merge([part for part in found if part is not None], dtype)

    def sentence(self, written: Features | None) -> str:
        """Say what was done."""
        if written is None:
            return (
                f"share {self.shard[0]} of {self.shard[1]} is done; the last host writes {self.out}"
            )
        count, size = written.features.shape
        bad = len(self.files) - count
        skipped = f", {bad} files that are no pictures left out" if bad else ""
        by = f"by version {self.version.number}"
        return f"{count} features of {size} numbers {by} in {self.out}{skipped}"

    def _done(self, dtype) -> Features | None:
        """Read what an earlier call wrote of the same version and pictures; None if there is nothing."""
        if not self.out.exists():
            return None
        found = read_features(self.out)
        known, expected = found.made_by, made_by(self.version)
        if {name: known.get(name) for name in expected} != expected or not self._same_list(found):
            problem = "has features of other pictures or of another version"
        elif known.get("dtype", dtype) != dtype:
            problem = f"has features that were computed in {known['dtype']}, not in {dtype}"
        elif "stamps" in known and known["stamps"] != _digest(_stamps(self.files)):
            problem = "has features of pictures that have changed since"
        else:
            return found
        raise UserError(f"{self.out} {problem}: choose another file, or remove it", "out")

    def _same_list(self, found: Features) -> bool:
        """Return whether features are of the pictures of this job, but for those it may leave out."""
        kept = set(found.paths)
        missing = [file for file in self.files if file not in kept]
        if missing and self.on_bad != "skip":
            return False
        if "listed" in found.made_by:
            return found.made_by["listed"] == self.listed
        # Earlier releases did not write down which pictures were given.
        return list(found.paths) == [file for file in self.files if file in kept] and not len(
            check_pictures(missing, on_bad="skip").kept
        )

    def _count(self, number) -> int:
        return len(self._files(number))

    def _files(self, number) -> list[str]:
        return self.files[number * self.part : (number + 1) * self.part]

    def _embed(self, number, batch_size, dtype) -> bytes:
        files = self._files(number)
        stamps = _stamps(files)  # before they are read: a change meanwhile is found later
        if self.on_bad == "skip":
            kept = check_pictures(files, on_bad="skip").kept
            files = [files[i] for i in kept]
        mesh = make_mesh("data:-1", jax.local_devices())
        try:
            features = self.version.embed(files, mesh=mesh, batch_size=batch_size, dtype=dtype)
        except BadPictures:  # the first of them: refuse all at once
            check_pictures(self.files, on_bad="stop")
            raise
        buffer = io.BytesIO()
        np.savez(
            buffer,
            features=features,
            paths=np.array(files, dtype=np.str_),
            stamps=np.array(stamps, dtype=np.str_),
        )
        return buffer.getvalue()

    def _path(self, number) -> epath.Path:
        return self.parts / f"{number:06d}.npz"

    def _key(self, number, dtype) -> str:
        return f"{self.key} {dtype} {number}"

    def _is_done(self, number, dtype) -> bool:
        """Return whether a part is there, of the pictures as they are on this host."""
        part = self._read(number, dtype)
        return part is not None and part["stamps"].tolist() == _stamps(self._files(number))

    def _read(self, number, dtype) -> dict[str, np.ndarray] | None:
        content = read_sealed(self._path(number), self._key(number, dtype))
        if content is None:
            return None
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)

    def _merge(self, parts: Sequence[dict[str, np.ndarray]], dtype) -> Features:
        features = np.concatenate([part["features"] for part in parts])
        paths, stamps = (
            [one for part in parts for one in part[name].tolist()] for name in ("paths", "stamps")
        )
        known = {"dtype": dtype, "listed": self.listed, "stamps": _digest(stamps)}
        found = Features(features, tuple(paths), {**made_by(self.version), **known})
        write_features(self.out, found)
        self.parts.rmtree(missing_ok=True)
        return found


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()


def _stamps(files: Sequence[str]) -> list[str]:
    """Return the size and time of change of each file; "" for one that is not there."""

    def one(i):
        try:
            if in_bucket(files[i]):
                found = epath.Path(files[i]).stat()
                return f"{found.length} {found.mtime}"
            status = os.stat(files[i])
            return f"{status.st_size} {status.st_mtime_ns}"
        except (OSError, ValueError):  # ValueError: a NUL in the path
            return ""

    return list(in_order(len(files), one, block=_STATS))
