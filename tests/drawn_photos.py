"""A small folder of photos as people have them: mixed sizes, turned by EXIF, transparent, CMYK, grey."""

import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageDraw

KINDS = ("jpg", "turned", "png", "cmyk", "grey", "palette")


def draw(root: Path, classes: Iterable[str], count: int, first: int = 0) -> None:
    """Write `count` photos of each class to root/CLASS, numbered from `first`.

    A class is a shape and a colour; the kind of file goes round. The same name gives the same pictures.
    """
    for name in classes:
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            _write(folder, number, _photo(name, number), KINDS[number % len(KINDS)])


def _photo(name, number):
    seed = zlib.crc32(name.encode())
    look, own = np.random.default_rng(seed), np.random.default_rng([seed, number])
    colour = tuple(map(int, look.integers(0, 160, 3)))
    width, height = map(int, own.integers(28, 60, 2))
    image = Image.new("RGB", (width, height), tuple(map(int, own.integers(190, 256, 3))))
    side = int(0.7 * min(width, height))
    x, y = int(own.integers(0, width - side)), int(own.integers(0, height - side))
    box = [x, y, x + side, y + side]
    drawer = ImageDraw.Draw(image)
    (drawer.ellipse, drawer.rectangle, drawer.rounded_rectangle)[seed % 3](box, fill=colour)
    return image


def _write(folder, number, image, kind):
    path = folder / f"{number:03d}.{'png' if kind in ('png', 'palette') else 'jpg'}"
    if kind == "turned":  # stored on its side, as phones do
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    elif kind == "png":
        image.putalpha(Image.new("L", image.size, 230))
        image.save(path)
    elif kind == "palette":
        image.quantize(16).save(path)
    else:
        image.convert({"cmyk": "CMYK", "grey": "L"}.get(kind, "RGB")).save(path)
