"""Hostile weight files: each ends in one line that names the file, or in the right values.

Files of torch.save need PyTorch, those of safetensors its library: without them these are skipped.

`pytest -m slow` adds thousands of damaged files.
"""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import socket
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from networks import assert_same_bits, network, random_variables
from weight_bytes import (
    MAGIC,
    MISSING,
    Call,
    Name,
    Persistent,
    Raw,
    Storages,
    legacy,
    library_of,
    pickled,
    safe_file,
    torch_file,
    with_header,
    zipped,
)

from compat_jax.errors import UserError
from compat_jax.interop import chains, to_torch, torch_files
from compat_jax.models import Backbone
from compat_jax.training import Run

SHAPE = (32, 32, 3)
RUN = Run(method="hoc", backbone=Backbone("resnet_small", {"width": 4}), num_prototypes=10)
VARIABLES = random_variables(network())
STATE = {n: a for n, a in to_torch(VARIABLES).items() if not n.endswith("num_batches_tracked")}
NAME = "backbone.bn1.bias"
DAMAGED = "is cut off or damaged: fetch it again ("
SECONDS = 20


@dataclasses.dataclass(frozen=True)
class Case:
    """A file and how reading it ends.

    Attributes:
      name: of the case.
      content: bytes, or a function that makes the file at a path.
      message: of the error; "" for a file that is right.
      file: its name.
    """

    name: str
    content: bytes | Callable[[Any], Any]
    message: str = ""
    file: str = "w.pt"

    @property
    def library(self) -> str | None:
        """The library that reads the file."""
        return None if callable(self.content) else library_of(self.content)


def ends_well(path, message, ema=False) -> bool:
    """Return whether the file was read, to the right values; else it was refused in one line."""
    with limited():
        try:
            weights = torch_files.load(path, ema)
            adopted = chains.adopt_file(weights, RUN, SHAPE)
        except UserError as error:
            text = str(error)
            assert str(path) in text and text.isprintable() and len(text) < 6000, text
            assert not any(words in text for words in ("load failed", "safe_globals", "Traceback"))
            assert message is None or (message and message in text), text
            return False
    assert not message, "was read"
    assert_same_bits(adopted.variables, VARIABLES)
    return True


