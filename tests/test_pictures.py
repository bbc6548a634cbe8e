"""Pictures: every kind of file, image and array becomes the same RGB by the rules, of one size."""

import io
import json
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms

from compat_jax.data.pictures import FILTERS, BadPictures, Preparation, decode
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
    """Save a picture and decode it."""
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


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        BadPictures, match=r"^gone is not there: put it back, or take it off the list"
    ):
        decode(tmp_path / "gone.png", "gone")


@pytest.mark.parametrize("most", [12, 20])
def test_a_picture_too_large_for_memory_is_refused(monkeypatch, most):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)  # 24 pixels: Pillow warns, or raises
    refused(encoded(RGB), "has too many pixels: make it smaller")


# What a picture is


def test_every_kind_of_picture_is_the_same_picture(tmp_path):
    content = encoded(RGB)
    (tmp_path / "a.png").write_bytes(content)
    path, image = tmp_path / "a.png", Image.fromarray(RGB)
    kinds = (path, str(path), content, bytearray(content), memoryview(content), image, RGB)
    for picture in (*kinds, Image.open(path), RGB[::-1][::-1]):
        np.testing.assert_array_equal(decode(picture), RGB)


def test_arrays_of_one_three_and_four_channels():
    np.testing.assert_array_equal(decode(GREY), as_rgb(GREY))
    np.testing.assert_array_equal(decode(GREY[..., None]), as_rgb(GREY))
    seen = np.array([[[*HIDDEN, 0], [*SEEN, 255], [0, 100, 200, 51]]], np.uint8)
    assert decode(seen).tolist() == [[[255, 255, 255], [*SEEN], [204, 224, 244]]]


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (
            RGB.astype(np.float32),
            r"x must be uint8 in 0\.\.255, got float32: multiply by 255 and con",
        ),
        (WIDE, r"x must be uint8 in 0\.\.255, got uint16: convert with \.astype\('uint8'\)"),
        (RGB[None], "x must be one picture, got 1: give them one by one"),
        (RGB[:2, :, :2], r"x must be \[height, width\] or .* got shape \(2, 6, 2\)$"),
        (
            RGB.transpose(2, 0, 1),
            r"x .*got shape \(3, 4, 6\): bring the channels last, \.transpose\(",
        ),
        (RGB[0, 0], r"x must be \[height, width\] or .* got shape \(3,\)$"),
        (RGB[:0], "x is empty: 6 x 0 pixels"),
        ([[0, 1]], "x must be a path, the bytes of a file, a PIL image or a uint8 array, got list"),
        (None, "x must be a path, .* got NoneType"),
        (Image.new("F", (2, 2)), "x has more than 16 bits per channel: convert it to 8"),
        (Image.new("RGB", (0, 2)), "x is empty: 0 x 2 pixels"),
    ],
)
def test_what_can_be_no_picture_is_told_so(picture, message):
    with pytest.raises(UserError, match=f"^{message}"):
        decode(picture, "x")


