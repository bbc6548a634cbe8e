"""Damaged pictures of every format that Pillow writes: refused by name in one line, or a picture."""

import io

import numpy as np
import pytest
from PIL import Image, features

from compat_jax.data.pictures import BadPictures, decode

MODES = {
    "PNG": ("RGB", "L", "P", "RGBA", "LA", "I;16", "1"),
    "JPEG": ("RGB", "L", "CMYK"),
    "GIF": ("P", "L"),
    "BMP": ("RGB", "P", "1"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("RGB", "LA", "CMYK", "I;16", "LAB"),
    "PPM": ("RGB", "L", "1"),
    "TGA": ("RGB", "RGBA", "P"),
    "ICO": ("RGBA",),
    "PCX": ("RGB", "P"),
    "DDS": ("RGB", "RGBA"),
    "SGI": ("RGB", "L"),
    "JPEG2000": ("RGB", "L"),
}
NEEDED = {"WEBP": "webp", "JPEG2000": "jpg_2000"}
FORMATS = [f for f in MODES if f not in NEEDED or features.check(NEEDED[f])]


def encoded(kind: str, mode: str, rng: np.random.Generator) -> bytes:
    """A picture of random sides in this format and mode."""
    height, width = rng.integers(1, 40, 2)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8))
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 2**16, (height, width)).astype(np.uint16))
    elif mode == "LAB":
        image = Image.frombytes("LAB", image.size, image.tobytes())
    else:
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes altered, cut out, doubled, swapped or cut off."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        at = int(rng.integers(0, max(len(data), 1)))
        span = int(rng.integers(1, 9))
        match rng.integers(0, 6):
            case 0:
                data[at : at + span] = rng.bytes(span)
            case 1:
                del data[at : at + span]
            case 2:
                data[at:at] = data[at : at + span]
            case 3:
                data[at : at + 4] = b"\xff\xff\xff\xff"
            case 4:
                del data[at:]
            case 5:
                data[at : at + span] = bytes(span)
    return bytes(data)


def check(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    read = 0
    for number in range(count):
        kind = FORMATS[number % len(FORMATS)]
        mode = MODES[kind][int(rng.integers(len(MODES[kind])))]
        whole = encoded(kind, mode, rng)
        picture = decode(whole, "whole")
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
        where = f"album/{number}.{kind}"
        try:
            picture = decode(damaged(whole, rng), where)
        except BadPictures as error:
            assert where in str(error) and "\n" not in str(error) and len(str(error)) < 400
            continue
        read += 1
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    assert 0.02 < read / count < 0.9  # both happen


def test_damaged_pictures_are_refused_by_name_or_read():
    assert len(FORMATS) >= 12
    check(200, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_damaged_pictures_are_refused_by_name_or_read(seed):
    check(2500, seed)
