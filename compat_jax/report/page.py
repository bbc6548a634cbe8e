"""The report as one HTML page that needs neither a network nor a program, and its figures as files."""

import html
from collections.abc import Sequence

from etils import epath

from compat_jax.data.dataset import Dataset
from compat_jax.errors import UserError
from compat_jax.files import write_bytes, write_json
from compat_jax.report import sections
from compat_jax.report.findings import Findings
from compat_jax.report.frame import Folder, compose


def write_page(
    chains: Sequence[Findings],
    query: Dataset,
    gallery: Dataset,
    folder: epath.Path,
    title: str = "Compatibility report",
) -> list[epath.Path]:
    """Write index.html, which holds everything, and its pictures, tables and figures beside it.

    Args:
      chains: to compare, on the same queries and galleries; the first one's rivals behind it.
      query: that all were evaluated with.
      gallery: that all were evaluated with.
      folder: to write to.
      title: of the page.

    Returns:
      The paths written, the page first.

    Raises:
      UserError: no chain, or two of one name.
    """
    names = [chain.name for chain in chains]
    if not names or len(set(names)) < len(names):
        raise UserError(f"a report takes chains of different names, got {names}", "chains")
    files = Folder(folder)
    shown = sections.write(chains, query, gallery, files=files)
    page = compose(title, _subtitle(chains, query, gallery), shown)
    write_json(files.path / "report.json", {chain.name: chain.summary() for chain in chains})
    write_bytes(files.path / "index.html", page.encode())
    return [files.path / "index.html", files.path / "report.json", *files.written]


def _subtitle(chains, query, gallery):
    one = chains[0].main
    text = (
        f"{', '.join(chain.name for chain in chains)}. {len(query):,} queries, {len(gallery):,} gallery "
        f"images of {len(gallery.class_names):,} classes. Main metric: {one.metric}."
    )
    return html.escape(" ".join([text, *dict.fromkeys(n for c in chains for n in c.main.notes)]))
