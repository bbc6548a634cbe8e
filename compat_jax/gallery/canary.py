"""Canaries: a few fixed pictures whose features show whether a model is the one that a gallery means.

A fingerprint says which bits a model has; whoever can write the manifest can forge it, and it does not
cover what the program around the bits does to a picture. The features of the canaries cover both. The
pictures are drawn from a hash, so that they are the same on every machine, for ever; they are wide and
tall, with fine detail and other content at the edges than in the middle, so that crop, aspect, filter
and normalisation all show.
"""

import functools
import hashlib
from typing import NamedTuple

import numpy as np

from compat_jax.chain import Version
from compat_jax.data.pictures import Preparation
from compat_jax.errors import UserError

# height, width
SIZES = ((320, 240), (192, 448), (448, 168), (256, 256), (300, 400), (97, 61))
_GRID = 5  # coarse blocks along a side
_FINE = 48  # how far noise moves a pixel
# Another machine, release or accelerator (matrix products in bfloat16) stays well below these.
LEAST_COSINE = 0.999
_STRICTEST = 1e-4
_PART = 0.02  # of the mean distance between the canaries


class Comparison(NamedTuple):
    """How features of the canaries compare with those of a manifest.

    Attributes:
      cosines: float64[n], of each canary with itself.
      least: cosine that each must reach.
    """

    cosines: np.ndarray
    least: float

    @property
    def passes(self) -> bool:
        """Return whether they are of one model and one preprocessing."""
        return bool((self.cosines >= self.least).all())


def pictures(preparation: Preparation | None, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Return the canaries, uint8[height, width, channels] each.

    Args:
      preparation: of the gallery's pictures; None for pictures that have their size.
      shape: (height, width, channels) of the network's input.
    """
    if preparation is not None:
        return [_draw(number, (*size, 3)) for number, size in enumerate(SIZES)]
    return [_draw(number, shape) for number in range(len(SIZES))]


def features(version: Version, preparation: Preparation | None) -> np.ndarray:
    """Embed the canaries.

    Args:
      version: that embeds.
      preparation: of the gallery's pictures; None for pictures that have their size.

    Returns:
      float32[n, feature_size], rows of norm 1.

    Raises:
      UserError: features that are not finite, or zero.
    """
    drawn = pictures(preparation, tuple(version.record.image_shape))
    found = version.embed(drawn, preparation=preparation)
    norms = np.linalg.norm(found, axis=1)
    if not np.isfinite(found).all() or not (norms > 0.5).all():
        raise UserError(
            f"version {version.number} gives a fixed test picture no direction (a feature of norm "
            f"{norms.min():.3g}): it is no model to search with"
        )
    return found


def compare(found: np.ndarray, expected: np.ndarray) -> Comparison:
    """Compare features of the canaries with those of a manifest.

    The least cosine is .999. For a network that tells the canaries hardly apart, their distances (1 -
    cosine) must also stay below a fiftieth of the mean distance between canaries, but not below 1e-4,
    which rounding alone may reach. What passes with other weights has features that retrieval can hardly
    tell from the gallery's own.

    Args:
      found: float32[n, d].
      expected: float32[m, d].
    """
    if found.shape != expected.shape:
        return Comparison(np.full(len(expected), -1.0), LEAST_COSINE)
    found, expected = (_unit(x) for x in (found, expected))
    others = ~np.eye(len(expected), dtype=bool)
    spread = float((1 - expected @ expected.T)[others].mean()) if len(expected) > 1 else 1.0
    allowed = np.clip(_PART * spread, _STRICTEST, 1 - LEAST_COSINE)
    return Comparison(np.einsum("nd,nd->n", found, expected), float(1 - allowed))


def _unit(rows):
    rows = rows.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@functools.lru_cache(maxsize=64)
def _draw(number: int, shape: tuple[int, ...]) -> np.ndarray:
    """Coarse blocks of colour with noise and stripes on them, by integers and a hash alone."""
    height, width, channels = shape
    blocks = _bytes(f"blocks {number}", (_GRID, _GRID, channels))
    down = np.minimum(np.arange(height) * _GRID // height, _GRID - 1)
    across = np.minimum(np.arange(width) * _GRID // width, _GRID - 1)
    coarse = blocks[down][:, across]
    noise = _bytes(f"noise {number}", shape) * (2 * _FINE) // 256 - _FINE
    period = 2 + number
    diagonal = (np.arange(height)[:, None] + (number + 1) * np.arange(width)) // period % 2
    stripes = (diagonal * 2 - 1) * _FINE
    drawn = np.clip(coarse + noise + stripes[..., None], 0, 255).astype(np.uint8)
    drawn.flags.writeable = False  # it is kept
    return drawn


def _bytes(what: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values 0..255, int64[shape], that a name decides."""
    count = int(np.prod(shape))
    stream = hashlib.shake_256(f"compat_jax canary {what}".encode()).digest(count)
    return np.frombuffer(stream, np.uint8).reshape(shape).astype(np.int64)
