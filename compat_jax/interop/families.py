"""State dicts of other libraries under the names of timm, which are those of the backbones here.

| family | names |
|---|---|
| torchvision's ViT | `conv_proj`, `class_token`, `encoder.layers.encoder_layer_0.ln_1`, ... |
| facebook's DINOv2 | timm's, but `register_tokens` and `mask_token` |
| torchvision's ConvNeXt | `features.1.0.block.0`, ... |
| facebook's ConvNeXt | `downsample_layers.0.0`, `stages.0.0.dwconv`, ... |

Prefixes of wrappers before these names stay; `weights.convert` strips them.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import numpy as np

_Renames: TypeAlias = tuple[tuple[str, str], ...]
_VIT: _Renames = (
    (r"class_token$", "cls_token"),
    (r"conv_proj\.", "patch_embed.proj."),
    (r"encoder\.pos_embedding$", "pos_embed"),
    (r"encoder\.ln\.", "norm."),
    (r"encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"(?<=\.)ln_([12])\.", r"norm\1."),
    (r"(?<=\.)self_attention\.in_proj_", "attn.qkv."),
    (r"(?<=\.)self_attention\.out_proj\.", "attn.proj."),
    # Published files have the older of the two names.
    (r"(?<=\.mlp\.)(?:0|linear_1)\.", "fc1."),
    (r"(?<=\.mlp\.)(?:3|linear_2)\.", "fc2."),
)
_DINOV2: _Renames = ((r"register_tokens$", "reg_token"),)
_CONVNEXT: _Renames = (
    (r"features\.0\.(\d)\.", r"stem.\1."),
    *((rf"features\.{2 * n + 1}\.(\d+)\.", rf"stages.{n}.blocks.\1.") for n in range(4)),
    *((rf"features\.{2 * n}\.(\d)\.", rf"stages.{n}.downsample.\1.") for n in (1, 2, 3)),
    (r"(?<=\.)block\.0\.", "conv_dw."),
    (r"(?<=\.)block\.2\.", "norm."),
    (r"(?<=\.)block\.3\.", "mlp.fc1."),
    (r"(?<=\.)block\.5\.", "mlp.fc2."),
    (r"(?<=\.)layer_scale$", "gamma"),
    (r"classifier\.0\.", "head.norm."),
)
_FACEBOOK_CONVNEXT: _Renames = (
    (r"downsample_layers\.0\.(\d)\.", r"stem.\1."),
    (r"downsample_layers\.([123])\.(\d)\.", r"stages.\1.downsample.\2."),
    (r"(?<=\.)dwconv\.", "conv_dw."),
    (r"(?<=\.)pwconv([12])\.", r"mlp.fc\1."),
    (r"(?<!\d\.)norm\.(?=weight$|bias$)", "head.norm."),
)


class _Family(NamedTuple):
    """Names of a library.

    Attributes:
      mark: pattern that one of a state dict's names has.
      renames: patterns and their replacements, applied one after the other.
      dropped: pattern of names whose tensors features do not need.
    """

    mark: str
    renames: _Renames
    dropped: str = r"(?!)"


_FAMILIES = (
    _Family(r"encoder\.layers\.encoder_layer_\d+\.", _VIT),
    _Family(r"(?:^|\.)(?:mask_token|register_tokens)$", _DINOV2, r"(?:^|\.)mask_token$"),
    _Family(r"(?:^|\.)features\.\d+\.\d+\.layer_scale$", _CONVNEXT),
    _Family(r"(?:^|\.)downsample_layers\.\d\.\d\.", _FACEBOOK_CONVNEXT),
)


def renamed(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a state dict under timm's names; names of no known family stay.

    Args:
      state_dict: arrays by name, as any of the libraries wrote it.

    Returns:
      The same arrays, ConvNeXt's factors as float[channels] and the class token of DINOv2 with
      registers with its position added, as timm stores them; `mask_token` is left out.
    """
    family = next((f for f in _FAMILIES if any(re.search(f.mark, n) for n in state_dict)), None)
    if family is None:
        return dict(state_dict)
    kept = {n: a for n, a in state_dict.items() if not re.search(family.dropped, n)}
    found = {_renamed(name, family.renames): array for name, array in kept.items()}
    for name, array in found.items():
        if name.endswith("gamma") and array.ndim == 3:
            found[name] = array.reshape(-1)
    return _without_class_position(found)


def _renamed(name, renames):
    for pattern, replacement in renames:
        # Not inside the name of a module.
        name = re.sub(rf"(?<![^.]){pattern}", replacement, name)
    return name


def _without_class_position(state_dict):
    """Positions without the class token's, which is added to it, where there are registers."""
    for name, registers in state_dict.items():
        if not name.endswith("reg_token"):
            continue
        prefix = name.removesuffix("reg_token")
        cls, positions = (state_dict.get(f"{prefix}{n}") for n in ("cls_token", "pos_embed"))
        if cls is None or positions is None or positions.ndim != 3 or _side(positions.shape[1]):
            return state_dict
        if cls.shape != (1, 1, positions.shape[2]) or registers.ndim != 3:
            return state_dict
        return {
            **state_dict,
            f"{prefix}cls_token": cls + positions[:, :1],
            f"{prefix}pos_embed": positions[:, 1:],
        }
    return state_dict


def resized_positions(positions: np.ndarray, tokens: int) -> np.ndarray | None:
    """Resample learned positions of a ViT for another number of patches.

    Args:
      positions: float[1, n, width] of a square grid of patches, behind one of the class token if n is
        no square number.
      tokens: positions that are needed, of the same kind.

    Returns:
      float[1, tokens, width]; None where either is not square, or only one has a class token.

    Source: `resample_abs_pos_embed` of timm: bicubic, antialiased.
    """
    if positions.ndim != 3 or len(positions) != 1:
        return None
    given = positions.shape[1]
    first = 0 if _side(given) and _side(tokens) else 1
    old, new = _side(given - first), _side(tokens - first)
    if not old or not new:
        return None
    grid = positions[0, first:].astype(np.float64).reshape(old, old, -1)
    weights = _bicubic(old, new)
    resized = np.einsum("pi,qj,ijc->pqc", weights, weights, grid, optimize=True)
    patches = resized.reshape(1, new * new, -1).astype(positions.dtype)
    return np.concatenate([positions[:, :first], patches], axis=1)


def _side(count):
    """The side of a square grid of this many patches; 0 where there is none."""
    side = math.isqrt(max(count, 0))
    return side if side * side == count else 0


def _bicubic(old, new):
    """Weights of the old pixels, float64[new, old], of an antialiased bicubic resize.

    Source: `_upsample_bicubic2d_aa` of PyTorch, which is Pillow's, with Keys' a = -1/2.
    """
    scale = old / new
    stretch = max(scale, 1.0)
    centres = (np.arange(new) + 0.5) * scale
    distance = np.abs(np.arange(old) + 0.5 - centres[:, None]) / stretch
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)
