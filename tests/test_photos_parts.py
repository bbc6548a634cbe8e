"""Parts of photos from month to month: moved, merged, edited and listed anew, without training."""

import collections
import os
from pathlib import Path

import drawn_photos
import pytest
import tiny
from PIL import Image

from compat_jax.data.class_register import Register
from compat_jax.data.ledger import NO_PART, Ledger, Row, Splits
from compat_jax.data.photos import Photos, refresh
from compat_jax.errors import UserError

OPEN = Splits(by="class", query=0.2, gallery=0.2)
LETTERS = ("a", "b", "c", "d", "e", "f")
LATER = 10**18  # ns; long after any file was written


class Shop:
    """A folder or table of photos, and the ledger and register of its run."""

    def __init__(self, root, *, path=None, **fields):
        self.root, self.path, self.fields = root, path or root, fields
        self.ledger, self.register, self.version = Ledger(), Register((), {}, tiny.K), -1
        self.notes, self.news = "", None

    def month(self, **more):
        """Look for what is new; `more` are fields of the photos."""
        pictures = Photos(path=str(self.path), size=tiny.SIZE, **{**self.fields, **more})
        version = self.version + 1
        self.news = refresh(pictures, self.ledger, self.register, version=version, progress=None)
        self.version, self.ledger = version, self.news.ledger
        self.register, self.notes = self.news.register, "\n".join(self.news.notes)
        return self.news

    def parts(self, label):
        return dict(collections.Counter(row.part for row in self.ledger if row.label == label))

    def rows(self, *parts, trained=None):
        """Those of some parts; of classes that are registered, or that are not."""
        found = self.ledger.part(*parts)
        return [r for r in found if trained is None or (r.label in self.register) == trained]

    def at(self, path):
        """The row of a file."""
        (row,) = [row for row in self.ledger if row.path == str(path)]
        return row

    def draw(self, labels, count, first):
        drawn_photos.draw(self.root, labels, count, first)

    def move(self, row, label):
        """Move a picture to the folder of a class."""
        target = self.root / label / f"moved-{row.label}-{Path(row.path).name}"
        Path(row.path).rename(target)
        return target


@pytest.fixture
def held(tmp_path):
    """Six classes of which some are held out; `d` and `b` of its names are such."""
    drawn_photos.draw(tmp_path / "photos", LETTERS, 8)
    shop = Shop(tmp_path / "photos", splits=OPEN)
    shop.month()
    assert 2 <= len(shop.register) <= 4
    return shop


@pytest.fixture
def closed(tmp_path):
    drawn_photos.draw(tmp_path / "photos", ("a", "b"), 10)
    shop = Shop(tmp_path / "photos")
    shop.month()
    return shop


def held_classes(shop):
    return sorted({row.label for row in shop.ledger} - set(shop.register.names))


def edit(path, colour=(255, 0, 0)):
    """Write another picture into a file."""
    Image.new("RGB", (30, 30), colour).save(path)
    os.utime(path, ns=(LATER, LATER))


def annotate(path):
    """Change the metadata of a file, and none of its pixels."""
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x010E] = "annotated"
        image.save(path, exif=exif)
    os.utime(path, ns=(LATER, LATER))


@pytest.mark.parametrize("merged", [False, True])
def test_a_trained_class_that_gets_held_out_pictures_is_trained_on(held, merged):
    source, target = held_classes(held)[0], held.register.names[0]
    row = held.rows("query", trained=False)[0]
    if merged:
        aliases = {source: target}
    else:
        aliases, source = {}, row.label
        held.move(row, target)
    before = held.parts(target)
    held.draw([target], 10, first=20)
    held.month(aliases=aliases)
    assert held.ledger.rows[row.digest].part in ("query", "gallery")  # a photo keeps its part
    gained = collections.Counter(held.parts(target)) - collections.Counter(before)
    assert gained["train"] == 9 and gained["validation"] == 1
    assert held.news.pictures == {target: 9}
    assert len(held.register) == len(held.news.register.names)


def test_a_registered_class_without_pictures_is_trained_on():
    new = {"a": [f"{i:032x}" for i in range(10)]}
    row = Row("f" * 32, "a", "query", -1, "", 1, 2)
    assert set(OPEN.assign([row], new).values()) == {"query", "gallery"}
    assert set(OPEN.assign([row], new, ("a",)).values()) == {"train", "validation"}
    assert set(OPEN.assign([], new, ("a",)).values()) == {"train", "validation"}


