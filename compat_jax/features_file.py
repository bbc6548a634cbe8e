"""Features in a file: what `launch.embed` writes, as .npz or .parquet, and who extracted them."""

import dataclasses
import io
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from compat_jax.chain import Version
from compat_jax.errors import UserError
from compat_jax.files import absolute, first_line, write_bytes

SUFFIXES = (".npz", ".parquet")


@dataclasses.dataclass(frozen=True)
class Features:
    """Features and the pictures that they are of.

    Attributes:
      features: float32[n, d], rows of norm 1.
      paths: of the pictures, one a row.
      made_by: JSON values: version, its SHA-256, feature size, K, preparation; of an `EmbeddingJob` also
        dtype, and digests of the list of pictures and of their sizes and times of change.
    """

    features: np.ndarray
    paths: tuple[str, ...]
    made_by: dict[str, Any]

    def replaced(self, features: np.ndarray) -> "Features":
        """Return these with other features of the same pictures."""
        return dataclasses.replace(self, features=features)


def made_by(version: Version) -> dict[str, Any]:
    """Describe the version that extracts features, as JSON values."""
    record = version.record
    return {
        "version": version.number,
        "sha256": version.sha256,
        "feature_size": record.feature_size,
        "num_prototypes": record.num_prototypes,
        "preparation": dict(record.preparation),
    }


def check_suffix(path: str | os.PathLike[str], argument: str = "out") -> epath.Path:
    """Return the absolute path of a file of features.

    Args:
      path: as given.
      argument: what gave it: "out" for a file to write, "features" for one to read.

    Raises:
      UserError: neither .npz nor .parquet.
    """
    found = absolute(path)
    if found.suffix not in SUFFIXES:
        done = "written to" if argument == "out" else "read from"
        raise UserError(f"features are {done} .npz or .parquet, got {found.name!r}", argument)
    return found


def check_paths(path: epath.Path, paths: Sequence[str]) -> None:
    """Refuse paths of pictures that a file of features cannot hold, before any is embedded.

    Raises:
      UserError: naming one that is not UTF-8, for .parquet.
    """
    for one in paths if path.suffix == ".parquet" else ():
        try:
            one.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{os.fsencode(one)!r} is not UTF-8, which .parquet cannot hold: rename it, or write "
                ".npz",
                "out",
            ) from error


def write_features(path: str | os.PathLike[str], found: Features) -> epath.Path:
    """Write features to .npz (features, paths, made_by) or .parquet (columns path and feature).

    The file appears whole or not at all.

    Raises:
      UserError: another suffix.
    """
    target, buffer = check_suffix(path), io.BytesIO()
    text = json.dumps(found.made_by)
    if target.suffix == ".npz":
        paths = np.array(found.paths, dtype=np.str_)
        np.savez(buffer, features=found.features, paths=paths, made_by=np.array(text))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        flat = pa.array(np.ascontiguousarray(found.features).reshape(-1))
        columns = {
            "path": pa.array(found.paths, pa.string()),
            "feature": pa.FixedSizeListArray.from_arrays(flat, found.features.shape[1]),
        }
        table = pa.table(columns).replace_schema_metadata({"made_by": text})
        pq.write_table(table, buffer)
    write_bytes(target, buffer.getvalue())
    return target


def read_features(path: str | os.PathLike[str]) -> Features:
    """Read what `write_features` wrote.

    Raises:
      UserError: no such file, or another content.
    """
    source = check_suffix(path, "features")
    if not source.exists():
        raise UserError(f"no file of features at {source}", "features")
    try:
        content = source.read_bytes()
        if source.suffix == ".npz":
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                features, paths = arrays["features"], arrays["paths"].tolist()
                text = str(arrays["made_by"])
        else:
            import pyarrow.parquet as pq

            table = pq.read_table(io.BytesIO(content))
            rows = table["feature"].combine_chunks()
            features = rows.flatten().to_numpy().reshape(len(rows), -1)
            paths, text = table["path"].to_pylist(), (table.schema.metadata or {})[b"made_by"]
        made = dict(json.loads(text))
        if features.ndim != 2 or len(features) != len(paths):
            raise ValueError(f"{features.shape} features of {len(paths)} paths")
    except Exception as error:  # NumPy, zip and pyarrow raise many kinds
        raise UserError(f"{source} holds no features ({first_line(error)})", "features") from error
    return Features(features.astype(np.float32, copy=False), tuple(map(str, paths)), made)
