"""Tables of pictures: .csv, .tsv and .parquet files with a column of paths."""

import difflib
import re
from collections.abc import Sequence

from etils import epath

from compat_jax.errors import UserError, unknown

COLUMNS = ("path", "label", "split")
TABLES = (".csv", ".tsv", ".parquet")
_SAID = re.compile(rb"(?:\xef\xbb\xbf)?\"?sep=([\x09\x20-\x7e])\"?\r?\n", re.IGNORECASE)


def read_table(root: epath.Path, columns: Sequence[str]) -> list[list[str | None] | None]:
    """Read the columns of paths, labels and splits of a table.

    Args:
      root: of the file, a name of `TABLES`.
      columns: their names there, "" for one that does not exist.

    Returns:
      Each as a list of texts, None for a column that does not exist.

    Raises:
      UserError: a table that cannot be read, or no such column (with the nearest).
    """
    import pyarrow  # only this source needs it

    read = _read_parquet if root.suffix.lower() == ".parquet" else _read_text
    try:
        with root.open("rb") as file:
            return read(file, root, columns)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{root} cannot be read as a table ({reason})", "path") from error


def _read_parquet(file, root, columns):
    import pyarrow
    from pyarrow import parquet

    names = parquet.read_schema(file).names
    wanted = _columns(names, columns, root)
    table = parquet.read_table(file, columns=[name for name in wanted if name])
    return [name and table[name].cast(pyarrow.string()).to_pylist() for name in wanted]


def _read_text(file, root, columns):
    import pyarrow
    from pyarrow import csv

    start, delimiter = _delimiter(file, root)
    parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    file.seek(start)
    names = csv.open_csv(file, parse_options=parse).schema.names
    file.seek(start)
    wanted = _columns(names, columns, root)
    kept = [name for name in wanted if name]
    convert = csv.ConvertOptions(
        include_columns=kept,
        column_types={name: pyarrow.string() for name in kept},  # 007 is a name, not a number
    )
    table = csv.read_csv(file, parse_options=parse, convert_options=convert)
    return [name and table[name].to_pylist() for name in wanted]


def _delimiter(file, root) -> tuple[int, str]:
    """Return where the column names begin and what separates them."""
    header = file.readline()
    said = _SAID.fullmatch(header)
    if said:  # the first line that Excel reads and does not show
        return len(header), said[1].decode()
    # Spreadsheets of many countries separate by semicolons, and call it CSV.
    usual = (b"\t", b",", b";") if root.suffix.lower() == ".tsv" else (b",", b";", b"\t")
    return 0, max(usual, key=header.count).decode()


def _columns(names, columns, root) -> list[str | None]:
    """Return which columns of a table are meant; None for one that does not exist."""
    stripped = {name.strip(): name for name in names}
    found = []
    for wanted, default in zip(columns, COLUMNS, strict=True):
        near = difflib.get_close_matches(wanted.lower(), [n.lower() for n in stripped], n=1)
        if wanted in stripped or not wanted:
            found.append(stripped.get(wanted))
        elif wanted == default != "path" and not near:
            found.append(None)
        else:
            raise unknown(f"column of {root}", wanted, stripped, "columns")
    return found