@pytest.mark.parametrize("more", [0, 6])
def test_a_picture_moved_from_a_trained_class_to_a_held_out_one_is_in_no_part(held, more):
    target = held_classes(held)[0]
    row = held.rows("train")[0]
    place = held.move(row, target)
    held.draw([target], more, first=20)
    before = held.register.names
    held.month()
    now = held.at(place)
    assert (now.part, now.version, now.label) == (NO_PART, 0, target)
    assert held.register.names == before and not held.news.pictures
    assert set(held.parts(target)) == {"query", "gallery", NO_PART}
    assert f"now in a class that is held out: 1 picture, such as {place}" in held.notes
    held.month()
    assert held.at(place).part == NO_PART and "held out" not in held.notes
    place.rename(held.root / row.label / place.name)
    held.month()
    back = held.at(held.root / row.label / place.name)
    assert (back.part, back.version) == ("train", held.version)  # learnt again
    assert not held.register.names[len(before) :]


def test_a_picture_without_a_part_survives_the_file(held, tmp_path):
    held.move(held.rows("train")[0], held_classes(held)[0])
    held.month()
    held.ledger.write(tmp_path / "pictures.csv")
    assert sorted(Ledger.read(tmp_path / "pictures.csv")) == sorted(held.ledger)


def test_a_picture_moves_from_one_held_out_class_to_another(held):
    source, target = held_classes(held)[:2]
    row = next(row for row in held.ledger if row.label == source)
    place = held.move(row, target)
    held.month()
    assert held.at(place) == row._replace(label=target, path=str(place))
    (held.root / source).rename(held.root / "other")
    with pytest.raises(UserError, match=f"class 'other' has .* pictures of the class '{source}'"):
        held.month()
    held.month(aliases={"other": source})
    assert {row.label for row in held.ledger} == set(LETTERS)


def test_a_trained_class_is_not_merged_into_a_held_out_one(held):
    trained, other = held.register.names[0], held_classes(held)[0]
    with pytest.raises(UserError, match=rf"{trained!r} was trained on, .*\({other}=") as caught:
        held.month(aliases={trained: other})
    assert caught.value.argument == "aliases"


def write_table(root, lines):
    path = root.parent / "table.csv"
    text = [f"{file.relative_to(root.parent)},{file.parent.name},{split}" for file, split in lines]
    path.write_text("\n".join(["path,label,split", *text]) + "\n")
    return path


def files(root):
    return sorted(path for path in root.rglob("*") if path.is_file())


def test_classes_with_parts_in_a_table_of_the_month_before_are_trained_on(tmp_path):
    root = tmp_path / "photos"
    drawn_photos.draw(root, ("a", "b"), 5)
    given = ("train", "query", "gallery", "train", "train")
    table = write_table(root, [(f, given[i % 5]) for i, f in enumerate(files(root))])
    shop = Shop(root, path=table, splits=OPEN)
    shop.month()
    drawn_photos.draw(root, ("a", "b"), 10, first=5)
    write_table(root, [(file, "") for file in files(root)])
    assert shop.month().pictures == {"a": 9, "b": 9}


def test_parts_of_a_table_count_for_pictures_without_one(tmp_path):
    root = tmp_path / "photos"
    drawn_photos.draw(root, ("a", "b"), 8)
    given = ("query", "gallery", "train")
    lines = [(file, given[i % 8] if i % 8 < 3 else "") for i, file in enumerate(files(root))]
    shop = Shop(root, path=write_table(root, lines), splits=OPEN)
    shop.month()
    for label in ("a", "b"):
        assert shop.parts(label) == {"query": 1, "gallery": 1, "train": 5, "validation": 1}


def test_a_table_does_not_train_on_a_held_out_class(tmp_path):
    root = tmp_path / "photos"
    drawn_photos.draw(root, ("a", "b"), 4)
    lines = [(f, "train" if f.parent.name == "a" else "query") for f in files(root)]
    shop = Shop(root, path=write_table(root, lines), splits=OPEN)
    shop.month()
    drawn_photos.draw(root, ("b",), 1, first=4)
    write_table(root, [*lines, (root / "b" / "004.jpg", "train")])
    with pytest.raises(UserError, match=r"split of .*004\.jpg is train, but its class 'b' is held"):
        shop.month()


def test_a_split_that_changes_is_named_and_the_part_stays(tmp_path):
    root = tmp_path / "photos"
    drawn_photos.draw(root, ("a", "b"), 4)
    given = ("train", "train", "query", "gallery")
    lines = [(file, given[i % 4]) for i, file in enumerate(files(root))]
    shop = Shop(root, path=write_table(root, lines))
    assert not shop.month().notes
    before = {row.digest: row.part for row in shop.ledger}
    write_table(root, [(lines[0][0], "test"), (lines[1][0], ""), *lines[2:]])
    shop.month()
    assert {row.digest: row.part for row in shop.ledger} == before
    assert shop.notes == (
        "listed with another split than their part, which stays: 1, such as "
        f"{lines[0][0]} (query, stays train)"
    )


