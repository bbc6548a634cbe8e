"""Folders that this package wrote, which may lie among pictures and are none.

Runs (`run.json`), versions (`record.json`), evaluations (`matrix.json`) and their features (`cache`),
reports (`report.json`, `answers.json`), sweeps (`results.jsonl`) and galleries of LanceDB (`*.lance`).
The content of those files decides, and a folder that holds other pictures as well is not meant.
"""

import json
import os
import re
from pathlib import Path

# Files by which a folder is known, and fields that their content has.
_MARKERS = {
    "run.json": {"method", "num_prototypes"},
    "record.json": {"format", "record"},
    "matrix.json": {"metric", "matrix"},
    "report.json": {"chain", "versions"},
    "answers.json": {"query", "answers"},
    "results.jsonl": {"cell", "metrics"},
}
_CHARTS = {"matrices.png", "average_accuracy.png"}  # of an evaluation
_CACHED = re.compile(r"[a-z]+[0-9]*-[0-9a-f]{24}\.npz")  # see `array_cache.Cache`
_PHOTOS = (".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".avif")


def is_output(folder: Path) -> bool:
    """Return whether this package wrote a folder; one with pictures of the user's does not count."""
    if folder.suffix == ".lance" and (folder / "_versions").is_dir():
        return True
    if folder.name == "cache" and _is_cache(os.listdir(folder)):
        return True
    markers = [name for name, fields in _MARKERS.items() if _has_fields(folder / name, fields)]
    return bool(markers) and not any(_is_photo(name, markers) for name in os.listdir(folder))


def _is_cache(names):
    return bool(names) and all(map(_CACHED.fullmatch, names))


def _is_photo(name, markers):
    """Return whether a file beside such markers is a picture of the user's rather than a chart."""
    of_page = "report.json" in markers or "answers.json" in markers
    is_chart = of_page or ("matrix.json" in markers and name in _CHARTS)
    return name.lower().endswith(_PHOTOS) or (name.lower().endswith(".png") and not is_chart)


def _has_fields(path, fields):
    """Return whether a file is JSON, or lines of it, of an object with these fields, or of some such."""
    try:
        content = path.read_bytes() if path.is_file() else b""
        whole = json.loads(content.splitlines()[0] if path.suffix == ".jsonl" else content)
    except (OSError, ValueError, IndexError):
        return False
    parts = whole.values() if isinstance(whole, dict) else whole if isinstance(whole, list) else ()
    return any(isinstance(one, dict) and fields <= one.keys() for one in (whole, *parts))
