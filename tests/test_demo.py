"""The page of an old gallery: what it shows at every share, what it answers, what it refuses."""

import contextlib
import http.client
import importlib
import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import browser
import numpy as np
import pytest
import small_gallery
import tiny
import uvicorn
from PIL import Image

from compat_jax.chain import Chain
from compat_jax.demo import Limits, Pick, application, in_memory, picks_of, prepare
from compat_jax.demo.showcase import NEAREST, SHARES, nearest
from compat_jax.errors import UserError
from compat_jax.gallery.gallery import Gallery
from compat_jax.gallery.memory import MemoryStore

ROOT = Path(__file__).parents[1]
LIMITS = Limits(size=200_000, pixels=10_000)
needs_browser = pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A chain and photos."""
    root = tmp_path_factory.mktemp("demo")
    small_gallery.chain(root / "chain")
    small_gallery.photos(root / "photos")
    small_gallery.drawn_photos.draw(root / "asked", small_gallery.CLASSES, 1, first=40)
    return root


@pytest.fixture(scope="module")
def gallery(folder):
    """A gallery that version 0 embedded, of which version 1 has embedded a quarter again."""
    made = small_gallery.made(Chain(folder / "chain"), folder / "photos")
    made.switch(1)
    made.backfill(until=0.25)
    return made


@pytest.fixture(scope="module")
def shown(gallery):
    """That gallery on the way to version 1."""
    return prepare(gallery, new=1)


@pytest.fixture(scope="module")
def whole(gallery):
    """Galleries of the same pictures that version 0 and version 1 embedded whole."""
    root = gallery.originals.root
    return [small_gallery.made(gallery.chain, root, version=number) for number in (0, 1)]


@pytest.fixture(scope="module")
def query(folder):
    """A picture that is not in the gallery."""
    return folder / "asked" / "pear" / "040.jpg"


@contextlib.contextmanager
def served(app):
    """Serve an application in a thread, yield its port."""
    config = uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_level="warning")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def port(shown):
    with served(application(shown, limits=LIMITS)) as port:
        yield port


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self):
        return json.loads(self.body)


def call(port, path, body=None, method=None, **headers) -> Reply:
    """One request."""
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        if body is not None:
            headers = {"Content-Type": "application/octet-stream", **headers}
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        line.request(method or ("GET" if body is None else "POST"), path, body, headers)
        answer = line.getresponse()
        return Reply(answer.status, answer.headers, answer.read())
    finally:
        line.close()


# What is shown


def test_nearest_rows_are_those_of_a_sort():
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(2, 30)).round(1).astype(np.float32)
    before[3] = after[3] = -np.inf
    cuts = [0, 7, 30]
    rows, scores = nearest(before, after, cuts, 5)
    for cut, found, values in zip(cuts, rows, scores, strict=True):
        mixed = np.where(np.arange(30) < cut, after, before)
        assert 3 not in found
        np.testing.assert_array_equal(values, -np.sort(-mixed)[:5])
        np.testing.assert_array_equal(mixed[found], values)
    rows, scores = nearest(before[:4], after[:4], [4], 5)
    assert sorted(rows[0].tolist()) == [-1, -1, 0, 1, 2] and np.isinf(scores[0, 3:]).all()


@pytest.mark.parametrize("version", [0, 1])
def test_every_share_is_what_a_gallery_at_that_share_answers(shown, gallery, whole, query, version):
    share = SHARES.index(0.25)
    assert shown.renewed == shown.cuts[share] == 3
    [found] = [one for one in shown.ask(query) if one.version == version]
    for place, one in ((0, whole[0]), (share, gallery), (-1, whole[1])):
        expected = one.search(query, NEAREST, version=version)
        assert [shown.rows.keys[row] for row in found.rows[place]] == expected.keys[0]
        np.testing.assert_allclose(found.scores[place], expected.scores[0], atol=1e-5)
        answered = [1 if row < shown.cuts[place] else 0 for row in found.rows[place]]
        assert answered == expected.versions[0].tolist()


def test_rows_are_in_the_order_in_which_a_backfill_takes_them(shown, gallery):
    copy = small_gallery.made(gallery.chain, gallery.originals.root)
    copy.switch(1)
    copy.backfill(until=0.5)
    done = {key for key, row in small_gallery.content(copy.store).items() if row[0] == 1}
    assert done == set(shown.rows.keys[: shown.cuts[50]])


def test_the_store_is_not_written_to(gallery, query):
    before, manifest = small_gallery.content(gallery.store), gallery.store.manifest()
    prepare(gallery, new=2).ask(query)
    after = small_gallery.content(gallery.store)
    assert manifest == gallery.store.manifest() and before.keys() == after.keys()
    assert all(np.array_equal(before[key][4], after[key][4]) for key in before)


def test_the_curves_are_the_share_of_rows_that_find_their_class(shown):
    labels = np.array([shown.label(row) for row in range(len(shown.rows))])
    mixed = shown.before.copy()
    mixed[: shown.cuts[50]] = shown.after[: shown.cuts[50]]
    for features, found in (
        (shown.before, shown.quality.old),
        (shown.after, shown.quality.new),
    ):
        scores = features @ mixed.T
        np.fill_diagonal(scores, -2)
        np.testing.assert_allclose(found[50], (labels[scores.argmax(axis=1)] == labels).mean())
    assert shown.quality.queries == small_gallery.COUNT


def test_a_row_is_no_answer_to_its_own_picture(shown):
    for answer in shown.ask(shown.picture(5)):
        assert 5 not in answer.rows and (answer.rows >= 0).all()


def test_a_gallery_that_was_embedded_again_whole_goes_back_to_zero(folder, query):
    made = small_gallery.made(Chain(folder / "chain"), folder / "photos")
    made.switch(2)
    made.backfill()
    shown = prepare(made, asking=[0])
    assert (shown.old, shown.new, shown.renewed, shown.asking) == (0, 2, 12, (0,))
    expected = Chain(folder / "chain")[0].embed([shown.picture(row) for row in range(12)])
    np.testing.assert_allclose(shown.before, expected, atol=1e-5)


def test_rows_whose_pictures_are_gone_are_left_out_and_counted(tmp_path):
    photos = small_gallery.photos(tmp_path / "photos")
    made = small_gallery.made(small_gallery.chain(tmp_path / "chain"), photos)
    next(iter((photos / "plum").iterdir())).unlink()
    shown = prepare(made, sample=12)
    assert (len(shown.rows), shown.left_out, shown.total) == (11, 1, 12)
    assert len(prepare(made, sample=4).rows) + prepare(made, sample=4).left_out == 4
    (photos / "pear").rename(tmp_path / "elsewhere")
    (photos / "plum").rename(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no picture of the gallery's rows is where it was"):
        prepare(made)


def test_what_cannot_be_shown_is_refused(gallery):
    with pytest.raises(UserError, match="the old and the new version are both version 1"):
        prepare(gallery, old=1, new=1)
    empty = Gallery.create(MemoryStore(tiny.K - 1), gallery.chain, work=small_gallery.work())
    with pytest.raises(UserError, match="the gallery has no rows yet"):
        prepare(empty)


def test_drawn_images_become_a_gallery_in_memory_that_takes_any_picture(tmp_path, query):
    """Nobody says how drawn images are prepared: they have their size."""
    data = tiny.dataset(classes=4, per_class=5)
    chain = small_gallery.chain(tmp_path / "chain", seeds=(0, 1), preparation={})
    made = in_memory(chain, data, sample=12, work=small_gallery.work())
    picks = picks_of(data, 6)
    shown = prepare(made, picks=picks)
    assert len(shown.rows) == 12 and set(map(shown.label, range(12))) <= set(data.class_names)
    assert {pick.label for pick in picks[:4]} == set(data.class_names)
    assert [answer.version for answer in shown.ask(query)] == [0, 1]
    inside = data.images[[data.class_names[label] for label in data.labels].index(shown.label(0))]
    assert len(shown.ask(inside)) == 2


def test_classes_of_any_json_are_shown_as_text(folder):
    made = small_gallery.made(Chain(folder / "chain"), folder / "photos")
    photos = folder / "photos"
    made.put(photos, payload=lambda key: {"label": ["fruit", key.partition("/")[0]]})
    shown = prepare(made, old=0, new=1)
    assert {pick.label for pick in shown.picks} == {'["fruit", "pear"]', '["fruit", "plum"]'}
    assert shown.quality.queries == len(made)


def test_files_become_a_gallery_in_memory(folder):
    from compat_jax.data import from_folder

    data = from_folder(folder / "photos", size=tiny.SIZE)
    made = in_memory(Chain(folder / "chain"), data, work=small_gallery.work())
    assert len(made) == 12 and made.originals.given is None
    assert isinstance(picks_of(data)[0].picture, str)


# The server


def test_the_page_and_its_parts_load(port):
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "javascript")):
        found = call(port, path)
        assert found.status == 200 and kind in found.headers["content-type"]
        assert "default-src 'none'" in found.headers["content-security-policy"]
        assert found.headers["x-content-type-options"] == "nosniff"
    text = call(port, "/").body.decode() + call(port, "/page.js").body.decode()
    assert not re.search(r"https?://|innerHTML|\bstyle=|\bonclick=", text)


def test_it_says_what_is_shown(port, shown, folder):
    about = call(port, "/about").json()
    assert (about["old"], about["new"], about["asking"]) == (0, 1, [0, 1, 2])
    assert (about["rows"], about["renewed"], about["cuts"]) == (12, 3, shown.cuts)
    assert len(about["colours"]) == len(set(about["colours"].values())) == 2
    assert len(about["quality"]["new"]) == 101 and len(about["picks"]) == 12


def test_a_picture_that_is_sent_gets_the_answers_of_every_version_at_every_share(
    port, shown, query
):
    answer = call(port, "/answers?name=pear.jpg", query.read_bytes())
    assert answer.status == 200 and answer.headers["cache-control"] == "no-store"
    content = answer.json()
    for one, expected in zip(content["answers"], shown.ask(query), strict=True):
        assert one["version"] == expected.version and len(one["shares"]) == 101
        for found, rows in zip(one["shares"], expected.rows, strict=True):
            assert [row for row, _ in found] == rows.tolist()
        assert one["embed_ms"] > 0 and one["search_ms"] >= 0
    row = content["rows"]["0"]
    assert row == {"key": shown.rows.keys[0], "label": shown.label(0), "version": 0}


def test_a_picture_that_is_there_is_asked_with_by_its_number(port, shown):
    content = call(port, "/picks/3/answers").json()
    assert content["label"] == shown.picks[3].label
    for path in ("/picks/3.png", "/rows/3.png"):
        found = call(port, path)
        assert found.headers["content-type"] == "image/png"
        assert max(Image.open(io.BytesIO(found.body)).size) <= 192


def test_nothing_that_is_sent_is_kept(port, query, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert call(port, "/answers", noise(99, 99, "BMP")).status == 200
    assert not list(tmp_path.iterdir())


def noise(width, height, kind="PNG"):
    """The bytes of a file."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("path", "options", "status", "text"),
    [
        ("/answers?name=a%00b.txt", {"body": b"no picture"}, 415, "ab.txt is not a picture"),
        ("/answers", {"body": b"%!PS-Adobe-3.0 EPSF-3.0\n"}, 415, "The picture is not a picture"),
        ("/answers", {"body": noise(20, 20)[:600]}, 415, "is not a picture that Pillow can read"),
        ("/answers", {"body": noise(20, 20, "PPM")}, 415, "Formats: JPEG, PNG"),
        ("/answers", {"body": noise(101, 100)}, 415, "too many pixels: make it smaller (101 x"),
        ("/answers", {"body": b""}, 400, "That file is empty"),
        ("/answers", {"body": bytes(200_001)}, 413, "more than 0.2 MB. Choose a smaller one."),
        ("/answers", {"body": iter([bytes(150_000)] * 2)}, 413, "more than 0.2 MB"),
        ("/answers", {"body": b"x", "Content_Type": "multipart/form-data"}, 415, "Send the bytes"),
        ("/answers", {}, 405, "cannot be asked in this way"),
        ("/answers", {"method": "OPTIONS"}, 405, "cannot be asked in this way"),
        ("/picks/12.png", {}, 404, "no picture of this number"),
        ("/rows/-1.png", {}, 404, "There is no such page here."),
        ("/rows/" + "9" * 5000 + ".png", {}, 404, "There is no such page here."),
        ("/picks/" + "9" * 5000 + "/answers", {}, 404, "There is no such page here."),
        ("/../../etc/passwd", {}, 404, "There is no such page here."),
        ("/docs", {}, 404, "There is no such page here."),
    ],
)
def test_other_requests_are_refused_in_a_sentence(port, path, options, status, text):
    found = call(port, path, **options)
    assert (found.status, text in found.json()["error"]) == (status, True), found.body


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example"]
)
def test_a_name_that_another_site_let_lead_here_is_refused(port, host):
    for path, body in (("/", None), ("/about", None), ("/answers", noise(8, 8))):
        assert call(port, path, body, Host=f"{host}:{port}").status == 400
    assert call(port, "/about", Host=f"localhost:{port}").status == 200