def test_a_picture_listed_with_two_splits_is_named(tmp_path):
    root = tmp_path / "photos"
    drawn_photos.draw(root, ("a", "b"), 3)
    lines = [(file, "train") for file in files(root)]
    twice = [(lines[0][0], "query"), (lines[1][0], "train")]
    shop = Shop(root, path=write_table(root, [*lines, *twice]))
    shop.month()
    assert shop.at(lines[0][0]).part == "train"
    assert (
        f"listed with two splits, of which the first counts: 1, such as {lines[0][0]} "
        "(train and query)"
    ) in shop.notes


@pytest.mark.parametrize("change", [annotate, edit])
@pytest.mark.parametrize("part", ["train", "validation", "query", "gallery"])
def test_a_file_with_other_contents_keeps_its_part(closed, part, change):
    before = closed.rows(part)
    row = before[0]
    change(row.path)
    news = closed.month()
    now = closed.at(row.path)
    assert (now.part, now.label) == (part, row.label) and now.digest != row.digest
    assert closed.ledger.rows[row.digest] == row._replace(path="")
    again = int(part == "train")
    assert now.version == (1 if again else -1) and sum(news.pictures.values()) == again
    assert closed.notes == (
        f"other contents in files that were there before: 1, such as {row.path}; each keeps its "
        f"part, {again} of them learnt again"
    )
    assert not closed.month() and not closed.notes


def test_all_files_with_other_metadata_ask_with_nothing_that_was_learnt(closed):
    before = {row.path: row.part for row in closed.ledger}
    for path in before:
        if path.endswith("jpg"):
            annotate(path)
    closed.month()
    assert {row.path: row.part for row in closed.ledger if row.path} == before


def test_copies_with_other_contents_are_what_was_learnt(closed):
    learnt, asked = closed.rows("train")[0], closed.rows("query")[0]
    for row in (asked, learnt):
        edit(row.path)
    closed.month()
    (now,) = [row for row in closed.ledger if row.version == 1]
    assert now.part == "train" and now.path in (asked.path, learnt.path)
    assert {closed.ledger.rows[row.digest].path for row in (asked, learnt)} == {""}


def test_a_picture_that_is_elsewhere_too_leaves_its_file(closed):
    row = closed.rows("query")[0]
    copy = Path(row.path).with_name("copy" + Path(row.path).suffix)
    Path(row.path).rename(copy)
    edit(row.path)
    closed.month()
    assert closed.at(copy) == row._replace(path=str(copy))
    assert "other contents" not in closed.notes


def test_pictures_that_are_gone_stay_learnt_if_they_were(closed):
    for row in closed.rows("query"):
        Path(row.path).unlink()
    closed.month()
    assert closed.notes == "2 pictures that were there before are gone"
    for row in closed.rows("train")[:3]:
        Path(row.path).unlink()
    closed.month()
    assert closed.notes == (
        "3 pictures that were there before are gone; the 3 of them that were learnt stay learnt"
    )


def test_pictures_that_are_not_learnt_are_counted(closed):
    for number in range(10, 20):
        closed.draw(["a"], 1, first=number)
        news = closed.month()
        assert sum(news.parts.values()) == 1 and bool(news) == ("train" in news.parts)


@pytest.mark.parametrize("part", ["query", "gallery"])
def test_what_is_evaluated_is_what_the_ledger_says(closed, part):
    pictures = Photos(path=str(closed.root), size=tiny.SIZE)
    row = closed.rows(part)[0]
    content = Path(row.path).read_bytes()
    os.utime(row.path, ns=(LATER, LATER))  # the same contents, as of a copy
    assert len(pictures.retrieval(closed.ledger)[0]) == len(closed.rows("query"))
    edit(row.path)
    with pytest.raises(
        UserError, match=rf"1 picture has other contents .* {row.path}: run the update again"
    ):
        pictures.retrieval(closed.ledger)
    Path(row.path).write_bytes(content)
    assert len(pictures.retrieval(closed.ledger)[0]) == len(closed.rows("query"))
    edit(row.path)
    closed.month()
    assert row.path in pictures.retrieval(closed.ledger)[part == "gallery"].files


def test_unchanged_files_are_not_digested_again(closed, monkeypatch):
    def read(path):
        raise AssertionError(f"read {path} for its digest")

    monkeypatch.setattr("compat_jax.data.reading.file_digest", read)
    query, gallery = Photos(path=str(closed.root), size=tiny.SIZE).retrieval(closed.ledger)
    assert len(query) == len(closed.rows("query")) and len(gallery) == len(closed.rows("gallery"))
