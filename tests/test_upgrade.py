"""An upgrade of a gallery: the check of two versions, and every subcommand of the program."""

import contextlib
import dataclasses
import io
import json
import re
import runpy
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import drawn_photos
import grain  # noqa: F401  # defines flags, which would go with those of the command that imports it
import numpy as np
import programs
import pytest
import tiny

from compat_jax import enlarge
from compat_jax.chain import Chain
from compat_jax.data import Dataset, Preparation
from compat_jax.errors import UserError
from compat_jax.gallery.checking import check
from compat_jax.gallery.rule import Terms, judge
from compat_jax.gallery.stages import overlap
from compat_jax.gallery.verdict import GO, LOSS, NO_GO, STAGES, Figure, Stage
from compat_jax.report.answers import Answer, answers_wall, versions_of, write_answers
from compat_jax.session import never
from compat_jax.spaces import differences
from launch import _cli, _upgrade, _upgrade_inputs, upgrade
from launch._upgrade import at_share
from launch._upgrade_inputs import lasting

DATA = tiny.dataset(classes=4, per_class=20, seed=3)
QUERY, GALLERY = DATA.take(range(24)), DATA.take(range(24, 80))
OLD, NEW = tiny.version(0, 0), tiny.version(1, 1)
SESSION = tiny.session(progress=False)


def unlabelled(data: Dataset) -> Dataset:
    """The same pictures without labels."""
    return dataclasses.replace(data, labels=None, class_names=())


def checked(old=OLD, new=NEW, query=QUERY, gallery=GALLERY, **terms):
    """A verdict, by one device."""
    return check(old, new, query=query, gallery=gallery, terms=Terms(**terms), session=SESSION)


@pytest.fixture(scope="module")
def strangers():
    """The verdict on two versions that were drawn apart."""
    return checked()


def test_a_version_in_its_own_place_is_a_go():
    verdict = checked(new=dataclasses.replace(OLD, number=1))
    found = verdict.measured
    assert verdict.word == GO and not verdict.refused
    for stage in found.stages.values():
        assert stage.change == (0, 0, 0) and stage.kept == (1, 1, 1)
    assert found.definition_1[:2] == (1, 1)
    assert (found.flips.gained, found.flips.lost) == (0, 0)
    assert len({at for at in found.at_threshold.values()}) == 1


def test_strangers_are_a_no_go_and_the_limit_decides(strangers):
    assert strangers.word == NO_GO
    assert "more than the limit of 5" in strangers.reasons[0]
    assert checked(limit=1.0).word == LOSS


