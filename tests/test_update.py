"""Month after month: the next version on what is new, from a folder of photos that grows."""

import json
import os
import shutil
from pathlib import Path

import drawn_photos
import numpy as np
import pytest
import tiny

from compat_jax import evaluate, update
from compat_jax.chain import Chain, variables_sha256
from compat_jax.data.ledger import LEDGER, Ledger, Splits
from compat_jax.data.photos import Photos
from compat_jax.errors import Diverged, Stopped, UserError
from compat_jax.training import Sgd

FRUIT, MORE = ("melon", "pear"), ("apple", "zucchini")


def photos(folder, **changes):
    """Of a folder, 8 pixels a side."""
    return Photos(path=str(folder), size=tiny.SIZE, **changes)


def run(**changes):
    """Two epochs of a tiny network."""
    return tiny.run(**{"batch_size": 8, **changes})


def month(folder, workdir, run_=None, *, start=None, adopt=None, change=False, **fields):
    """Call `update`; `fields` are those of the photos."""
    return update(
        run_ or run(),
        photos(folder, **fields),
        workdir,
        start=start,
        adopt=adopt,
        session=tiny.session(progress=False, accept_changes=change),
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A folder of photos, and a workdir after the first month."""
    root = tmp_path_factory.mktemp("first")
    drawn_photos.draw(root / "photos", FRUIT, 12)
    done = month(root / "photos", root / "work")
    assert done.version == 0
    return root


@pytest.fixture
def shop(first, tmp_path):
    """A copy of it; files keep their times, as a user's own do."""
    shutil.copytree(first, tmp_path / "shop", copy_function=shutil.copy2)
    return tmp_path / "shop"


@pytest.fixture(scope="module")
def second(first, tmp_path_factory):
    """A workdir after the second month, with two new classes and more pears."""
    root = tmp_path_factory.mktemp("second") / "shop"
    shutil.copytree(first, root, copy_function=shutil.copy2)
    drawn_photos.draw(root / "photos", MORE, 12)
    drawn_photos.draw(root / "photos", ["pear"], 6, first=12)
    done = month(root / "photos", root / "work")
    assert done.version == 1
    return root


def names(workdir, version=-1):
    return Chain(Path(workdir) / "chain").record(version).class_names


def test_new_classes_take_the_next_prototypes_wherever_they_sort(second):
    assert names(second / "work", 0) == ("melon", "pear")
    assert names(second / "work", 1) == ("melon", "pear", "apple", "zucchini")


def test_a_version_says_what_it_learnt(second):
    learnt = Chain(second / "work" / "chain").record(1).learnt
    assert learnt["classes"] == ["apple", "zucchini"]
    assert learnt["pictures"].keys() == {"apple", "pear", "zucchini"}
    assert learnt["rehearsed"] == 2 * 4  # melon and pear, four each, as the run rehearses
    assert set(learnt["validation"]) == {"step", "accuracy", "recall@1", "cross"}


def test_the_first_version_is_put_onto_the_simplex_by_cross_entropy(second):
    chain = Chain(second / "work" / "chain")
    assert [chain.record(n).method for n in (0, 1)] == ["sce", "hoc"]
    assert chain.record(1).parent == 0


def test_nothing_new_does_nothing_and_says_so(shop):
    before = variables_sha256(Chain(shop / "work" / "chain")[-1].variables)
    done = month(shop / "photos", shop / "work")
    assert done.version is None and len(done.chain) == 1
    assert str(done) == (
        f"nothing new: 1 versions in {shop / 'work' / 'chain'}; K = 16, 2 in use (room for 14 more)"
    )
    assert variables_sha256(done.chain[-1].variables) == before


def test_new_pictures_of_which_none_is_to_be_learnt_are_counted(shop):
    files = sorted((shop / "photos").glob("*/*"))
    drawn_photos.draw(shop / "photos", ["pear"], 1, first=12)
    lines = [f"{file},{file.parent.name}," for file in files]
    lines.append(f"{shop / 'photos' / 'pear' / '012.jpg'},pear,gallery")
    (shop / "list.csv").write_text("\n".join(["path,label,split", *lines]))
    done = month(shop / "list.csv", shop / "work")
    assert done.version is None
    assert str(done).startswith("1 new picture: 1 for gallery; nothing new to learn: 1 versions in")
    assert "nothing new: 1 versions" in str(month(shop / "list.csv", shop / "work"))


def test_a_workdir_that_is_read_only_is_refused_at_once(shop, monkeypatch):
    allowed = os.access

    def access(path, mode):
        return Path(path) != shop / "work" and allowed(path, mode)

    monkeypatch.setattr(os, "access", access)
    with pytest.raises(UserError, match=r"cannot write to .*work: no permission in") as caught:
        month(shop / "photos", shop / "work")
    assert caught.value.argument == "workdir"


def test_a_part_never_changes_when_pictures_are_added(first, second):
    before, after = (Ledger.read(root / "work" / LEDGER) for root in (first, second))
    assert len(after) == len(before) + 2 * 12 + 6
    for digest, row in before.rows.items():
        assert after.rows[digest].part == row.part
        assert after.rows[digest].version == row.version


def test_a_class_that_is_gone_keeps_its_prototype(shop):
    shutil.rmtree(shop / "photos" / "melon")
    drawn_photos.draw(shop / "photos", ["apple"], 12)
    done = month(shop / "photos", shop / "work")
    assert names(shop / "work") == ("melon", "pear", "apple")
    assert "12 pictures that were there before are gone; the 7 of them that were learnt" in str(
        done
    )
    assert done.chain.record(-1).learnt["rehearsed"] == 4  # pears alone


def test_a_moved_or_renamed_picture_is_the_same(shop):
    for number, file in enumerate(sorted((shop / "photos" / "pear").iterdir())):
        file.rename(file.with_name(f"moved{number}{file.suffix}"))
    shutil.copytree(shop / "photos", shop / "elsewhere")
    assert month(shop / "elsewhere", shop / "work").version is None


def test_a_renamed_class_is_found_out(shop):
    (shop / "photos" / "pear").rename(shop / "photos" / "birne")
    with pytest.raises(
        UserError, match=r"class 'birne' has 12 pictures of the class 'pear'.*birne=pear"
    ):
        month(shop / "photos", shop / "work")
    done = month(shop / "photos", shop / "work", aliases={"birne": "pear"})
    assert done.version is None  # the same class under another name
    drawn_photos.draw(shop / "photos", ["birne"], 8, first=40)
    done = month(shop / "photos", shop / "work", aliases={"birne": "pear"})
    assert names(shop / "work") == ("melon", "pear")
    assert done.chain.record(-1).aliases == {"birne": "pear"}


def test_an_alias_is_remembered_by_the_chain_and_its_parts(shop):
    (shop / "photos" / "pear").rename(shop / "photos" / "birne")
    month(shop / "photos", shop / "work", aliases={"birne": "pear"})
    drawn_photos.draw(shop / "photos", ["birne"], 12, first=40)
    assert month(shop / "photos", shop / "work", aliases={"birne": "pear"}).version == 1
    drawn_photos.draw(shop / "photos", ["birne"], 6, first=60)
    assert month(shop / "photos", shop / "work").version == 2  # the record knows it
    assert names(shop / "work") == ("melon", "pear")
    query, gallery = photos(shop / "photos").retrieval(shop / "work")
    assert query.class_names == gallery.class_names == ("melon", "pear")
    assert {row.label for row in Ledger.read(shop / "work" / LEDGER)} == {"melon", "pear"}


def test_photos_that_moved_are_found_for_an_evaluation(second, tmp_path):
    shutil.copytree(second, tmp_path / "shop", copy_function=shutil.copy2)
    work = tmp_path / "shop" / "work"
    ledger = Ledger.read(work / LEDGER)
    lost = Ledger(row._replace(path="/gone" + row.path) for row in ledger)
    lost.write(work / LEDGER)
    query, gallery = photos(tmp_path / "shop" / "photos").retrieval(work)
    assert len(query) + len(gallery) == len(ledger.part("query", "gallery"))
    with pytest.raises(UserError, match=r"none of the .* pictures of query and gallery is there"):
        photos(tmp_path / "nowhere").retrieval(work)
    with pytest.raises(UserError, match=r"there is no pictures\.csv in .*nowhere"):
        photos(tmp_path / "shop" / "photos").retrieval(tmp_path / "nowhere")


def test_a_lost_ledger_is_not_made_up(shop):
    (shop / "work" / LEDGER).unlink()
    with pytest.raises(UserError, match=r"has 1 versions but no pictures\.csv"):
        month(shop / "photos", shop / "work")


def test_a_refused_call_leaves_the_settings_as_they_were(shop, tmp_path):
    (shop / "photos" / "pear" / "bad.jpg").write_bytes(b"bad")
    before = (shop / "work" / "run.json").read_bytes()
    with pytest.raises(UserError, match=r"bad\.jpg .*on_bad='skip' leaves such files out"):
        month(shop / "photos", shop / "work", run(epochs=9), change=True)
    assert (shop / "work" / "run.json").read_bytes() == before
    with pytest.raises(UserError, match=r"bad\.jpg"):
        month(shop / "photos", tmp_path / "new")
    assert not (tmp_path / "new" / "run.json").exists()


@pytest.mark.parametrize("place", ["photos", "photos/pear", "photos/run/a", "linked/run"])
def test_a_workdir_among_the_photos_is_refused_before_anything_is_written(shop, place):
    (shop / "linked").symlink_to(shop / "photos")
    before = sorted(shop.rglob("*"))
    with pytest.raises(
        UserError, match=r"lies in the folder of pictures .*: use a workdir"
    ) as caught:
        month(shop / "photos", shop / place)
    assert caught.value.argument == "workdir" and sorted(shop.rglob("*")) == before


def test_the_workdir_of_a_refused_call_does_not_stay(shop):
    (shop / "photos" / "fig").mkdir()
    before = sorted(shop.rglob("*"))
    with pytest.raises(UserError, match=r"class folder .*fig is empty"):
        month(shop / "photos", shop / "runs" / "other")
    assert sorted(shop.rglob("*")) == before
    (shop / "runs").mkdir()
    with pytest.raises(UserError, match=r"class folder .*fig is empty"):
        month(shop / "photos", shop / "runs" / "other")
    assert sorted(shop.rglob("*")) == sorted([*before, shop / "runs"])


def test_a_picture_put_right_is_learnt_again(shop):
    wrong = next(r for r in Ledger.read(shop / "work" / LEDGER) if r.part == "train")
    right = "pear" if wrong.label == "melon" else "melon"
    file = shop / "photos" / wrong.label / Path(wrong.path).name
    file.rename(shop / "photos" / right / f"put-right{file.suffix}")
    done = month(shop / "photos", shop / "work")
    assert "moved to another class: 1 pictures, 1 of them learnt again" in str(done)
    assert done.chain.record(-1).learnt["pictures"] == {right: 1}


def test_copies_count_once(shop):
    one = sorted((shop / "photos" / "pear").iterdir())[0]
    shutil.copy(one, shop / "photos" / "pear" / f"copy{one.suffix}")
    done = month(shop / "photos", shop / "work")
    assert done.version is None and "copies of other files, which count once: 1" in str(done)


def test_more_classes_than_prototypes_are_refused_before_anything_is_written(shop):
    drawn_photos.draw(shop / "photos", [f"c{i:02d}" for i in range(15)], 2)
    ledger = (shop / "work" / LEDGER).read_bytes()
    with pytest.raises(UserError, match="num_prototypes is 16, but there are 17 classes"):
        month(shop / "photos", shop / "work")
    assert (shop / "work" / LEDGER).read_bytes() == ledger


def test_a_bad_picture_stops_or_is_skipped(shop):
    drawn_photos.draw(shop / "photos", ["apple"], 12)
    bad = shop / "photos" / "apple" / "broken.jpg"
    bad.write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"broken\.jpg is not a picture"):
        month(shop / "photos", shop / "work")
    done = month(shop / "photos", shop / "work", on_bad="skip")
    assert done.version == 1 and "skipped 1 of 13 pictures" in str(done)


