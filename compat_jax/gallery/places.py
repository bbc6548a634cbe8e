"""The place of a gallery as one text: which engine, and where."""

import importlib.util
import os
import re

from compat_jax.errors import UserError, unknown
from compat_jax.fields import Field, Rule, checked
from compat_jax.gallery import memory
from compat_jax.gallery.store import Store

ENGINES = ("memory", "lance", "qdrant")
_EXTRAS = {"lance": ("lancedb", "gallery"), "qdrant": ("qdrant_client", "qdrant")}
_SIZE = Field("size", int, Rule("numbers in a feature", low=1), None)
_SERVER = re.compile(r"[\w.-]+:[0-9]+")  # without the scheme it would name a folder
_EXAMPLES = "lance:FOLDER/NAME, FOLDER/NAME.lance, qdrant:http://localhost:6333/NAME or memory:NAME"


def open_store(place: str | os.PathLike[str], size: int | None = None) -> Store:
    """Open the store at a place, or make a new one.

    Args:
      place: "lance:FOLDER/NAME", also gs://bucket/FOLDER/NAME and s3://…, with or without "lance:"
        there; a path that ends in .lance; "qdrant:http://host:6333/NAME", also https://;
        "qdrant:FOLDER/NAME"; or "memory:NAME" for one that ends with this process.
      size: of the features; None opens a store that is there, and makes none.

    Raises:
      UserError: no such kind of place, an engine that is not installed, or see the engines' stores.
    """
    if not isinstance(place, str | os.PathLike):
        raise UserError(f"{place!r:.200} names no gallery: write {_EXAMPLES}")
    place = os.fsdecode(place)
    if size is not None:
        checked(_SIZE, size)
    engine, where = _parsed(place)
    if engine == "memory":
        return memory.named(where, size)
    _check_installed(engine)
    folder, separator, name = where.rstrip("/").rpartition("/")
    if separator and not folder:
        folder = "/"
    name = name.removesuffix(".lance") if engine == "lance" else name
    if not name or folder.endswith(":/"):
        raise UserError(f"the gallery {place!r:.200} has no name: write {_EXAMPLES}")
    if engine == "qdrant" and _SERVER.fullmatch(folder):
        raise UserError(
            f"a server's address begins with http:// or https://: qdrant:http://{where}"
        )
    if engine == "lance":
        from compat_jax.gallery.lance import LanceStore

        return LanceStore(folder or ".", name, size)
    from compat_jax.gallery.qdrant import QdrantStore

    return QdrantStore(folder or ".", name, size)


def _parsed(place: str) -> tuple[str, str]:
    """Return the engine and the rest of a place."""
    engine, separator, where = place.partition(":")
    if separator and not where.startswith("//") and "/" not in engine:
        if engine not in ENGINES:
            raise unknown("kind of gallery", engine, ENGINES)
        return engine, where
    if (separator and where.startswith("//")) or place.rstrip("/").endswith(".lance"):
        if engine in ("http", "https"):
            raise UserError(f"a server's address needs its engine in front: qdrant:{place}")
        return "lance", place
    raise UserError(f"{place!r:.200} names no gallery: write {_EXAMPLES}")


def _check_installed(engine: str) -> None:
    module, extra = _EXTRAS[engine]
    if importlib.util.find_spec(module) is None:
        package = module.replace("_", "-")
        raise UserError(
            f"a gallery at {engine}: needs {package}, which is not installed: "
            f"pip install 'compat_jax[{extra}]'"
        )