def test_every_stage_is_what_its_queries_find(strangers):
    """An oracle with NumPy: who asks, and which rows are there."""
    features = {
        name: [version.embed(data) for version in (OLD, NEW)]
        for name, data in (("query", QUERY), ("gallery", GALLERY))
    }
    drawn = np.random.default_rng(0).permutation(len(GALLERY))
    embedded_again = {
        name: drawn[: len(GALLERY) // part]
        for name, part in (("fiftieth", 50), ("tenth", 10), ("half", 2), ("new", 1))
    }
    rows = {"old": features["gallery"][0]}
    for name, some in embedded_again.items():
        rows[name] = features["gallery"][0].copy()
        rows[name][some] = features["gallery"][1][some]
    asked = {
        "today": (0, "old"),
        "switched": (1, "old"),
        "first": (1, "fiftieth"),
        "begun": (1, "tenth"),
        "half": (1, "half"),
        "finished": (1, "new"),
        "half back": (0, "half"),
        "back": (0, "new"),
    }
    assert list(asked) == list(STAGES) == list(strangers.measured.stages)
    values = {}
    for stage, (version, place) in asked.items():
        order = np.argsort(-features["query"][version] @ rows[place].T, axis=1)[:, :10]
        values[stage] = (GALLERY.labels[order[:, 0]] == QUERY.labels).mean()
        found = strangers.measured.stages[stage]
        np.testing.assert_allclose(found.quality.value, values[stage])
        np.testing.assert_allclose(found.change.value, values[stage] - values["today"])
        assert found.quality.low <= found.quality.value <= found.quality.high
        expected = np.isin(order, embedded_again.get(place, [])).mean()
        np.testing.assert_allclose(found.new_rows, expected)
    flips = strangers.measured.flips
    np.testing.assert_allclose(flips.gained - flips.lost, values["switched"] - values["today"])


def test_flips_come_by_class_the_greatest_net_loss_first(strangers):
    classes = strangers.measured.classes
    net = [each.gained - each.lost for each in classes]
    assert net == sorted(net) and sum(each.queries for each in classes) == len(QUERY)
    assert classes[0].name in strangers.text()


def test_todays_threshold_lets_few_false_pairs_pass(strangers):
    today = strangers.measured.at_threshold["today"]
    assert 0 < today.falsely <= 0.01
    assert today.moved == strangers.measured.threshold
    given = checked(threshold=0.5)
    assert given.measured.threshold == 0.5
    for at in given.measured.at_threshold.values():
        assert 0 <= at.falsely <= 1 and -1 <= at.score <= 1


def test_without_labels_agreement_is_measured_and_the_rest_is_said_to_be_unknown():
    verdict = checked(query=unlabelled(QUERY))
    found = verdict.measured
    assert found.metric == "agreement@10" and not found.labelled
    assert found.stages["finished"].quality == (1, 1, 1)
    assert found.flips is found.definition_1 is None and found.classes == ()
    assert np.isnan(found.at_threshold["today"].falsely)
    assert 0.85 < found.at_threshold["today"].accepted <= 0.9
    assert "there are no labels" in verdict.not_known[0] and "Not known" in verdict.text()
    assert '"falsely": null' in json.dumps(verdict.summary(), allow_nan=False)


@pytest.mark.parametrize(("count", "k", "most"), [(10, 10, 5), (19, 10, 9), (2, 2, 1)])
def test_without_labels_a_gallery_of_few_pictures_is_refused(count, k, most):
    """Of k pictures all versions would have the same k nearest, and every stage would agree."""
    few = unlabelled(GALLERY.take(range(count)))
    with pytest.raises(UserError, match=rf"only {count}, of which.* k of at most {most}, or lab"):
        checked(query=unlabelled(QUERY), gallery=few, k=k)
    assert checked(query=unlabelled(QUERY), gallery=few, k=most).word != GO
    with pytest.raises(UserError, match="needs at least 2 pictures that answer"):
        checked(query=unlabelled(QUERY), gallery=few.take([0]), k=1)


def test_a_query_in_the_gallery_is_not_its_own_answer():
    both = DATA.take(range(30))
    verdict = checked(new=dataclasses.replace(OLD, number=1), query=both, gallery=both)
    features = OLD.embed(both)
    scores = features @ features.T
    np.fill_diagonal(scores, -2)
    right = both.labels[scores.argmax(1)] == both.labels
    np.testing.assert_allclose(verdict.measured.stages["today"].quality.value, right.mean())
    assert any("leaves itself out" in sentence for sentence in verdict.not_known)


P8, P9 = Preparation(8).describe(), Preparation(8, resize="squash").describe()
NAMED = {"task": 0, "class_names": ("a", "b")}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ({}, {"num_prototypes": 32, "feature_size": 31}, "features differ: 31"),
        ({}, {"num_prototypes": 32, "feature_size": 31}, r"prototypes \(K\) differ: 32"),
        ({}, {"label_order": "ascending"}, "orders of the prototypes differ: ascending"),
        (
            NAMED,
            {"task": 1, "class_names": ("b", "a")},
            "class number 0 is 'a' in the chain, but 'b'",
        ),
        ({"preparation": P8}, {"preparation": P9}, "preprocessed in another way"),
        (
            {},
            {"method": "er", "head_classes": 3},
            "with a learnable classifier, version 0 .* simplex",
        ),
        ({}, {"fresh": ("projection",)}, "layers that were never trained"),
    ],
)
def test_versions_that_share_no_space_are_refused_with_the_reason(old, new, message):
    old, new = tiny.version(0, 0, **old), tiny.version(1, 1, **new)
    refused = differences(old, new)
    verdict = check(old, new, query=QUERY, gallery=GALLERY)
    assert verdict.word == NO_GO and verdict.refused and verdict.reasons == refused
    with pytest.raises(UserError, match=message):
        raise UserError("; ".join(refused))
    assert json.loads(json.dumps(verdict.summary()))["measured"] is None