def test_a_stopped_month_goes_on_with_the_pictures_it_began_with(shop, tmp_path):
    drawn_photos.draw(shop / "photos", ["apple"], 12)
    shutil.copytree(shop, tmp_path / "unbroken", copy_function=shutil.copy2)
    whole = month(tmp_path / "unbroken" / "photos", tmp_path / "unbroken" / "work")
    asked = iter(range(1000))
    stopping = tiny.session(progress=False, should_stop=lambda: next(asked) > 1)
    with pytest.raises(Stopped):
        update(run(), photos(shop / "photos"), shop / "work", session=stopping)
    drawn_photos.draw(shop / "photos", ["zucchini"], 12)  # come in next time
    resumed = month(shop / "photos", shop / "work")
    assert resumed.version == 1 and names(shop / "work") == ("melon", "pear", "apple")
    assert resumed.chain[1].sha256 == whole.chain[1].sha256
    assert month(shop / "photos", shop / "work").version == 2
    assert names(shop / "work") == ("melon", "pear", "apple", "zucchini")


def test_another_backbone_replaces_the_model(second, tmp_path):
    shop = tmp_path / "shop"
    shutil.copytree(second, shop, copy_function=shutil.copy2)
    from compat_jax.models import Backbone

    other = run(backbone=Backbone("one_conv", {"width": 8}))
    done = month(shop / "photos", shop / "work", other)
    record = done.chain.record(2)
    assert done.version == 2 and record.backbone_arguments == {"width": 8}
    assert record.method == "sce" and record.parent is None
    assert record.replaced_by == "one_conv with fresh weights"
    assert sum(record.learnt["pictures"].values()) > 30 and record.learnt["rehearsed"] == 0
    assert record.class_names == names(shop / "work", 1)
    assert month(shop / "photos", shop / "work", other).version is None


