"""Weight files of PyTorch and safetensors, read without running anything they contain.

The content of a file, not its name, tells which of the two it is. Files of `torch.save` need PyTorch,
those of safetensors its library; both come with the extra `torch`.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from etils import epath

from compat_jax.errors import UserError
from compat_jax.files import absolute, first_line, in_bucket, write_bytes
from compat_jax.interop import image_settings, torch_load
from compat_jax.interop.image_settings import ImageSettings
from compat_jax.interop.tensors import FLOATS, check_numbers, float32, is_counter, shown
from compat_jax.interop.torch_load import INSTALL, StandIn, import_torch

PathLike: TypeAlias = str | os.PathLike[str]
# Where training programs keep the state dict of a checkpoint.
_PLAIN = ("net", "state_dict", "model", "model_state_dict")
# Types of numbers in a file of safetensors, by its names; others go by theirs.
_DTYPES = {
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    "BF16": "bfloat16",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}
_MAX_HEADER_BYTES = 100_000_000  # as in the library
_MAX_AXES = 32
_LFS = b"version https://git-lfs.github.com"
_OTHER_KINDS = {
    b"\x1f\x8b": "is packed with gzip: unpack it first",
    b"\x89HDF": "is an HDF5 file (Keras): PyTorch's weights are needed, .pt or .safetensors",
    b"GGUF": "is a GGUF file: weights of PyTorch are needed, .pt or .safetensors",
    b"\x93NUMPY": "is an array of NumPy: weights of PyTorch are needed, .pt or .safetensors",
    b"{": "is a text of JSON: give the .safetensors or .pt file that it belongs to",
}
_HTML = (b"<!doctype html", b"<html", b"<?xml")


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A weight file that was read.

    Attributes:
      path: of the file.
      tensors: arrays by name; narrow floats are widened to float32.
      images: size and normalisation that the file gives.
      sha256: of the file.
      notes: sentences about choices that were made in reading it.
    """

    path: epath.Path
    tensors: dict[str, np.ndarray]
    images: ImageSettings
    sha256: str
    notes: tuple[str, ...] = ()


def load(path: PathLike, ema: bool = False) -> WeightFile:
    """Read a weight file.

    Args:
      path: a safetensors file or one of `torch.save`: a state dict, or a dict with one under "net"
        (as in the reference's checkpoints), "state_dict", "model" or "model_state_dict".
      ema: take averaged weights, e.g. those under "state_dict_ema" or "model_ema".

    Returns:
      The file. Half precision, bfloat16 and float8 are widened to float32, which is exact.

    Raises:
      UserError: naming the file and, where one is at fault, the tensor: no such file, none of weights,
        cut off or damaged, a pickle that would run code, no state dict or several, tensors that are
        not dense, finite floats, or PyTorch or safetensors is not installed.
    """
    file = absolute(path)
    content = _content(file)
    try:
        if _begins_as_safetensors(content):
            stored, metadata = _read_safetensors(content)
            images, notes = image_settings.of_metadata(metadata), _flat(stored, ema)
        else:
            saved = torch_load.load(content)
            images = image_settings.of_checkpoint(saved)
            stored, notes = _choose(saved, ema)
        tensors = _arrays(stored, len(content))
    except UserError as error:
        raise named(file, error) from error
    widened = sorted({d for t in stored.values() if (d := _dtype(t)).startswith("float8")})
    if widened:
        notes = (*notes, f"{', '.join(widened)} is widened to float32, which is exact")
    images = images.over(_beside(file))
    return WeightFile(file, tensors, images, hashlib.sha256(content).hexdigest(), notes)


def read(path: PathLike) -> dict[str, np.ndarray]:
    """Read the tensors of a weight file, see `load`."""
    return load(path).tensors