def test_a_class_that_was_added_later_fits_in_both_directions():
    old = tiny.version(0, 0, **NAMED)
    new = tiny.version(1, 1, task=1, class_names=("a", "b", "c"))
    assert differences(old, new) == differences(new, old) == ()


def stages(**changes):
    """Stages that lose nothing, but for (value, low, high) of some."""
    none = Figure(0, 0, 0)
    return {
        name: Stage(none, Figure(*changes.get(name.replace(" ", "_"), (0, 0, 0))), none, 0)
        for name in STAGES
    }


@pytest.mark.parametrize(
    ("changes", "word", "reason"),
    [
        ({}, GO, "no stage of the upgrade loses more than 1 point; "),
        ({"switched": (0.1, 0.05, 0.2)}, GO, r"\+10\.0 \(\+5\.0 to \+20\.0\)"),
        ({"switched": (-0.01, -0.01, 0)}, GO, "no stage"),
        ({"switched": (0.49 - 0.5, 0.49 - 0.5, 0)}, GO, "no stage"),  # a query of a hundred
        ({"switched": (0.02, -0.03, 0.07)}, LOSS, "the switch may lose more than 1 point: "),
        ({"switched": (-0.03, -0.04, -0.02)}, LOSS, "the switch loses 3.0 points"),
        ({"switched": (-0.06, -0.2, 0.1)}, LOSS, "the switch may lose"),
        (
            {"switched": (-0.06, -0.08, -0.03)},
            NO_GO,
            "the switch loses 6.0 points, more than the limit",
        ),
        ({"back": (-0.5, -0.6, -0.4)}, LOSS, "a rollback after a backfill loses 50.0 points, more"),
        (
            {"begun": (-0.06, -0.08, -0.04)},
            LOSS,
            "the beginning of a backfill loses 6.0 points, more",
        ),
        ({"half_back": (-0.03, -0.04, -0.02)}, LOSS, "a rollback in the middle of a backfill"),
        ({"finished": (-0.03, -0.04, -0.02)}, LOSS, "a finished backfill loses"),
    ],
)
def test_the_rule(changes, word, reason):
    found, reasons = judge(stages(**changes), Terms())
    assert found == word
    with pytest.raises(UserError, match=reason):
        raise UserError("; ".join(reasons))


def test_terms_are_refused_that_contradict_themselves():
    with pytest.raises(UserError, match="limit must be at least the margin"):
        Terms(margin=0.1, limit=0.05)
    with pytest.raises(UserError, match="threshold must be at least -1 and at most 1"):
        Terms(threshold=1.5)


def test_overlap_counts_wanted_answers():
    found, wanted = np.array([[1, 2, 3], [4, 5, 6]]), np.array([[3, 9, 1], [6, 5, 4]])
    np.testing.assert_allclose(overlap(found, wanted), [2 / 3, 1])


def test_a_check_needs_pictures_of_the_same_classes():
    other = dataclasses.replace(QUERY, class_names=("w", "x", "y", "z"))
    with pytest.raises(UserError, match="query and gallery have different classes"):
        checked(query=other)
    with pytest.raises(UserError, match="pictures that ask and pictures that answer"):
        checked(query=unlabelled(QUERY.take([])))


# The program


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def run(*arguments) -> Ended:
    """`python -m launch.upgrade ARGUMENTS` in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    handler, code = signal.getsignal(signal.SIGINT), 0
    argv, module = sys.argv, sys.modules.pop("launch.upgrade")
    sys.argv = ["launch.upgrade", *map(str, arguments)]
    try:
        with tiny.own_flags(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_module("launch.upgrade", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv, sys.modules["launch.upgrade"] = argv, module
        signal.signal(signal.SIGINT, handler)
    for stream in (out, err):
        stream.seek(0)
    return Ended(code, out.read(), err.read())


@pytest.fixture(scope="module", autouse=True)
def no_signals():
    """Commands of this process do not take over its signals, and may meet in its memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cli, "StopSignal", lambda: never)
        for module in (_upgrade, _upgrade_inputs):
            patch.setattr(module, "lasting", lambda place: place)
        yield


