"""Paths: one function decides what a path is; files appear whole or not at all."""

import logging
import os
import shutil
from pathlib import Path

import pytest
import tiny
from PIL import Image
from small_chain import assert_same_bits, small

import compat_jax as cj
from compat_jax import files
from compat_jax.chain import Chain
from compat_jax.data.glyphs import class_names
from compat_jax.errors import UserError
from compat_jax.training.workdir import Workdir


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, and another current folder that stays empty."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert not list((tmp_path / "here").iterdir())


def test_the_home_folder_is_meant_the_same_way_everywhere(home):
    assert str(files.absolute("~")) == str(home)
    assert str(files.absolute("~/a/b")) == str(home / "a" / "b") == str(files.storage("~/a/b"))
    assert str(Chain("~/chain").path) == str(home / "chain")
    workdir = Workdir(Path("~/run"))
    assert str(workdir.path) == str(home / "run")
    assert str(workdir.chain.path) == str(home / "run" / "chain")
    assert str(workdir.log.path) == str(home / "run" / "log.jsonl")
    workdir.claim({"seed": 0})
    assert (home / "run" / "run.json").exists()


def test_the_cache_may_be_in_the_home_folder(cache_folder, home, monkeypatch):
    class_names()  # found before, or chosen now
    (home / "cache").mkdir()
    for path in Path(cache_folder).rglob("classes-*"):
        place = home / "cache" / path.relative_to(cache_folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    monkeypatch.setenv("COMPAT_JAX_CACHE", "~/cache")
    spec = {"source": "glyphs", "classes": (0, 1), "per_class": 1, "look": "print", "seed": 0}
    cj.data.load(spec)
    (made,) = (home / "cache").rglob("images-*")
    assert made.stat().st_size > 0


def test_a_file_has_one_path_however_it_is_written(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    for written in ("a/./b/c", "a//b/c", "a/b/../b/c", "a/no/../../a/b/./x/../c", "./a/b/c/"):
        assert str(files.absolute(f"{tmp_path}/{written}")) == f"{tmp_path}/a/b/c", written
    assert files.plain("/../..//a/..b/...") == "/a/..b/..."
    assert files.plain("/a/..") == "/"
    for kept in ("link/../c", "link/../../c", "link/c"):  # out of the folder that the link names
        assert files.plain(f"{tmp_path}/{kept}") == f"{tmp_path}/{kept}"
    for kept in ("gs://shop/./a/../b", "s3://shop//a", "a/../b", ""):
        assert files.plain(kept) == kept


def test_only_a_leading_tilde_is_the_home_folder(home):
    assert str(files.absolute("a/~/b")) == f"{os.getcwd()}/a/~/b"
    assert str(files.absolute("./~a")) == f"{os.getcwd()}/~a"
    for name in ("~no_such_user_here", "~no_such_user_here/runs"):
        with pytest.raises(UserError, match=rf"no home folder for '{name}': write the path from /"):
            files.absolute(name)


def test_a_path_is_absolute_whatever_folder_comes_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in ("runs/a", Path("runs/a"), files.epath.Path("runs/a"), f"{tmp_path}/runs/a"):
        assert str(files.absolute(given)) == f"{tmp_path}/runs/a"


PLACES = {
    "path": files.absolute,
    "storage": files.storage,
    "chain": Chain,
    "workdir": Workdir,
    "folder of pictures": cj.data.from_folder,
    "run": lambda path: cj.train(tiny.run(), tiny.dataset(), path, session=tiny.session()),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "a path cannot be empty or hold a NUL: ''"),
        ("runs\0a", r"a path cannot be empty or hold a NUL: 'runs\\x00a'"),
        ("s4://bucket/a", r"unknown kind of address 's4://'\. Did you mean 's3://'\? Valid: gs:"),
        ("http://host/a", r"unknown kind of address 'http://'\..* Valid: gs://, s3://"),
        ("file:///a", r"unknown kind of address 'file://'\..* Valid: gs://, s3://"),
        ("GS://bucket/a", r"unknown kind of address 'GS://'\..* Valid: gs://, s3://"),
        ("~no_such_user_here/a", "there is no home folder for"),
    ],
)
def test_what_is_no_path_is_refused_everywhere(home, place, path, message):
    with pytest.raises(UserError, match=message):
        PLACES[place](path)


