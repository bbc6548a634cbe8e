"""Load files of `torch.save` through PyTorch, without running anything that they contain.

`torch.load` with `weights_only=True` makes tensors and plain values and refuses every other class.
The settings that training programs save beside the weights are common and harmless: each of their
classes is replaced by a `StandIn`, which keeps the values given to it. None of them is imported.

Source of the formats: `torch/serialization.py`.
"""

import io
import re
import struct
import threading
import warnings
import zipfile
import zlib
from types import ModuleType
from typing import Any

from compat_jax.errors import UserError
from compat_jax.interop.tensors import shown

_TORCH_2_10 = (2, 10)
INSTALL = 'pip install "compat_jax[torch]"'
# Classes beside weights in checkpoints of the reference, timm, torchvision's and OmegaConf's users.
_CLASSES = {
    "argparse": "Namespace",
    "builtins": "bool bytes dict float frozenset int list object range slice str tuple",
    "datetime": "date datetime time timedelta timezone",
    "iamcl2r.params": "ExperimentParams",
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "omegaconf.base": "ContainerMetadata Metadata",
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "omegaconf.nodes": "AnyNode BooleanNode FloatNode IntegerNode PathNode StringNode",
    "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
    "pathlib._local": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
    "PIL.Image": "Resampling",
    "torchvision.transforms.autoaugment": (
        "AugMix AutoAugment AutoAugmentPolicy RandAugment TrivialAugmentWide"
    ),
    "torchvision.transforms.functional": "InterpolationMode",
    "torchvision.transforms.transforms": (
        "CenterCrop ColorJitter Compose ConvertImageDtype GaussianBlur Grayscale Normalize "
        "PILToTensor Pad RandomAffine RandomApply RandomCrop RandomErasing RandomGrayscale "
        "RandomHorizontalFlip RandomResizedCrop RandomRotation RandomVerticalFlip Resize ToPILImage "
        "ToTensor"
    ),
    "types": "SimpleNamespace",
    "typing": "Any",
}
_NAMED = re.compile(r"GLOBAL (\S+) (?:was not an allowed|whose module)")
_OPCODE = re.compile(r"Unsupported operand \d+")
# PyTorch does not look at the order of bytes that its older format states in its third pickle.
_BIG_ENDIAN = re.compile(rb"little_endian(q.)?\x89")
_LEGACY_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")
_ZIP_ERRORS = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, LookupError),
    *(NotImplementedError, OSError, RuntimeError, ValueError),
)
_LOCK = threading.Lock()  # torch's list of safe names is global


class StandIn:
    """An object of a file, in the place of one of its class.

    Attributes:
      kind: "module.name" of the class, or of the function that would have made it.
      state: its attributes, mostly a dict.
    """

    kind = ""
    state: Any = None

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        self.state = state

    @property
    def attributes(self) -> dict[str, Any]:
        """Return its attributes by name; {} where they are not."""
        return self.state if isinstance(self.state, dict) else {}


def _dict(*_):
    """A defaultdict without its default."""
    return {}


def _list(*_):
    """A deque without its limit."""
    return []


_SAFE = [
    *(
        (type(name, (StandIn,), {"kind": f"{module}.{name}"}), f"{module}.{name}")
        for module, names in _CLASSES.items()
        for name in names.split()
    ),
    (_dict, "collections.defaultdict"),
    (_list, "collections.deque"),
]


def import_torch(purpose: str) -> ModuleType:
    """Return the module torch.

    Args:
      purpose: for the error, e.g. "writing a.pt".

    Raises:
      UserError: not installed.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise UserError(
            f"{purpose} needs PyTorch, which is not installed: {INSTALL} (torch's CPU build is "
            "enough), or use a .safetensors file"
        ) from error
    return torch


def load(content: bytes) -> Any:
    """Load a file of `torch.save`, of the zip format or the older one.

    Args:
      content: of the file.

    Returns:
      What was saved: tensors on the CPU, plain values, a `StandIn` for each object of a known class.

    Raises:
      UserError: PyTorch is missing or too old, the file is damaged, none of `torch.save`, or holds
        classes or functions that are not known to be harmless.
    """
    if content[:2] == b"PK":
        _check_zip(content)
    else:
        _check_legacy(content)
    torch = import_torch("reading a file of torch.save")
    if torch.torch_version.TorchVersion(torch.__version__) < _TORCH_2_10:
        raise UserError(
            f"reading a file of torch.save needs PyTorch 2.10 or later, not {torch.__version__}: a "
            "forged file can make older ones run code even with weights_only (CVE-2026-24747)"
        )
    with _LOCK, torch.serialization.safe_globals(_SAFE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about types of tensors that are refused by name later
        try:
            return torch.load(io.BytesIO(content), "cpu", weights_only=True, mmap=False)
        except Exception as error:  # a forged file makes torch and Python raise almost any kind
            raise _refusal(torch, content, str(error)) from error


def _refusal(torch, content, text):
    """The error for a file that torch.load did not read."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
    except Exception:
        found = _NAMED.findall(text)
    if not found:
        if _OPCODE.search(text):
            return UserError(
                "holds a pickle that PyTorch does not read without running it: broken, or saved with "
                "another pickle_protocol than torch.save's own"
            )
        return UserError("is cut off or damaged: fetch it again (PyTorch cannot read it)")
    names = ", ".join(shown(name) for name in sorted(found)[:10])
    if any(name.startswith("torch.nn.modules.") for name in found):
        return UserError(
            f"holds a whole network, which only its own program can open ({names}): save the result "
            "of its state_dict()"
        )
    return UserError(
        f"is refused: opening it would run code of {names}; nothing of it was run. If you trust it, "
        "save its weights alone where those modules are installed: "
        "torch.save(torch.load(f, weights_only=False)['net'], out)"
    )


def _check_zip(content):
    """Refuse archives that are none of torch.save, and damage: PyTorch does not verify checksums."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            names = {entry.filename for entry in entries}
            _check_entries(entries, names)
            bad = archive.testzip()
    except UserError:
        raise
    except _ZIP_ERRORS as error:
        raise UserError("is cut off or damaged: fetch it again (its zip cannot be read)") from error
    if bad is not None:
        raise UserError(f"is damaged: {shown(bad)} differs from its checksum; fetch it again")


def _check_entries(entries, names):
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(names) < len(entries):
        raise UserError("is damaged: its zip has an entry twice")
    if len(pickles) != 1:
        raise UserError("is a zip archive, but none of torch.save: give the file of weights in it")
    if pickles[0].replace("data.pkl", "constants.pkl") in names:
        raise UserError(
            "is TorchScript, a program: save its weights alone, "
            "torch.save(torch.jit.load(f).state_dict(), out)"
        )
    # What is not packed cannot expand.
    if any(
        e.compress_type != zipfile.ZIP_STORED or e.compress_size != e.file_size for e in entries
    ):
        raise UserError("is no file of torch.save: its zip is compressed")


def _check_legacy(content):
    if _LEGACY_MAGIC not in content[:20]:
        raise UserError(
            "is a pickle, but none of torch.save: save its weights with torch.save or safetensors"
        )
    if _BIG_ENDIAN.search(content[:200]):
        raise UserError(
            "was written on a big-endian machine in torch.save's older format: save again"
        )
