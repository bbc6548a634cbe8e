"""Lists: folders, tables and trees list nothing but pictures, and say what is wrong."""

import os
import shutil
import unicodedata

import numpy as np
import pyarrow
import pytest
import tiny
from PIL import Image
from pyarrow import parquet

import compat_jax as cj
from compat_jax import report
from compat_jax.chain import Chain
from compat_jax.data import from_folder, from_table
from compat_jax.data.listing import (
    Picture,
    class_name,
    holds,
    list_folder,
    list_huggingface,
    list_labelled,
    list_parts,
    list_pictures,
    list_table,
)
from compat_jax.data.pictures import BadPictures
from compat_jax.errors import UserError
from compat_jax.matrix import Evaluation


def write(path, value):
    """Write a grey picture of 4 x 4 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(path)


# Folders


@pytest.fixture
def folder(tmp_path):
    """Classes cat, with a folder in it, and dog; four pictures of one colour each."""
    for number, place in enumerate(("cat/b.png", "cat/a.png", "cat/more/c.png", "dog/a.png")):
        write(tmp_path / "pictures" / place, number)
    return tmp_path / "pictures"


def listed(folder):
    found = list_folder(folder)
    assert all(picture.split is None for picture in found)
    return [(picture.label, os.path.relpath(picture.path, folder)) for picture in found]


WHOLE = [
    ("cat", "cat/a.png"),
    ("cat", "cat/b.png"),
    ("cat", "cat/more/c.png"),
    ("dog", "dog/a.png"),
]


def test_classes_and_pictures_come_in_the_order_of_their_names(folder):
    assert listed(folder) == WHOLE
    dataset = from_folder(folder)
    assert dataset.class_names == ("cat", "dog") and dataset.labels.tolist() == [0, 0, 0, 1]
    assert dataset.images[:, 0, 0, 0].tolist() == [1, 0, 2, 3]


@pytest.mark.parametrize("place", ["", "cat", "cat/more"])
def test_what_systems_leave_behind_is_no_picture(folder, place):
    for name in (".hidden", ".git", "@eaDir", "__MACOSX", "lost+found", "@EADIR"):
        (folder / place / name).mkdir()
        (folder / place / name / "a.png").write_bytes(b"no picture")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "ehthumbs.db", "._a.png", "THUMBS.DB"):
        (folder / place / name).write_bytes(b"no picture")
    assert listed(folder) == WHOLE
    assert len(from_folder(folder)) == 4


def test_links_are_followed(folder, tmp_path):
    write(tmp_path / "elsewhere" / "z.png", 9)
    (folder / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "cat" / "y.png").symlink_to(tmp_path / "elsewhere" / "z.png")
    (folder / "owl").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "all").symlink_to(folder)
    dataset = from_folder(tmp_path / "all")
    assert dataset.class_names == ("cat", "dog", "owl")
    assert dataset.images[:, 0, 0, 0].tolist() == [1, 0, 9, 2, 9, 3, 9]


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("nowhere.png", r"x is a link to nowhere \(No such file or directory\): remove it or"),
        ("x", r"x is a link to nowhere \(Too many levels of symbolic links\): remove it or"),
        ("a.png/b.png", r"x is a link to nowhere \(Not a directory\): remove it or restore"),
        (".", "x links to a folder around itself: remove the link"),
        ("..", "x/cat links to a folder around itself: remove the link"),
        ("/dev/zero", "x is neither a file nor a folder: remove it"),
    ],
)
def test_links_that_lead_to_nothing_or_around_are_refused(folder, to, message):
    (folder / "cat" / "x").symlink_to(to)
    with pytest.raises(UserError, match=rf"pictures/cat/{message}"):
        from_folder(folder)


def test_a_pipe_is_refused_and_never_opened(folder):
    os.mkfifo(folder / "dog" / "pipe.png")
    with pytest.raises(UserError, match=r"dog/pipe\.png is neither a file nor a folder"):
        from_folder(folder)


def test_a_class_name_that_is_not_utf_8_is_refused(folder):
    shutil.copytree(folder / "dog", folder / os.fsdecode(b"d\xf6g"))
    with pytest.raises(UserError, match=r"name of class folder b'.*/d\\xf6g' is not UTF-8: rename"):
        from_folder(folder)


def test_a_file_name_need_not_be_utf_8(folder):
    shutil.copy(folder / "dog" / "a.png", os.fsencode(folder) + b"/dog/\xff.png")
    assert len(from_folder(folder)) == 5


def test_class_names_may_be_of_any_script(folder):
    for name in ("猫", "ёж", "a b", "[x]*?"):
        shutil.copytree(folder / "dog", folder / name)
    assert set(from_folder(folder).class_names) == {"cat", "dog", "猫", "ёж", "a b", "[x]*?"}


def test_all_bad_pictures_are_named_at_once(folder):
    (folder / "cat" / "bad.png").write_bytes(b"")
    content = (folder / "cat" / "a.png").read_bytes()
    (folder / "dog" / "cut.png").write_bytes(content[:40])
    Image.fromarray(np.ones((4, 4), np.float32)).save(folder / "dog" / "float.tiff")
    with pytest.raises(
        BadPictures, match=r"^3 pictures cannot be read: /.*cat/bad.png is"
    ) as caught:
        from_folder(folder)
    names = [problem.partition(" ")[0] for problem in caught.value.problems]
    assert names == [str(folder / p) for p in ("cat/bad.png", "dog/cut.png", "dog/float.tiff")]
    assert all(name in str(caught.value) for name in names)
    for number in range(20):
        (folder / "dog" / f"z{number:02d}.png").write_bytes(b"")
    with pytest.raises(
        BadPictures,
        match=r"^23 pictures cannot be read: .*; and 13 more\. on_bad='skip' leaves such files out$",
    ) as caught:
        from_folder(folder)
    assert len(caught.value.problems) == 23 and str(caught.value).count("Pillow can read") == 9


@pytest.mark.parametrize("parts", [("train", "query"), ("Train", "val", "test"), ("train", "more")])
def test_a_folder_one_level_too_high_is_refused(tmp_path, parts):
    for part in parts:
        write(tmp_path / part / "cat" / "a.png", 0)
        write(tmp_path / part / "dog" / "a.png", 0)
    with pytest.raises(UserError, match=r"no classes, but .*: give one of them, such as .*/[tT]"):
        from_folder(tmp_path)
    assert from_folder(tmp_path / parts[0]).class_names == ("cat", "dog")


def test_classes_may_be_called_as_parts_or_hold_the_same_folders(tmp_path):
    for place in ("train/a.png", "bus/a.png", "cat/2023/a.png", "dog/2023/a.png"):
        write(tmp_path / place, 0)
    assert from_folder(tmp_path).class_names == ("bus", "cat", "dog", "train")
    shutil.rmtree(tmp_path / "train")
    shutil.rmtree(tmp_path / "bus")
    assert from_folder(tmp_path).class_names == ("cat", "dog")


def test_one_class_of_nothing_but_folders_is_one_level_too_high(folder):
    above, again = folder.parent, r"would be a single class, 'pictures', of 2 folders \(cat, dog\)"
    for read in (from_folder, list_labelled, list_parts):
        with pytest.raises(UserError, match=rf"{again}: give .*/pictures if they are the classes"):
            read(above)
    assert len(list_folder(above, class_folders="path")) == 4
    assert {p.label for p in list_folder(above, exclude=["dog"])} == {"pictures"}  # one folder
    (above / "results").mkdir()
    (above / "results" / "run.json").write_text('{"method": 1, "num_prototypes": 2}')
    with pytest.raises(UserError, match=again):
        from_folder(above)
    write(above / "pictures" / "own.png", 0)
    assert from_folder(above).class_names == ("pictures",)
    write(above / "owl" / "2024" / "a.png", 0)
    assert from_folder(above).class_names == ("owl", "pictures")


# What this package wrote: a folder each, with what is in it


WRITTEN = {
    "run/run.json": '{"method": {"name": "hoc"}, "num_prototypes": 16}',
    "chain/0000/record.json": '{"format": 3, "record": {}}',
    "chain/0000/variables-1/d/part": "",
    "evaluation/matrix.json": '{"hoc": {"metric": "map", "matrix": []}}',
    "evaluation/matrices.png": "",
    "evaluation/average_accuracy.png": "",
    "several/map/matrix.json": '{"hoc": {"metric": "map", "matrix": []}}',
    "several/cache/gallery0000-0123456789abcdef01234567.npz": "",
    "report/report.json": '{"hoc": {"chain": "x", "versions": []}}',
    "report/1-map-matrix.png": "",
    "answers/answers.json": '[{"query": "x", "answers": []}]',
    "answers/wall-0.png": "",
    "sweep/results.jsonl": '{"cell": {}, "metrics": {}}\n{"cell": {}, "metrics": {}}\n',
    "store.lance/_versions/1.manifest": "",
    "store.lance/data/1.lance": "",
}


def put(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


@pytest.mark.parametrize("place", ["", "cat", "cat/more"])
def test_folders_that_this_package_wrote_are_passed_over(folder, place):
    put(folder / place, WRITTEN)
    assert listed(folder) == WHOLE
    files = [str(folder / name) for _, name in WHOLE]
    assert list_pictures(folder) == list_pictures(f"{folder}/**") == files
    assert {p.label for p in list_folder(folder, class_folders="name")} == {"cat", "more", "dog"}
    assert list_pictures(f"{folder / place}/evaluation/m*.png")  # asked for by name


def test_what_this_package_really_writes_is_passed_over(folder, tmp_path):
    described = tiny.record()
    Chain(folder / "cat" / "chain").add(tiny.variables(described), described)
    results = {"hoc": Evaluation("map", np.eye(2), ("0", "1"), (False, False))}
    report.write(results, folder / "cat" / "evaluation")
    assert any((folder / "cat" / "chain").rglob("record.json")) and listed(folder) == WHOLE


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", '{"method": "of the user"}'),
        ("run.json", "no JSON"),
        ("run.json", "[]"),
        ("results.jsonl", ""),
        ("matrix.json", '{"metric": 1}'),
        ("cache/gallery.npz", ""),
        ("my.lance/a.bin", ""),
    ],
)
def test_a_folder_of_the_users_own_is_not_passed_over(folder, name, content):
    put(folder / "dog" / "x", {name: content})
    assert ("dog", f"dog/x/{name}") in listed(folder)


@pytest.mark.parametrize("name", ["a.jpg", "b.PNG", "c.webp"])
@pytest.mark.parametrize("kind", ["run/run.json", "evaluation/matrix.json"])
def test_pictures_beside_what_this_package_wrote_are_not_lost(folder, name, kind):
    marker = kind.partition("/")[2]
    put(folder / "dog", {marker: WRITTEN[kind], name: ""})
    dogs = [file for label, file in listed(folder) if label == "dog"]
    assert dogs == [f"dog/{file}" for file in sorted(("a.png", name, marker))]


def test_a_folder_of_nothing_but_outputs_holds_no_class(tmp_path):
    put(tmp_path, WRITTEN)
    with pytest.raises(UserError, match="has no sub-folder: it must hold one folder of pictures"):
        list_folder(tmp_path)


def test_what_a_folder_would_list_is_known_before(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "cats").symlink_to(folder / "cat")
    for place in ("", "run", "cat", "cat/../run/a"):
        assert holds(folder, folder / place) and holds(tmp_path / "link", folder / place)
        assert holds(folder, tmp_path / "link" / place)
    assert holds(folder, tmp_path / "cats" / "run") and not holds(folder / "dog", folder / "cat")
    for place in (".runs/a", "cat/.x", "@eaDir", "out", "a/out", "..", "../pictures2", "../runs/a"):
        assert not holds(folder, folder / place, ["out"])
    assert not holds(table(folder, "path\ncat/a.png\n"), folder / "run")
    assert not holds(folder, "s3://shop/run") and not holds(tmp_path / "none", tmp_path / "none")


def test_folders_of_parts_are_listed_with_their_part(folder):
    parts = folder.parent / "parts"
    for part in ("train", "query"):
        shutil.copytree(folder, parts / part)
    found = list_parts(parts)
    assert [p.split for p in found] == ["query"] * 4 + ["train"] * 4
    assert list_parts(folder) == list_folder(folder) == list_labelled(folder)


# Class names


def test_one_function_decides_what_a_class_is_called():
    decomposed = unicodedata.normalize("NFD", "ёж à")
    assert decomposed != "ёж à" and class_name(f" {decomposed}\t", "x") == "ёж à"
    for text in ("", "  ", "a\0b"):
        with pytest.raises(UserError, match=r"^x is empty or has a NUL: give it a name"):
            class_name(text, "x")
    with pytest.raises(UserError, match=r"^x is not UTF-8: rename it"):
        class_name(os.fsdecode(b"d\xf6g"), "x")


def test_two_folders_of_one_name_are_refused_by_both_names(folder):
    for name in ("dog ", unicodedata.normalize("NFD", "ё"), unicodedata.normalize("NFC", "ё")):
        shutil.copytree(folder / "dog", folder / name)
    with pytest.raises(
        UserError, match=r"folders 'dog' and 'dog ' of .* the same class name 'dog'"
    ):
        from_folder(folder)
    shutil.rmtree(folder / "dog ")
    with pytest.raises(UserError, match="have the same class name 'ё': rename one, or move its"):
        from_folder(folder)


# Tables


def table(folder, text, name="list.csv"):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("name", ["list.csv", "list.tsv", "list.CSV", "list.parquet"])
def test_a_table_lists_paths_labels_and_splits(folder, name):
    rows = [("cat/a.png", "007", "train"), (str(folder / "dog/a.png"), " кот ", "test")]
    rows += [("cat/b.png", "007", "train"), ("cat/more/c.png", "3", "")]
    if name.endswith("parquet"):
        columns = {n: [row[i] for row in rows] for i, n in enumerate(("path", "label", "split"))}
        parquet.write_table(pyarrow.table({**columns, "more": [1.5] * 4}), folder / name)
    else:
        sign = "\t" if name == "list.tsv" else ","
        lines = [("path", "label", "split", "more"), *((*row, "1.5") for row in rows)]
        table(folder, "".join(sign.join(line) + "\n" for line in lines), name)
    found = list_table(folder / name)
    assert found == list_labelled(folder / name)
    assert found[:2] == [
        Picture(str(folder / "cat/a.png"), "007", "train"),
        Picture(str(folder / "dog/a.png"), "кот", "test"),
    ]
    assert found[3].split is None
    train = from_table(folder / name, split="train")
    assert train.class_names == ("007",) and train.images[:, 0, 0, 0].tolist() == [1, 0]
    everything = from_table(folder / name)
    assert everything.class_names == ("007", "3", "кот")
    assert everything.labels.tolist() == [0, 2, 0, 1]
    assert [os.path.basename(file) for file in everything.files] == [
        "a.png",
        "a.png",
        "b.png",
        "c.png",
    ]


def test_a_table_may_name_its_columns_and_have_no_labels(folder):
    path = table(folder, "file,kind,set\ncat/a.png,x,train\ndog/a.png,y,test\n")
    dataset = from_table(path, "test", columns=("file", "kind", "set"))
    assert dataset.class_names == ("y",) and dataset.images[0, 0, 0, 0] == 3
    unlabelled = from_table(path, columns=("file", "", ""))
    assert unlabelled.labels is None and unlabelled.class_names == () and len(unlabelled) == 2
    assert from_table(table(folder, "path,price\ncat/a.png,3\n")).labels is None


@pytest.mark.parametrize("address", ["gs://shop/a.png", "gs://shop/./a/../b.png", "s3://shop//a"])
def test_addresses_in_buckets_stay_as_they_are(folder, address):
    found = list_table(table(folder, f"path,label\n{address},x\n"))
    assert found == [Picture(address, "x")]


def test_a_picture_has_the_same_path_in_every_list(folder, tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    monkeypatch.chdir(tmp_path / "lists")
    written = ("./a.png", "../cat/a.png", f"{folder}//dog/../cat/./a.png", "more/../a.png")
    inside = table(folder / "cat", "path\n" + "".join(f"{one}\n" for one in written))
    beside = table(tmp_path / "lists", "path\n../pictures/cat/a.png\n../pictures/./cat//a.png\n")
    found = [picture.path for path in (inside, beside) for picture in list_table(path)]
    found += list_pictures(["../pictures/cat/a.png", "../pictures/./cat//a.png"])
    found += list_pictures("../pictures/./cat/a.*")
    found += [list_folder("../pictures")[0].path, list_labelled(f"{folder}/cat/..")[0].path]
    assert set(found) == {str(folder / "cat/a.png")}


def test_a_table_of_a_spreadsheet(folder):
    text = '\ufeffpath, label\r\n"cat/a.png",x\r\n"d,g/a.png","a\nb"\r\n'
    found = list_table(table(folder, text))
    assert found == [
        Picture(str(folder / "cat/a.png"), "x"),
        Picture(str(folder / "d,g/a.png"), "a\nb"),
    ]


def test_a_table_may_be_separated_by_semicolons(folder):
    found = list_table(table(folder, "path;label\ncat/a.png;x, y\ndog/a.png;z\n"))
    assert [picture.label for picture in found] == ["x, y", "z"]


@pytest.mark.parametrize("line", ["sep=;\r\n", '"sep=;"\n', "\ufeffSEP=;\n"])
def test_the_first_line_of_excel_says_what_separates(folder, line):
    found = list_table(table(folder, f"{line}path;label\ncat/a.png;x, y\ndog/a.png;z, w, v\n"))
    assert [(p.path, p.label) for p in found] == [
        (str(folder / "cat/a.png"), "x, y"),
        (str(folder / "dog/a.png"), "z, w, v"),
    ]
    (one,) = list_table(table(folder, "sep=|\npath|label\ncat/a.png|x,y;z\n"))
    assert one == Picture(str(folder / "cat/a.png"), "x,y;z")


def test_blanks_around_a_path_count_only_where_a_file_is_called_so(folder):
    text = "label, path\nx, cat/a.png\ny, cat/b.png \nz,  ~/none.png\nw, gs://bucket/a.png\n"
    found = [picture.path for picture in list_table(table(folder, text))]
    home = os.path.expanduser("~/none.png")
    assert found == [
        *(str(folder / "cat" / n) for n in ("a.png", "b.png")),
        home,
        "gs://bucket/a.png",
    ]
    assert len(from_table(table(folder, "label, path\nx, cat/a.png\n"), size=2)) == 1
    (folder / " blank.png ").write_bytes((folder / "cat" / "a.png").read_bytes())
    (one,) = list_table(table(folder, "path,label\n blank.png ,x\n"))
    assert one.path == str(folder / " blank.png ")


def test_a_table_of_whole_numbers_and_categories(folder):
    labels = pyarrow.array([10, 9]), pyarrow.array(["x", "y"]).dictionary_encode()
    for column, names in zip(labels, (["10", "9"], ["x", "y"]), strict=True):
        columns = {"path": ["cat/a.png", "dog/a.png"], "label": column}
        parquet.write_table(pyarrow.table(columns), folder / "list.parquet")
        assert [p.label for p in list_table(folder / "list.parquet")] == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\ncat/a.png,x\n", r"unknown column of .*csv 'path'\. Valid: file, label\."),
        ("path,Label\ncat/a.png,x\n", r"unknown column .* 'label'\. Did you mean 'Label'\?"),
        ("path,labels\ncat/a.png,x\n", r"unknown column .* 'label'\. Did you mean 'labels'\?"),
        ("path,label\ncat/a.png,x\ndog/a.png,\n", r"row 2 of .*list\.csv has no label: give one"),
        ("path,label\ncat/a.png,  \n", r"row 1 of .*list\.csv has no label: give one or remove"),
        ("path,label\n,x\n", "row 1 of .* has no path"),
        ("path,label\na\0.png,x\n", "the path in row 1 of .* has a NUL: mend the table"),
        ("path,label\n", "list.csv has no rows"),
        ("path,label\ncat/a.png\n", r"list\.csv cannot be read as a table \(.*Expected 2 columns"),
        ("", r"list\.csv cannot be read as a table \(Empty CSV file\)"),
    ],
)
def test_tables_that_cannot_be(folder, text, message):
    with pytest.raises(UserError, match=message) as caught:
        from_table(table(folder, text))
    assert "\n" not in str(caught.value)


def test_what_is_no_table(folder):
    with pytest.raises(UserError, match=r"no table .*absent\.csv"):
        list_table(folder / "absent.csv")
    with pytest.raises(UserError, match=r"is no table: its name must end with \.csv, \.tsv, \.par"):
        list_table(folder)
    (folder / "list.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"list\.parquet cannot be read as a table \(.*magic bytes"):
        list_table(folder / "list.parquet")
    (folder / "list.csv").write_bytes(b"path,label\ncat/a.png,\xff\n")
    with pytest.raises(UserError, match=r"list\.csv cannot be read as a table \(.*UTF8"):
        list_table(folder / "list.csv")
    path = table(folder, "path,label\ncat/a.png,x\n")
    with pytest.raises(UserError, match="columns must name those of path, label and split"):
        list_table(path, ("path", "label"))
    with pytest.raises(UserError, match=r"list\.csv has no splits: leave split out"):
        from_table(path, split="train")
    path = table(folder, "path,label,split\ncat/a.png,x,train\n")
    with pytest.raises(UserError, match=r"unknown split of .* 'trian'\. Did you mean 'train'"):
        from_table(path, split="trian")


def test_files_that_a_table_names_in_vain_are_bad_pictures(folder, capsys):
    path = table(folder, "path,label\ncat/a.png,x\ngone.png,x\n")
    with pytest.raises(BadPictures, match=r"^/.*/gone\.png is not there: put it back, or take it"):
        from_table(path)
    assert len(from_table(path, on_bad="skip")) == 1
    assert "skipped 1 of 2 pictures" in capsys.readouterr().err


# Pictures without labels


def test_trees_patterns_files_and_lists(folder, monkeypatch):
    (folder / "Thumbs.db").write_bytes(b"no picture")
    (folder / ".hidden.png").write_bytes(b"no picture")
    everything = [
        str(folder / p) for p in ("cat/a.png", "cat/b.png", "cat/more/c.png", "dog/a.png")
    ]
    assert list_pictures(folder) == cj.data.pictures(str(folder)) == everything
    assert list_pictures(folder / "**" / "*.png") == everything
    assert list_pictures(folder / "*" / "a.*") == [everything[0], everything[3]]
    assert list_pictures(everything[1]) == [everything[1]]
    assert list_pictures([everything[3], folder / "cat"]) == [everything[3], *everything[:3]]
    monkeypatch.chdir(folder)
    assert list_pictures("dog") == [everything[3]]
    for nothing, message in (
        ("owl", "no file or folder owl"),
        ("*.jpg", r"\*\.jpg holds no pictures"),
        (["dog", "cat/?.png"], r"no file or folder cat/\?\.png \(in a list, each item is a file"),
    ):
        with pytest.raises(UserError, match=message):
            list_pictures(nothing)


def test_pictures_without_labels_are_a_data_set(folder):
    dataset = cj.data.from_pictures(folder, size=2)
    assert dataset.labels is None and dataset.images.shape == (4, 2, 2, 3)
    assert dataset.files == tuple(list_pictures(folder))
    loaded = cj.data.load({"source": "pictures", "path": str(folder), "size": 2})
    assert loaded.fingerprint() == dataset.fingerprint()


# Hugging Face


def test_without_datasets_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "state.json").write_text("{}")
    for function in (list_huggingface, cj.data.from_huggingface):
        with pytest.raises(UserError, match=r"run pip install 'compat_jax\[huggingface\]'"):
            function(tmp_path)


def test_class_folders_per_split_are_read_without_datasets(folder):
    parts = folder.parent / "parts"
    for part in ("train", "test"):
        shutil.copytree(folder, parts / part)
    dataset = cj.data.from_huggingface(parts, split="test")
    assert dataset.class_names == ("cat", "dog") and len(dataset) == 4
    assert all("/test/" in file for file in dataset.files)
    assert len(list_huggingface(folder)) == 4


@pytest.fixture
def saved(folder):
    """A data set of two splits, as `save_to_disk` leaves it: the pictures are inside."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["owl", "ant"])}
    )
    files = [str(folder / p) for p in ("cat/a.png", "cat/b.png", "dog/a.png")]
    split = datasets.Dataset.from_dict({"image": files, "label": [1, 0, 1]}, features=features)
    datasets.DatasetDict({"train": split, "test": split.select([2])}).save_to_disk(folder / "saved")
    return folder / "saved"


def test_a_saved_data_set_is_read(saved):
    for in_memory in (True, False):
        dataset = cj.data.from_huggingface(saved, split="train", in_memory=in_memory)
        assert dataset.class_names == ("ant", "owl") and dataset.labels.tolist() == [0, 1, 0]
        assert np.asarray(dataset.images)[:, 0, 0, 0].tolist() == [1, 0, 3]
        assert len(dataset.digests) == 3
    first = cj.data.from_huggingface(saved, split="train", size=2, classes=(0, 1), per_class=1)
    assert first.class_names == ("ant",) and first.images.shape == (1, 2, 2, 3)
    with pytest.raises(UserError, match=r"unknown split of .* 'tests'\. Did you mean 'test'"):
        cj.data.from_huggingface(saved, split="tests")
    with pytest.raises(UserError, match="holds the pictures themselves, not their files: read it"):
        list_huggingface(saved)


def test_folders_that_datasets_cannot_open(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be opened by `datasets`"):
        cj.data.from_huggingface(tmp_path)