def encode(path: PathLike, state_dict: Mapping[str, np.ndarray], images: ImageSettings) -> bytes:
    """Encode a state dict for `load_state_dict` in PyTorch.

    Args:
      path: `.safetensors`, which also keeps the image settings; any other name for `torch.save`.
      state_dict: arrays by name.
      images: complete, or without any value.

    Returns:
      The content of the file.

    Raises:
      UserError: PyTorch or safetensors is needed and not installed.
    """
    if is_safetensors(path):
        metadata = images.metadata() if images.is_complete else {"format": "pt"}
        arrays = {name: np.array(a, order="C") for name, a in state_dict.items()}
        return _import_safetensors(f"writing {path}").numpy.save(arrays, metadata)
    torch, stream = import_torch(f"writing {path}"), io.BytesIO()
    torch.save({name: torch.from_numpy(np.array(a)) for name, a in state_dict.items()}, stream)
    return stream.getvalue()


def write(path: PathLike, state_dict: Mapping[str, np.ndarray]) -> None:
    """Write a state dict for `load_state_dict` in PyTorch; the file appears whole or not at all.

    Args:
      path: of the file, whose folder is made: `.safetensors`, or any other name for `torch.save`.
      state_dict: arrays by name.

    Raises:
      UserError: PyTorch or safetensors is needed and not installed, or the file cannot be written.
    """
    write_content(path, encode(path, state_dict, ImageSettings()))


