"""Arrays that were computed once, in files, addressed by what they were made of."""

import hashlib
import io
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from compat_jax import hosts
from compat_jax.files import absolute, read_sealed, write_sealed


class Cache:
    """Arrays that an evaluation has computed, on disk, addressed by what they were made of.

    Args:
      folder: local or gs://; None to keep nothing.
      settings: part of the address of all arrays.
    """

    def __init__(self, folder, settings: str):
        self.folder = None if folder is None else absolute(folder)
        self.settings = settings

    def get(
        self,
        kind: str,
        made_of: Sequence[str],
        compute: Callable[[], tuple[np.ndarray, ...]],
    ) -> tuple[np.ndarray, ...]:
        """Read arrays if every process can, or compute and keep them.

        Args:
          kind: begins the name of the file.
          made_of: the rest of the address.
          compute: makes the arrays.
        """
        if self.folder is None:
            return compute()
        key = "\n".join([self.settings, *made_of])
        path = self.folder / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
        content = read_sealed(path, key)
        is_missing = hosts.any_process(content is None)
        if content is not None and not is_missing:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                return tuple(arrays[name] for name in sorted(arrays.files))
        parts = compute()
        buffer = io.BytesIO()
        # Scores are mostly zeros and ones; features do not compress.
        save: Any = np.savez_compressed if kind.startswith("row") else np.savez
        save(buffer, **{f"{i:02d}": np.asarray(a) for i, a in enumerate(parts)})

        def write():
            try:
                write_sealed(path, buffer.getvalue(), key)
            except OSError as error:  # the numbers are right without a cache
                logging.warning("cannot keep %s: %s", path, error.strerror or error)

        hosts.on_first(write)
        return tuple(np.asarray(a) for a in parts)