def test_a_program_makes_no_gallery_that_ends_with_it():
    with pytest.raises(UserError, match="memory:x would end with this program"):
        lasting("memory:x")
    assert lasting("runs/shop.lance") == "runs/shop.lance"


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A chain of three versions that take photos, the third as good as the first, and photos."""
    root = tmp_path_factory.mktemp("shop")
    chain = Chain(root / "chain")
    for task, seed in enumerate((0, 1, 0)):
        made = tiny.record(
            task=task, class_names=("pear", "plum"), preparation=Preparation(8).describe()
        )
        chain.add(tiny.variables(made, seed), made)
    drawn_photos.draw(root / "photos", ["pear", "plum"], 8)
    drawn_photos.draw(root / "asked", ["pear", "plum"], 3, first=20)
    return root


@pytest.fixture
def store(shop, tmp_path):
    """Flags of a gallery that version 0 embedded, in the memory of this process."""
    where = [f"--chain={shop}/chain", f"--store=memory:{tmp_path}", f"--root={shop}"]
    made = run(
        "index", *where, f"--pictures={shop}/photos", "--labels", "--version=0", "--noprogress"
    )
    assert made == (0, "16 rows inserted, 0 there before\n", ""), made
    return where


def test_each_help_shows_its_own_command():
    """That they parse, test_programs.py tests."""
    for command, text in upgrade.HELP.items():
        shown = re.findall(r"^  python -m launch.upgrade (\w+) --", text, re.M)
        assert shown and set(shown) == {command}


@pytest.mark.parametrize("command", upgrade.HELP)
def test_each_command_explains_itself(command):
    code, out, err = programs.call("upgrade", command, "--help")
    assert (code, err) == (0, "") and out.startswith(upgrade.HELP[command].splitlines()[0])
    assert "--chain: folder of the chain" in out and f"launch.upgrade {command}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the command is missing: python -m launch.upgrade check | index"),
        (["chek", "--chain=x"], "unknown command 'chek'. Did you mean 'check'?"),
        (["check"], "--chain is missing"),
        (["check", "--chain=/nowhere"], "no chain at /nowhere"),
        (["check", "--chain=/nowhere", "--limit=0"], "limit must be at least the margin"),
        (["check", "--chain=/nowhere", "--metric=recal"], "unknown metric 'recal'"),
        (["check", "--chain={}/chain", "--old=1", "--new=1"], "--old and --new are both version 1"),
        (["check", "--chain={}/chain", "--new=7"], "no version 7"),
        (["check", "--chain={}/chain", "--query=x"], "--gallery is missing"),
        (["check", "--chain={}/chain"], "does not say what to query"),
        (
            ["check", "--chain={}/chain", "--query={}/asked", "--gallery={}/none", "--noprogress"],
            "none (flag --gallery)",
        ),
        (["index", "--chain={}/chain", "--store=memory:x"], "--pictures is missing"),
        (["index", "--chain={}/chain", "--pictures={}/photos"], "--store is missing"),
        (
            ["index", "--chain=x", "--store=memory:x", "--pictures={}/photos", "--shard=2/2"],
            "shard",
        ),
        (
            ["switch", "--chain={}/chain", "--store=memory:x"],
            "give one of --to=NUMBER and --rollback",
        ),
        (["query", "--chain={}/chain", "--store=memory:x", "--pictures={}/asked"], "memory"),
        (["delete", "--chain={}/chain", "--store=memory:x"], "nothing to delete"),
        (
            ["status", "--chain={}/chain", "--store=memory:x", "--check={}/photos/pear/000.jpg"],
            "not wh",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(shop, arguments, message):
    code, out, err = run(*(text.format(shop) for text in arguments))
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert message in err


def checks(shop, *flags):
    """`check` on the shop's photos."""
    pictures = [f"--query={shop}/asked", f"--gallery={shop}/photos"]
    return run("check", f"--chain={shop}/chain", *pictures, "--noprogress", *flags)


