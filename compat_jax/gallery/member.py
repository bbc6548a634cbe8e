"""The versions of a gallery in its manifest: normalisation, fingerprints and canaries."""

import base64
import binascii
import dataclasses
import hashlib
import json
import re
from typing import Annotated, Any

import numpy as np

from compat_jax.chain import Chain, NoSuchVersion, Record, Version
from compat_jax.errors import UserError
from compat_jax.fields import Rule, check_fields
from compat_jax.spaces import Preprocessing, order_of

SHA256 = re.compile(r"[0-9a-f]{64}")
_MODEL = re.compile(r"[0-9a-f]{16}")
_TOLERANCE = 1e-3  # of the norm of a canary's feature

Numbers = Annotated[tuple[float, ...], Rule("one number a channel")]
Text = Annotated[str, Rule("text")]


@dataclasses.dataclass(frozen=True)
class Member:
    """A version that embeds rows or queries of a gallery.

    Attributes:
      variables: SHA-256 of its variables, 64 hexadecimal digits.
      model: its fingerprint, see `fingerprint`.
      mean: channel means of its normalisation, in 0..1; each version has its own.
      std: channel deviations, in 0..1.
      canary: features of the canaries (`canary.pictures`), float32[n, d] as little-endian bytes in
        base64.
    """

    variables: Text
    model: Text
    mean: Numbers
    std: Numbers
    canary: Text = dataclasses.field(repr=False)

    def __post_init__(self):
        check_fields(self, "version.")
        for name, pattern in (("variables", SHA256), ("model", _MODEL)):
            value = getattr(self, name)
            if not pattern.fullmatch(value):
                raise UserError(
                    f"{name} of a version must be hexadecimal digits, got {value!r:.80}"
                )
        if min(self.std, default=0) <= 0:
            raise UserError(f"std of a version must be numbers above 0, got {self.std!r:.80}")

    @classmethod
    def of(cls, version: Version, features: np.ndarray, preprocessing: Preprocessing) -> "Member":
        """Describe a version.

        Args:
          version: the version.
          features: float32[n, d], of the canaries.
          preprocessing: of the gallery.
        """
        text = base64.b64encode(np.ascontiguousarray(features, "<f4").tobytes()).decode()
        record = version.record
        model = fingerprint(version.sha256, record, preprocessing)
        return cls(version.sha256, model, record.mean, record.std, canary=text)

    def describe(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**dataclasses.asdict(self), "mean": list(self.mean), "std": list(self.std)}

    def features(self, size: int) -> np.ndarray:
        """Return the features of the canaries, float32[n, size].

        Raises:
          UserError: no such array, values that are not finite, or rows of another norm than 1.
        """
        try:
            content = base64.b64decode(self.canary, validate=True)
        except (binascii.Error, ValueError) as error:
            raise UserError(f"the canary features of a version are not base64 ({error})") from error
        if not content or len(content) % (4 * size):
            raise UserError(f"the canary features of a version are no rows of {size} float32")
        found = np.frombuffer(content, "<f4").reshape(-1, size).astype(np.float32)
        with np.errstate(all="ignore"):
            norms = np.linalg.norm(found, axis=1)
        if not (np.abs(norms - 1) <= _TOLERANCE).all():
            raise UserError("the canary features of a version are not finite, or not of norm 1")
        return found


def fingerprint(variables: str, record: Record, preprocessing: Preprocessing) -> str:
    """Return the fingerprint of a version: what its features depend on, in 16 hexadecimal digits.

    Names and numbers do not count: a version that was renamed needs no row embedded again.

    Args:
      variables: their SHA-256.
      record: of the version.
      preprocessing: of its pictures.
    """
    head = (record.num_prototypes, order_of(record), record.feature_size)
    normalized = (record.mean, record.std)
    return model_of(variables, preprocessing, normalized=normalized, head=head)


def chain_fingerprint(chain: Chain) -> str | None:
    """Return the SHA-256 of what a chain begins with, which stays when versions are added.

    Args:
      chain: the chain.

    Returns:
      64 hexadecimal digits; None if version 0 is no longer there.

    Raises:
      CorruptEntry: version 0 is damaged.
    """
    try:
        variables = chain.digest(0)
    except NoSuchVersion:
        return None
    record = chain.record(0)
    return _sha256([variables, record.num_prototypes, order_of(record), record.feature_size])


def model_of(variables: str, preprocessing: Preprocessing, *, normalized, head) -> str:
    """Return the fingerprint of a version from its parts.

    Args:
      variables: their SHA-256.
      preprocessing: of its pictures.
      normalized: (mean, std) of its channels.
      head: (number of prototypes, their order, feature size).
    """
    numbers = [list(map(float, each)) for each in normalized]
    return _sha256([variables, preprocessing.describe(), *numbers, *head])[:16]


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
