"""Paths, local or in a bucket, and files that appear whole or not at all."""

import functools
import hashlib
import importlib.util
import json
import os
import socket
import uuid
from collections.abc import Iterator
from typing import Any

from absl import logging
from etils import epath

from compat_jax.errors import UserError, unknown

_SCHEMES = ("gs", "s3")
_METADATA = "metadata.google.internal"


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """Turn a path that a user gave into an absolute one; the one function that decides what a path is.

    `~` is expanded, `.` and `..` are left out (see `plain`); a bucket's address (gs://bucket/folder)
    stays as it is.

    Args:
      path: as given.

    Returns:
      The absolute path.

    Raises:
      UserError: empty, with a NUL, with an unknown URL scheme, `~` without a home folder, or in a
        bucket that nothing installed can read.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise UserError(f"a path cannot be empty or hold a NUL: {text!r:.80}")
    scheme, separator, _ = text.partition("://")
    if separator:
        if scheme not in _SCHEMES:
            raise unknown("kind of address", f"{scheme}://", [f"{s}://" for s in _SCHEMES])
        prepare_buckets(scheme)
        return epath.Path(text)
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise UserError(
            f"there is no home folder for {text!r}: write the path from /, or ./{text} for a folder "
            "of that name"
        )
    try:
        return epath.Path(plain(str(epath.Path(expanded).absolute())))
    except OSError as error:  # a working folder that was removed
        raise UserError(f"cannot tell where {text!r} is: {error}") from error


def plain(path: str) -> str:
    """Write an absolute path in the one way that every file has: without `.`, `..` and `//`.

    A `..` behind a link stays, since it leads out of the folder that the link names.

    Args:
      path: absolute, with or without a file there; an address in a bucket and a relative path stay as
        they are.
    """
    if not path.startswith("/"):
        return path
    parts: list[str] = []
    for part in path.split("/"):
        if part in ("", "."):
            continue
        if part != ".." or (parts and (parts[-1] == ".." or os.path.islink(f"/{'/'.join(parts)}"))):
            parts.append(part)
        elif parts:
            parts.pop()
    return f"/{'/'.join(parts)}"


def storage(path: str | os.PathLike[str]) -> epath.Path:
    """Turn a path into an absolute one that checkpoints can be stored under.

    Args:
      path: as given, see `absolute`.

    Raises:
      UserError: see `absolute`; also a path that is not UTF-8, or has characters that Orbax takes for
        a pattern, since what is written there could not be read again.
    """
    found = absolute(path)
    try:
        str(found).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{os.fsencode(str(found))!r} is not UTF-8, so checkpoints cannot be stored under it: use "
            "another folder"
        ) from error
    patterns = sorted(set("*?[]{}\\") & set(str(found)))
    if patterns:
        raise UserError(
            f"{found} has {' and '.join(patterns)} in it, which checkpoints cannot be stored under: "
            "use another folder"
        )
    return found


def in_bucket(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is an address like gs://bucket/folder, where nothing can be renamed."""
    return "://" in str(path)


@functools.cache
def prepare_buckets(scheme: str) -> None:
    """Check once that a kind of bucket can be reached, and have listings read anew each time.

    Args:
      scheme: "gs" or "s3".

    Raises:
      UserError: nothing installed reads it, or there are no credentials.
    """
    if scheme == "gs" and importlib.util.find_spec("gcsfs") is None:
        raise UserError(
            "gs:// needs gcsfs, which is not installed: pip install gcsfs (or this package with "
            "its extra gcs)"
        )
    if scheme == "gs":
        _check_credentials()
    import fsspec  # comes with etils

    # Others write as well, among them TensorStore: a listing that was kept would be wrong.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False


def _check_credentials() -> None:
    """Refuse gs:// without credentials at once; the client would retry for a minute, silently."""
    if os.environ.get("STORAGE_EMULATOR_HOST") or os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
        return
    settings = os.environ.get("CLOUDSDK_CONFIG") or os.path.expanduser("~/.config/gcloud")
    if os.path.exists(os.path.join(settings, "application_default_credentials.json")):
        return
    try:  # machines of Google's get theirs from here
        socket.create_connection((_METADATA, 80), timeout=1).close()
    except OSError as error:
        raise UserError(
            "gs:// needs credentials, and this machine has none: run `gcloud auth application-default "
            "login`, or set GOOGLE_APPLICATION_CREDENTIALS"
        ) from error


def first_line(error: Exception) -> str:
    """Return kind and beginning of an error, for the parentheses of a message."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def walk(folder: epath.Path) -> Iterator[epath.Path]:
    """List all files below a folder, in the order of their names."""
    for path in sorted(folder.iterdir()):
        yield from walk(path) if path.is_dir() else [path]


def sha256(path: epath.Path) -> str:
    """Return the SHA-256 of a file, as a hexadecimal string."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_bytes(path: epath.Path, content: bytes) -> None:
    """Write a file whole: beside the target, then renamed; objects of a bucket appear whole anyway."""
    path = epath.Path(path)
    if in_bucket(path):
        path.write_bytes(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        aside.write_bytes(content)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: epath.Path, content: Any) -> None:
    """Write a value as indented JSON."""
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def create(path: epath.Path, content: bytes) -> bool:
    """Create an object of a bucket if it does not exist; return whether this writer created it."""
    import fsspec

    system, inside = fsspec.core.url_to_fs(str(path))
    try:
        system.pipe_file(inside, content, mode="create")
    except FileExistsError:
        return False
    return True


def append(path: epath.Path, line: str) -> None:
    """Append a line to a text file; an object of a bucket is written anew, since none can grow."""
    if in_bucket(path):
        before = path.read_text() if path.exists() else ""
        path.write_text(f"{before}{line}\n")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(f"{line}\n")


def write_sealed(path: epath.Path, content: bytes, key: str) -> None:
    """Write a cache file that `read_sealed` can verify.

    Args:
      path: of the file.
      content: any bytes.
      key: what the content was made of; another file's content does not pass under this key.
    """
    write_bytes(path, hashlib.sha256(key.encode() + content).digest() + content)


def read_sealed(path: epath.Path, key: str) -> bytes | None:
    """Read a cache file.

    Returns:
      The content; None if there is no such file, or if it is not what was written, which is logged.
    """
    if not path.exists():
        return None
    text = path.read_bytes()
    digest, content = text[:32], text[32:]
    if hashlib.sha256(key.encode() + content).digest() != digest:
        logging.warning("%s was altered or cut off: made again", path)
        return None
    return content


def check_memory(needed: int, what: str) -> None:
    """Refuse arrays larger than the memory of this machine, before they are made.

    Args:
      needed: bytes.
      what: name for the error.

    Raises:
      UserError: naming both sizes.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise UserError(
            f"{what} would take {needed / 2**30:,.0f} GiB, this machine has {memory / 2**30:.0f}: take "
            "fewer or smaller ones"
        )