def test_check_says_by_its_exit_code_what_it_found(shop):
    go = checks(shop, "--old=0", "--new=2", "--labels")
    assert go.code == 0 and go.out.startswith("go: version 2 in the place of version 0"), go
    loss = checks(shop, "--old=0", "--new=1", "--limit=1", "--k=4")
    few = checks(shop, "--old=0", "--new=2")
    assert few.code == 2 and "k of at most 8, or labels (flag --k)" in few.err, few
    assert loss.code == 3 and loss.out.startswith("go with loss"), loss
    assert "Not known: whether the answers are right" in loss.out
    no = checks(shop, "--old=0", "--new=1", "--json", "--margin=0", "--limit=0", "--k=4")
    found = json.loads(no.out)
    assert no.code == 4 and found["verdict"] == "no-go" and not found["refused"]
    assert list((shop / "evaluation" / "cache").glob("features*"))


def test_check_refuses_versions_that_share_no_space_before_it_reads_a_picture(shop, tmp_path):
    chain = Chain(tmp_path / "chain")
    for preparation in (Preparation(8), Preparation(8, resize="squash")):
        made = tiny.record(task=None, preparation=preparation.describe())
        chain.add(tiny.variables(made), made)
    refused = run("check", f"--chain={chain.path}", "--query=/nowhere", "--gallery=/nowhere")
    assert refused.code == 4 and "preprocessed in another way" in refused.out, refused


def test_an_upgrade_from_end_to_end(shop, store, tmp_path):
    """Switch, ask, backfill, roll back, delete, and what status says of each."""

    def say(command, *flags):
        quiet = ["--noprogress"] if command == "backfill" else []
        done = run(command, *store, *flags, *quiet, "--json")
        assert (done.code, done.err) == (0, ""), (command, done)
        return json.loads(done.out)

    photos, asked = f"--pictures={shop}/photos", f"--pictures={shop}/asked"
    verdict = tmp_path / "check.json"
    verdict.write_text(checks(shop, "--old=0", "--new=1", "--labels", "--limit=1", "--json").out)
    assert say("switch", "--to=1") == {"before": 0, "query": 1, "previous": 0}
    first = say("status", asked, "--labels", f"--check={verdict}")
    assert (first["query"], first["rows"], first["left"]) == (1, {"0": 16}, 16)
    stages = json.loads(verdict.read_text())["measured"]["stages"]
    assert first["expected"] == stages["switched"]["quality"]["value"] == first["measured"]
    half = say("backfill", "--until=0.5")
    assert (half["updated"], half["share"]) == (8, 0.5)
    answers = say("query", asked, "--k=4")
    assert answers["version"] == 1 and len(answers["queries"]) == 6
    assert {len(one["answers"]) for one in answers["queries"]} == {4}
    shares = say("status", asked, "--k=4")["answers"]
    assert shares == answers["shares"]
    assert say("switch", "--rollback") == {"before": 1, "query": 0, "previous": None}
    assert say("backfill", "--budget=3")["rows"] == {"0": 11, "1": 5}
    assert say("delete", "--keys=photos/pear/000.jpg,photos/none.jpg") == {
        "deleted": 1,
        "missing": ["photos/none.jpg"],
    }
    assert say("backfill")["rows"] == {"0": 15}
    assert say("verify", "--sample=5")["problems"] == {}
    again = run("index", *store, photos, "--labels", "--noprogress")
    assert again.out == "1 row inserted, 15 there before\n"
    enlarge.enlarge(Chain(f"{shop}/chain"), Chain(tmp_path / "larger"), 21)
    moved = [f"--larger={tmp_path}/larger", f"--target=memory:{tmp_path}/larger", "--noprogress"]
    done = json.loads(run("enlarge", *store, *moved, "--json").out)
    assert done == {"moved": 16, "present": 0, "differing": 0, "query": 0}


