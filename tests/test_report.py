"""The report: what it collects, what the page says, and that it needs nothing else."""

import base64
import csv
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import flat  # noqa: F401, registers its backbone
import numpy as np
import programs
import pytest
import tiny
from PIL import Image

from compat_jax import afterwards, drift, evaluation, metrics, report, retrieval, simplex
from compat_jax import config as configs
from compat_jax.chain import Chain
from compat_jax.errors import Stopped, UserError
from compat_jax.report import figures, findings, style, tables, ways

QUERY = tiny.dataset(classes=4, per_class=9, seed=1, name="<b>$x$ & 'y'")
GALLERY = tiny.dataset(classes=4, per_class=7, seed=2, name="<b>$x$ & 'y'")
WAYS = ("naive", "ridge", "slerp", "rescoring", "reindex")
A_PICTURE_A_CLASS = {
    "data__query__classes": (6, 12),
    "data__gallery__classes": (6, 12),
    "data__gallery__per_class": 1,
}


def write_chain(folder, method, count, seed, **changes):
    """A chain of versions that were never trained, with a log."""
    chain = Chain(folder / "chain")
    for task in range(count):
        made = tiny.record(method=method, task=task, class_names=("class0", "class1"), **changes)
        chain.add(tiny.variables(made, seed + task), made)
    lines = [
        {"task": t, "step": s, "loss": 2 - s / 9, "accuracy": s / 9} for t in (0, 1) for s in (4, 8)
    ]
    lines.insert(2, {"task": 0, "step": 8, "validation": {"recall@1": 0.5}})
    lines.append({"task": 1, "step": 8, "validation": {"accuracy": 0.25, "recall@1": 0.75}})
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"task": 1, "st')
    return chain


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    """Findings of two chains of three versions."""
    folder = tmp_path_factory.mktemp("chains")
    made = []
    for number, method in enumerate(("hoc", "sce")):
        chain = write_chain(folder / method, method, 3, seed=10 * number)
        session = tiny.session(cache=folder / method / "cache", progress=False)
        one = report.collect(chain, QUERY, GALLERY, metrics=["recall@1", "map"], session=session)
        plan = afterwards.Plan(ways=WAYS, shares=(0, 0.5, 1))
        ways = afterwards.compare(chain, QUERY, GALLERY, plan=plan, session=session)
        made.append(dataclasses.replace(one, ways=ways))
    return made


@pytest.fixture(scope="module")
def page(chains, tmp_path_factory):
    """The folder of their report."""
    folder = tmp_path_factory.mktemp("page")
    paths = report.write_page(chains, QUERY, GALLERY, folder, "A <title> & more")
    assert paths[0] == folder / "index.html" and all(path.exists() for path in paths)
    assert sorted(path.name for path in paths) == sorted(path.name for path in folder.iterdir())
    return folder


