"""Pictures: every kind of file becomes the same RGB by the rules; folders list nothing but pictures."""

import io
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from compat_jax.data import from_folder
from compat_jax.data.pictures import BadPictures, class_folders, decode, resized
from compat_jax.errors import UserError

RGB = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)
GREY = RGB[..., 0]
WIDE = np.random.default_rng(1).integers(0, 2**16, (4, 6)).astype(np.uint16)


def encoded(image, kind="PNG", **options):
    """The bytes of a file."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(image, kind="PNG", **options):
    """What becomes of a picture that is saved and decoded."""
    pixels = decode(encoded(image, kind, **options), "a picture")
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[-1] == 3
    return pixels


def as_rgb(grey):
    return np.repeat(grey[..., None], 3, axis=-1)


def two_pixels(mode, first, second):
    image = Image.new(mode, (2, 1), first)
    image.putpixel((1, 0), second)
    return image


# What a pixel becomes


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM", "TGA"])
def test_colour_and_grey_keep_their_values(kind):
    np.testing.assert_array_equal(read(RGB, kind), RGB)
    np.testing.assert_array_equal(read(GREY, kind), as_rgb(GREY))


def test_a_file_and_its_bytes_are_one_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(RGB))
    np.testing.assert_array_equal(decode(tmp_path / "a.png", "a"), RGB)
    np.testing.assert_array_equal(decode(str(tmp_path / "a.png"), "a"), RGB)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
def test_a_palette_is_looked_up(kind):
    image = Image.new("P", (3, 1))
    image.putpalette([9, 8, 7, 200, 100, 50, 1, 2, 3])
    image.putdata([0, 1, 2])
    assert read(image, kind).tolist() == [[[9, 8, 7], [200, 100, 50], [1, 2, 3]]]


def test_one_bit_is_black_and_white():
    image = Image.fromarray(np.array([[True, False], [False, False]]))
    assert image.mode == "1"
    np.testing.assert_array_equal(read(image)[..., 1], [[255, 0], [0, 0]])
    np.testing.assert_array_equal(read(image, "TIFF")[..., 1], [[255, 0], [0, 0]])


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for kind, more in (("GIF", {}), ("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        moving = read(frames[0], kind, save_all=True, append_images=frames[1:], **more)
        np.testing.assert_array_equal(moving, np.full((4, 4, 3), (255, 0, 0)))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_ink_becomes_light(kind):
    options = {"quality": 100} if kind == "JPEG" else {}
    for ink, light in (((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 255), (0, 0, 0))):
        pixels = read(Image.new("CMYK", (8, 8), ink), kind, **options)
        np.testing.assert_allclose(pixels.astype(int), np.full((8, 8, 3), light), atol=3)


def test_other_colour_spaces_are_converted():
    grey = Image.fromarray(as_rgb(GREY))
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    for image in (grey.convert("YCbCr"), ImageCms.applyTransform(grey, to_lab)):
        np.testing.assert_allclose(read(image, "TIFF").astype(int), as_rgb(GREY), atol=3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_are_scaled_to_eight(kind):
    expected = np.floor(WIDE / 257 + 0.5).astype(np.uint8)
    np.testing.assert_array_equal(read(WIDE, kind), as_rgb(expected))
    extremes = np.array([[0, 128, 129, 257, 65535]], np.uint16)
    assert read(extremes, kind)[0, :, 0].tolist() == [0, 0, 1, 1, 255]


def test_sixteen_bits_of_a_portable_graymap_are_scaled_too():
    content = b"P5 3 1 65535\n" + np.array([0, 999, 65535], ">u2").tobytes()
    assert decode(content, "a")[0, :, 0].tolist() == [0, 4, 255]


# Transparency

SEEN, HIDDEN = (10, 20, 30), (250, 0, 120)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_transparent_pixels_are_white_whatever_colour_they_hide(kind):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    image = two_pixels("RGBA", (*HIDDEN, 0), (*SEEN, 255))
    assert read(image, kind, **options).tolist() == [[[255, 255, 255], [*SEEN]]]


def test_what_is_half_transparent_is_half_white():
    image = two_pixels("RGBA", (0, 100, 200, 51), (0, 100, 200, 204))
    # 255 (1 - a) + c a, with a = 1/5 and 4/5.
    np.testing.assert_array_equal(read(image), [[[204, 224, 244], [51, 131, 211]]])


def test_grey_with_transparency_is_composed_on_white():
    image = two_pixels("LA", (40, 0), (40, 255))
    assert read(image)[0, :, 0].tolist() == [255, 40]
    assert read(two_pixels("L", 40, 7), transparency=40)[0, :, 0].tolist() == [255, 7]
    assert read(two_pixels("1", 1, 0), transparency=0)[0, :, 2].tolist() == [255, 255]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_palette_with_transparency_is_composed_on_white(kind):
    image = two_pixels("P", 0, 1)
    image.putpalette([*HIDDEN, *SEEN])
    assert read(image, kind, transparency=0).tolist() == [[[255, 255, 255], [*SEEN]]]
    if kind == "PNG":  # an alpha for each colour
        mixed = read(image, kind, transparency=bytes([51, 255]))
        assert mixed.tolist() == [[[254, 204, 228], [*SEEN]]]


def test_a_transparent_colour_is_white():
    image = two_pixels("RGB", HIDDEN, SEEN)
    assert read(image, transparency=HIDDEN).tolist() == [[[255, 255, 255], [*SEEN]]]


def png_of_wide_grey(*values, transparent):
    """A PNG of one row of 16-bit grey with a transparent value, which Pillow cannot write."""

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", len(values), 1, 16, 0, 0, 0, 0)
    row = b"\0" + struct.pack(f">{len(values)}H", *values)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"tRNS", struct.pack(">H", transparent))
        + chunk(b"IDAT", zlib.compress(row))
        + chunk(b"IEND", b"")
    )


def test_a_transparent_value_of_sixteen_bits_is_white():
    content = png_of_wide_grey(1000, 1001, 65535 - 257, transparent=1000)
    assert decode(content, "a")[0, :, 0].tolist() == [255, 4, 254]


# Turned upright


def upright(stored, orientation):
    """A picture by the definition of EXIF: where the first row and the first column are."""
    height, width = stored.shape[:2]
    shape = (width, height) if orientation >= 5 else (height, width)
    turned = np.zeros((*shape, *stored.shape[2:]), stored.dtype)
    bottom, right = shape[0] - 1, shape[1] - 1
    for row in range(height):
        for column in range(width):
            place = {
                1: (row, column),  # top, left
                2: (row, right - column),  # top, right
                3: (bottom - row, right - column),  # bottom, right
                4: (bottom - row, column),  # bottom, left
                5: (column, row),  # left, top
                6: (column, right - row),  # right, top
                7: (bottom - column, right - row),  # right, bottom
                8: (bottom - column, row),  # left, bottom
            }[orientation]
            turned[place] = stored[row, column]
    return turned


def turned_by(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation):
    exif, expected = turned_by(orientation), upright(RGB, orientation)
    np.testing.assert_array_equal(read(RGB, "PNG", exif=exif), expected)
    np.testing.assert_array_equal(read(RGB, "TIFF", exif=exif), expected)
    np.testing.assert_array_equal(read(RGB, "WEBP", exif=exif, lossless=True), expected)
    blocks = np.kron(RGB, np.ones((8, 8, 1), np.uint8))
    compressed = read(blocks, "JPEG", exif=exif, quality=100, subsampling=0)
    np.testing.assert_allclose(compressed.astype(int), upright(blocks, orientation), atol=10)
    # Of all kinds, also those that are converted first.
    palette = Image.fromarray(GREY).convert("P")
    np.testing.assert_array_equal(read(palette, exif=exif), as_rgb(upright(GREY, orientation)))
    wide = np.floor(upright(WIDE, orientation) / 257 + 0.5).astype(np.uint8)
    np.testing.assert_array_equal(read(WIDE, exif=exif), as_rgb(wide))
    seen = Image.fromarray(np.dstack([RGB, np.where(GREY > 99, 255, 0).astype(np.uint8)]))
    on_white = np.where(GREY[..., None] > 99, RGB, 255)
    np.testing.assert_array_equal(read(seen, exif=exif), upright(on_white, orientation))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_means_nothing_turns_nothing(orientation):
    np.testing.assert_array_equal(read(RGB, exif=turned_by(orientation)), RGB)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_broken_exif_data_turn_nothing(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    for exif in (b"Exif\0\0no tiff at all", b"Exif\0\0MM\0*\0\0\0\x08\0\xff\x01\x12\0\x03"):
        broken = read(RGB, kind, exif=exif, **options)
        np.testing.assert_array_equal(broken, read(RGB, kind, **options))


# What is refused


def refused(content, message):
    with pytest.raises(BadPictures, match=f"^cat/1 {message}") as caught:
        decode(content, "cat/1")
    assert "\n" not in str(caught.value) and "0x" not in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"])
def test_a_picture_cut_off_anywhere_is_refused_or_whole(kind):
    large = np.random.default_rng(2).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    content = encoded(large, kind)
    whole = decode(content, "whole")
    for end in np.linspace(0, len(content) - 1, 40).astype(int):
        try:
            pixels = decode(content[:end], "cat/1")
        except BadPictures as error:
            assert str(error).startswith("cat/1 is not a picture that Pillow can read: remove or")
        else:  # only the end mark is missing
            assert end > 0.95 * len(content)
            np.testing.assert_array_equal(pixels, whole)
    refused(content[: len(content) // 2], "is not a picture that Pillow can read: remove or repair")


def test_what_is_no_picture_is_refused():
    for content in (b"", b"no picture", b"\x89PNG\r\n", b"<svg/>", b"\0" * 1000):
        refused(content, r"is not a picture that Pillow can read: remove or repair it \(")


def test_more_than_sixteen_bits_are_refused():
    for image in (np.full((6, 6), 0.5, np.float32), np.full((6, 6), 99, np.int32)):
        refused(encoded(image, "TIFF"), "has more than 16 bits per channel: convert it to 8")


def test_a_file_that_vanished_is_named(tmp_path):
    with pytest.raises(BadPictures, match=r"^gone vanished while it was read: put it back"):
        decode(tmp_path / "gone.png", "gone")


@pytest.mark.parametrize("most", [12, 20])
def test_a_picture_too_large_for_memory_is_refused(monkeypatch, most):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)  # 24 pixels: Pillow warns, or raises
    refused(encoded(RGB), "has too many pixels: make it smaller")


def test_resizing_averages_what_a_pixel_covers():
    checks = np.kron([[0, 100], [100, 0]], np.ones((2, 2))).astype(np.uint8)
    np.testing.assert_array_equal(resized(as_rgb(checks), 1), np.full((1, 1, 3), 50))
    assert resized(RGB, None) is RGB and resized(RGB[:4, :4], 4).base is RGB
    np.testing.assert_array_equal(resized(checks[..., None], None), as_rgb(checks))
    with pytest.raises(UserError, match=r"images must be uint8 in 0\.\.255, got float32"):
        resized(RGB.astype(np.float32), 2)


# Folders


@pytest.fixture
def folder(tmp_path):
    """Classes cat, with a folder in it, and dog; four pictures of one colour each."""
    for number, place in enumerate(("cat/b.png", "cat/a.png", "cat/more/c.png", "dog/a.png")):
        path = tmp_path / "pictures" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(np.full((4, 4), number, np.uint8)))
    return tmp_path / "pictures"


def listed(folder):
    return [
        (name, [str(p.relative_to(folder)) for p in files]) for name, files in class_folders(folder)
    ]


WHOLE = [("cat", ["cat/a.png", "cat/b.png", "cat/more/c.png"]), ("dog", ["dog/a.png"])]


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
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "z.png").write_bytes(encoded(np.full((4, 4), 9, np.uint8)))
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
    (folder / "dog" / "cut.png").write_bytes(encoded(RGB)[:60])
    (folder / "dog" / "float.tiff").write_bytes(encoded(np.ones((4, 4), np.float32), "TIFF"))
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
        BadPictures, match=r"^23 pictures cannot be read: .*; and 13 more$"
    ) as caught:
        from_folder(folder)
    assert len(caught.value.problems) == 23 and str(caught.value).count("Pillow can read") == 9