@pytest.mark.parametrize(
    ("query", "share", "quality"),
    [
        (3, 0, 0.5),
        (3, 0.02, 0.45),
        (3, 0.06, 0.375),
        (3, 0.1, 0.3),
        (3, 0.5, 0.4),
        (3, 1, 0.6),
        (1, 0.5, 0.2),
        (1, 1, 0.7),
    ],
)
def test_status_expects_what_the_check_measured_around_a_share(query, share, quality):
    figures = {"today": 0.7, "switched": 0.5, "first": 0.45, "begun": 0.3, "half": 0.4}
    expected = {"old": 1, "new": 3, **figures, "finished": 0.6, "half back": 0.2, "back": 0.1}
    assert at_share(expected, share, query) == pytest.approx(quality)


def test_query_writes_a_page_that_holds_everything(shop, store, tmp_path):
    done = run("query", *store, f"--pictures={shop}/asked", f"--out={tmp_path}", "--k=3")
    assert (done.code, done.err) == (0, ""), done
    assert done.out.startswith(
        "version 0 asks: 6 queries; answers: rows embedded 100.0% by version 0"
    )
    files = ["answers.csv", "answers.json", "index.html", "wall-0.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    page = (tmp_path / "index.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "") and page.count("data:image/png") == 1
    found = json.loads((tmp_path / "answers.json").read_text())
    assert [len(one["answers"]) for one in found] == [3] * 6
    assert all(Path(one["picture"]).exists() for row in found for one in row["answers"])
    scores = [one["score"] for one in found[0]["answers"]]
    assert scores == sorted(scores, reverse=True)


def test_a_row_of_each_version_has_its_colour(shop):
    photo = str(shop / "asked" / "pear" / "020.png")
    found = [[Answer(photo, 0.5, 0), Answer("/gone.jpg", 0.25, 1)]]
    drawn = answers_wall([photo], found)
    assert [text.get_text() for text in drawn.axes[0].texts] == ["0.500", "0.250"]
    edges = {patch.get_edgecolor()[:3] for patch in drawn.axes[0].patches}
    assert len(edges) == 2 and versions_of(found) == {0: 1, 1: 1}
    with pytest.raises(UserError, match="1 queries need as many lists of answers, got 0"):
        write_answers([photo], [], "/nowhere")


def test_shards_share_out_the_pictures(shop, tmp_path):
    where = [f"--chain={shop}/chain", f"--store=memory:{tmp_path}", "--noprogress"]
    for shard, text in (
        ("0/2", "8 rows inserted, 0 there before\n"),
        ("1/2", "8 rows inserted, 0 "),
    ):
        done = run("index", *where, f"--pictures={shop}/photos", f"--shard={shard}")
        assert done.code == 0 and done.out.startswith(text), done
    done = run("index", *where, f"--pictures={shop}/photos")
    assert done.out == "0 rows inserted, 16 there before\n", done


def test_pictures_do_not_get_a_second_row_by_another_root(shop, store, tmp_path):
    done = run("index", *store[:2], f"--pictures={shop}/photos", "--noprogress")
    assert done.code == 2 and done.out == "", done
    assert "keys are paths within a folder, such as photos/p" in done.err, done
    assert done.err.endswith("(flag --root)\n"), done
    bare = [store[0], f"--store=memory:{tmp_path}/bare"]
    assert run("index", *bare, f"--pictures={shop}/photos", "--noprogress").code == 0
    done = run("index", *bare, store[2], f"--pictures={shop}/photos", "--noprogress")
    assert done.code == 2 and f"absolute paths, such as {shop}/photos/p" in done.err, done
    done = run("verify", *bare, store[2], "--sample=4")
    assert done.code == 1 and "or none if they were indexed without" in done.out, done


def test_rows_are_deleted_by_the_paths_that_one_sees(shop, store, monkeypatch):
    monkeypatch.chdir(shop / "photos")
    assert run("delete", *store, "--keys=pear/000.jpg,photos/pear/001.jpg").code == 0
    status = json.loads(run("status", *store, "--json").out)
    assert status["rows"] == {"0": 14}
    done = run("delete", *store, "--keys=pear/000.jpg")
    assert done == (1, "0 rows deleted, 1 not there: 'pear/000.jpg'\n", ""), done


