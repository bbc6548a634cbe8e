"""Lists of pictures: folders of classes, tables, data sets of Hugging Face on disk, and plain trees.

In a folder, hidden files and what systems leave behind (`@eaDir`, `__MACOSX`, `Thumbs.db`, …) are no
pictures; links are followed, dangling ones refused.

Folders that this package wrote are passed over as well, see `own_outputs`; a class folder that holds
nothing else is no class.
"""

import fnmatch
import glob
import itertools
import os
import stat
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from compat_jax.data.huggingface import is_saved, open_saved, saved_splits
from compat_jax.data.own_outputs import is_output
from compat_jax.data.tables import COLUMNS, TABLES, read_table
from compat_jax.errors import UserError
from compat_jax.files import absolute, in_bucket, plain

# Which folders are classes, and what names them: see `list_folder`.
CLASS_FOLDERS = ("top", "path", "name")
_LEFT_BEHIND = {"@eadir", "__macosx", "thumbs.db", "desktop.ini", "ehthumbs.db", "lost+found"}
# Names of folders that hold class folders rather than pictures of a class.
_PARTS = {
    *("train", "training", "val", "valid", "validation", "dev", "test", "testing"),
    *("query", "gallery", "probe", "eval", "holdout"),
}


class Picture(NamedTuple):
    """A picture of a list.

    Attributes:
      path: absolute path of the file, the same of every list that it is in, see `files.plain`.
      label: class name, or None.
      split: part of the data that it belongs to, or None.
    """

    path: str
    label: str | None = None
    split: str | None = None


