"""From files to features: every kind of picture, one or many, and the program that writes them."""

import dataclasses
import io
import json
import os
import shutil

import drawn_photos
import jax.numpy as jnp
import numpy as np
import programs
import pytest
import tiny
from PIL import Image

from compat_jax import embed, features
from compat_jax import mesh as meshes
from compat_jax.chain import Chain
from compat_jax.data import Preparation, from_arrays, from_folder
from compat_jax.data.listing import list_pictures
from compat_jax.embedding_job import EmbeddingJob
from compat_jax.enlarge import enlarge, enlarge_features
from compat_jax.errors import Stopped, UserError
from compat_jax.features_file import Features, made_by, read_features, write_features
from compat_jax.mesh import shard_batch as place
from compat_jax.retrieval import Index

PREPARATION = Preparation(tiny.SIZE)


@pytest.fixture(scope="module")
def version():
    """A version whose record says how pictures become 8 x 8."""
    return tiny.version(preparation=PREPARATION.describe())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Drawn photos of two classes."""
    root = tmp_path_factory.mktemp("photos")
    drawn_photos.draw(root, ["pear", "plum"], 8)
    return root


@pytest.fixture(scope="module")
def expected(version, folder):
    """Features by a path of its own: Pillow to prepare, the plain network, NumPy to normalise."""
    files = list_pictures(str(folder))
    pixels = np.stack([PREPARATION(file) for file in files]).astype(np.float32) / 255
    mean, std = (np.float32(x) for x in (version.record.mean, version.record.std))
    images = (pixels - mean) / std
    rows = np.asarray(version.embedder().apply(version.variables, images, train=False).features)
    return files, rows / np.linalg.norm(rows, axis=1, keepdims=True)


def opened(file):
    """A PIL image."""
    with Image.open(file) as image:
        image.load()
        return image


def content(file):
    """The bytes of a file."""
    with open(file, "rb") as stream:
        return stream.read()


KINDS = {
    "a list of paths": lambda files: files,
    "paths as objects": lambda files: tuple(map(os.fspath, files)),
    "PIL images": lambda files: [opened(f) for f in files],
    "bytes": lambda files: [content(f) for f in files],
    "a generator": lambda files: (f for f in files),
    "arrays of any size": lambda files: [np.asarray(opened(f).convert("RGB")) for f in files[:1]],
    "prepared pixels": lambda files: np.stack([PREPARATION(f) for f in files]),
    "prepared pixels one by one": lambda files: [PREPARATION(f) for f in files],
    "a data set": lambda files: from_arrays(np.stack([PREPARATION(f) for f in files])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_has_the_same_features(version, expected, kind):
    files, rows = expected
    found = version.embed(KINDS[kind](files))
    assert found.dtype == np.float32 and found.shape[1] == rows.shape[1]
    np.testing.assert_allclose(found, rows[: len(found)], atol=2e-5)


def test_a_folder_and_a_pattern_are_lists_of_their_pictures(version, folder, expected):
    np.testing.assert_allclose(version.embed(str(folder)), expected[1], atol=2e-5)
    np.testing.assert_allclose(version.embed(folder / "p*" / "*"), expected[1], atol=2e-5)
    several = [folder / "pear", str(folder / "plum"), opened(expected[0][0])]
    rows = np.r_[: 8 + len(list_pictures(several[1])), 0]
    for given in (several, iter(several)):
        files = [*list_pictures(several[:2]), expected[0][0]]
        want = version.embed(files)
        assert len(want) == len(rows)
        np.testing.assert_allclose(version.embed(given), want, atol=1e-6)


def test_a_name_with_the_signs_of_a_pattern_is_a_file(version, folder, tmp_path, monkeypatch):
    strange = tmp_path / "pear [1]*.jpg"
    strange.write_bytes(content(folder / "pear" / "000.jpg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    want = version.embed(folder / "pear" / "000.jpg")
    for given in (strange, [strange], ["~/pear [1]*.jpg"], iter(["~/pear [1]*.jpg"])):
        np.testing.assert_array_equal(version.embed(given), want)


@pytest.mark.parametrize("form", [list, iter, tuple])
def test_a_path_of_a_list_whose_file_vanished_stands_for_no_other_files(
    version, folder, tmp_path, form
):
    files = [shutil.copy(folder / "pear" / f"00{i}.jpg", tmp_path / f"a{i}.jpg") for i in (0, 1)]
    vanished = tmp_path / "a[01].jpg"
    message = r"no file or folder .*a\[01\]\.jpg \(in a list, each item is a file or a folder\)"
    with pytest.raises(UserError, match=message):
        version.embed(form([files[0], vanished, files[1]]))
    with pytest.raises(UserError, match=message):
        Index(version, form([files[0], str(vanished)]))
    assert len(version.embed(vanished)) == 2  # given alone, it stands for a set of pictures


def test_one_picture_gives_one_row(version, expected):
    files, rows = expected
    array = np.asarray(opened(files[0]).convert("RGB"))
    for one in (files[0], opened(files[0]), content(files[0]), array):
        assert version.embed(one).shape == (1, rows.shape[1])
    grey = array[..., 0]
    np.testing.assert_array_equal(version.embed(grey), version.embed(grey[..., None]))


def test_none_at_all_is_an_empty_answer(version):
    assert version.embed([]).shape == (0, tiny.K - 1)
    assert version.embed(np.zeros((0, 8, 8, 3), np.uint8)).shape == (0, tiny.K - 1)


@pytest.mark.parametrize("count", [1, 2, 8, 9, 16])
def test_batches_change_no_feature(version, expected, count):
    files, rows = expected
    found = version.embed(files[:count], batch_size=8)
    np.testing.assert_allclose(found, rows[:count], atol=2e-5)


@pytest.mark.parametrize("size", [0, -1, 2.5, "8", True, None])
def test_a_batch_size_that_is_no_number_of_pictures_is_refused(version, expected, size):
    files, _ = expected
    for pictures in (files, np.stack([PREPARATION(file) for file in files])):
        with pytest.raises(UserError, match="batch_size must be") as refused:
            version.embed(pictures, batch_size=size)
        assert refused.value.argument == "batch_size"
        with pytest.raises(UserError, match="batch_size must be"):
            Index(version, pictures, batch_size=size)


def test_pictures_are_brought_to_the_size_of_the_version_alone(version, folder):
    for ask in (version.embed, lambda *given, **more: Index(version, *given, **more)):
        with pytest.raises(UserError, match=r"size=16, but the version embeds pictures of 8 x 8"):
            ask(folder, preparation=Preparation(16))
    assert version.embed(folder, preparation=Preparation(8, "squash")).shape == (16, tiny.K - 1)


def test_large_pictures_go_in_fewer_on_a_cpu_which_changes_no_feature(monkeypatch):
    mesh = tiny.one_device()
    for side, asked, taken in ((32, 256, 256), (224, 256, 8), (224, 4, 4), (4096, 256, 1)):
        assert features.at_once(mesh, asked, (side, side, 3)) == taken
    version, sizes = tiny.version(image_shape=(224, 224, 3)), []
    pictures = np.random.default_rng(0).integers(0, 256, (20, 224, 224, 3), np.uint8)
    monkeypatch.setattr(meshes, "shard_batch", lambda x, m: (sizes.append(len(x)), place(x, m))[1])
    found = version.embed(pictures)
    assert sizes == [8, 8, 8]
    monkeypatch.setattr(features, "_PIXELS_ON_CPU", 1 << 30)
    np.testing.assert_allclose(found, version.embed(pictures), atol=1e-6)
    assert sizes[3:] == [64]


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (3, "pictures are paths, PIL images or uint8 arrays, one or many of them, got 3"),
        (np.uint8(3), r"pictures are paths, .* got np\.uint8\(3\)"),
        (np.array(3, np.uint8), r"pictures are paths, .* got array\(3, dtype=uint8\)"),
        (jnp.uint8(3), "pictures are paths"),
        ({"a": 1}, "pictures are paths"),
        (
            [3],
            "picture 0 must be a path, the bytes of a file, a PIL image or a uint8 array, got int",
        ),
        ([np.zeros((4, 4, 3))], "picture 0 must be uint8 in 0..255, got float64"),
        (
            np.zeros((2, 8, 8, 3), np.float32),
            r"embeds uint8 images of shape \[n, 8, 8, 3\], got float32",
        ),
        (["/nowhere.jpg"], r"/nowhere\.jpg"),
    ],
)
def test_what_is_no_picture_is_refused(version, pictures, message):
    with pytest.raises(UserError, match=message):
        version.embed(pictures)


def test_a_version_that_does_not_say_how_asks(expected):
    silent, files = tiny.version(), expected[0]
    for pictures in (files, np.zeros((2, 9, 9, 3), np.uint8)):
        with pytest.raises(
            UserError, match=r"does not say how .*give preparation=Preparation\(size"
        ):
            silent.embed(pictures)
    given = silent.embed(files, preparation=PREPARATION)
    np.testing.assert_allclose(given, expected[1], atol=2e-5)


def test_files_of_the_versions_size_need_no_preparation(tmp_path):
    """As drawn and downloaded data sets have them, written to files."""
    silent, files = tiny.version(), []
    pixels = np.random.default_rng(0).integers(0, 256, (2, tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(picture).save(files[-1])
    np.testing.assert_array_equal(silent.embed(files), silent.embed(pixels))
    np.testing.assert_array_equal(silent.embed(Image.open(files[0])), silent.embed(pixels[0]))


def test_a_gallery_of_files_needs_no_labels(version, expected):
    files, _ = expected
    index = Index(version, files)
    scores, rows = index.search(version, files[3], k=1)
    assert rows.tolist() == [[3]]
    np.testing.assert_allclose(scores, 1, atol=1e-5)


def test_from_folder_reads_what_embed_reads(version, folder):
    data = from_folder(folder, size=tiny.SIZE)
    np.testing.assert_array_equal(version.embed(data), embed(version, list(data.files)))


def test_pictures_of_a_data_set_that_was_prepared_otherwise_are_read_again(
    version, folder, expected
):
    for settings in ({"size": 12}, {"size": tiny.SIZE, "resize": "squash"}):
        data = from_folder(folder, **settings)
        np.testing.assert_allclose(version.embed(data), expected[1], atol=2e-5)
    nameless = dataclasses.replace(from_folder(folder, size=12), files=None, digests=None)
    with pytest.raises(UserError, match="brought to 12 px, the version was trained on 8 px"):
        version.embed(nameless)


def test_versions_and_data_sets_print_in_a_line(version, folder):
    assert len(repr(version)) < 3000 and "kernel" not in repr(version)
    assert repr(from_folder(folder, size=8)) == "Dataset(16 images of 8 x 8 x 3, 2 classes)"


# The program's work: parts, resuming, shares


@pytest.mark.parametrize("name", ["features.npz", "features.parquet"])
def test_a_job_writes_features_and_paths(version, expected, tmp_path, name):
    files, rows = expected
    written = EmbeddingJob(version, files, tmp_path / name, part=5).run()
    found = read_features(tmp_path / name)
    assert found.paths == written.paths == tuple(files)
    np.testing.assert_array_equal(found.features, written.features)
    np.testing.assert_allclose(found.features, rows, atol=2e-5)
    assert found.made_by["sha256"] == version.sha256
    assert os.listdir(tmp_path) == [name]


def test_a_stopped_job_resumes_with_the_parts_it_has(version, expected, tmp_path, monkeypatch):
    files, _ = expected
    answers = iter([False, False, True])
    job = EmbeddingJob(version, files, tmp_path / "f.npz", part=4)
    with pytest.raises(Stopped):
        job.run(should_stop=lambda: next(answers))
    embedded = []
    original = type(version).embed
    monkeypatch.setattr(
        type(version),
        "embed",
        lambda self, pictures, **more: (
            embedded.append(len(pictures)) or original(self, pictures, **more)
        ),
    )
    whole = EmbeddingJob(version, files, tmp_path / "f.npz", part=4).run()
    assert sum(embedded) == len(files) - 8
    again = EmbeddingJob(version, files, tmp_path / "f.npz", part=4).run()
    assert sum(embedded) == len(files) - 8  # nothing is left to do
    np.testing.assert_array_equal(again.features, whole.features)


def test_shares_of_several_hosts_make_one_file(version, expected, tmp_path):
    files, rows = expected
    jobs = [EmbeddingJob(version, files, tmp_path / "f.npz", part=3, shard=(i, 2)) for i in (0, 1)]
    assert jobs[0].run() is None and "the last host writes" in jobs[0].sentence(None)
    np.testing.assert_allclose(jobs[1].run().features, rows, atol=2e-5)


def test_features_of_another_list_are_not_overwritten(version, expected, tmp_path):
    files, _ = expected
    EmbeddingJob(version, files, tmp_path / "f.npz").run()
    with pytest.raises(UserError, match="has features of other pictures or of another version"):
        EmbeddingJob(version, files[:4], tmp_path / "f.npz").run()


def test_bad_pictures_stop_all_at_once_or_are_skipped(version, expected, tmp_path):
    files = list(expected[0])
    for name in ("one.jpg", "two.jpg"):
        (tmp_path / name).write_bytes(b"no picture")
        files.insert(3, str(tmp_path / name))
    with pytest.raises(UserError, match=r"2 pictures cannot be read: .*two\.jpg.*one\.jpg"):
        EmbeddingJob(version, files, tmp_path / "f.npz", part=4).run()
    job = EmbeddingJob(version, files, tmp_path / "f.npz", part=4, on_bad="skip")
    done = job.run()
    assert len(done.paths) == len(files) - 2
    assert "2 files that are no pictures left out" in job.sentence(done)
    np.testing.assert_allclose(done.features, expected[1], atol=2e-5)


def test_new_pictures_are_never_taken_for_bad_ones(version, expected, tmp_path):
    files, _ = expected
    out, skipping = tmp_path / "f.npz", {"on_bad": "skip"}
    EmbeddingJob(version, files[:4], out, **skipping).run()
    with pytest.raises(UserError, match="has features of other pictures"):
        EmbeddingJob(version, files, out, **skipping).run()
    # As an earlier release wrote it: what is missing must be no picture.
    found = read_features(out)
    write_features(out, dataclasses.replace(found, made_by=made_by(version)))
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    for listed in (files[:4], [files[0], str(bad), *files[1:4]]):
        assert EmbeddingJob(version, listed, out, **skipping).run().paths == tuple(files[:4])
    with pytest.raises(UserError, match="has features of other pictures"):
        EmbeddingJob(version, files[:5], out, **skipping).run()


def test_a_picture_that_changed_is_not_answered_with_its_old_feature(version, expected, tmp_path):
    files, out = [str(tmp_path / f"{i}.png") for i in range(4)], tmp_path / "f.npz"
    for file in files:
        Image.new("RGB", (30, 40), "red").save(file)
    answers = iter([False, True])
    with pytest.raises(Stopped):
        EmbeddingJob(version, files, out, part=2).run(should_stop=lambda: next(answers))
    Image.new("RGB", (30, 40), "blue").save(files[0])  # between a kill and the next run
    found = EmbeddingJob(version, files, out, part=2).run()
    np.testing.assert_allclose(found.features, version.embed(files), atol=2e-5)
    assert EmbeddingJob(version, files, out, part=4).run().paths == found.paths
    with pytest.raises(UserError, match="were computed in float32, not in bfloat16"):
        EmbeddingJob(version, files, out).run(dtype="bfloat16")
    Image.new("RGB", (31, 40), "green").save(files[1])  # after all were embedded
    with pytest.raises(
        UserError, match=r"of pictures that have changed since: choose another file"
    ):
        EmbeddingJob(version, files, out).run()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard": (5, 2)}, "a shard is"),
        ({"shard": (-1, 2)}, "a shard is"),
        ({"part": 0}, "part must be at least 1 and at most"),
        ({"on_bad": "Skip"}, "unknown on_bad 'Skip'"),
        ({"files": ["/a/\udcff.jpg"]}, "is not UTF-8, which .parquet cannot hold"),
    ],
)
def test_wrong_settings_of_a_job_are_refused_before_it_runs(version, tmp_path, settings, message):
    given = {"files": ["/a.jpg"], "out": tmp_path / "f.parquet", **settings}
    with pytest.raises(UserError, match=message):
        EmbeddingJob(version, **given)


@pytest.mark.parametrize(
    ("text", "message"), [(b"", "holds no features"), (b"PK\x03\x04 broken", "holds no features")]
)
def test_a_damaged_file_of_features_is_refused(tmp_path, text, message):
    for name in ("f.npz", "f.parquet"):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(UserError, match=message):
            read_features(tmp_path / name)
    buffer = io.BytesIO()
    np.savez(buffer, features=np.zeros((2, 3)), paths=np.array(["a"]), made_by=np.array("{}"))
    (tmp_path / "g.npz").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match=r"\(2, 3\) features of 1 paths"):
        read_features(tmp_path / "g.npz")


def test_a_file_of_another_suffix_is_refused_by_what_it_was_for(tmp_path, version):
    with pytest.raises(UserError, match=r"are read from .npz or .parquet, got 'mk.py'") as caught:
        read_features(tmp_path / "mk.py")
    assert caught.value.argument == "features"
    with pytest.raises(UserError, match=r"are written to .npz or .parquet, got 'f'") as caught:
        EmbeddingJob(version, ["/a.jpg"], tmp_path / "f")
    assert caught.value.argument == "out"


@pytest.fixture(scope="module")
def chain(version, tmp_path_factory):
    """A chain of one version that a program can open."""
    record = dataclasses.replace(version.record, task=0, backbone="resnet_small")
    record = dataclasses.replace(record, backbone_arguments={"width": 4})
    chain = Chain(tmp_path_factory.mktemp("version") / "chain")
    chain.add(tiny.variables(record), record)
    return chain


def said_by_embed(chain, pictures, out, *more):
    """Run the command; return what it prints."""
    given = (f"--chain={chain.path}", f"--pictures={pictures}", f"--out={out}", "--noprogress")
    code, said, err = programs.call("embed", *given, *more)
    assert (code, err) == (0, ""), err
    return said


def test_the_command_skips_pictures_however_their_paths_are_written(chain, folder, tmp_path):
    files, known, out = list_pictures(folder), tmp_path / "known.npz", tmp_path / "new.npz"
    # As of an earlier release, which kept the paths of a table as they were written.
    names = [os.path.relpath(file, folder) for file in files]
    rows = np.eye(4, tiny.K - 1, dtype=np.float32)
    paths = tuple(
        f"{folder}/{dots}/{name}" for dots in (".", f"../{folder.name}") for name in names[:2]
    )
    write_features(known, Features(rows, paths, made_by(chain[0])))
    table = folder / "list.csv"
    table.write_text("path\n" + "".join(f"./{name}\n" for name in [*names, names[0], names[5]]))
    try:
        said = said_by_embed(chain, table, out, f"--skip={known}")
    finally:
        table.unlink()
    assert said.splitlines() == [
        "2 of 18 paths left out: their pictures are listed already",
        "2 of 16 pictures left out by --skip",
        f"14 features of 15 numbers by version 0 in {out}",
    ]
    assert read_features(out).paths == tuple(files[2:])


@pytest.mark.slow
def test_the_command_writes_features(chain, folder, tmp_path):
    out = tmp_path / "f.npz"
    said = said_by_embed(chain, folder, out)
    assert said == f"16 features of 15 numbers by version 0 in {out}\n"
    np.testing.assert_allclose(read_features(out).features, chain[0].embed(str(folder)), atol=2e-5)


# A larger simplex


def test_an_enlarged_chain_searches_what_the_old_one_embedded(version, expected, tmp_path):
    files, _ = expected
    old, new = Chain(tmp_path / "old"), Chain(tmp_path / "new")
    record = dataclasses.replace(version.record, task=0, class_names=("a", "b"))
    old.add(version.variables, record)
    old.add(tiny.variables(record, seed=1), dataclasses.replace(record, task=1))
    enlarge(old, new, 40)
    enlarge(old, new, 40)  # again, as after a kill
    assert new.record(1).class_names == ("a", "b") and new.record(1).num_prototypes == 40
    moved = enlarge_features(old[0].embed(files), old.record(0), 40)
    np.testing.assert_allclose(new[0].embed(files), moved, atol=2e-5)
    scores_old = old[1].embed(files) @ old[0].embed(files).T
    np.testing.assert_allclose(new[1].embed(files) @ moved.T, scores_old, atol=5e-5)
    assert json.loads(json.dumps(dict(new.record(0).learnt)))["enlarged_from"] == tiny.K


def test_a_chain_is_enlarged_only_upwards_and_once(tmp_path):
    old, new = Chain(tmp_path / "old"), Chain(tmp_path / "new")
    record = tiny.record(task=0)
    old.add(tiny.variables(record), record)
    with pytest.raises(UserError, match="num_prototypes can only grow: the chain has 16, got 16"):
        enlarge(old, new, 16)
    enlarge(old, new, 20)
    with pytest.raises(UserError, match="there is another chain"):
        enlarge(old, new, 24)
    er = Chain(tmp_path / "er")
    record = tiny.record(method="er", head_classes=2, feature_size=16)
    er.add(tiny.variables(record), record)
    with pytest.raises(UserError, match="learnable head, which grows by itself"):
        enlarge(er, Chain(tmp_path / "er2"), 32)