def test_one_query_prints_all_its_answers_and_several_their_nearest(shop, store):
    for pictures, line, count in (
        ("pear/020.png", "version 0 asks: 1 query; answers:", 5),
        ("pear", "version 0 asks: 3 queries; answers:", 9),
    ):
        done = run("query", *store, f"--pictures={shop}/asked/{pictures}", "--k=5")
        assert done.code == 0 and done.out.startswith(line), done
        assert sum("(version 0)" in each for each in done.out.splitlines()) == count


def test_new_pictures_are_of_the_version_in_force_whatever_the_first_command_said(shop, store):
    again = ["index", *store, f"--pictures={shop}/photos", "--noprogress"]
    assert run(*again, "--version=0").code == 0
    assert run("switch", *store, "--to=1").code == 0
    done = run(*again, "--version=0")
    assert done.code == 2 and "version 1 embeds queries and new pictures" in done.err, done
    assert "leave --version out" in done.err and run(*again).code == 0
    assert run(*again, "--version=-2").code == 0


def test_status_measures_with_labels_only_and_with_pictures_from_elsewhere(shop, store, tmp_path):
    bare = tmp_path / "bare.csv"
    bare.write_text(f"path\n{shop}/asked/pear/020.png\n")
    for pictures in ([], [f"--pictures={bare}"]):
        done = run("status", *store, *pictures, "--labels")
        assert done.code == 2 and "--labels needs the classes of --pictures" in done.err, done
    drawn_photos.draw(tmp_path / "asked", ["pear", "plum"], 1, first=30)  # outside --root
    done = run("status", *store, f"--pictures={tmp_path}/asked", "--labels", "--json")
    assert 0 <= json.loads(done.out)["measured"] <= 1
    where = [store[0], f"--store=memory:{tmp_path}/bare", store[2]]
    filled = ["index", *where, f"--pictures={shop}/photos", "--noprogress"]
    assert run(*filled).code == 0
    done = run("status", *where, f"--pictures={shop}/asked", "--labels")
    assert done.code == 2 and "index --replace --labels" in done.err, done
    assert run(*filled, "--replace", "--labels").out.startswith("0 rows inserted, 16 replaced")
    assert run("status", *where, f"--pictures={shop}/asked", "--labels").code == 0


def test_verify_says_by_its_exit_code_that_a_claim_does_not_hold(shop, store, tmp_path):
    moved = [store[0], store[1], f"--root={tmp_path}"]
    done = run("verify", *moved, "--sample=4")
    assert done.code == 1 and "pictures that are gone" in done.out, done


def test_a_table_gives_its_labels_and_a_list_its_keys(shop, tmp_path):
    table = tmp_path / "photos.csv"
    rows = [f"{shop}/photos/{name}/{n:03d}.jpg,{name}" for name in ("pear", "plum") for n in (0, 1)]
    table.write_text("\n".join(["path,label", *rows]) + "\n")
    where = [f"--chain={shop}/chain", f"--store=memory:{tmp_path}"]
    assert run("index", *where, f"--pictures={table}", "--noprogress").code == 0
    done = run("status", *where, f"--pictures={table}", "--labels", "--json")
    assert 0 <= json.loads(done.out)["measured"] <= 1
    gone = tmp_path / "gone.txt"
    listed = rows[0].partition(",")[0] + "\r\n/with a\u2028break.jpg\n\n"
    gone.write_text(listed, encoding="utf-8-sig")  # with a byte order mark, as Windows writes it
    done = run("delete", *where, f"--list={gone}")
    assert done == (0, "1 row deleted, 1 not there: '/with a\\u2028break.jpg'\n", ""), done
    done = run("delete", *where, f"--list={gone}")
    assert done.code == 1 and done.out.startswith("0 rows deleted, 2 not there: "), done
    done = run("delete", *where, f"--list={shop}/photos/pear/000.jpg")
    assert (done.code, done.out) == (2, "") and "no text in UTF-8" in done.err, done
