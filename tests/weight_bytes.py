"""Files of torch.save and of safetensors, byte by byte and without either library, good and hostile."""

import dataclasses
import io
import json
import struct
import zipfile
from typing import Any

import numpy as np

INSTALL = 'not installed: pip install "compat_jax[torch]"'
MISSING = {"torch": f"PyTorch is {INSTALL}", "safetensors": f"safetensors is {INSTALL}"}
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
STORAGE = {
    "float32": "Float",
    "float64": "Double",
    "float16": "Half",
    "int8": "Char",
    "uint8": "Byte",
    "int16": "Short",
    "int32": "Int",
    "int64": "Long",
    "bool": "Bool",
    "complex64": "ComplexFloat",
    "complex128": "ComplexDouble",
    "bfloat16": "BFloat16",
}


@dataclasses.dataclass(frozen=True)
class Name:
    """A global that a pickle names."""

    name: str


@dataclasses.dataclass(frozen=True)
class Call:
    """A call that a pickle asks for: of a function, or of `__new__` of a class."""

    name: str
    arguments: tuple = ()
    state: Any = None
    new: bool = False


@dataclasses.dataclass(frozen=True)
class Persistent:
    """An object stored outside a pickle."""

    identifier: Any


@dataclasses.dataclass(frozen=True)
class Raw:
    """Instructions as they are."""

    code: bytes


def pickled(value, protocol=2) -> bytes:
    """A pickle of a value."""
    return bytes([0x80, protocol]) + _body(value) + b"."


def _body(value) -> bytes:
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        size = (value.bit_length() + 8) // 8
        return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(text)) + text
    if isinstance(value, bytes):
        return _body(Call("_codecs.encode", (value.decode("latin1"), "latin1")))
    if isinstance(value, list):
        return b"](" + b"".join(map(_body, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_body, value)) + b"t"
    if isinstance(value, dict):
        return b"}(" + b"".join(_body(k) + _body(v) for k, v in value.items()) + b"u"
    if isinstance(value, Name):
        module, _, name = value.name.rpartition(".")
        return f"c{module}\n{name}\n".encode()
    if isinstance(value, Call):
        made = _body(Name(value.name)) + _body(value.arguments) + (b"\x81" if value.new else b"R")
        return made if value.state is None else made + _body(value.state) + b"b"
    if isinstance(value, Persistent):
        return _body(value.identifier) + b"Q"
    assert isinstance(value, Raw)
    return value.code


class Storages:
    """Arrays as tensors of a pickle, and the bytes of their storages."""

    def __init__(self, order="<", legacy=False):
        self.order, self.legacy = order, legacy
        self.contents, self.counts = {}, {}

    def tensor(
        self,
        array,
        *,
        offset=0,
        shape=None,
        stride=None,
        more=(False, None),
        kind=None,
        size=None,
    ):
        """A call that rebuilds an array; arguments take the place of the true ones."""
        array = np.asarray(array)
        key = str(len(self.contents))
        words = array.view(f"u{array.itemsize}") if array.dtype.kind in "fiub" else array
        self.contents[key] = words.astype(words.dtype.newbyteorder(self.order)).tobytes()
        self.counts[key] = array.size
        name = Name(f"torch.{kind or STORAGE[array.dtype.name]}Storage")
        rest = (None,) if self.legacy else ()
        storage = Persistent(("storage", name, key, "cpu", size or array.size, *rest))
        strides = tuple(s // array.itemsize for s in array.strides) if stride is None else stride
        shape = array.shape if shape is None else shape
        return Call("torch._utils._rebuild_tensor_v2", (storage, offset, shape, strides, *more))


def zipped(saved, storages, *, prefix="archive", entries=None, compress=False) -> bytes:
    """A zip archive of torch.save; further entries replace those of a name."""
    order = b"big" if storages.order == ">" else b"little"
    files = {"data.pkl": pickled(saved), "byteorder": order, "version": b"3\n"}
    files |= {f"data/{key}": content for key, content in storages.contents.items()}
    files |= entries or {}
    stream = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(stream, "w", kind) as archive:
        for name, content in files.items():
            if content is not None:
                archive.writestr(zipfile.ZipInfo(f"{prefix}/{name}"), content, kind)
    return stream.getvalue()


def legacy(saved, storages) -> bytes:
    """A file of torch.save as before PyTorch 1.6."""
    little = storages.order == "<"
    system = {"protocol_version": PROTOCOL, "little_endian": little}
    parts = [pickled(MAGIC), pickled(PROTOCOL), pickled(system), pickled(saved)]
    parts.append(pickled(list(storages.contents)))
    for key, content in storages.contents.items():
        parts += [struct.pack(f"{storages.order}q", storages.counts[key]), content]
    return b"".join(parts)


def torch_file(state, wrap=lambda state: state, old=False, order="<", **more) -> bytes:
    """A state dict as torch.save writes it; `wrap` puts it into a checkpoint."""
    storages = Storages(order, old)
    tensors = {n: a if isinstance(a, Call | Raw) else storages.tensor(a) for n, a in state.items()}
    saved = wrap(tensors)
    return legacy(saved, storages) if old else zipped(saved, storages, **more)


SAFE = {"float32": "F32", "float64": "F64", "float16": "F16", "int64": "I64", "int8": "I8"}
SAFE |= {"int32": "I32", "uint8": "U8", "bool": "BOOL", "complex64": "C64", "bfloat16": "BF16"}
SAFE |= {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0"}
SAFE |= {"float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ"}


def safe_file(state, metadata=None, **changes) -> bytes:
    """A state dict as safetensors writes it; changes are fields of a tensor's entry, by its name."""
    header, parts, end = {} if metadata is None else {"__metadata__": metadata}, [], 0
    for name, array in state.items():
        array = np.asarray(array)
        parts.append(array.tobytes())
        entry = {"dtype": SAFE[array.dtype.name], "shape": list(array.shape)}
        header[name] = entry | {"data_offsets": [end, end + len(parts[-1])]}
        end += len(parts[-1])
    for name, fields in changes.items():
        header[name] = fields if not isinstance(fields, dict) else header[name] | fields
    return with_header(json.dumps(header).encode(), b"".join(parts))


def with_header(header: bytes, numbers: bytes = b"") -> bytes:
    """A file of safetensors with a header of any content."""
    return struct.pack("<Q", len(header)) + header + numbers


def library_of(content: bytes) -> str | None:
    """The library that reads a file, by its beginning."""
    if content[8:9] == b"{":
        return "safetensors"
    return "torch" if content[:2] in (b"PK", b"\x80\x02") else None