def test_a_start_counts_once(shop, tmp_path):
    start = tiny.version(fresh=("projection",), class_names=())
    work = tmp_path / "work"
    assert month(shop / "photos", work, start=start).version == 0
    assert Chain(work / "chain").record(0).method == "sce"
    assert month(shop / "photos", work, start=start).version is None
    drawn_photos.draw(shop / "photos", ["apple"], 12)
    done = month(shop / "photos", work, start=start)
    assert done.version == 1 and done.chain.record(1).parent == 0


def test_a_new_chain_continues_the_classes_of_the_version_it_starts_from(second, tmp_path):
    start = Chain(second / "work" / "chain")[1]
    drawn_photos.draw(tmp_path / "photos", ["banana", "melon"], 12)
    done = month(tmp_path / "photos", tmp_path / "work", start=start)
    assert done.chain.record(0).class_names == ("melon", "pear", "apple", "zucchini", "banana")
    assert done.chain.record(0).method == "hoc"  # it was on the simplex already


def test_a_replacement_with_other_classes_on_the_same_prototypes_is_refused(second):
    start = tiny.version(class_names=("shirt", "shoe"), task=3)
    with pytest.raises(UserError, match="prototype number 0 is 'melon' in the chain, but 'shirt'"):
        month(second / "photos", second / "work", start=start)


