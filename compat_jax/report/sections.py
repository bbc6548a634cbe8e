"""The sections of a report: what each says, with its pictures and tables."""

from collections.abc import Sequence

from compat_jax.data.dataset import Dataset
from compat_jax.report import figures, matrices, style, tables, ways
from compat_jax.report.findings import Findings
from compat_jax.report.frame import Folder, details, grid, paragraph
from compat_jax.report.tables import Table
from compat_jax.report.wall import wall


def write(
    chains: Sequence[Findings], query: Dataset, gallery: Dataset, *, files: Folder
) -> list[tuple[str, str]]:
    """Write the pictures and tables of all sections, and return each section's name and HTML.

    Args:
      chains: to compare, of different names, at least one.
      query: that all were evaluated with.
      gallery: that all were evaluated with.
      files: the folder that pictures and tables are written to.

    Returns:
      A name, plain text, and content, HTML, a section; "" for one that has nothing to say.
    """
    return [
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


def _stem(number: int, chain: Findings) -> str:
    """Begin the names of a chain's own files; the number keeps them apart."""
    return f"{number}-{style.file_name(chain.name)}"


def _overview(chains, files):
    says = []
    for chain in chains:
        sentence = chain.main.sentence(chain.name) or f"{chain.name}: {chain.main.meaning()}"
        says.append(paragraph(sentence))
    averages = tables.averages(chains)
    table = files.table("averages", averages)
    if len(chains[0].evaluations) == 1:  # its name is in the subtitle
        table = averages.without("metric").html()
    explained = paragraph(
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
        pictures.append(f"<div>{picture}{details('The numbers', numbers)}</div>")
    curves = []
    says = "Average accuracy of the versions so far, a line a chain"
    caption = "AA of the versions so far. Bands: 95 % intervals. Rings: a better model came in."
    drawn = matrices.accuracy_curves(results)
    curves.append(files.picture("average_accuracy", drawn, says, caption))
    if any(len(result.matrix) > 2 for result in results.values()):  # two versions have one AC
        says = "Share of compatible pairs among the versions so far, a line a chain"
        caption = "AC of the versions so far; it counts signs, also of differences within noise."
        drawn = matrices.compatibility_curves(results)
        curves.append(files.picture("average_compatibility", drawn, says, caption))
    unit = chains[0].main.unit
    text = paragraph(
        f"Rows: the version that embeds the queries. Columns: the version that embedded the gallery. "
        f"Each cell: {unit}. A cell is compatible if it is above the diagonal cell of its column."
    )
    return "Matrices", text + grid(pictures) + grid(curves)


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
    text = paragraph(
        "The newest version asks, the gallery is as the oldest version embedded it. Blue frames: images "
        "of the query's class. The queries were drawn at random, one a class, the same for all chains."
    )
    return "Retrieval wall", text + grid(pictures)


def _backfill(chains, files):
    notes = _notes(chains)
    orders = dict.fromkeys(curve.order for chain in chains for curve in chain.backfills)
    if not orders:
        return "Backfill", notes
    text = paragraph(
        "Retrieval with the newest version's queries while the oldest gallery is embedded again, image "
        "by image: at the left nothing was, at the right everything. Farthest: images far from their "
        "class's mean come first. Oracle: an order that looks at the answers. The table says at which "
        "share 99 % of the new version's level is first reached (later ones may fall below it again), "
        "and how many images have to be embedded for it."
    )
    says = "Retrieval against the share of the gallery that was embedded again, order: "
    pictures = [
        files.picture(f"backfill-{order}", figures.backfill_curves(chains, order), says + order)
        for order in orders
    ]
    files.write("backfill-points.csv", tables.backfill_points(chains).csv().encode())
    table = files.table("backfill", tables.backfills(chains))
    return "Backfill", text + grid(pictures) + table + notes


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
        grids.append(grid([*pictures, files.picture(name, drawn, says, caption)]))
    files.write("ways-points.csv", ways.points(chains).csv().encode())
    quality = files.table("ways", ways.quality(chains))
    costs = files.table("ways-costs", ways.costs(chains))
    gone = "".join(paragraph(says) for chain in chains for says in ways.left_out(chain))
    return "Ways to upgrade", _about_ways(found) + gone + "".join(grids) + quality + costs


def _about_ways(found):
    """Explain the ways, and what their figures rest on."""
    one = found[0][1]
    fitted = max(way.cost.pairs for way in one.ways)
    where = "of the gallery" if one.from_gallery else "of the training side"
    explained = paragraph(
        "The newest version comes in while the gallery is as the oldest one embedded it. Naive swap: "
        "its queries search the old features as they are. Procrustes, ridge, low rank, SLERP, adapter: "
        f"its queries are mapped into the old space, by a map fitted on {fitted:,} images {where} that "
        f"both versions embedded. Rescoring: the old version proposes {one.candidates} images, and the "
        "new one embeds and ranks them. Re-index: the old version answers until all images are embedded "
        "again. Images embedded again are compared with the new version's own queries, in all ways."
    )
    caution = paragraph(
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
    return "".join(paragraph(note, muted=True) for note in [*sorted(shared), *own])


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
        pictures.append(f"<div>{picture}{details('All classes', table)}</div>")
    if not pictures:
        return "Who gains, who loses", ""
    text = paragraph(
        "Queries of the newest version against the old version's own, both in the old gallery. A query "
        "that was wrong and is right counts as gained, one that was right and is wrong as lost. Below, "
        "by class, for the oldest gallery."
    )
    table = files.table("updates", tables.updates(chains))
    return "Who gains, who loses", text + table + grid(pictures)


def _drift(chains, files):
    if all(len(chain.turns) < 2 for chain in chains):
        return "Drift and angles", ""
    text = paragraph(
        "How far the mean feature of a class turns. What counts for an old gallery is the gap between "
        "the lines on the left: a class must stay nearer to its own old mean than to those of other "
        "classes. The angle to the prototypes is known for classes that the version was trained on. "
        "NC1 and NC2, measured on features of length 1, are 0 for features that have collapsed onto a "
        "simplex."
    )
    drawn = figures.turns_since_first(chains)
    since = files.picture("drift-first", drawn, "Angle of the class means to those of version 0")
    drawn = figures.turns_since_before(chains)
    before = files.picture(
        "drift-before", drawn, "Turn of the class means since the version before"
    )
    table = files.table("geometry", tables.geometry(chains))
    return "Drift and angles", text + grid([since, before]) + table


def _training(chains, files):
    lines = [line for chain in chains for line in chain.log]
    kinds = ("loss", "accuracy", *figures.VALIDATED)
    shown = [k for k in kinds if any(figures.figure_of(line, k) is not None for line in lines)]
    if not shown:
        return "Training", ""
    text = paragraph(
        "From the logs of the runs. Losses of different methods do not compare. Accuracy: the share of "
        "training images whose class scores highest; with a fixed simplex, among all its prototypes, "
        "those of pre-training included."
    )
    validated = any(map(figures.is_validation, lines))
    if validated:
        text += paragraph(
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
        table += details("The last validation of each task", last)
    return "Training", text + grid(pictures) + table


def _settings(chains, files):
    versions = files.table("versions", tables.versions(chains))
    fields = tables.settings(chains)
    whole = files.table("settings", fields)
    differing = Table(fields.columns, fields.rows[: len(fields.strong)])
    text = ""
    if len(chains) > 1:
        differ = paragraph("Settings in which the chains differ:") + differing.html()
        text = differ if differing.rows else paragraph("The chains have the same settings.")
    return "Settings and versions", text + details("All settings", whole) + versions
