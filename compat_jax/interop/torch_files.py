"""PyTorch's weight files, read and written without running anything they contain.

Imports torch only when a `.pt` file is at hand.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from compat_jax.errors import UserError
from compat_jax.interop.weights import unwrap

# What the reference's checkpoints hold beside weights and plain values: its settings object, and
# NumPy numbers and torchvision's transforms inside it. Each is replaced by an inert stand-in; none of
# them is imported.
_STOOD_IN = (
    "iamcl2r.params.ExperimentParams",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.dtype",
    "torchvision.transforms.functional.InterpolationMode",
    *(
        f"torchvision.transforms.transforms.{name}"
        for name in ("Normalize", "RandomCrop", "RandomHorizontalFlip", "Resize", "ToTensor")
    ),
)


class _StandIn:
    """Takes whatever a pickle gives to an object, and keeps nothing of it."""

    def __new__(cls, *args):
        del args
        return super().__new__(cls)

    def __init__(self, *args):
        del args

    def __setstate__(self, state):
        del state


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The state dict of a weight file.

    Args:
      path: `.safetensors`, which needs no torch; any other name is read as a file of `torch.save`,
        with `weights_only`: a state dict, or a dict with one under "net" (the reference's
        checkpoints), "state_dict" or "model".

    Returns:
      Arrays by name; half-precision and bfloat16 tensors become float32.

    Raises:
      UserError: no such file, not a weight file, a pickle that would have to run code, or torch not
        installed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weight file at {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    torch = _import_torch(path)
    state = unwrap(_load(torch, path))
    tensors = {name: value for name, value in state.items() if torch.is_tensor(value)}
    others = sorted(str(name) for name in state.keys() - tensors.keys())
    if others or not tensors:
        raise UserError(
            f"{path} holds no state dict: not tensors: {', '.join(others[:10]) or 'empty'}. Save the "
            "result of state_dict(), alone or under 'net'"
        )
    return {name: _to_numpy(torch, tensor) for name, tensor in tensors.items()}


def write(path: str | Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict for `load_state_dict` in PyTorch.

    Args:
      path: of the file, whose folder is made: `.safetensors`, which needs no torch; any other name
        is written as `torch.save` does.
      state_dict: arrays by name.

    Raises:
      UserError: torch, or safetensors, not installed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        _import_safetensors(path).numpy.save_file(dict(state_dict), path)
        return
    torch = _import_torch(path)
    torch.save({name: torch.from_numpy(np.array(a)) for name, a in state_dict.items()}, path)


def _import_torch(path: Path) -> ModuleType:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path} needs PyTorch, which is not installed: pip install -e '.[torch]' (its CPU build "
            "is enough), or use a .safetensors file"
        ) from error
    return torch


def _import_safetensors(path: Path) -> ModuleType:
    try:
        import safetensors.numpy
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path} needs safetensors, which is not installed: pip install safetensors"
        ) from error
    return safetensors


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    library = _import_safetensors(path)
    try:
        arrays = library.numpy.load_file(path)
    except library.SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from error
    return {name: _widen(array) for name, array in arrays.items()}


def _load(torch: ModuleType, path: Path) -> Mapping[str, Any]:
    stand_ins = [(_StandIn, name) for name in _STOOD_IN]
    try:
        with torch.serialization.safe_globals(stand_ins):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise UserError(_reason(torch, path, error)) from error
    if not isinstance(checkpoint, Mapping):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, not a state dict: save that")
    return checkpoint


def _reason(torch: ModuleType, path: Path, error: Exception) -> str:
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        needs = set(named) - set(_STOOD_IN)
    except Exception:  # Whatever is wrong with the file, the error at hand tells of it.
        needs = set()
    if not needs:
        return f"{path} is not a file of torch.save: {str(error).splitlines()[0]}"
    return (
        f"{path} is refused: opening it would run code of {', '.join(sorted(needs))}. If you trust "
        "it, save its weights alone, where those modules are installed: "
        "torch.save(torch.load(f, weights_only=False)['net'], out)"
    )


def _to_numpy(torch: ModuleType, tensor: Any) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return _widen(tensor.detach().numpy())


def _widen(array: np.ndarray) -> np.ndarray:
    """Float types narrower than float32, among them those that NumPy has from ml_dtypes."""
    narrow = array.dtype.itemsize < 4 and not np.issubdtype(array.dtype, np.integer)
    return array.astype(np.float32) if narrow else array