@pytest.mark.parametrize("place", ["storage", "chain", "workdir", "run"])
@pytest.mark.parametrize("name", ["a[1]", "a]", "[a", "a*", "what?", "{a}", "a{", "a}", "a\\b"])
def test_a_path_that_checkpoints_take_for_a_pattern_is_refused(tmp_path, place, name):
    for path in (tmp_path / name, tmp_path / name / "below"):
        with pytest.raises(
            UserError, match=r"has .* in it, which checkpoints cannot be stored under"
        ):
            PLACES[place](path)
    assert not list(tmp_path.iterdir())


def test_the_signs_in_question_are_named():
    with pytest.raises(
        UserError, match=r"/a\[1\]\* has \* and \[ and \] in it, .*: use another fol"
    ):
        files.storage("/a[1]*")


def test_a_path_that_is_not_utf_8_holds_pictures_but_no_chain(tmp_path):
    path = tmp_path / os.fsdecode(b"a\xff")
    (path / "cat").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(path / "cat" / "a.png")
    assert len(cj.data.from_folder(path)) == 1
    for place in (Chain, Workdir):
        with pytest.raises(
            UserError, match=r"^b'/.*/a\\xff' is not UTF-8, so checkpoints cannot be"
        ):
            place(path)


@pytest.mark.parametrize(
    "name", ["a b", "猫 (1)", "a'b\"c$d&e;f#g%h", "-a", ".a", "a~", "a%2Fb", "a:b"]
)
def test_a_chain_opens_under_any_other_name(tmp_path, name):
    chain = Chain(tmp_path / name)
    chain.add(small(1), tiny.record())
    assert_same_bits(Chain(str(tmp_path / name))[0].variables, small(1))


# Files


def test_a_sealed_file_is_read_under_its_key_only(tmp_path, caplog):
    path = files.absolute(tmp_path / "new" / "file")
    assert files.read_sealed(path, "key") is None and not caplog.records
    files.write_sealed(path, b"content", "key")
    assert files.read_sealed(path, "key") == b"content"
    whole = path.read_bytes()
    broken = (whole[:-1], whole + b"x", b"", whole[:20], whole[:-1] + b"T", b"x" + whole[1:])
    for content, key in [(whole, "yek"), *((b, "key") for b in broken)]:
        path.write_bytes(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert files.read_sealed(path, key) is None
        (record,) = caplog.records
        assert record.getMessage() == f"{path} was altered or cut off: made again"


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = files.absolute(tmp_path / "file")
    files.write_bytes(path, b"first")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(path), "replace", killed)
        files.write_bytes(path, b"second")
    assert path.read_bytes() == b"first" and [p.name for p in tmp_path.iterdir()] == ["file"]
    files.write_bytes(path, b"third")
    assert path.read_bytes() == b"third" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_bucket_without_credentials_is_refused_at_once(monkeypatch, tmp_path):
    pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    files.prepare_buckets.cache_clear()  # another test may have been let in
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))

    def no_metadata_server(address, timeout):
        assert address == ("metadata.google.internal", 80) and timeout <= 2
        raise TimeoutError

    monkeypatch.setattr(files.socket, "create_connection", no_metadata_server)
    with pytest.raises(
        UserError, match="needs credentials, and this machine has none: run `gcloud"
    ):
        files.absolute("gs://bucket/chain")
    (tmp_path / "application_default_credentials.json").touch()
    assert str(files.absolute("gs://bucket/chain")) == "gs://bucket/chain"
    files.prepare_buckets.cache_clear()
