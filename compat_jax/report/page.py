"""The report as one HTML page that needs neither a network nor a program, and its figures as files."""

import base64
import datetime
import html
import importlib.metadata
import platform
from collections.abc import Iterable, Sequence
from string import Template
from typing import TYPE_CHECKING

from etils import epath

from compat_jax.data.dataset import Dataset
from compat_jax.errors import UserError
from compat_jax.files import write_bytes, write_json
from compat_jax.report import figures, matrices, style, tables, ways
from compat_jax.report.findings import Findings
from compat_jax.report.tables import Table
from compat_jax.report.wall import wall

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PACKAGES = ("compat_jax", "jax", "flax", "optax", "numpy", "matplotlib")

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light; --ink: #1b1f24; --muted: #57606a; --line: #d8dee4; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 0 20px 64px; max-width: 1240px; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 30px; line-height: 1.2; margin: 36px 0 4px; }
h2 { font-size: 21px; margin: 48px 0 4px; padding-top: 12px; border-top: 1px solid var(--line); }
p { margin: 6px 0 14px; max-width: 76ch; }
.muted, figcaption { color: var(--muted); font-size: 14px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 16px 0 8px; font-size: 15px; }
a { color: var(--accent); }
nav a { padding: 4px 0; text-decoration: none; border-bottom: 1px solid var(--line); }
.says { border-left: 4px solid var(--accent); padding: 2px 0 2px 14px; margin: 18px 0; }
.says p { margin: 6px 0; }
.grid { display: grid; gap: 20px 32px; align-items: start; margin: 14px 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; max-width: 600px; height: auto; }
.scroll { overflow-x: auto; margin: 10px 0; background:
  linear-gradient(to left, #fff 30%, #fff0) right / 48px 100% no-repeat local,
  linear-gradient(to left, #1b1f2433, #1b1f2400) right / 14px 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px 5px 0; text-align: left; vertical-align: bottom;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--muted); }
td { vertical-align: top; white-space: nowrap; }
td.long { white-space: normal; overflow-wrap: anywhere; min-width: 18em; max-width: 34em; }
th.n, td.n { text-align: right; padding-left: 12px; max-width: 12em; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; }
.strong td { font-weight: 600; }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--accent); padding: 6px 0; }
footer { margin-top: 48px; border-top: 1px solid var(--line); padding-top: 12px; }
@media (max-width: 600px) {
  body { padding: 0 14px 40px; font-size: 15px; }
  h1 { font-size: 24px; margin-top: 22px; }
  h2 { margin-top: 34px; }
  td:first-child { white-space: normal; min-width: 8em; max-width: 9em; }
}
@media print { nav { display: none; } figure { break-inside: avoid; } }
</style>
</head>
<body>
<h1>$title</h1>
<p class="muted">$subtitle</p>
<nav>$links</nav>
<main>
$sections
</main>
<footer class="muted">$footer</footer>
</body>
</html>
""")


class Folder:
    """The files of a report; pictures and tables are written as they are put on the page."""

    def __init__(self, path: epath.Path):
        self.path = epath.Path(path)
        self.written: list[epath.Path] = []

    def write(self, name: str, content: bytes) -> None:
        """Write a file."""
        write_bytes(self.path / name, content)
        self.written.append(self.path / name)

    def picture(self, name: str, drawn: "Figure", says: str, caption: str = "") -> str:
        """Write a picture, and return it as HTML with its bytes inside."""
        content = style.png(drawn)
        self.write(f"{name}.png", content)
        data = base64.b64encode(content).decode()
        under = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        return (
            f'<figure><img alt="{html.escape(says)}" src="data:image/png;base64,{data}">'
            f"{under}</figure>"
        )

    def table(self, name: str, table: Table) -> str:
        """Write a table as CSV, and return it as HTML."""
        self.write(f"{name}.csv", table.csv().encode())
        return table.html()


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
    sections = [
        _overview(chains, files),
        _matrices(chains, files),
        _wall(chains, query, gallery, files=files),
        _backfill(chains, files),
        _ways(chains, files),
        _flips(chains, files),
        _drift(chains, files),
        _training(chains, files),
        _settings(chains, files),
    ]
    page = compose(title, _subtitle(chains, query, gallery), sections)
    write_json(files.path / "report.json", {chain.name: chain.summary() for chain in chains})
    write_bytes(files.path / "index.html", page.encode())
    return [files.path / "index.html", files.path / "report.json", *files.written]


def compose(title: str, subtitle: str, sections: Iterable[tuple[str, str]]) -> str:
    """Compose a page that needs neither a network nor a program.

    Args:
      title: of the page, plain text.
      subtitle: below it, HTML.
      sections: name, plain text, and content, HTML; those without content are left out.

    Returns:
      HTML.
    """
    shown = [(name, text) for name, text in sections if text]
    links = [f'<a href="#{_anchor(name)}">{html.escape(name)}</a>' for name, _ in shown]
    return _PAGE.substitute(
        title=html.escape(title),
        subtitle=subtitle,
        links="".join(links) if len(links) > 1 else "",
        sections="\n".join(
            f'<section><h2 id="{_anchor(name)}">{html.escape(name)}</h2>\n{text}</section>'
            for name, text in shown
        ),
        footer=_footer(),
    )


def _anchor(name: str) -> str:
    return style.file_name(name).lower()


def _paragraph(*sentences: str, muted: bool = False) -> str:
    text = html.escape(" ".join(filter(None, sentences))).replace(" %", "&nbsp;%")
    kind = ' class="muted"' if muted else ""
    return f"<p{kind}>{text}</p>" if text else ""


def _grid(parts: Iterable[str]) -> str:
    return f'<div class="grid">{"".join(parts)}</div>'


def _details(title: str, inside: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{inside}</details>"


def _stem(number: int, chain: Findings) -> str:
    """Begin the names of a chain's own files; the number keeps them apart."""
    return f"{number}-{style.file_name(chain.name)}"


def _subtitle(chains, query, gallery):
    one = chains[0].main
    text = (
        f"{', '.join(chain.name for chain in chains)}. {len(query):,} queries, {len(gallery):,} gallery "
        f"images of {len(gallery.class_names):,} classes. Main metric: {one.metric}."
    )
    return html.escape(" ".join([text, *dict.fromkeys(n for c in chains for n in c.main.notes)]))


def _footer():
    versions = [f"Python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return html.escape(f"Written {today} with {', '.join(versions)}.")


def _overview(chains, files):
    says = []
    for chain in chains:
        sentence = chain.main.sentence(chain.name) or f"{chain.name}: {chain.main.meaning()}"
        says.append(_paragraph(sentence))
    averages = tables.averages(chains)
    table = files.table("averages", averages)
    if len(chains[0].evaluations) == 1:  # its name is in the subtitle
        table = averages.without("metric").html()
    explained = _paragraph(
        "AA: mean of all cells of the matrix. AC: share of pairs in which the newer version's queries "
        "do better on the older version's gallery than the older version's own. From and to: 95 % "
        "intervals by a paired bootstrap over the queries; another seed of training varies more. "
        "Within noise: pairs whose difference could be none. BC: gain of the last version over the "
        "earlier ones on their galleries; FC: loss of a version on its predecessor's gallery.",
        muted=True,
    )
    return "Overview", f'<div class="says">{"".join(says)}</div>{table}{explained}'


def _matrices(chains, files):
    pictures, results = [], {chain.name: chain.main for chain in chains}
    for number, chain in enumerate(chains):
        stem, result = _stem(number, chain), chain.main
        drawn = matrices.heat_map(chain.name, result)
        says = f"Compatibility matrix of {chain.name}, {result.unit}"
        picture = files.picture(f"{stem}-matrix", drawn, says, result.meaning())
        cells = tables.scored_matrix_cells(result)
        files.write(f"{stem}-cells.csv", cells.csv().encode())
        numbers = files.table(f"{stem}-matrix", tables.matrix(result))
        pictures.append(f"<div>{picture}{_details('The numbers', numbers)}</div>")
    curves = []
    says = "Average accuracy of the versions so far, a line a chain"
    caption = "AA of the versions so far. Bands: 95 % intervals. Rings: a better model came in."
    drawn = matrices.accuracy_curves(results)
    curves.append(files.picture("average_accuracy", drawn, says, caption))
    if any(len(result.matrix) > 1 for result in results.values()):
        says = "Share of compatible pairs among the versions so far, a line a chain"
        caption = "AC of the versions so far; it counts signs, also of differences within noise."
        drawn = matrices.compatibility_curves(results)
        curves.append(files.picture("average_compatibility", drawn, says, caption))
    unit = chains[0].main.unit
    text = _paragraph(
        f"Rows: the version that embeds the queries. Columns: the version that embedded the gallery. "
        f"Each cell: {unit}. A cell is compatible if it is above the diagonal cell of its column."
    )
    return "Matrices", text + _grid(pictures) + _grid(curves)


def _wall(chains, query, gallery, *, files):
    pictures = []
    for number, chain in enumerate(chains):
        if chain.answers is None:
            continue
        answers = chain.answers
        caption = (
            f"Of {answers.queries:,} queries, {100 * answers.first:.0f} % have an image of their class "
            f"first; of the five nearest, {100 * answers.among:.0f} % are of the query's class."
        )
        says = f"Queries of {chain.name} and their five nearest gallery images"
        drawn = wall(chain, query, gallery)
        pictures.append(files.picture(f"{_stem(number, chain)}-wall", drawn, says, caption))
    if not pictures:
        return "Retrieval wall", ""
    text = _paragraph(
        "The newest version asks, the gallery is as the oldest version embedded it. Blue frames: images "
        "of the query's class. The queries were drawn at random, one a class, the same for all chains."
    )
    return "Retrieval wall", text + _grid(pictures)


def _backfill(chains, files):
    notes = _notes(chains)
    orders = dict.fromkeys(curve.order for chain in chains for curve in chain.backfills)
    if not orders:
        return "Backfill", notes
    text = _paragraph(
        "Retrieval with the newest version's queries while the oldest gallery is embedded again, image "
        "by image: at the left nothing was, at the right everything. Farthest: images far from their "
        "class's mean come first. Oracle: an order that looks at the answers. The table says at which "
        "share 99 % of the new version's level is held, and how many images have to be embedded for it."
    )
    says = "Retrieval against the share of the gallery that was embedded again, order: "
    pictures = [
        files.picture(f"backfill-{order}", figures.backfill_curves(chains, order), says + order)
        for order in orders
    ]
    files.write("backfill-points.csv", tables.backfill_points(chains).csv().encode())
    table = files.table("backfill", tables.backfills(chains))
    return "Backfill", text + _grid(pictures) + table + notes


def _ways(chains, files):
    found = ways.measured(chains)
    if not found:
        return "Ways to upgrade", ""
    grids = []
    for metric in found[0][1].metrics:
        pictures = [
            files.picture(
                f"{_stem(number, chain)}-ways-{style.file_name(metric)}",
                ways.curves(chain, metric, ways.reach(chains, metric)),
                f"{metric} of each way against the share embedded again, {chain.name}",
            )
            for number, chain in enumerate(chains)
            if chain.ways is not None
        ]
        drawn = ways.against_images(chains, metric)
        says = f"{metric} against the images embedded: naive swap and best map of each chain"
        caption = (
            "Solid: the naive swap. Dashed: the map with the largest mean, its pairs counted; where it "
            "goes straight up or down, new features of the pairs take the place of the old ones."
        )
        name = f"ways-images-{style.file_name(metric)}"
        grids.append(_grid([*pictures, files.picture(name, drawn, says, caption)]))
    files.write("ways-points.csv", ways.points(chains).csv().encode())
    quality = files.table("ways", ways.quality(chains))
    costs = files.table("ways-costs", ways.costs(chains))
    return "Ways to upgrade", _about_ways(found) + "".join(grids) + quality + costs


def _about_ways(found):
    """What the ways are, and what their figures rest on."""
    one = found[0][1]
    fitted = max(way.cost.pairs for way in one.ways)
    where = "of the gallery" if one.from_gallery else "of the training side"
    explained = _paragraph(
        "The newest version comes in while the gallery is as the oldest one embedded it. Naive swap: "
        "its queries search the old features as they are. Procrustes, ridge, low rank, SLERP, adapter: "
        f"its queries are mapped into the old space, by a map fitted on {fitted:,} images {where} that "
        f"both versions embedded. Rescoring: the old version proposes {one.candidates} images, and the "
        "new one embeds and ranks them. Re-index: the old version answers until all images are embedded "
        "again. Images embedded again are compared with the new version's own queries, in all ways."
    )
    caution = _paragraph(
        f"{one.queries:,} queries. Scores of old and new rows are merged as they are: where mapped "
        "queries score higher among old rows than new ones among new rows, old rows hold the head of "
        "the list (new answers half way). Such a map may serve the old rows alone until the last image "
        "is embedded, at its value at 0 %. From and to: 95 % interval of the mean, by a paired "
        "bootstrap. Seconds: fitting, and embedding at a measured "
        f"{1000 * one.seconds_an_image:.2g} ms an image on the machine that made this report. Images a "
        "query: those that a query has embedded on demand before any image was embedded again. "
        "MB to keep: beside one feature an image.",
        muted=True,
    )
    return explained + caution


def _notes(chains):
    """The notes of the chains; one that all have is said once."""
    shared = set.intersection(*(set(chain.notes) for chain in chains))
    own = [f"{c.name}: {note}" for c in chains for note in c.notes if note not in shared]
    return "".join(_paragraph(note, muted=True) for note in [*sorted(shared), *own])


def _flips(chains, files):
    pictures, reach = [], figures.reach_of_flips(chains)
    for number, chain in enumerate(chains):
        rows = figures.class_flips(chain)
        if not rows:
            continue
        some = f", {figures.MAX_BARS} of {len(rows)}" if len(rows) > figures.MAX_BARS else ""
        caption = f"Classes by gain{some}; the last lose most."
        says = f"Gains and losses of each class, {chain.name}"
        drawn = figures.flips_by_class(chain, reach)
        stem = _stem(number, chain)
        picture = files.picture(f"{stem}-flips", drawn, says, caption)
        table = files.table(f"{stem}-flips", tables.classes(chain))
        pictures.append(f"<div>{picture}{_details('All classes', table)}</div>")
    if not pictures:
        return "Who gains, who loses", ""
    text = _paragraph(
        "Queries of the newest version against the old version's own, both in the old gallery. A query "
        "that was wrong and is right counts as gained, one that was right and is wrong as lost. Below, "
        "by class, for the oldest gallery."
    )
    table = files.table("updates", tables.updates(chains))
    return "Who gains, who loses", text + table + _grid(pictures)


def _drift(chains, files):
    if all(len(chain.turns) < 2 for chain in chains):
        return "Drift and angles", ""
    text = _paragraph(
        "How far the mean feature of a class turns. What counts for an old gallery is the gap between "
        "the lines on the left: a class must stay nearer to its own old mean than to those of other "
        "classes. The angle to the prototypes is known for classes that the version was trained on. "
        "NC1 and NC2 are 0 for features that have collapsed onto a simplex."
    )
    drawn = figures.turns_since_first(chains)
    since = files.picture("drift-first", drawn, "Angle of the class means to those of version 0")
    drawn = figures.turns_since_before(chains)
    before = files.picture(
        "drift-before", drawn, "Turn of the class means since the version before"
    )
    table = files.table("geometry", tables.geometry(chains))
    return "Drift and angles", text + _grid([since, before]) + table


def _training(chains, files):
    lines = [line for chain in chains for line in chain.log]
    kinds = ("loss", "accuracy", *figures.VALIDATED)
    shown = [k for k in kinds if any(figures.figure_of(line, k) is not None for line in lines)]
    if not shown:
        return "Training", ""
    text = _paragraph(
        "From the logs of the runs. Losses of different methods do not compare. Accuracy: the share of "
        "training images whose class scores highest; with a fixed simplex, among all its prototypes, "
        "those of pre-training included."
    )
    validated = any(map(figures.is_validation, lines))
    if validated:
        text += _paragraph(
            "Validation, on held-out pictures of the classes seen: accuracy as above; recall@1, whether "
            "the nearest other picture is of the same class; cross, the same among features that the "
            "version before gave them."
        )
    pictures = [
        files.picture(
            f"training-{style.file_name(key)}",
            figures.training_curves(chains, key),
            f"{key} by step",
        )
        for key in shown
    ]
    table = files.table("training", tables.training(chains)) if "loss" in shown else ""
    if validated:
        last = files.table("validation", tables.validation(chains))
        table += _details("The last validation of each task", last)
    return "Training", text + _grid(pictures) + table


def _settings(chains, files):
    versions = files.table("versions", tables.versions(chains))
    fields = tables.settings(chains)
    whole = files.table("settings", fields)
    differing = Table(fields.columns, fields.rows[: len(fields.strong)])
    text = ""
    if len(chains) > 1:
        differ = _paragraph("Settings in which the chains differ:") + differing.html()
        text = differ if differing.rows else _paragraph("The chains have the same settings.")
    return "Settings and versions", text + _details("All settings", whole) + versions
