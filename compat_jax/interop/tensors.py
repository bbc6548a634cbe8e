"""Numbers of a weight file's tensors, and names from a file for messages."""

from typing import Any

import ml_dtypes
import numpy as np

from compat_jax.errors import UserError

# Floats that float32 holds exactly, float64 apart, by the names that PyTorch and NumPy share.
FLOATS: dict[str, Any] = {
    **{name: np.dtype(name) for name in ("float64", "float32", "float16")},
    **{
        name: np.dtype(getattr(ml_dtypes, name))
        for name in (
            "bfloat16",
            "float8_e4m3fn",
            "float8_e4m3fnuz",
            "float8_e5m2",
            "float8_e5m2fnuz",
            "float8_e8m0fnu",
        )
    },
}
# Whole numbers that count something: batches of a BatchNorm, models of an average.
_COUNTERS = ("num_batches_tracked", "n_averaged")
_WHOLE = (
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
    *("bool", "qint8", "quint8", "qint32", "quint4x2", "quint2x4"),
)


def is_counter(name: str) -> bool:
    """Return whether a tensor of this name counts something, so that it may be of whole numbers."""
    return name.rpartition(".")[2] in _COUNTERS


def check_numbers(name: str, dtype: str) -> None:
    """Refuse a tensor whose numbers are no floats that float32 can hold; counters may be whole.

    Args:
      name: of the tensor.
      dtype: name of the type, e.g. "bfloat16".

    Raises:
      UserError: naming tensor, type and remedy.
    """
    if dtype in FLOATS or (is_counter(name) and dtype in _WHOLE):
        return
    remedy = "weights cannot be read from them: save them as float32"
    if dtype.startswith("complex"):
        remedy = "weights are real: save a real network"
    elif dtype in _WHOLE or dtype.startswith(("int", "uint", "bits", "float4", "F4", "F6")):
        remedy = "weights are not whole numbers: is it quantised? Save the float weights"
    raise UserError(f"tensor {shown(name)} holds {shown(dtype)} numbers, {remedy}")


def float32(name: str, array: np.ndarray) -> np.ndarray:
    """Return weights as float32 in C order, a copy.

    Args:
      name: of the tensor, for errors.
      array: of any float type.

    Raises:
      UserError: whole or complex numbers, or values that are not finite as float32.
    """
    check_numbers(name, array.dtype.name)
    with np.errstate(over="ignore", invalid="ignore"):
        converted = np.array(array, np.float32, order="C")
    wrong = converted.size - np.count_nonzero(np.isfinite(converted))
    if wrong:
        raise UserError(
            f"tensor {shown(name)} holds {wrong} values that float32 does not have (NaN, infinite or "
            "too large): the training diverged or the file is damaged"
        )
    return converted


def shown(name: Any) -> str:
    """Return a name from a file as one short printable line."""
    text = str(name) if isinstance(name, str | int | float | bytes) else type(name).__name__
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 120 else f"{text[:117]}..."