def test_a_picture_that_went_away_is_said_to_be_gone(folder, tmp_path):
    made = small_gallery.made(Chain(folder / "chain"), small_gallery.photos(tmp_path / "photos"))
    shown = prepare(made, new=1, picks=[Pick(str(tmp_path / "photos/pear/000.jpg"), "pear")])
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    with served(application(shown)) as port:
        assert call(port, "/rows/0.png").status == 404
        assert "is not there" in call(port, "/picks/0/answers").json()["error"]


def test_limits_are_checked():
    with pytest.raises(UserError, match="size must be at least 1"):
        Limits(size=0)


# The program


@pytest.fixture
def program():
    """The module of the program, whose flags do not stay."""
    sys.modules.pop("launch.demo", None)
    with tiny.own_flags():
        yield importlib.import_module("launch.demo")
    del sys.modules["launch.demo"]


def test_the_program_serves_by_few_names(program):
    local = ["127.0.0.1", "localhost", "[::1]"]
    assert program.names_of("127.0.0.1", []) == [*local, "127.0.0.1"]
    assert program.names_of("::1", ["box.local"]) == [*local, "box.local", "[::1]"]
    everywhere = program.names_of("0.0.0.0", [])
    assert socket.gethostname() in everywhere and "*" not in everywhere


def test_the_program_refuses_in_a_sentence(program, monkeypatch):
    with program.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=rf"cannot serve on 127.0.0.1 port {port} \(.*--port"):
            program.listen("127.0.0.1", port)
    with pytest.raises(UserError, match=r"asking are numbers of versions, e\.g\. 0,2"):
        program.numbers("asking", ["0", "two"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape("pip install 'compat_jax[demo]'")):
        program.check_installed()


def test_the_program_lists_pictures_to_pick_from(program, folder):
    found = program.read_picks(str(folder / "photos"), True)
    assert {pick.label for pick in found} == set(small_gallery.CLASSES) and len(found) == 12
    assert program.read_picks(str(folder / "asked" / "pear"), False)[0].label is None


@pytest.mark.slow
def test_the_program_shows_a_drawn_gallery_and_ends_cleanly(tmp_path):
    """As the quickstart says: the chain alone, whose configuration draws its pictures."""
    from compat_jax import config as configs
    from configs import glyphs

    config = glyphs.get_config("method=hoc")
    for role in ("query", "gallery"):
        config.data[role].update({"classes": (2000, 2006), "per_class": 3, "size": tiny.SIZE})
    settings = json.loads(json.dumps(configs.plain(config)))
    small_gallery.chain(tmp_path / "chain", seeds=(0, 1), preparation={}, config=settings)
    code = (
        "import tiny, runpy; runpy.run_module('launch.demo', run_name='__main__', alter_sys=True)"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", code, f"--chain={tmp_path}/chain", "--port=0", "--noprogress"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = started.stdout.readline()
    address = re.fullmatch(r"Open in a browser: http://127.0.0.1:(\d+)/ \(Ctrl-C ends\)\n", line)
    assert address, line + started.communicate(timeout=60)[1]
    assert call(int(address[1]), "/about").json()["rows"] == 18
    time.sleep(0.2)
    started.send_signal(signal.SIGINT)
    assert started.communicate(timeout=60) == ("\nended\n", "")
    assert started.returncode == 0


# The page in a browser


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    made = browser.Browser(tmp_path_factory.mktemp("browser"))
    yield made
    made.close()


ANSWERED = (
    "document.querySelectorAll('.answer').length === 20"
    " && $('answers').getAttribute('aria-busy') === 'false'"
)


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [1400, 390])
def test_a_browser_shows_answers_and_refusals_and_moves_the_slider(
    opened, port, query, tmp_path, width
):
    opened.size(width)
    opened.open(f"http://127.0.0.1:{port}/")
    opened.wait(ANSWERED)
    assert "Version 0 asks" in opened.text() and "25 %" in opened.text()
    opened.wait("[...document.images].every(i => i.hidden || (i.complete && i.naturalWidth))")
    assert opened.value("document.documentElement.scrollWidth") <= width
    versions = "[...document.querySelectorAll('.frame .chip')].map(c => c.textContent)"
    assert set(opened.value(versions)) == {"v0", "v1"}
    opened.value("$('slider').focus()")
    opened.press("End")
    opened.wait("$('share').textContent === '100 %'")
    assert set(opened.value(versions)) == {"v1"}
    (tmp_path / "notes.txt").write_text("no picture")
    opened.choose(tmp_path / "notes.txt")
    opened.wait("$('error').textContent.includes('notes.txt is not a picture')")
    (tmp_path / "large.png").write_bytes(bytes(LIMITS.size + 1))
    opened.choose(tmp_path / "large.png")
    opened.wait(
        "$('error').textContent === 'large.png has more than 0.2 MB. Choose a smaller one.'"
    )
    opened.choose(query)
    opened.wait(f"$('error').hidden && $('asked').alt === '{query.name}' && ({ANSWERED})")
    assert opened.value("document.documentElement.scrollWidth") <= width
    refused = [line for line in opened.complaints if "415" not in line]
    assert not refused


@pytest.mark.slow
@needs_browser
def test_a_keyboard_reaches_everything_in_order(opened, port):
    opened.size(1400)
    opened.open(f"http://127.0.0.1:{port}/")
    opened.wait(ANSWERED)
    reached = []
    for _ in range(1 + 12 + 1 + 3):
        opened.press("Tab")
        reached.append(opened.value("document.activeElement.id || document.activeElement.type"))
    assert reached == ["file", *["button"] * 12, "slider", *["checkbox"] * 3]
