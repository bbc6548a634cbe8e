"""The embedded data set: its characters, how their pictures are drawn, and their cache."""

import logging
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from compat_jax import meter
from compat_jax.data import glyphs
from compat_jax.errors import UserError


@pytest.fixture(scope="session")
def names(tmp_path_factory):
    """The class list, computed once; later calls in this process take it from memory."""
    return glyphs.class_names(cache_dir=tmp_path_factory.mktemp("names"))


@pytest.fixture(autouse=True)
def own_cache(names, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPAT_JAX_CACHE", str(tmp_path))
    return tmp_path / "glyphs"


def draw(classes=(0, 1, 2), count=4, look="photo", *, seed=7, **settings):
    where = {
        name: settings.pop(name) for name in ("size", "cache_dir", "progress") & settings.keys()
    }
    return glyphs.render(classes, count, glyphs.Style(look, **settings), seed=seed, **where)


@pytest.fixture
def no_drawing(monkeypatch):
    def transform(*_):
        raise AssertionError("drawn again")

    return lambda: monkeypatch.setattr(Image.Image, "transform", transform)


def warnings(caplog):
    return [record.getMessage() for record in caplog.records]


def test_about_2500_different_characters(names):
    assert 2300 <= len(names) <= 2700
    assert len(set(names)) == len(names)
    assert all(len(name) == 1 for name in names)


@pytest.mark.parametrize("alike", ["AΑА", "OΟО", "oοо", "HΗН", "cCсС", "zZ", "pрρ", "Il|", ".·"])
def test_of_look_alikes_at_most_one_remains(names, alike):
    assert len(set(alike) & set(names)) <= 1


@pytest.mark.parametrize("dropped", ["é", "\u0301", " ", "\u2800", "\u00ad", "\ue000", "½"])
def test_decomposed_marks_and_blanks_are_dropped(names, dropped):
    assert dropped not in names


def test_any_slice_is_a_mix_of_alphabets(names):
    median = np.median([ord(name) for name in names])
    below = [np.mean([ord(name) < median for name in names[i : i + 500]]) for i in (0, 500, 1000)]
    np.testing.assert_allclose(below, 0.5, atol=0.08)


def test_order_is_fixed(names):
    assert names == glyphs.class_names()
    assert names.index("A") != sorted(names).index("A")


@pytest.mark.parametrize("look", ["print", "photo"])
def test_shapes_types_and_labels(names, look):
    data = draw([5, 3], 3, look, size=20)
    assert data.images.shape == (6, 20, 20, 3)
    assert data.images.dtype == np.uint8
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.class_names == (names[5], names[3])


def test_print_is_dark_on_light_and_grey():
    images = draw(range(20), 2, "print").images.astype(int)
    border = np.concatenate([images[:, 0], images[:, :, 0]], axis=1)
    assert np.median(border) > 220
    assert (images.min(axis=(1, 2, 3)) < np.median(images, axis=(1, 2, 3)) - 40).all()
    assert np.ptp(images, axis=-1).mean() < 4


def test_photos_are_coloured_and_noisy_and_strength_0_is_print():
    def roughness(**settings):
        images = draw(range(20), 2, **settings).images.astype(float)
        tint = np.ptp(images.mean(axis=(1, 2)), axis=-1).mean()
        grain = (images - images.mean(axis=-1, keepdims=True)).std(axis=(1, 2)).mean()
        return tint, grain

    clean, half, full = roughness(strength=0.0), roughness(strength=0.5), roughness()
    assert clean[0] < 2 < half[0] < full[0]
    assert clean[1] < 2 < half[1] < full[1]
    assert roughness(noise=0.0)[1] < half[1]
    assert roughness(look="print") == pytest.approx(clean, abs=0.3)


def test_same_arguments_same_bytes_without_the_cache(tmp_path):
    first, second = (draw(cache_dir=tmp_path / name).images for name in "ab")
    np.testing.assert_array_equal(first, second)


def test_seed_look_and_picture_number_each_change_the_picture():
    data = draw([4], 2)
    others = [data.images[1], draw([4], 1, seed=8).images[0], draw([4], 1, strength=0.0).images[0]]
    others.append(draw([4], 1, "print").images[0])
    assert all((data.images[0] != other).any() for other in others)


def test_a_picture_depends_on_no_other(monkeypatch):
    alone = draw([9], 3).images
    np.testing.assert_array_equal(draw([2, 9, 4], 5).images[5:8], alone)
    monkeypatch.setattr(glyphs, "CHUNK", 2)
    np.testing.assert_array_equal(draw([9, 1], 3).images[:3], alone)


def test_photo_share_spreads_photos_over_each_class():
    mixed = draw([1, 2], 10, "print", photo_share=0.3).images.reshape(2, 10, -1)
    photo = draw([1, 2], 10, "photo").images.reshape(2, 10, -1)
    clean = draw([1, 2], 10, "print").images.reshape(2, 10, -1)
    is_photo, is_print = (mixed == photo).all(axis=-1), (mixed == clean).all(axis=-1)
    assert is_photo.sum(axis=1).tolist() == [3, 3]
    np.testing.assert_array_equal(is_print, ~is_photo)
    assert is_photo[0, :4].any() and is_photo[0, 4:7].any() and is_photo[0, 7:].any()


def test_second_call_reads_the_cache(no_drawing):
    first = draw().images
    no_drawing()
    np.testing.assert_array_equal(draw().images, first)
    with pytest.raises(AssertionError, match="drawn again"):
        draw(seed=8)


def test_clean_print_is_not_drawn_again_for_another_strength(no_drawing):
    first = draw(look="print", strength=1.0).images
    no_drawing()
    np.testing.assert_array_equal(draw(look="print", strength=0.5).images, first)


@pytest.mark.parametrize("kind", ["images", "classes"])
@pytest.mark.parametrize("damage", ["truncated", "changed byte", "empty", "other file", "longer"])
def test_a_damaged_cache_file_is_made_again(names, own_cache, kind, damage, caplog):
    first = draw().images
    (path,) = own_cache.glob(f"{kind}-*")
    good = path.read_bytes()
    middle = len(good) // 2
    path.write_bytes(
        {
            "truncated": good[:middle],
            "changed byte": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
            "empty": b"",
            "other file": b"no array at all",
            "longer": good + b"more",
        }[damage]
    )
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(draw().images, first)
    (warning,) = warnings(caplog)
    assert str(path) in warning and "making it again" in warning and "\n" not in warning
    assert path.read_bytes() == good
    assert glyphs.class_names() == names
    assert len(list(own_cache.iterdir())) == 2


def test_no_byte_of_a_cache_file_can_change_unnoticed(own_cache, caplog):
    first = draw([0], 1, size=8).images
    (path,) = own_cache.glob("images-*")
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    places = rng.choice(len(good), 100, replace=False).tolist()
    for place in places:
        changed = bytearray(good)
        changed[place] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        np.testing.assert_array_equal(draw([0], 1, size=8).images, first)
        assert path.read_bytes() == good
    assert len(warnings(caplog)) == len(places)


def test_a_cache_file_in_the_place_of_another_is_made_again(own_cache, caplog):
    """Both files are whole, but each is of the other's pictures."""
    first = draw(seed=1).images
    (path,) = own_cache.glob("images-*")
    second = draw(seed=2).images
    (other,) = set(own_cache.glob("images-*")) - {path}
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(draw(seed=1).images, first)
        np.testing.assert_array_equal(draw(seed=2).images, second)
    assert ["SHA-256" in warning for warning in warnings(caplog)] == [True, True]


def test_a_pipe_in_the_place_of_a_cache_file_does_not_block(own_cache):
    first = draw().images
    (path,) = own_cache.glob("images-*")
    path.unlink()
    os.mkfifo(path)
    np.testing.assert_array_equal(draw().images, first)
    assert path.is_file()


def test_what_a_killed_process_left_in_the_cache_is_removed(own_cache):
    own_cache.mkdir(parents=True)
    old, new = own_cache / "a.tmp", own_cache / "b.tmp"
    for path in (old, new):
        path.write_bytes(b"unfinished")
    os.utime(old, (0, 0))
    draw()
    assert not old.exists() and new.exists()


def test_without_a_home_folder_pictures_are_drawn_without_a_cache(monkeypatch, caplog):
    expected = draw().images
    monkeypatch.delenv("COMPAT_JAX_CACHE")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(draw().images, expected)
    assert warnings(caplog) == ["glyphs: no home folder to keep a cache in: set COMPAT_JAX_CACHE"]


def test_the_cache_may_be_below_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    draw(cache_dir="~/cache")
    assert list((tmp_path / "home" / "cache" / "glyphs").glob("images-*"))


@pytest.mark.slow
def test_the_matplotlib_backend_of_a_notebook_does_no_harm(names, tmp_path):
    """A notebook sets MPLBACKEND to a module of its own; importing matplotlib would fail."""
    program = (
        "import sys\n"
        "from compat_jax.data import glyphs\n"
        "images = glyphs.render([0], 2, glyphs.Style('photo'), seed=7).images\n"
        "assert 'matplotlib' not in sys.modules\n"
        "print(glyphs.class_names()[:50], images.tobytes().hex())\n"
    )
    environment = {
        **os.environ,
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "COMPAT_JAX_CACHE": str(tmp_path / "new"),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONUTF8": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{names[:50]} {draw([0], 2).images.tobytes().hex()}"


def test_an_unwritable_cache_is_one_logged_line(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        images = draw(cache_dir=blocked).images
    np.testing.assert_array_equal(images, draw().images)
    assert ["COMPAT_JAX_CACHE" in warning for warning in warnings(caplog)] == [True]


def test_every_class_can_be_drawn_at_an_extreme_strength(names):
    images = draw(range(0, len(names), 50), 1, size=8, strength=10.0).images
    assert images.shape[1:] == (8, 8, 3)
    assert np.ptp(images) == 255


def test_progress_is_shown_where_it_is_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(meter, "SECONDS", 0)
    draw([0], 6)
    assert capsys.readouterr().err == ""
    draw([0], 7, progress=True)
    assert "drawing glyphs: 7 of 7 pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": [0, 99999]}, r"class 99999 asked for, but there are \d+ glyph classes"),
        ({"classes": [-1]}, r"class -1 asked for, but there are \d+ glyph classes"),
        ({"look": "foto"}, "unknown look 'foto'. Did you mean 'photo'.*photo, print"),
        ({"count": 0}, "images_per_class is 0: use 1 or more"),
        ({"size": 7}, "size is 7 pixels: use 8 or more"),
        (
            {"look": "print", "photo_share": 1.5},
            "photo_share must be at least 0 and at most 1, got 1.5",
        ),
        ({"photo_share": 0.5}, "photo_share is 0.5, but every picture is a photo"),
        ({"strength": -1.0}, "strength must be at least 0, got -1.0"),
        ({"noise": float("nan")}, "noise must be a finite number, got nan"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        draw(**settings)