def test_pictures_of_pillow_are_turned_and_converted_as_their_files():
    for mode, kind in (("RGB", "JPEG"), ("L", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG")):
        image = Image.fromarray(RGB).convert(mode)
        content = encoded(image, kind, exif=turned_by(6))
        opened = Image.open(io.BytesIO(content))
        pixels = decode(opened)
        assert pixels.shape == (6, 4, 3)
        np.testing.assert_array_equal(pixels, decode(content))
        assert opened.size == (6, 4)  # the caller's image is as it was
    ink = Image.new("CMYK", (2, 2), (0, 255, 255, 0))
    np.testing.assert_array_equal(decode(ink), np.full((2, 2, 3), (255, 0, 0)))
    np.testing.assert_array_equal(decode(Image.fromarray(WIDE)), read(WIDE))


def test_threads_decode_without_a_word_and_leave_the_filters_of_warnings_alone():
    noisy = two_pixels("P", 0, 1)
    noisy.putpalette([*HIDDEN, *SEEN])
    content = encoded(noisy, transparency=bytes([51, 255]))  # of which Pillow warns
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(decode, [content] * 64))
    assert {pixels.tobytes() for pixels in found} == {found[0].tobytes()}
    assert list(warnings.filters) == before


# Brought to size


def test_the_centre_is_cropped_and_the_aspect_kept():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    for picture in (wide, wide.transpose(1, 0, 2)):
        np.testing.assert_array_equal(Preparation(10)(picture), np.full((10, 10, 3), 200))
    squashed = Preparation(10, resize="squash", filter="box")(wide)
    third = [0, 0, 0, 133, 200, 200, 133, 0, 0, 0]  # of three columns each
    np.testing.assert_array_equal(squashed, np.tile(np.array(third)[None, :, None], (10, 1, 3)))


@pytest.mark.parametrize("filter", FILTERS)
def test_shrinking_is_antialiased(filter):
    checks = np.kron([[0, 100], [100, 0]], np.ones((1, 1))).astype(np.uint8)
    fine = np.tile(checks, (32, 32))
    for resize in ("crop", "squash"):
        small = Preparation(8, resize, filter)(fine)
        np.testing.assert_allclose(small.astype(int), 50, atol=1)


def test_boxes_average_what_a_pixel_covers():
    checks = np.kron([[0, 100], [100, 0]], np.ones((2, 2))).astype(np.uint8)
    np.testing.assert_array_equal(Preparation(1, filter="box")(checks), np.full((1, 1, 3), 50))


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_a_picture_of_the_size_is_left_as_it_is(resize):
    square = RGB[:4, :4]
    for filter in FILTERS:
        prepare = Preparation(4, resize, filter, crop=0.5)
        np.testing.assert_array_equal(prepare(square), square)
        np.testing.assert_array_equal(prepare(encoded(square)), square)


def test_small_and_narrow_pictures_are_enlarged():
    for shape in ((1, 1, 3), (1, 5000, 3), (5000, 2, 3), (3, 2, 3)):
        picture = np.full(shape, 77, np.uint8)
        for resize in ("crop", "squash"):
            np.testing.assert_array_equal(
                Preparation(32, resize)(picture), np.full((32, 32, 3), 77)
            )


def test_the_crop_keeps_its_share_of_the_short_side():
    ramp = np.repeat(np.arange(0, 256, 1, np.uint8)[None, :], 256, axis=0)
    whole, part = Preparation(64)(ramp), Preparation(64, crop=0.5)(ramp)
    assert whole[0, 0, 0] < 4 and whole[0, -1, 0] > 251
    np.testing.assert_allclose(part[0, [0, -1], 0].astype(int), [64, 191], atol=1)


SIZES = ((50, 40), (40, 50), (33, 97), (32, 64), (20, 31), (64, 64))  # height, width


def noise(height, width):
    rng = np.random.default_rng(height * width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8))


@pytest.mark.parametrize("filter", FILTERS)
def test_the_short_side_is_resized_and_the_centre_kept(filter):
    short, method = 36, Image.Resampling[filter.upper()]
    for height, width in SIZES:
        picture = noise(height, width)
        high, wide = (side * short // min(height, width) for side in (height, width))
        whole = np.asarray(picture.resize((wide, high), method))
        top, left = round((high - 32) / 2), round((wide - 32) / 2)
        expected = whole[top : top + 32, left : left + 32]
        np.testing.assert_array_equal(
            Preparation(32, filter=filter, crop=32 / 36)(picture), expected
        )


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("crop", [1.0, 0.875])
def test_the_pixels_are_those_of_torchvision(crop):
    transforms = pytest.importorskip("torchvision.transforms")
    for height, width in SIZES:
        picture = noise(height, width)
        for filter in FILTERS:
            mode = transforms.InterpolationMode(filter)
            resize = transforms.Resize(int(32 / crop + 1e-6), mode)
            theirs = transforms.CenterCrop(32)(resize(picture))
            np.testing.assert_array_equal(
                Preparation(32, filter=filter, crop=crop)(picture), theirs
            )


def test_a_preparation_describes_itself():
    prepare = Preparation(96, "squash", "lanczos", crop=0.9)
    described = prepare.describe()
    assert json.loads(json.dumps(described)) == described and "alpha on white" in described["rules"]
    assert Preparation.from_mapping(described) == prepare
    assert Preparation.from_mapping({"size": 8}) == Preparation(8)
    with pytest.raises(
        UserError, match=r"unknown field of a preparation 'sise'\. Did you mean 'size'"
    ):
        Preparation.from_mapping({"sise": 8})
    with pytest.raises(UserError, match="a preparation needs a size"):
        Preparation.from_mapping({})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 0}, "size must be at least 1 and at most 8,192, got 0"),
        ({"resize": "pad"}, r"unknown resize 'pad'\..* Valid: crop, squash"),
        ({"filter": "bicubik"}, "unknown filter 'bicubik'. Did you mean 'bicubic'"),
        ({"crop": 0}, "crop must be above 0 and at most 1, got 0"),
        ({"crop": 1.5}, "crop must be above 0 and at most 1"),
    ],
)
def test_a_preparation_that_cannot_be(fields, message):
    with pytest.raises(UserError, match=message):
        Preparation(**{"size": 8, **fields})