@contextlib.contextmanager
def limited():
    """Fail work that hangs."""

    def ring(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def make(case, folder):
    path = folder / case.file
    if callable(case.content):
        case.content(path)
    else:
        path.write_bytes(case.content)
    return path


# --- numbers that weights cannot have


def numbers():
    good = STATE[NAME]
    wrong = {
        "int8": (good.astype(np.int8), "holds int8 numbers"),
        "int64": (good.astype(np.int64), "holds int64 numbers"),
        "uint8": (good.astype(np.uint8), "holds uint8 numbers"),
        "bool": (good > 0, "holds bool numbers"),
        "complex64": (good.astype(np.complex64), "holds complex64 numbers"),
        "nan": (np.float32([np.nan] * len(good)), "holds 2 values that float32 does not have"),
        "inf": (np.float32([np.inf, *good[1:]]), "holds 1 values that float32 does not have"),
        "half inf": (np.float16([np.inf] * len(good)), "holds 2 values that float32 does not have"),
        "too large": (np.full(len(good), 1e300), "holds 2 values that float32 does not have"),
    }
    for name, (array, message) in wrong.items():
        state = STATE | {NAME: array}
        for old in (False, True):
            content = torch_file(state, old=old)
            yield Case(f"{name}, {'old' if old else 'zip'}", content, f"tensor {NAME} {message}")
        content = safe_file(state)
        yield Case(f"{name}, safetensors", content, f"tensor {NAME} {message}", "w.safetensors")
    counted = STATE | {"backbone.bn1.num_batches_tracked": np.int64(7)}
    yield Case("counter", torch_file(counted))
    yield Case("counter of an average", torch_file(counted | {"n_averaged": np.int64(3)}))
    narrow = STATE | {n: STATE[n].astype(np.float64) for n in list(STATE)[:5]}
    yield Case("float64", torch_file(narrow))
    yield Case("float64, safetensors", safe_file(narrow))
    for dtype in ("F8_E4M3X", "F4", "F6_E2M3", "I4", "", 3, None, ["F32"]):
        content = safe_file(STATE, **{NAME: {"dtype": dtype}})
        yield Case(f"dtype {dtype}", content, "w.safetensors", "w.safetensors")
    storages = {
        **{s: f"run code of torch.{s}Storage" for s in ("Foo", "ComplexHalf", "Untyped")},
        **{s: DAMAGED for s in ("QInt8", "QUInt8", "Char", "Double", "ComplexFloat")},
        "QInt32": f"tensor {NAME} is quantised",
        "Int": f"tensor {NAME} holds int32 numbers",
    }
    for storage, message in storages.items():
        made = functools.partial(Storages.tensor, array=STATE[NAME], kind=storage)
        yield Case(f"storage {storage}", with_tensor(made), message)


# --- tensors that are not dense


UTILS = "torch._utils."


def with_tensor(made):
    """The weights with another tensor in the place of one."""
    stored = Storages()
    state = {n: stored.tensor(a) for n, a in STATE.items()}
    state[NAME] = made(stored) if callable(made) else made
    return zipped(state, stored)


def with_gradient(stored):
    return stored.tensor(STATE[NAME], more=(True, Call("collections.OrderedDict")))


def tensors():
    odd = {
        **{
            f"no arguments of {function}": (Call(f"{UTILS}_rebuild_{function}", ()), DAMAGED)
            for function in ("tensor", "sparse_tensor", "qtensor", "nested_tensor", "tensor_v3")
        },
        "xla": (Call(f"{UTILS}_rebuild_xla_tensor", ()), f"run code of {UTILS}_rebuild_xla_tensor"),
        "later": (Call(f"{UTILS}_rebuild_of_2030", ()), f"run code of {UTILS}_rebuild_of_2030"),
        "oldest": (Call("torch.Tensor", (), (), new=True), f"misshapen: {NAME}"),
        "far too large": (Call("torch.Tensor", (2**45,)), DAMAGED),
        "own class": (Call("my.Weights", (), {"a": 1}, new=True), "run code of my.Weights"),
        "settings": (Call("argparse.Namespace", (), {}, new=True), f"not tensors: {NAME}"),
        "function": (Name(f"{UTILS}_rebuild_tensor_v2"), f"not tensors: {NAME}"),
        "number": (3.0, f"not tensors: {NAME}"),
        "none": (None, f"not tensors: {NAME}"),
        "gradient": (with_gradient, ""),
    }
    for name, (made, message) in odd.items():
        yield Case(f"tensor: {name}", with_tensor(made), message)


def views():
    good = STATE[NAME]
    views = {
        "expanded": ({"shape": (2,), "stride": (0,)}, 1, f"tensor {NAME} is an expanded view"),
        "beyond": ({"offset": 2}, None, DAMAGED),
        "huge": ({"shape": (2**40,)}, None, DAMAGED),
        "endless": ({"shape": (2**60,)}, None, DAMAGED),
        "endless without a step": (
            {"shape": (2**40,), "stride": (0,)},
            None,
            "is an expanded view",
        ),
        "many axes": ({"shape": (1,) * 60, "stride": (1,) * 60}, 1, f"tensor {NAME} has 60 axes"),
        "negative": ({"shape": (-2,)}, None, DAMAGED),
        "backwards": ({"offset": 1, "stride": (-1,)}, None, DAMAGED),
        "before": ({"offset": -1}, None, DAMAGED),
        "float shape": ({"shape": (2.0,)}, None, DAMAGED),
        "text shape": ({"shape": ("2",)}, None, DAMAGED),
        "two strides": ({"stride": (1, 1)}, None, DAMAGED),
        "far stride": ({"stride": (2**45,)}, None, DAMAGED),
        "negated": ({"more": (False, None, {"neg": True})}, None, f"tensor {NAME} is a lazy"),
        "odd metadata": ({"more": (False, None, {"my": True})}, None, ""),
        "too few": ({"more": ()}, None, DAMAGED),
    }
    for name, (fields, count, message) in views.items():
        made = functools.partial(Storages.tensor, array=good[:count], **fields)
        yield Case(f"view: {name}", with_tensor(made), message)
    for old in (False, True):
        for name, size in {"more": 3, "far more": 10**6, "endless": 2**50}.items():
            stored = Storages(legacy=old)
            saved = {NAME: stored.tensor(good, size=size)}
            content = (legacy if old else zipped)(saved, stored)
            yield Case(f"storage said {name}, {'old' if old else 'zip'}", content, DAMAGED)
    less = functools.partial(Storages.tensor, array=good, size=1)
    yield Case("storage said fewer, zip", with_tensor(less), DAMAGED)
    identifiers = {
        "other": ("module", "x", "y", "z", 1),
        "short": ("storage",),
        "text": "storage",
        "key": ("storage", Name("torch.FloatStorage"), ["0"], "cpu", 2),
        "outside": ("storage", Name("torch.FloatStorage"), "../data.pkl", "cpu", 2),
        "missing": ("storage", Name("torch.FloatStorage"), "999", "cpu", 2),
        "no type": ("storage", None, "0", "cpu", 2),
    }
    for name, identifier in identifiers.items():
        call = Call(
            f"{UTILS}_rebuild_tensor_v2", (Persistent(identifier), 0, (2,), (1,), False, None)
        )
        yield Case(f"storage: {name}", with_tensor(call), DAMAGED)
    parameter = f"{UTILS}_rebuild_parameter"
    hooks = Call("collections.OrderedDict")
    yield Case("parameter", with_tensor(lambda s: Call(parameter, (s.tensor(good), True, hooks))))


# --- files of another kind


def kinds():
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 97781721\n"
    page = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
    others = {
        "empty": (b"", "is empty"),
        "pointer": (pointer, "is a pointer of Git LFS, not the weights: git lfs pull"),
        "page": (page, "is a web page (HTML)"),
        "page in capitals": (b"<HTML><BODY>404</BODY></HTML>", "is a web page (HTML)"),
        "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page"),
        "json": (b'{"error": "not found"}', "is a text of JSON"),
        "index": (b'{"metadata": {}, "weight_map": {"a": "b"}}', "is a text of JSON"),
        "text": (b"Not found", "is no weight file"),
        "zeros": (bytes(4096), "is no weight file"),
        "one byte": (b"\x80", "is a pickle"),
        "gzip": (b"\x1f\x8b\x08\x00" + bytes(60), "packed with gzip"),
        "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(60), "HDF5"),
        "gguf": (b"GGUF\x03" + bytes(60), "GGUF"),
        "npy": (b"\x93NUMPY\x01\x00" + bytes(60), "NumPy"),
        "png": (b"\x89PNG\r\n\x1a\n" + bytes(60), "is no weight file"),
        "elf": (b"\x7fELF" + bytes(60), "is no weight file"),
        "tar": (b"sys_info" + bytes(504), "is no weight file"),
        "empty zip": (b"PK\x05\x06" + bytes(18), "none of torch.save"),
        "half a zip": (b"PK\x03\x04" + bytes(60), "is cut off or damaged"),
        "pickle": (pickled({"a": 1}), "is a pickle, but none of torch.save"),
        "magic alone": (pickled(MAGIC), DAMAGED),
        "later format": (
            pickled(MAGIC) + pickled(2002),
            DAMAGED,
        ),
    }
    for name, (content, message) in others.items():
        for file in ("w.pt", "w.safetensors"):
            expected = message if name != "one byte" else file
            yield Case(f"{name} called {file}", content, expected, file)
    files = {
        "word": {"data.pkl": None, "document.xml": b"x"},
        "npz": {"data.pkl": None, "a.npy": b""},
    }
    for name, entries in files.items():
        yield Case(name, zipped({}, Storages(), entries=entries), "none of torch.save")
    script = zipped({}, Storages(), entries={"constants.pkl": pickled(())})
    yield Case("torchscript", script, "is TorchScript, a program")
    yield Case("packed", torch_file(STATE, compress=True), "its zip is compressed")
    nested = zipped({}, Storages(), entries={"deeper/data.pkl": pickled({})})
    yield Case("no weights", nested, "not tensors: empty")
    for name in ("w.bin", "w.pth", "w.safetensors", "w"):
        yield Case(f"zip called {name}", torch_file(STATE), "", name)
        yield Case(f"safetensors called {name}", safe_file(STATE), "", name)
    yield Case("old called safetensors", torch_file(STATE, old=True), "", "w.safetensors")
    yield Case("big endian", torch_file(STATE, order=">"))
    old = torch_file(STATE, old=True, order=">")
    yield Case("big endian, old", old, "was written on a big-endian machine")