@pytest.mark.slow
def test_a_learnable_head_grows_with_the_photos(first, tmp_path):
    shop = tmp_path / "shop"
    shutil.copytree(first / "photos", shop / "photos")
    month(shop / "photos", shop / "work", run(method="er"))
    drawn_photos.draw(shop / "photos", MORE, 12)
    done = month(shop / "photos", shop / "work", run(method="er"))
    assert done.chain.record(1).head_classes == 4
    assert done.chain[1].variables["params"]["head"]["kernel"].shape[1] == 4


def test_changed_settings_need_a_word_and_are_kept(shop):
    other = run(optimizer=Sgd(lr=0.02, min_lr=0.001), epochs=3)
    with pytest.raises(UserError, match=r"epochs was 2, now 3; optimizer\.lr .*continue with"):
        month(shop / "photos", shop / "work", other)
    assert month(shop / "photos", shop / "work", other, change=True).version is None
    (entry,) = json.loads((shop / "work" / "run.json").read_text())["changes"]
    assert entry["version"] == 1 and entry["changed"]["epochs"] == [2, 3]


def test_what_makes_a_chain_what_it_is_never_changes(shop):
    for name, other in {"seed": run(seed=1), "num_prototypes": run(num_prototypes=32)}.items():
        with pytest.raises(UserError, match=f"{name} was"):
            month(shop / "photos", shop / "work", other, change=True)
    with pytest.raises(UserError, match=r"photos\.splits\.by was picture, now class"):
        month(shop / "photos", shop / "work", splits=Splits(by="class"), change=True)