class Page(HTMLParser):
    """Tags, attributes and text of a page; complains about tags that are not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read_csv(path):
    return list(csv.reader(io.StringIO(path.read_text())))


def test_the_page_needs_nothing_but_itself(page):
    text = (page / "index.html").read_text()
    found = Page(text)
    assert not {tag for tag, _ in found.tags} & {"script", "link", "iframe", "object"}
    for tag, attributes in found.tags:
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(
                "#" if tag == "a" else "data:image/png;base64,"
            )
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert (
        "meta",
        {"name": "viewport", "content": "width=device-width, initial-scale=1"},
    ) in found.tags
    anchors = {a["href"][1:] for tag, a in found.tags if tag == "a"}
    assert anchors == {a["id"] for _, a in found.tags if "id" in a} and len(anchors) == 9


def test_pictures_are_described_and_lie_beside_the_page(page):
    images = [a for tag, a in Page((page / "index.html").read_text()).tags if tag == "img"]
    inside = {base64.b64decode(a["src"].partition(",")[2]) for a in images}
    assert inside == {path.read_bytes() for path in page.glob("*.png")} and len(inside) >= 12
    assert all(a["alt"] for a in images)
    for content in inside:
        with Image.open(io.BytesIO(content)) as image:
            assert 500 < image.width < 1000 and len(image.convert("L").getcolors(256)) > 20


def test_what_users_named_is_text(page):
    text = (page / "index.html").read_text()
    found = Page(text)
    assert "A <title> & more" in found.texts
    assert not any(tag == "b" for tag, _ in found.tags)
    assert "<b>$x$ & 'y'0" in found.texts  # a class, in the table of flips


def test_numbers_are_to_the_right_and_tables_sorted(chains, page):
    text = (page / "index.html").read_text()
    tables_of_figures = text.partition('id="settings-and-versions"')[0]
    for cell in re.findall(r"<td([^>]*)>([−+]?[\d.,]+)</td>", tables_of_figures):
        assert cell[0] == ' class="n"', cell
    rows = read_csv(page / "averages.csv")
    assert rows[0][:4] == ["chain", "metric", "AA", "AA from"] and "AA,&nbsp;%" in text
    for path in page.glob("*.csv"):
        head = read_csv(path)[0]
        assert len(set(head)) == len(head), path.name
        assert not any(re.search(", (%|points)", name) for name in head), path.name
    assert [row[1] for row in rows[1:]] == ["recall@1"] * 2 + ["map"] * 2
    for pair in (rows[1:3], rows[3:]):
        assert float(pair[0][2]) >= float(pair[1][2])
    results = {chain.name: chain.evaluations for chain in chains}
    for name, metric, aa, low, high, ac, *_ in rows[1:]:
        result = results[name][metric]
        assert float(aa) == pytest.approx(result.average_accuracy)
        assert float(ac) == pytest.approx(result.average_compatibility)
        assert float(low) <= float(aa) <= float(high)


def test_json_and_csv_hold_the_matrices(chains, page):
    content = json.loads((page / "report.json").read_text())
    assert list(content) == [chain.name for chain in chains]
    for number, chain in enumerate(chains):
        summary = content[chain.name]
        assert summary["evaluations"]["recall@1"]["matrix"] == chain.main.matrix.tolist()
        assert summary["evaluations"]["recall@1"]["scale"] == "shares in 0..1"
        assert [v["sha256"] for v in summary["versions"]] == list(chain.sha256)
        assert [curve["order"] for curve in summary["backfills"]] == [
            "random",
            "farthest",
            "oracle",
        ]
        path = page / f"{number}-{style.file_name(chain.name)}-cells.csv"
        cells = list(csv.DictReader(io.StringIO(path.read_text())))
        assert len(cells) == 6
        verdicts = {(row["query version"], row["gallery version"]): row["verdict"] for row in cells}
        for row in cells:
            t, k = int(row["query version"]), int(row["gallery version"])
            assert float(row["low"]) <= float(row["value"]) <= float(row["high"])
            ends = [chain.main.intervals.differences[n][t, k] for n in (0, 1)]
            read = [float(row[f"difference {name}"]) for name in ("low", "high")]
            assert read == ends and ends[0] <= float(row["difference"]) <= ends[1]
        for t, k in ((1, 0), (2, 0), (2, 1)):
            noise = chain.main.within_noise[t, k]
            better = chain.main.matrix[t, k] > chain.main.matrix[k, k]
            expected = "within noise" if noise else "compatible" if better else "not compatible"
            assert verdicts[str(t), str(k)] == expected


def test_a_row_has_a_value_a_column():
    columns = tuple(map(tables.Column, ("a", "b")))
    for row in ((1,), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"row 1: . values, 2 columns"):
            tables.Table(columns, [(1, 2), row])


def test_losses_below_zero_are_drawn(chains):
    lines = [{"task": 0, "step": n, "loss": 1 - n} for n in range(4)]
    below = dataclasses.replace(chains[0], log=tuple(lines))
    low, _ = figures.training_curves([below, chains[1]]).axes[0].get_ylim()
    assert low < -2
    assert figures.training_curves(chains).axes[0].get_ylim()[0] == 0


def test_the_ends_of_a_backfill_are_cells_of_the_matrix(chains):
    for chain in chains:
        for curve in chain.backfills:
            assert curve.values[0] == pytest.approx(chain.main.matrix[2, 0])
            assert curve.values[-1] == pytest.approx(chain.main.matrix[2, 2])


def test_answers_are_the_nearest_images_and_of_different_classes(chains, tmp_path):
    chain = Chain(chains[0].path)
    asking = retrieval.embed(chain.open(2), QUERY.images)
    answering = retrieval.embed(chain.open(0), GALLERY.images)
    answers = chains[0].answers
    scores = asking[answers.rows] @ answering.T
    best = -np.sort(-scores, axis=1)[:, :5]
    np.testing.assert_allclose(np.take_along_axis(scores, answers.found, 1), best, atol=1e-5)
    assert len(set(QUERY.labels[answers.rows[:4]])) == 4 and len(answers.rows) == findings.SHOWN
    assert answers.first == pytest.approx(chains[0].main.matrix[2, 0])  # recall@1
    np.testing.assert_array_equal(answers.rows, chains[1].answers.rows)  # the rival gets the same


def test_right_answers_are_framed_in_the_colour_of_right(chains):
    drawn = report.wall(chains[0], QUERY, GALLERY)
    answers = chains[0].answers
    right = GALLERY.labels[answers.found] == QUERY.labels[answers.rows][:, None]
    assert len(drawn.axes[0].patches) == right.sum() > 0


def test_a_picture_that_is_in_the_gallery_is_no_answer_to_itself(chains):
    chain = Chain(chains[0].path)
    found = report.collect(chain, GALLERY, GALLERY, session=tiny.session(progress=False))
    assert not (found.answers.found == found.answers.rows[:, None]).any()


def test_drift_is_that_of_the_features(chains):
    chain = Chain(chains[0].path)
    embedded = [retrieval.embed(chain.open(n), GALLERY.images) for n in range(3)]
    expected = drift.drift_matrix(embedded, GALLERY.labels)
    np.testing.assert_allclose(chains[0].turns, expected, atol=1e-3)
    assert np.isnan([place.prototype_angle for place in chains[0].geometry]).all()  # unseen classes
    means = [drift.class_means(part, GALLERY.labels).means for part in (embedded[2], embedded[0])]
    others = [drift.angles(means[0][a], means[1][b]) for a in range(4) for b in range(4) if a != b]
    assert chains[0].others[2] == pytest.approx(np.mean(others), abs=1e-3)


def test_the_angle_to_prototypes_is_measured_on_classes_that_were_learnt(chains, tmp_path):
    gallery = tiny.dataset(classes=3, per_class=5, seed=4)  # class0 and class1 are of the record
    chain = Chain(chains[0].path)
    found = report.collect(chain, gallery, gallery, session=tiny.session(progress=False))
    keep = gallery.select([0, 1])
    expected = drift.prototype_angles(
        retrieval.embed(chain.open(1), keep.images),
        tiny.K - 1 - keep.labels,
        np.asarray(simplex.prototypes(tiny.K)),
    )
    assert found.geometry[1].prototype_angle == pytest.approx(expected.mean(), abs=0.01)


def test_classes_are_sorted_by_what_they_gain(chains):
    rows = figures.class_flips(chains[0])
    nets = [row["net"] for row in rows]
    assert nets == sorted(nets, reverse=True) and sum(row["queries"] for row in rows) == len(QUERY)
    result = chains[0].main
    mean = np.average(nets, weights=[row["queries"] for row in rows])
    assert mean == pytest.approx(result.matrix[2, 0] - result.matrix[0, 0])


def test_the_log_is_read_up_to_where_it_was_cut_off(chains):
    log = chains[0].log
    assert [line["step"] for line in log] == [4, 8, 8, 4, 8, 8]
    assert figures.task_starts(log) == {0: 0, 1: 8}
    (row, _) = tables.training(chains).rows
    assert row == (chains[0].name, 2, 16, pytest.approx(2 - 8 / 9), pytest.approx(8 / 9))


def test_validation_is_drawn_and_listed(chains, page):
    rows = tables.validation(chains[:1]).rows
    name = chains[0].name
    expected = [(name, 0, 8, np.nan, 0.5, np.nan), (name, 1, 8, 0.25, 0.75, np.nan)]
    for row, wanted in zip(rows, expected, strict=True):
        assert row[:3] == wanted[:3]
        np.testing.assert_array_equal(row[3:], wanted[3:])
    axis = figures.training_curves(chains, "validation recall@1").axes[0]
    first = axis.lines[:2]  # a line a task, in steps of the whole run
    assert [line.get_xydata().tolist() for line in first] == [[[8, 50]], [[16, 75]]]
    assert (page / "training-validation-recall-1.png").exists()
    assert not (page / "training-validation-cross.png").exists()  # nothing was measured
    assert len(read_csv(page / "validation.csv")) == 5


def test_ways_are_listed_by_what_they_bring_on_the_way(chains, page):
    rows = read_csv(page / "ways.csv")
    head, means = rows[0], [float(row[2]) for row in rows[1:]]
    assert head[2] == "identification mean on the way" and means == sorted(means, reverse=True)
    assert len(rows) == 1 + 2 * len(WAYS) and len(set(head)) == len(head)
    content = json.loads((page / "report.json").read_text())
    for chain in chains:
        named = {way["name"]: way for way in content[chain.name]["ways"]["ways"]}
        assert list(named) == list(WAYS)
        for row in rows[1:]:
            if row[0] == chain.name:
                (way,) = (w for w in WAYS if ways.title(w) == row[1])
                values = named[way]["curves"]["recall@1"]["values"]
                assert [float(row[7]), float(row[9])] == [values[0], values[-1]]
        naive = chain.ways.way("naive").curves["recall@1"].values
        np.testing.assert_allclose(naive[[0, -1]], chain.main.matrix[2, [0, 2]])
    points = read_csv(page / "ways-points.csv")
    assert len(points) == 1 + 2 * 2 * (3 * (len(WAYS) - 1) + 4)  # a re-index ends in a jump
    costs = read_csv(page / "ways-costs.csv")
    assert [row[1] for row in costs[1:]] == [ways.title(way) for way in WAYS] * 2
    assert "-ways-recall-1.png" in " ".join(path.name for path in page.iterdir())


def test_the_best_map_is_drawn_beside_the_naive_swap(chains):
    best = ways.best_map(chains[0], "recall@1")
    areas = {kind: chains[0].ways.way(kind).curves["recall@1"].area for kind in ("ridge", "slerp")}
    assert areas[best] == max(areas.values())
    drawn = ways.against_images(chains, "recall@1")
    texts = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert texts[:2] == [f"{chains[0].name}, naive swap", f"{chains[0].name}, {ways.title(best)}"]
    fitted = drawn.axes[0].lines[1].get_xdata()
    assert fitted[0] == pytest.approx(50) and fitted[-1] == 100  # half of the gallery is paired
    assert ways.best_map(dataclasses.replace(chains[0], ways=None), "recall@1") == ""


def test_settings_that_differ_come_first(chains):
    table = tables.settings(chains)
    assert table.rows == [("epochs", "2", "2")] and not table.strong


def test_a_second_report_embeds_nothing(chains, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation, "embed", lambda *_, **__: pytest.fail("embedded again"))
    chain = Chain(chains[0].path)
    cache = chain.path.parent / "cache"
    session = tiny.session(cache=cache, progress=False)
    again = report.collect(chain, QUERY, GALLERY, metrics=["recall@1", "map"], session=session)
    assert again.summary() == dataclasses.replace(chains[0], ways=None).summary()


def test_one_version_alone_has_a_report_too(tmp_path):
    chain = write_chain(tmp_path, "hoc", 1, seed=5)
    found = report.collect(chain, QUERY, GALLERY, session=tiny.session(progress=False))
    report.write_page([found], QUERY, GALLERY, tmp_path / "out")
    text = (tmp_path / "out" / "index.html").read_text()
    Page(text)
    assert "One version alone has no older gallery" in text and "Retrieval wall" not in text
    with pytest.raises(UserError, match="no answers in the oldest gallery"):
        report.wall(found, QUERY, GALLERY)


def test_features_of_another_size_are_said_to_be_so(tmp_path):
    chain = Chain(tmp_path / "chain")
    for number, width in enumerate((8, 16)):
        made = tiny.record(
            method="er",
            task=number,
            backbone_arguments={"width": width},
            feature_size=width,
            head_classes=2,
        )
        chain.add(tiny.variables(made, number), made)
    found = report.collect(chain, QUERY, GALLERY, session=tiny.session(progress=False))
    assert found.backfills == () and found.answers is None and not found.log
    report.write_page([found], QUERY, GALLERY, tmp_path / "out")
    text = (tmp_path / "out" / "index.html").read_text()
    assert "Version 1 has features of 16 numbers, version 0 of 8" in text


def test_names_must_differ_and_a_stop_is_heard(chains, tmp_path):
    for wrong in ([], [chains[0], chains[0]]):
        with pytest.raises(UserError, match="chains of different names"):
            report.write_page(wrong, QUERY, GALLERY, tmp_path)
    session = tiny.session(progress=False, should_stop=lambda: True)
    with pytest.raises(Stopped):
        report.collect(Chain(chains[0].path), QUERY, GALLERY, session=session)


def test_colours_come_with_marks():
    looks = [style.line(n) for n in range(len(style.COLOURS))]
    assert len({look["marker"] for look in looks}) == len({look["color"] for look in looks}) == 7


def flat_chain(folder, method, config):
    """Two versions of the backbone that the programs of tests know."""
    described = tiny.record(method=method, backbone="flat", config=configs.plain(config), task=None)
    chain = Chain(folder / method / "chain")
    for seed in range(2):
        chain.add(tiny.variables(described, seed), described)
    return str(chain.path)


@pytest.mark.slow
def test_the_program_writes_the_page(tmp_path):
    config = tiny.config()
    paths = [flat_chain(tmp_path, method, config) for method in ("hoc", "sce")]
    out = tmp_path / "out"
    arguments = [f"--chains={','.join(paths)}", f"--out={out}", "--mesh=data:1", "--noprogress"]
    code, text, error = programs.call("report", *arguments, flat=True)
    assert code == 0, error
    says = rf"^{out}/index.html \(\d\d pictures, tables and figures beside it\)$"
    assert re.search(says, text, re.M) and "d-Simplex-HOC: identification %" in text
    assert "d-Simplex-HOC" in (out / "index.html").read_text()
    assert (tmp_path / "hoc" / "evaluation" / "cache").is_dir()


def test_a_way_that_was_left_out_is_named(chains, tmp_path):
    reason = "no class has two pictures <here>"
    gone = dataclasses.replace(chains[0].ways, left_out={"slerp": reason})
    found = dataclasses.replace(chains[0], ways=gone)
    assert report.left_out(found) == [f"{found.name}: SLERP was left out: {reason}."]
    assert report.left_out(chains[1]) == []
    assert report.left_out(dataclasses.replace(found, ways=None)) == []
    report.write_page([found], QUERY, GALLERY, tmp_path)
    text = (tmp_path / "index.html").read_text()
    assert f"{reason}." in " ".join(Page(text).texts) and text.count("was left out") == 1
    content = json.loads((tmp_path / "report.json").read_text())
    assert content[found.name]["ways"]["left_out"] == {"slerp": reason}


@pytest.mark.slow
def test_the_program_reports_on_a_gallery_of_a_picture_a_class(tmp_path):
    path = flat_chain(tmp_path, "hoc", tiny.config(**A_PICTURE_A_CLASS))
    arguments = [f"--chains={path}", f"--out={tmp_path / 'out'}", "--mesh=data:1", "--noprogress"]
    code, text, error = programs.call("report", *arguments, flat=True)
    assert code == 0, error
    assert "d-Simplex-HOC: SLERP was left out: no class has two pictures" in text
    page = (tmp_path / "out" / "index.html").read_text()
    assert "SLERP was left out" in page and "Procrustes" in page


@pytest.mark.parametrize("first", [True, False])
def test_a_metric_of_ones_own_is_reported_on(chains, tmp_path, first):
    def score(queries, galleries):
        return np.full((len(galleries), len(queries.labels)), 0.25)

    own = metrics.Metric("mine", "% mine", score)
    chain = Chain(chains[0].path)
    session = tiny.session(cache=chain.path.parent / "cache", progress=False)
    chosen = [own, "map"] if first else ["map", own]
    found = report.collect(chain, QUERY, GALLERY, metrics=chosen, session=session)
    assert found.main.metric == ("mine" if first else "map")
    assert {curve.metric for curve in found.backfills} == {found.main.metric}
    assert (found.evaluations["mine"].matrix[np.tril_indices(3)] == 0.25).all()
    if first:
        assert all((curve.values == 0.25).all() for curve in found.backfills)
        report.write_page([found], QUERY, GALLERY, tmp_path)
        assert "% mine" in (tmp_path / "index.html").read_text()


@pytest.mark.slow
def test_chains_of_other_pictures_are_refused_before_any_is_embedded(tmp_path):
    paths = flat_chain(tmp_path, "hoc", tiny.config())
    paths += "," + flat_chain(tmp_path, "sce", tiny.config(data__query__seed=9))
    arguments = [f"--chains={paths}", f"--out={tmp_path / 'out'}", "--mesh=data:1", "--noprogress"]
    code, _, error = programs.call("report", *arguments, flat=True)
    assert code == 2 and "has other queries or another gallery" in error, error
    assert error.endswith("(flag --config)\n") and not (tmp_path / "hoc" / "evaluation").exists()


def test_chains_are_named_by_method_and_folder(tmp_path):
    config = tiny.config()
    paths = [
        flat_chain(tmp_path / n, m, config) for n, m in (("a", "hoc"), ("b", "hoc"), ("b", "er"))
    ]
    named = report.titles([Chain(path) for path in paths])
    assert named == [
        f"d-Simplex-HOC ({paths[0]})",
        f"d-Simplex-HOC ({paths[1]})",
        "ER (learnable classifier)",
    ]