def write_content(path: PathLike, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
      UserError: it cannot be written; a file that was there is untouched.
    """
    file = absolute(path)
    with _writing("write", file, "make room or choose another; a file that was there is untouched"):
        write_bytes(file, content)


@contextlib.contextmanager
def _writing(verb: str, place: PathLike, remedy: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # gcsfs and what it is built on raise many kinds
        if not isinstance(error, OSError) and not in_bucket(place):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot {verb} {place} ({reason}): {remedy}", "out") from error


def check_writable(path: PathLike) -> epath.Path:
    """Refuse, before any work, a path that a weight file cannot be written to.

    Args:
      path: as given; its folder is made.

    Returns:
      The absolute path.

    Raises:
      UserError: the path is a folder or a device, its folder cannot be written to, or PyTorch or
        safetensors is needed and not installed.
    """
    file = absolute(path)
    if not in_bucket(file) and os.path.lexists(file) and not os.path.isfile(file):
        raise UserError(f"{file} is no regular file: name a file to write", "out")
    probe = file.parent / f".{file.name}.writable"
    with _writing("write to", file.parent, "choose another folder"):
        write_bytes(probe, b"")
        probe.unlink()
    needed = _import_safetensors if is_safetensors(file) else import_torch
    needed(f"writing {file}")
    return file


def is_safetensors(path: PathLike) -> bool:
    """Return whether a file to write is one of safetensors, by its name."""
    return str(path).endswith(".safetensors")


def named(file: PathLike, error: UserError) -> UserError:
    """Return the error with the name of the file in front."""
    is_sentence = str(error).startswith(("is ", "was ", "holds "))
    return UserError(f"{file}{'' if is_sentence else ':'} {error}", error.argument)


def _content(file):
    """The bytes of a regular file; a FIFO or a device is not waited for."""
    if in_bucket(file):
        if not file.exists():
            raise UserError(f"no weight file at {file}")
        content = file.read_bytes()
        if problem := _no_weights(content[:512]):
            raise UserError(f"{file} {problem}")
        return content
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise UserError(f"no weight file at {file}") from error
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise UserError(f"{file} is {kind}: give a weight file, .pt or .safetensors")
    with open(descriptor, "rb") as stream:
        try:
            return _kind_checked(file, stream, status.st_size)
        except (OSError, MemoryError) as error:
            raise UserError(f"cannot read {file} ({first_line(error)})") from error


def _kind_checked(file, stream, size):
    """Read a file whose first bytes are those of weights, to the size that it has now."""
    head = stream.read(512)
    problem = _no_weights(head)
    if problem:
        raise UserError(f"{file} {problem}")
    if hasattr(os, "sysconf") and size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise UserError(f"{file} has {size} bytes, more than this machine's memory")
    return head + stream.read(max(size - len(head), 0))


def _no_weights(head):
    """Why a file with this beginning holds no weights; "" where it may."""
    if not head:
        return "is empty: fetch it again"
    if head.startswith(_LFS):
        return "is a pointer of Git LFS, not the weights: git lfs pull"
    text = head.lstrip().lower()
    if text.startswith(_HTML):
        return "is a web page (HTML), not weights: fetch the file itself, by its download link"
    if _begins_as_safetensors(head) or head[:2] in (b"PK", b"\x80\x02"):
        return ""
    for magic, problem in _OTHER_KINDS.items():
        if head.startswith(magic):
            return problem
    is_pickle = head[:1] == b"\x80" and head[1:2] <= b"\x05"
    return "" if is_pickle else "is no weight file, neither of torch.save nor of safetensors"


def _begins_as_safetensors(head):
    size = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and 2 <= size <= _MAX_HEADER_BYTES


def _import_safetensors(purpose) -> ModuleType:
    try:
        import safetensors.numpy
    except ModuleNotFoundError as error:
        raise UserError(
            f"{purpose} needs safetensors, which is not installed: {INSTALL}"
        ) from error
    return safetensors


def _read_safetensors(content):
    """The tensors of a file of safetensors, arrays where NumPy has their type, and its metadata."""
    library = _import_safetensors("reading a file of safetensors")
    try:
        entries = dict(library.deserialize(content))
    except library.SafetensorError as error:
        reason = shown(str(error).removeprefix("Error while deserializing: "))
        raise UserError(f"is cut off or damaged: fetch it again ({reason})") from error
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = header.pop("__metadata__", None) or {}
    return {name: _array(name, entries[name]) for name in header}, metadata


def _array(name, entry):
    """An entry as an array; its type is known, or refused."""
    dtype, shape = _DTYPES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"])
    check_numbers(name, dtype)
    if len(shape) > _MAX_AXES:
        raise UserError(f"tensor {shown(name)} has {len(shape)} axes: is it one of a network?")
    return np.frombuffer(entry["data"], FLOATS.get(dtype, dtype)).reshape(shape)


def _flat(tensors, ema):
    """The notes about a file that has tensors alone."""
    if ema:
        raise UserError("holds no averaged (EMA) weights by name: leave ema out", "ema")
    if not tensors:
        raise UserError(_without_weights({}, {}))
    return ()


def _choose(saved: Any, ema: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The state dict of a checkpoint, and notes about the choice."""
    if _is_tensor(saved):
        raise UserError("holds a single tensor, not a state dict: save that")
    if not isinstance(saved, dict):
        kind = saved.kind if isinstance(saved, StandIn) else type(saved).__name__
        raise UserError(f"holds a {kind}, not a state dict: save the result of state_dict()")
    inside = {key: found for key, value in saved.items() if (found := _inner(value))}
    averaged = [key for key in inside if _is_ema(key)]
    plain = [key for key in inside if key in _PLAIN]
    direct = _has_tensors(saved) and not plain
    if ema and not averaged:
        raise UserError("holds no averaged (EMA) weights by name: leave ema out", "ema")
    only = bool(averaged) and not plain and not direct
    candidates = averaged if ema or only else plain
    if len(candidates) > 1:
        names = ", ".join(map(shown, candidates))
        raise UserError(f"holds several state dicts ({names}): save the one to read alone")
    if ema or only:
        rest = "has no others" if only else "has plain ones as well"
        note = f"averaged (EMA) weights are taken, {shown(averaged[0])}; the file {rest}"
        return _state(inside[averaged[0]]), (note,)
    if not plain and not direct:
        raise UserError(_without_weights(saved, inside))
    others = [k for k, v in saved.items() if _is_ema(k) and not _is_tensor(v) and v]
    state = inside[plain[0]] if plain else {k: v for k, v in saved.items() if k not in others}
    return _state(state), _ema_notes(others, averaged)


def _ema_notes(others, averaged):
    if not others:
        return ()
    names = ", ".join(map(shown, others))
    how = "ask for ema to take them" if averaged else "in a form that is not read here"
    return (f"plain weights are taken; the file has averaged ones as well ({names}): {how}",)


def _inner(value):
    """The state dict that a value is, or that is alone in it; None for others."""
    if not isinstance(value, dict) or _has_tensors(value):
        return value if isinstance(value, dict) else None
    found = [inner for inner in value.values() if _has_tensors(inner)]
    return found[0] if len(found) == 1 else None


def _has_tensors(value):
    return isinstance(value, dict) and any(map(_is_tensor, value.values()))


def _is_tensor(value):
    import torch

    return isinstance(value, torch.Tensor)


def _is_ema(key):
    return isinstance(key, str) and "ema" in key.lower().replace(".", "_").split("_")


def _state(mapping):
    """The tensors by name, if they are nothing else."""
    strange = [key for key in mapping if not isinstance(key, str)]
    if strange:
        raise UserError(
            f"its tensors are not named by text ({shown(strange[0])}): save the result of state_dict()"
        )
    others = [name for name, value in mapping.items() if not _is_tensor(value)]
    if others:
        listed = ", ".join(shown(name) for name in others[:10])
        raise UserError(
            f"holds no state dict: not tensors: {listed}. Save the result of state_dict(), alone or "
            "under 'net'"
        )
    return dict(mapping)


def _without_weights(saved, inside):
    if inside:
        listed = ", ".join(shown(key) for key in list(inside)[:10])
        return f"holds state dicts by other names ({listed}): save the one to read alone"
    listed = ", ".join(shown(key) for key in list(saved)[:10]) or "empty"
    return (
        f"holds no state dict: not tensors: {listed}. Save the result of state_dict(), alone or under "
        "'net'"
    )


def _arrays(state, size):
    """All tensors as arrays; together they cannot need much more than the file has."""
    for name, tensor in state.items():
        problem = "" if isinstance(tensor, np.ndarray) else _problem(tensor)
        if problem:
            raise UserError(f"tensor {shown(name)} {problem}")
        check_numbers(name, _dtype(tensor))
    # float8 widens fourfold; tied layers name a storage more than once.
    if sum(math.prod(t.shape) for t in state.values()) * 4 > 16 * size + 2**20:
        raise UserError("is damaged: its tensors are larger than the file")
    arrays = {}
    for name, tensor in state.items():
        array = tensor if isinstance(tensor, np.ndarray) else _to_numpy(tensor)
        if not is_counter(name):
            array = _checked(name, array)
        arrays[name] = array
    return arrays


def _checked(name, array):
    """Finite floats, float64 as they are and others widened to float32."""
    widened = float32(name, array)
    return array if array.dtype == np.float64 else widened


def _dtype(tensor):
    """The name of a tensor's or array's type, which PyTorch and NumPy share."""
    return str(tensor.dtype).removeprefix("torch.")


def _to_numpy(tensor):
    tensor = tensor.detach().cpu()
    # NumPy lacks bfloat16 and float8.
    return (
        tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor
    ).numpy()


def _problem(tensor):
    """Why a tensor of PyTorch is no dense one; "" for one that is."""
    import torch

    if tensor.is_nested:
        return "is nested: save plain tensors"
    if tensor.layout != torch.strided:
        return "is sparse: save tensor.to_dense()"
    if tensor.is_quantized:
        return "is quantised: save tensor.dequantize(), better the float weights"
    if tensor.device.type == "meta":
        return "is on the meta device, without values: save real weights"
    if tensor.is_conj() or tensor.is_neg():
        return "is a lazy conjugate or negative: save tensor.resolve_conj().resolve_neg()"
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        return "is an expanded view: save a copy, tensor.contiguous()"
    if tensor.ndim > _MAX_AXES:
        return f"has {tensor.ndim} axes: is it one of a network?"
    return ""


def _beside(file):
    """The image settings of a config.json as timm writes it beside its weights."""
    config = file.parent / "config.json"
    if in_bucket(file) or not os.path.isfile(config):
        return ImageSettings()
    try:
        with config.open("rb") as stream:
            content = json.loads(stream.read(2**20))
    except (OSError, RecursionError, ValueError):
        return ImageSettings()
    return image_settings.of_metadata(content) if isinstance(content, dict) else ImageSettings()