def test_an_exploding_run_publishes_nothing(shop):
    drawn_photos.draw(shop / "photos", ["apple"], 12)
    wild = run(optimizer=Sgd(lr=1e30, min_lr=1e30))
    with pytest.raises(Diverged, match="at step"):
        month(shop / "photos", shop / "work", wild, change=True)
    assert len(Chain(shop / "work" / "chain")) == 1


def test_evaluation_names_the_setting(second):
    query, gallery = photos(second / "photos").retrieval(second / "work")
    assert query.class_names == gallery.class_names == ("apple", "melon", "pear", "zucchini")
    result = evaluate(
        Chain(second / "work" / "chain"), query, gallery, session=tiny.session(progress=False)
    )
    assert "Closed set: the newest version was trained on all 4 classes" in str(result)


def test_open_set_classes_are_never_trained_on(tmp_path):
    drawn_photos.draw(tmp_path / "photos", [f"c{i}" for i in range(8)], 8)
    splits = Splits(by="class", query=0.25, gallery=0.25)
    month(tmp_path / "photos", tmp_path / "work", splits=splits)
    query, gallery = photos(tmp_path / "photos", splits=splits).retrieval(tmp_path / "work")
    assert not set(query.class_names) & set(names(tmp_path / "work"))
    assert len(query.class_names) == 4
    result = evaluate(
        Chain(tmp_path / "work" / "chain"), query, gallery, session=tiny.session(progress=False)
    )
    assert "Open set: no version was trained on the 4 classes" in str(result)


def test_a_picture_of_a_table_that_is_gone_is_named(tmp_path):
    drawn_photos.draw(tmp_path / "photos", FRUIT, 3)
    lines = [f"photos/{n}/{f.name},{n}" for n in FRUIT for f in (tmp_path / "photos" / n).iterdir()]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *lines, "photos/gone.jpg,pear"]))
    with pytest.raises(UserError, match=r"gone\.jpg is not there: put it back"):
        month(tmp_path / "list.csv", tmp_path / "work")


def test_a_table_may_say_the_parts(tmp_path):
    drawn_photos.draw(tmp_path / "photos", FRUIT, 8)
    lines = ["path,label,split"]
    for name in FRUIT:
        files = sorted((tmp_path / "photos" / name).iterdir())
        parts = ["train"] * 4 + ["val", "query", "gallery", ""]
        lines += [f"photos/{name}/{f.name},{name},{p}" for f, p in zip(files, parts, strict=True)]
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    month(tmp_path / "list.csv", tmp_path / "work")
    rows = Ledger.read(tmp_path / "work" / LEDGER)
    given = {Path(row.path).stem: row.part for row in rows if row.label == "pear"}
    assert [given[f"{i:03d}"] for i in range(7)] == ["train"] * 4 + [
        "validation",
        "query",
        "gallery",
    ]


def test_features_of_photos_equal_those_of_the_training_pipeline(second):
    version = Chain(second / "work" / "chain")[-1]
    query, _ = photos(second / "photos").retrieval(second / "work")
    by_file = version.embed(list(query.files))
    np.testing.assert_array_equal(by_file, version.embed(query))