# --- safetensors


def headers():
    def raw(name, header, message, body=b""):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return Case(f"header: {name}", with_header(text, body), message, "w.safetensors")

    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    yield raw("empty", {}, "not tensors: empty")
    yield raw("only metadata", {"__metadata__": {"a": "b"}}, "not tensors: empty")
    yield raw("no json", b"{]", DAMAGED)
    yield raw("no utf-8", b'{"\xff": 1}', DAMAGED)
    yield raw("deep", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", DAMAGED)
    yield raw("long number", b'{"a": ' + b"9" * 10_000 + b"}", DAMAGED)
    for name, wrong in {"number": 3, "list": [], "text": "x", "none": None}.items():
        yield raw(f"entry {name}", {"a": wrong}, DAMAGED)
    broken = {
        "no offsets": {"data_offsets": None},
        "one offset": {"data_offsets": [0]},
        "text offsets": {"data_offsets": ["0", "4"]},
        "float offsets": {"data_offsets": [0.0, 4.0]},
        "true offsets": {"data_offsets": [False, 4]},
        "negative offsets": {"data_offsets": [-4, 0]},
        "turned offsets": {"data_offsets": [4, 0]},
        "no shape": {"shape": None},
        "text shape": {"shape": "a"},
        "negative shape": {"shape": [-1]},
        "huge shape": {"shape": [2**62]},
    }
    for name, fields in broken.items():
        yield raw(name, {"a": entry | fields}, DAMAGED, bytes(4))
    yield raw("axes", {"a": entry | {"shape": [1] * 100}}, "tensor a has 100 axes", bytes(4))
    yield raw("larger shape", {"a": entry | {"shape": [2]}}, DAMAGED, bytes(4))
    yield raw("too few", {"a": entry}, DAMAGED, bytes(2))
    yield raw("too many", {"a": entry}, DAMAGED, bytes(9))
    yield raw("overlap", {"a": entry, "b": entry}, DAMAGED, bytes(4))
    gap = {"a": entry | {"data_offsets": [4, 8]}}
    yield raw("gap", gap, DAMAGED, bytes(8))
    twice = f'{{"a": {json.dumps(entry)}, "a": {json.dumps(gap["a"])}}}'
    yield raw("twice", twice.encode(), DAMAGED, bytes(8))
    good = safe_file(STATE)
    for name, size in {"beyond": len(good), "endless": 2**63, "zero": 0, "one": 1}.items():
        content = struct.pack("<Q", size) + good[8:]
        yield Case(f"header size {name}", content, "w.safetensors", "w.safetensors")
    for name, value in {"list": [1], "deep": {"a": {"b": 1}}, "text": "x"}.items():
        yield Case(f"metadata {name}", _metadata(value), DAMAGED, "w.safetensors")
    for name, value in {"none": None, "empty": {}, "odd": {"pretrained_cfg": "[" * 10**5}}.items():
        yield Case(f"metadata {name}", _metadata(value), "", "w.safetensors")


def _metadata(value):
    good = safe_file(STATE)
    size = int.from_bytes(good[:8], "little")
    header = {"__metadata__": value, **json.loads(good[8 : 8 + size])}
    return with_header(json.dumps(header).encode(), good[8 + size :])


# --- pickles


def around(extra, old=False):
    """The weights with something beside them."""
    return torch_file(STATE, lambda state: {"net": state, "extra": extra}, old=old)


def settings():
    harmless = {
        "namespace": Call("argparse.Namespace", (), {"lr": 0.1}, new=True),
        "simple namespace": Call("types.SimpleNamespace", (), {"lr": 0.1}),
        "path": Call("pathlib.PosixPath", ("/", "data")),
        "newer path": Call("pathlib._local.PosixPath", ("/", "data")),
        "scalar": Call(
            "numpy._core.multiarray.scalar", (Call("numpy.dtype", ("f8",)), b"12345678")
        ),
        "array": Call(
            "numpy.core.multiarray._reconstruct", (Name("numpy.ndarray"), (0,), b"b"), (1,)
        ),
        "ordered": Call("collections.OrderedDict", (), {"_metadata": {}}),
        "default": Call("collections.defaultdict", (Name("builtins.list"),)),
        "pairs": Call("collections.OrderedDict", ([["a", 1]],)),
        "bytes": Call("_codecs.encode", ("abc", "latin1")),
        "set": Call("builtins.set", ([1, 2],)),
        "enum": Call("torchvision.transforms.functional.InterpolationMode", ("bilinear",)),
        "class": Name("argparse.Namespace"),
        "type": Name("builtins.dict"),
        "config": Call(
            "omegaconf.dictconfig.DictConfig", (), {"_content": {}, "_metadata": None}, new=True
        ),
        "deque": Call("collections.deque", ([], 3)),
        "deque without a limit": Raw(b"ccollections\ndeque\n)R(K\x01K\x02e"),
        "tensors": {"exp_avg": [Call("torch.Tensor", (2,))]},
        "namespace of odd state": Call("argparse.Namespace", (), [1, 2], new=True),
        "namespace with arguments": Call("argparse.Namespace", (1, 2), {"a": 1}, new=True),
        "namespace of number": Call("argparse.Namespace", (), {1: 2, "mean": {}}, new=True),
        "size": Call("torch.Size", ((1, 2),)),
        "device": Call("torch.device", ("cuda", 0)),
        "date": Call("datetime.datetime", (b"\x07\xe8\x01\x01\x00\x00\x00\x00\x00\x00",)),
        "deep list": Raw(b"]" * 50_000 + b"a" * 49_999),
        "deep tuple": Raw(b")" + b"\x85" * 100_000),
        "deep tuple as key": Raw(b"})" + b"\x85" * 100_000 + b"Ns"),
        "wide": Raw(b"]q\x05" + b"h\x05\x86q\x05" * 200),
        "itself": Raw(b"]q\x07h\x07a"),
        "itself in a dict": Raw(b"}q\x07K\x01h\x07s"),
        "large number": 2**2000,
        "far memo": Raw(b"Nr\xff\xff\xff\x7f"),
    }
    for name, extra in harmless.items():
        yield Case(f"beside: {name}", around(extra))
        yield Case(f"beside, old: {name}", around(extra, old=True))


def pickles():
    calls = ["posix.system", "os.popen", "builtins.exec", "builtins.__import__", "nt.system"]
    calls += ["subprocess.Popen", "runpy.run_path", "ctypes.CDLL", "socket.socket", "os.system"]
    calls += ["builtins.eval", "builtins.getattr", "importlib.import_module", "pickle.loads"]
    calls += ["torch.load", "torch.hub.load", "torch.utils.cpp_extension.load_inline"]
    calls += ["numpy.load", "functools.partial", "operator.attrgetter", "webbrowser.open"]
    calls += ["copyreg._reconstructor", "my.Settings", "torch.optim.sgd.SGD", "types.FunctionType"]
    for name in calls:
        for old in (False, True):
            content = around(Call(name, ("true",)), old)
            # Of the older format, PyTorch drops the module of Python's own functions.
            said = name.removeprefix("builtins.") if old else name
            yield Case(
                f"call {name}, {'old' if old else 'zip'}",
                content,
                f"is refused: opening it would run code of {said}; nothing of it was run",
            )
    several = [Name("my.A"), Name("os.system"), Name("argparse.Namespace")]
    yield Case("several names", around(several), "would run code of my.A, os.system; nothing")
    odd_name = Name("my.\x1b[31mred")
    yield Case("name that colours", around(odd_name), "would run code of 'my.\\x1b[31mred'")
    yield Case("many names", around([Name(f"my.A{n}") for n in range(5000)]), "my.A0, my.A1,")
    method = Call("argparse.Namespace.__init__.__globals__", ())
    yield Case("attribute of a known class", around(method), "is refused")
    yield Case("call of an object", around(Raw(b"cargparse\nNamespace\n)R)R")), DAMAGED)
    class_state = Raw(b"cargparse\nNamespace\n}X\x01\0\0\0aK\x01sb")
    yield Case("state of a class", around(class_state), DAMAGED)
    text = b"(X\x04\x00\x00\x00trueios\nsystem\n"
    yield Case("call INST", around(Raw(text)), "a pickle that PyTorch does not read")
    later = pickled({"net": {}}, 4)[:2] + b"\x95" + bytes(8) + b"N."
    for protocol in (3, 4, 5):
        code = zipped(
            None, Storages(), entries={"data.pkl": b"\x80" + bytes([protocol]) + later[2:]}
        )
        yield Case(f"protocol {protocol}", code, "with another pickle_protocol")
    broken = {
        "underflow": b"0000000000",
        "no mark": b"t",
        "no memo": b"h\x63",
        "no stop": b"(",
        "extension": b"\x82\x01",
        "unknown": b"\xff",
        "buffer": b"\x97",
        "text persistent": b"P0\n",
        "cut text": b"X\xff\xff\xff\x7fabc",
        "endless bytes": b"\x8e" + struct.pack("<Q", 2**62) + b"abc",
        "endless array": b"\x96" + struct.pack("<Q", 2**62) + b"abc",
        "negative number": b"\x8b\xff\xff\xff\xff",
        "append to none": b"NNa",
        "item of none": b"NNNs",
        "call of text": b"X\x01\x00\x00\x00a)R",
        "new of number": b"K\x01)\x81",
        "arguments no tuple": b"cmy\nf\nNR",
        "odd items": b"}(NNNu",
        "list as key": b"}](K\x01eNs",
        "stack global of numbers": b"K\x01K\x02\x93",
        "no float": b"Fabc\n",
        "no text": b"Vabc\\ud8\n",
    }
    for name, code in broken.items():
        yield Case(f"pickle: {name}", around(Raw(code)), "w.pt")
    for name, saved in {"list": [1], "text": "x", "none": None, "number": 3, "tuple": ()}.items():
        yield Case(f"saved {name}", zipped(saved, Storages()), "not a state dict")
    own = Call("my.Net", (), {"_modules": {}}, new=True)
    yield Case("saved network", zipped(own, Storages()), "run code of my.Net")
    layer = Call("torch.nn.modules.linear.Linear", (), {"_modules": {}}, new=True)
    for name, saved in {"": layer, " inside": {"model": layer, "epoch": 3}}.items():
        message = "holds a whole network, which only its own program can open (torch.nn.modules.lin"
        yield Case(f"saved network of torch{name}", zipped(saved, Storages()), message)
    settings = Call("argparse.Namespace", (), {"a": 1}, new=True)
    yield Case("saved settings", zipped(settings, Storages()), "holds a argparse.Namespace")


# --- names


def names():
    def keyed(rename, **more):
        return torch_file({rename(n): a for n, a in STATE.items()}, **more)

    for prefix in ("module.", "_orig_mod.", "model.", "module.model._orig_mod."):
        yield Case(f"prefix {prefix}", keyed(lambda n, p=prefix: p + n))
        twice = STATE | {prefix + NAME: STATE[NAME]}
        message = f"{NAME} and {prefix}{NAME} are the same tensor"
        yield Case(f"twice {prefix}", torch_file(twice), message)
        yield Case(f"twice {prefix}, safetensors", safe_file(twice), message, "w.safetensors")
    yield Case("encoder", keyed(lambda n: f"encoder.{n}"), "unknown: encoder.backbone.bn1.bias")
    strange = {"line": "a\nb", "escape": "\x1b[31mred", "surrogate": "\udc80", "empty": ""}
    strange |= {"nul": "a\0b", "long": "x" * 100_000, "right to left": "a\u202eb", "dots": "..."}
    for name, key in strange.items():
        more = STATE | {key: np.zeros(2, np.float32)}
        yield Case(f"name: {name}", torch_file(more), "unknown: ")
        bad = STATE | {key: np.zeros(2, np.int8)}
        yield Case(f"name of a wrong tensor: {name}", torch_file(bad), "holds int8 numbers")
    for name, key in {"number": 0, "bytes": b"w", "none": None, "tuple": ("a", 1)}.items():
        yield Case(f"key: {name}", torch_file({key: STATE[NAME]}), "not named by text")
        yield Case(f"one key: {name}", torch_file(STATE | {key: STATE[NAME]}), "not named by text")
    few = dict(list(STATE.items())[:3])
    yield Case("few", torch_file(few), "missing: ")
    yield Case(
        "other shape", torch_file(STATE | {NAME: np.zeros((2, 1))}), "misshapen: backbone.bn1"
    )
    yield Case(
        "no shape", torch_file(STATE | {NAME: np.float32(1)}), "misshapen: backbone.bn1.bias"
    )
    yield Case(
        "other simplex", torch_file(STATE | {"fc2.weight": np.ones((10, 9))}), "not the fixed"
    )
    yield Case(
        "flat simplex", torch_file(STATE | {"fc2.weight": np.float32(1)}), "fc2.weight has shape"
    )
    yield Case(
        "flat projection", torch_file(STATE | {"fc1.weight": np.float32(1)}), "misshapen: fc1"
    )


# --- file systems


def places():
    def link(target):
        return lambda path: path.symlink_to(target)

    def listen(path):
        with socket.socket(socket.AF_UNIX) as server:
            here = os.getcwd()
            os.chdir(path.parent)  # the path of a socket must be short
            try:
                server.bind(path.name)
            finally:
                os.chdir(here)

    def sparse(path):
        path.touch()
        os.truncate(path, 2**40)

    def large(path):
        path.write_bytes(b"PK\x03\x04")
        os.truncate(path, 2**43)

    def linked(path):
        need("safetensors")
        (path.parent / "real").write_bytes(safe_file(STATE))
        path.symlink_to("real")

    def around(path):
        path.symlink_to(path)

    yield Case("folder", lambda path: path.mkdir(), "is a folder: give a weight file")
    yield Case("fifo", lambda path: os.mkfifo(path), "is no regular file")
    yield Case("zeros for ever", link("/dev/zero"), "is no regular file")
    yield Case("null", link("/dev/null"), "is no regular file")
    yield Case("terminal", link("/dev/tty"), "w.pt")
    yield Case("socket", listen, "cannot read")
    yield Case("nowhere", link("nowhere"), "no weight file at")
    yield Case("not made", lambda path: None, "no weight file at")
    yield Case("circle", around, "cannot read")
    yield Case("sparse", sparse, "is no weight file")
    yield Case("large", large, "more than this machine's memory")
    yield Case("link", linked)
    yield Case("kernel", link("/proc/self/maps"), "w.pt")


# --- damage


def damaged(seed):
    """A good file with one random damage; where a format has checksums, anywhere."""
    rng = np.random.default_rng(seed)
    kind = ("zip", "old", "safetensors")[seed % 3]
    good = {"zip": ZIP, "old": OLD, "safetensors": SAFE}[kind]
    content = bytearray(good)
    # What is neither checked nor a description could differ without a trace: left as it is.
    end = len(good) if kind == "zip" else int.from_bytes(good[:8], "little") + 8
    end = 60 if kind == "old" else end
    place = int(rng.integers(end))
    damage = ("cut", "flip", "zeros", "insert", "double", "byte")[int(rng.integers(6))]
    if damage == "cut":
        del content[int(rng.integers(len(good))) :]
    elif damage == "flip":
        content[place] ^= 1 << int(rng.integers(8))
    elif damage == "zeros":
        stop = min(place + 16, end)
        content[place:stop] = bytes(stop - place)
    elif damage == "insert":
        content[place:place] = rng.bytes(int(rng.integers(1, 9)))
    elif damage == "double":
        content[place:place] = content[place : place + 64]
    else:
        content[place] = int(rng.integers(256))
    return Case(
        f"{kind}, {damage} {seed}",
        bytes(content),
        "",
        f"w.{'safetensors' if kind == 'safetensors' else 'pt'}",
    )


def need(library):
    if library:
        pytest.importorskip(library, reason=MISSING[library])


ZIP, OLD, SAFE = torch_file(STATE), torch_file(STATE, old=True), safe_file(STATE)
CASES = [
    *(case for family in (numbers, tensors, views, kinds, headers) for case in family()),
    *(case for family in (settings, pickles, names, places) for case in family()),
]


def test_there_are_enough():
    assert len({case.name for case in CASES}) == len(CASES) >= 300


def marked(case):
    marks = [pytest.mark.torch] if case.library == "torch" else []
    return pytest.param(case, id=case.name.replace("\0", ""), marks=marks)


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_a_hostile_file_is_refused_in_one_line_or_read_rightly(case, tmp_path):
    need(case.library)
    assert ends_well(make(case, tmp_path), case.message) == (not case.message)


def garbled(seed):
    """A good file whose pickle has random damages, under a checksum that fits."""
    rng = np.random.default_rng([seed, 1])
    stored = Storages(legacy=bool(seed % 2))
    settings = Call("argparse.Namespace", (), {"lr": 0.1, "m": [1, (2, 3)], "d": {}}, new=True)
    saved = {"net": {NAME: stored.tensor(STATE[NAME])}, "args": settings}
    code = bytearray(legacy(saved, stored) if seed % 2 else pickled(saved))
    for _ in range(int(rng.integers(1, 5))):
        place, other = (int(rng.integers(len(code))) for _ in range(2))
        change = int(rng.integers(4))
        if change == 0:
            code[place] = int(rng.integers(256))
        elif change == 1:
            code[place:place] = rng.bytes(int(rng.integers(1, 6)))
        elif change == 2:
            del code[place : place + int(rng.integers(1, 8))]
        else:
            code[place:place] = code[other : other + int(rng.integers(1, 40))]
    whole = bytes(code)
    return whole if seed % 2 else zipped(None, stored, entries={"data.pkl": whole})


def many(first, step, count):
    """The first seeds, and more with `-m slow`."""
    more = [range(n, n + step) for n in range(first, first + count * step, step)]
    return [range(first), *(pytest.param(seeds, marks=pytest.mark.slow) for seeds in more)]


@pytest.mark.torch
@pytest.mark.parametrize("seeds", many(100, 1000, 6))
def test_a_damaged_file_is_refused_in_one_line_or_read_rightly(seeds, tmp_path):
    need("torch")
    need("safetensors")
    read = [ends_well(make(damaged(seed), tmp_path), None) for seed in seeds]
    assert sum(read) < len(read) / 3


@pytest.mark.torch
@pytest.mark.parametrize("seeds", many(150, 5000, 4))
def test_a_garbled_pickle_ends_in_one_line(seeds, tmp_path):
    need("torch")
    path, refused = tmp_path / "w.pt", 0
    for seed in seeds:
        path.write_bytes(garbled(seed))
        with limited():
            try:
                torch_files.load(path)
            except UserError as error:
                refused += 1
                assert str(path) in str(error) and str(error).isprintable()
    assert refused > len(seeds) / 2
