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
from compat_jax.data.reading import check_pictures
from compat_jax.errors import Stopped, UserError
from compat_jax.features_file import (
    Features,
    check_suffix,
    made_by,
    read_features,
    write_features,
)
from compat_jax.files import read_sealed, write_sealed
from compat_jax.mesh import make_mesh
from compat_jax.meter import Meter
from compat_jax.models import computed_in
from compat_jax.session import never


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
      UserError: no pictures, another suffix, or a shard out of range.
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
        self.version, self.files, self.on_bad, self.part = version, list(files), on_bad, part
        self.out, self.shard = check_suffix(out), shard
        self.parts = self.out.parent / f".{self.out.name}.parts"
        listed = hashlib.sha256("\0".join(self.files).encode("utf-8", "surrogateescape"))
        described = f"{version.sha256} {version.record.preparation} {on_bad} {part}"
        self.key = f"{described} {listed.hexdigest()}"

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

        Args:
          should_stop: asked between parts.
          batch_size: pictures per batch.
          dtype: of the network's computation: "float32", "bfloat16" or "auto"; see `Run`.
          progress: label of a progress bar; None for none.

        Returns:
          What was written; None while parts of other hosts are missing.

        Raises:
          Stopped: it was asked to stop; the parts that were done are saved.
          UserError: files that are no pictures, with on_bad "stop".
        """
        done = self._done()
        if done is not None:
            return done
        dtype = computed_in(dtype)
        own = range(self.shard[0], len(self), self.shard[1])
        with Meter(progress, sum(map(self._count, own)), units="pictures") as meter:
            for number in own:
                if self._read(number, dtype) is not None:
                    meter.skip(self._count(number))
                    continue
                if should_stop():
                    raise Stopped
                content = self._embed(number, batch_size, dtype)
                write_sealed(self._path(number), content, self._key(number, dtype))
                meter.update(self._count(number))
        found = [self._read(number, dtype) for number in range(len(self))]
        if any(content is None for content in found):
            return None
        return self._merge([content for content in found if content is not None])

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

    def _done(self) -> Features | None:
        """Read what an earlier call wrote of the same version and pictures; None if there is nothing."""
        if not self.out.exists():
            return None
        found = read_features(self.out)
        same = list(found.paths) == self.files or (
            self.on_bad == "skip" and set(found.paths) <= set(self.files)
        )
        if found.made_by != made_by(self.version) or not same:
            raise UserError(
                f"{self.out} has features of other pictures or of another version: choose another file, "
                "or remove it",
                "out",
            )
        return found

    def _count(self, number) -> int:
        return len(self.files[number * self.part : (number + 1) * self.part])

    def _embed(self, number, batch_size, dtype) -> bytes:
        files = self.files[number * self.part : (number + 1) * self.part]
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
        np.savez(buffer, features=features, paths=np.array(files, dtype=np.str_))
        return buffer.getvalue()

    def _path(self, number) -> epath.Path:
        return self.parts / f"{number:06d}.npz"

    def _key(self, number, dtype) -> str:
        return f"{self.key} {dtype} {number}"

    def _read(self, number, dtype) -> bytes | None:
        return read_sealed(self._path(number), self._key(number, dtype))

    def _merge(self, parts: Sequence[bytes]) -> Features:
        features, paths = [], []
        for content in parts:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                features.append(arrays["features"])
                paths += arrays["paths"].tolist()
        found = Features(np.concatenate(features), tuple(paths), made_by(self.version))
        write_features(self.out, found)
        self.parts.rmtree(missing_ok=True)
        return found