def class_name(text: str, where: str) -> str:
    """Return the class name that a text stands for; the one function that decides it.

    Args:
      text: name of a folder, or entry of a table.
      where: what to call it in errors.

    Returns:
      The text in Unicode's composed form (NFC), without blanks around it.

    Raises:
      UserError: empty, with a NUL, or not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is not UTF-8: rename it", "path") from error
    name = unicodedata.normalize("NFC", text).strip()
    if not name or "\0" in name:
        raise UserError(f"{where} is empty or has a NUL: give it a name", "path")
    return name


def list_labelled(path: str | os.PathLike) -> list[Picture]:
    """List class folders, a table, or a data set of Hugging Face, whatever the path is.

    Args:
      path: a folder, or a file of `TABLES`.

    Raises:
      UserError: see `list_folder`, `list_table` and `list_huggingface`.
    """
    root = absolute(path)
    if root.suffix.lower() in TABLES and not root.is_dir():
        return list_table(root)
    if is_saved(root):
        return list_huggingface(root)
    return list_folder(root)


def list_folder(
    path: str | os.PathLike, *, class_folders: str = "top", exclude: Sequence[str] = ()
) -> list[Picture]:
    """List a folder with one sub-folder of pictures per class.

    Args:
      path: of the folder.
      class_folders: "top": the sub-folders are the classes, with all folders in them. "path": every
        folder that itself holds pictures is a class, called by its path, e.g. "Fruit/Apple/Royal-Gala".
        "name": the same, called by its own name, "Royal-Gala".
      exclude: patterns of names of files and folders to pass over, e.g. "*.txt".

    Returns:
      The pictures class by class, sorted by class name and path.

    Raises:
      UserError: no such folder, no class, an empty class, two folders of one class name, folders one
        level too high, a name that is not UTF-8, a dangling link, or a file that is neither a file nor
        a folder.
    """
    root = Path(absolute(path))
    if not root.is_dir():
        raise UserError(
            f"no folder {path}: it must hold one sub-folder of pictures per class", "path"
        )
    folders: dict[str, Path] = {}
    nested = class_folders != "top"
    for folder in _class_folders(root, (), nested=nested, exclude=exclude):
        given = folder.relative_to(root).as_posix()
        called = folder.name if class_folders == "name" else given
        name = class_name(called, f"the name of class folder {os.fsencode(folder)!r}")
        if name in folders:
            other = folders[name].relative_to(root).as_posix()
            raise UserError(
                f"class folders {other!r} and {given!r} of {root} have the same "
                f"class name {name!r}: rename one, or move its pictures into the other",
                "path",
            )
        folders[name] = folder
    if not nested:
        _refuse_parts(root, list(folders.values()), exclude)
    found = [
        Picture(str(file), name)
        for name, folder in sorted(folders.items())
        for file in (_files(folder, exclude) if nested else _pictures(folder, exclude))
    ]
    if not found:
        raise UserError(
            f"{path} has no sub-folder: it must hold one folder of pictures per class", "path"
        )
    return found


def _class_folders(root, above, *, nested, exclude) -> Iterable[Path]:
    """The folders within one that are classes."""
    where = _entered(root, above)
    for folder in (p for p in _entries(root, exclude) if p.is_dir()):
        if not nested or _files(folder, exclude):
            yield folder
        if nested:
            yield from _class_folders(folder, (*above, where), nested=True, exclude=exclude)


def _files(folder, exclude):
    return [path for path in _entries(folder, exclude) if not path.is_dir()]


def _refuse_parts(root, folders, exclude):
    """Refuse folders of class folders in the place of classes: the folder is one level too high."""
    inside = {folder: found for folder in folders if (found := _entries(folder, exclude))}
    if not inside or not all(p.is_dir() for found in inside.values() for p in found):
        return
    named = [folder.name for folder in folders if folder.name.lower() in _PARTS]
    names = [p.name for entries in inside.values() for p in entries]
    if named and (len(named) == len(folders) or len(set(names)) < len(names)):
        raise UserError(
            f"{root} holds no classes, but folders of classes ({', '.join(f.name for f in folders)}): "
            f"give one of them, such as {root / named[0]}",
            "path",
        )
    _refuse_only(root, inside)


def _refuse_only(root, inside):
    """Refuse one folder of folders in the place of classes, which would be a single class."""
    if len(inside) != 1:
        return
    ((folder, entries),) = inside.items()
    if len(entries) > 1:
        raise UserError(
            f"{root} would be a single class, {folder.name!r}, of {len(entries)} folders "
            f"({entries[0].name}, {entries[1].name}{', ...' if entries[2:] else ''}): give {folder} if "
            "they are the classes; if it really is one class, move the pictures out of its folders",
            "path",
        )


def _pictures(folder, exclude):
    """The pictures of a class folder; none where it holds only what this package wrote."""
    files = list(_walk(folder, (), exclude))
    if not files and not any(p.is_dir() and is_output(p) for p in folder.iterdir()):
        raise UserError(f"class folder {folder} is empty: add pictures or remove it", "path")
    return files


def _walk(folder, above, exclude=()) -> Iterable[Path]:
    where = _entered(folder, above)
    for path in _entries(folder, exclude):
        if path.is_dir():
            yield from _walk(path, (*above, where), exclude)
        else:
            yield path


def _entered(folder, above):
    """The true path of a folder, which must not be one of those that it was reached through."""
    where = folder.resolve()
    if where in above:
        raise UserError(f"{folder} links to a folder around itself: remove the link", "path")
    return where


def _entries(folder, exclude=()):
    """List pictures and folders of them, in the order of names."""
    found = [
        p for p in sorted(folder.iterdir()) if not any(fnmatch.fnmatch(p.name, e) for e in exclude)
    ]
    return [path for path in found if _is_data(path)]


def _is_data(path):
    """Return whether this is a file or folder of data; raise for what is neither."""
    if _is_left_behind(path.name):
        return False
    try:
        mode = path.stat().st_mode
    except OSError as error:
        kind = "a link to nowhere" if path.is_symlink() else "nothing that can be read"
        raise UserError(
            f"{path} is {kind} ({error.strerror}): remove it or restore what it names", "path"
        ) from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{path} is neither a file nor a folder: remove it", "path")
    return not (stat.S_ISDIR(mode) and is_output(path))


def _is_left_behind(name):
    return name.startswith(".") or name.lower() in _LEFT_BEHIND


def holds(
    pictures: str | os.PathLike, path: str | os.PathLike, exclude: Sequence[str] = ()
) -> bool:
    """Return whether files at a path would be listed among the pictures of a folder.

    Args:
      pictures: path of the folder; one that is something else holds nothing.
      path: of a folder, which need not exist; links on the way are followed.
      exclude: see `list_folder`.

    Raises:
      UserError: what is no path.
    """
    root, place = absolute(pictures), absolute(path)
    if in_bucket(root) or in_bucket(place) or not root.is_dir() or is_saved(root):
        return False
    whole, inside = os.path.realpath(root), os.path.realpath(place)
    if os.path.commonpath([whole, inside]) != whole:
        return False
    names = Path(inside).relative_to(whole).parts
    return not any(
        _is_left_behind(name) or any(fnmatch.fnmatch(name, e) for e in exclude) for name in names
    )


def list_pictures(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """List pictures without labels.

    Args:
      paths: a file, a folder (with all folders in it), a pattern such as "photos/**/*.jpg", or a list
        of files and folders, see `list_item`.

    Returns:
      Absolute paths: those of a folder or pattern sorted, those of a list in its order.

    Raises:
      UserError: nothing there, or a folder that cannot be listed, see `list_folder`.
    """
    if not isinstance(paths, str | os.PathLike):
        return [path for given in paths for path in list_item(given)]
    root = Path(absolute(paths))
    if root.exists() or not glob.has_magic(str(root)):
        return list_item(paths)
    return _some([str(path) for path in _matches(root)], paths)


def list_item(path: str | os.PathLike) -> list[str]:
    """List the pictures of an item of a list: a file itself, or those of a folder.

    It is never a pattern: a file that vanished, called "a[12].png", must not stand for others.

    Returns:
      Absolute paths, those of a folder sorted.

    Raises:
      UserError: nothing there, or a folder that cannot be listed, see `list_folder`.
    """
    root = Path(absolute(path))
    if root.is_dir():
        return _some([str(file) for file in _walk(root, ())], path)
    if root.exists():
        return [str(root)]
    also = " (in a list, each item is a file or a folder)" if glob.has_magic(str(root)) else ""
    raise UserError(f"no file or folder {path}{also}", "path")


def _some(files, path):
    if not files:
        raise UserError(f"{path} holds no pictures", "path")
    return files


def _matches(pattern):
    """The files of a pattern, but for those in folders that hold no data."""
    base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    known = {base: True}

    def is_data(path):
        if path not in known and base in path.parents:
            known[path] = is_data(path.parent) and _is_data(path)
        return known.get(path, True)

    matches = sorted(Path(p) for p in glob.iglob(str(pattern), recursive=True))
    return [path for path in matches if is_data(path) and not path.is_dir()]


def list_table(path: str | os.PathLike, columns: Sequence[str] = COLUMNS) -> list[Picture]:
    """List the pictures of a table.

    Args:
      path: of a .csv or .tsv file with a line of column names, or of a .parquet file.
      columns: names of the columns of paths, labels and splits; "" for one that does not exist. Paths
        are relative to the table. By default, labels and splits may be missing.

    Returns:
      The pictures, row by row.

    Raises:
      UserError: no such table, no such column (with the nearest), an empty path or label, or a table
        that cannot be read.
    """
    root = absolute(path)
    if root.suffix.lower() not in TABLES:
        raise UserError(f"{path} is no table: its name must end with {', '.join(TABLES)}", "path")
    if not root.is_file():
        raise UserError(f"no table {path}", "path")
    if len(columns) != len(COLUMNS):
        raise UserError(
            f"columns must name those of path, label and split ('' for none), got {tuple(columns)}",
            "columns",
        )
    paths, labels, splits = read_table(root, columns)
    if paths is None:
        raise UserError(f"columns must name the column of paths in {path}", "columns")
    base = root.parent
    found = []
    for row, file in enumerate(paths, start=1):
        if not file or not file.strip():
            raise UserError(f"row {row} of {path} has no path", "path")
        if "\0" in file:
            raise UserError(f"the path in row {row} of {path} has a NUL: mend the table", "path")
        label = None if labels is None else _label(labels[row - 1], row, path)
        split = None if splits is None else (splits[row - 1] or "").strip() or None
        found.append(Picture(_place(file, base), label, split))
    if not found:
        raise UserError(f"{path} has no rows", "path")
    return found


def _place(text, base):
    """Return where a file of a table is; blanks around its path count only if a file is called so."""
    place = text if in_bucket(text) else os.path.join(base, os.path.expanduser(text))
    bare = text.strip()
    if bare != text and not _is_there(place):
        return _place(bare, base)
    return plain(place)


def _is_there(place):
    if not in_bucket(place):
        return os.path.lexists(place)
    return place == place.lstrip() and absolute(place).exists()


def _label(text, row, path):
    if not (text or "").strip():
        raise UserError(f"row {row} of {path} has no label: give one or remove the row", "path")
    return class_name(text, f"the label in row {row} of {path}")


def list_huggingface(path: str | os.PathLike) -> list[Picture]:
    """List a data set of Hugging Face on disk whose pictures are files.

    Args:
      path: what `save_to_disk` wrote, or a folder of class folders or of a folder of them per split.

    Raises:
      UserError: `datasets` is not installed, no pictures, or pictures inside the data set, which
        `from_huggingface` reads.
    """
    root = absolute(path)
    if not is_saved(root):
        return list_parts(root)
    found = []
    for split in saved_splits(root):
        records = open_saved(root, split)
        files = records.files()
        if files is None:
            raise UserError(
                f"{path} holds the pictures themselves, not their files: read it with "
                "data.from_huggingface",
                "path",
            )
        labels = records.labels and [
            class_name(label, f"label {label!r} of {path}") for label in records.labels
        ]
        found += [
            Picture(plain(file), labels[row] if labels else None, split)
            for row, file in enumerate(files)
        ]
    return found


def list_parts(path: str | os.PathLike) -> list[Picture]:
    """List class folders, or folders of class folders called train, test, query, … (their splits).

    Raises:
      UserError: see `list_folder`.
    """
    root = Path(absolute(path))
    folders = [p for p in _entries(root) if p.is_dir()] if root.is_dir() else []
    if not folders or any(folder.name.lower() not in _PARTS for folder in folders):
        return list_folder(root)
    return [
        picture._replace(split=folder.name) for folder in folders for picture in list_folder(folder)
    ]
