"""Convert weights of an embedder to and from the state dict of its PyTorch counterpart, by name.

| here | PyTorch |
|---|---|
| module `layer1_0`, `layer1_blocks_0`, `downsample_0`, ... | `layer1.0`, `layer1.blocks.0`, ... |
| module `stages_0_blocks_1`, `head_norm` of ConvNeXt | `stages.0.blocks.1`, `head.norm` |
| the embedder's own layers `projection` and `head` | `fc1` and `fc2` |
| convolution `kernel` [h, w, in, out] | `weight` [out, in, h, w] |
| linear `kernel` [in, out] | `weight` [out, in] |
| norm `scale`, `bias` | `weight`, `bias` |
| BatchNorm `mean`, `var` (of the unbiased variance in both) | `running_mean`, `running_var` |
| - | `num_batches_tracked`: written as 0, not read (momentum is fixed) |
| fixed simplex, which has no variable | `fc2.weight`: written as the prototypes, checked when read |

The rest agrees by construction: `models.layers.BatchNorm` has PyTorch's epsilon of 1e-5 and its
momentum (0.1 there is 0.9 here). Values are copied unchanged, so a round trip returns the same bits.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from compat_jax import simplex
from compat_jax.errors import UserError
from compat_jax.interop.families import renamed, resized_positions
from compat_jax.interop.tensors import float32, is_counter, shown

# Modules that PyTorch numbers inside a container. In other names (`bn_1`) a trailing number stays.
_INDEXED = re.compile(r"(layer\d+|stage_\d+|blocks|downsample|shortcut|stem|conv1)(_blocks)?_(\d+)")
_STAGES = re.compile(r"stages_(\d+)_(blocks|downsample)_(\d+)")
_NESTED = {"head_norm": "head.norm"}
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# Layers of the embedder itself. Layers of these names inside a backbone keep them.
_TOP_LEVEL = {"projection": "fc1", "head": "fc2"}
_OWN_WEIGHTS = tuple(f"{name}.weight" for name in _TOP_LEVEL.values())
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}
_FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0)}
# Classifiers of torchvision (fc, heads.head, classifier.2), timm (fc, head, head.fc) and of the usual
# CIFAR networks (linear).
_FOREIGN_HEADS = tuple(
    f"{h}.{leaf}"
    for h in ("fc", "head", "head.fc", "heads.head", "classifier.2", "linear")
    for leaf in ("weight", "bias")
)
# Modules that training programs wrap a network in, and the one of torch.compile, anywhere in a name.
_WRAPPERS, _COMPILED = ("module", "model", "backbone"), "_orig_mod"
_LISTED = 20


class Misfit(UserError):
    """A state dict that does not fit a network.

    Attributes:
      missing: names that the network has and the state dict lacks.
      unknown: names that the network lacks.
      misshapen: {name in the state dict: (shape in the network, shape in the state dict)}.
    """

    def __init__(self, missing: list[str], unknown: list[str], misshapen: dict[str, tuple]):
        self.missing, self.unknown, self.misshapen = sorted(missing), sorted(unknown), misshapen
        groups = {
            "missing": self.missing,
            "unknown": [shown(name) for name in self.unknown],
            "misshapen": [
                f"{shown(name)} (wanted {wanted}, found {found})"
                for name, (wanted, found) in sorted(misshapen.items())
            ],
        }
        parts = [f"{kind}: {_listed(names)}" for kind, names in groups.items() if names]
        super().__init__(f"the state dict does not fit the network; {'; '.join(parts)}")


def to_torch(
    variables: Mapping[str, Any], classes_seen: int | None = None
) -> dict[str, np.ndarray]:
    """Convert variables of an embedder to the state dict of the reference's network.

    Args:
      variables: {"params", "batch_stats"} of an `Embedder`, leaves float32.
      classes_seen: number of rows of a learnable `fc2` to write, since the reference's grows with the
        classes; None writes all. Without effect on a fixed simplex.

    Returns:
      Arrays by name; `load_state_dict(..., strict=True)` of the reference accepts them.

    Source: names of `Incremental_ResNet` in `src/iamcl2r/models/__init__.py`.
    """
    state: dict[str, np.ndarray] = {}
    for path, leaf in _leaves(variables).items():
        array = np.asarray(leaf)
        if path[-1] == "kernel":
            array = array.transpose(_TO_TORCH[array.ndim])
        name = _torch_name(path[1:])
        state[name] = np.array(array, order="C")
        if path[0] == "batch_stats" and path[-1] == "var":
            module = name.removesuffix(".running_var")
            state[f"{module}.num_batches_tracked"] = np.zeros((), np.int64)
    if "fc2.weight" in state:
        state["fc2.weight"] = state["fc2.weight"][:classes_seen]
    elif "fc1.weight" in state:
        state["fc2.weight"] = np.array(simplex.prototypes(state["fc1.weight"].shape[0] + 1))
    return state


def from_torch(
    state_dict: Mapping[str, np.ndarray], template: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Convert a PyTorch state dict to variables of an embedder, see `convert`.

    Args:
      state_dict: arrays by name.
      template: {"params", "batch_stats"} of the embedder, for names and shapes.

    Returns:
      {"params", "batch_stats"} with the structure of the template.

    Raises:
      UserError: see `convert`.
    """
    return convert(state_dict, template)[0]


def convert(
    state_dict: Mapping[str, np.ndarray], template: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """Convert a PyTorch state dict to variables of an embedder, and list the layers that it lacks.

    It reads state dicts of the reference's network and of a bare backbone: torchvision's and timm's
    ResNets, ViTs and ConvNeXts and facebook's DINOv2 and ConvNeXt, see `families`, with or without the
    `.blocks.` infix. The prefixes `module.`, `model.`, `backbone.` and `_orig_mod.` are stripped, in
    any combination. The classifier of a bare backbone is dropped; projection and head, which it lacks,
    keep the values of the template. Positions of a ViT are resampled, see `fitted`.

    Args:
      state_dict: arrays by name, of any float type; cast to float32.
      template: {"params", "batch_stats"} of the embedder, for names and shapes.

    Returns:
      {"params", "batch_stats"} with the structure of the template, and the names of the embedder's own
      layers if the state dict is that of a bare backbone.

    Raises:
      Misfit: tensors are unknown, missing or have another shape; each is named.
      UserError: a tensor is there twice, values are whole, complex or not finite, or a fixed
        classifier is not the simplex.
    """
    state_dict, _ = fitted(state_dict, template)
    bare = is_bare(state_dict)
    wanted = {_merge_blocks(_torch_name(path[1:])): path for path in _leaves(template)}
    if bare:
        wanted = {name: path for name, path in wanted.items() if name.startswith("backbone.")}
    given, unknown = _matched(state_dict, wanted, bare)
    if "fc2.weight" not in wanted and "fc2.weight" in given:
        _check_prototypes(np.asarray(state_dict[given.pop("fc2.weight")]), wanted, template)
    arrays, misshapen = {}, {}
    for name, given_name in given.items():
        path, shape = wanted[name], _at(template, wanted[name]).shape
        array = np.asarray(state_dict[given_name])
        if array.shape != _torch_shape(path, shape):
            misshapen[given_name] = (_torch_shape(path, shape), array.shape)
            continue
        array = float32(given_name, array)
        if path[-1] == "kernel":
            array = np.array(array.transpose(_FROM_TORCH[array.ndim]), order="C")
        arrays[path] = array
    missing = [_torch_name(wanted[name][1:]) for name in wanted.keys() - given.keys()]
    if missing or unknown or misshapen:
        raise Misfit(missing, unknown, misshapen)
    merged = {"params": {}, "batch_stats": {}} | unflatten_dict(_leaves(template) | arrays)
    fresh = tuple(sorted(template["params"].keys() - {"backbone"})) if bare else ()
    return {collection: merged[collection] for collection in ("params", "batch_stats")}, fresh


def fitted(
    state_dict: Mapping[str, np.ndarray], template: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Rename the tensors of other libraries, and resample positions made for another image size.

    Args:
      state_dict: arrays by name.
      template: {"params", "batch_stats"} of the embedder, for names and shapes.

    Returns:
      The state dict, and a sentence if positions were resampled.
    """
    state_dict = renamed(state_dict)
    wanted = template["params"].get("backbone", {}).get("pos_embed")
    name = next((n for n in state_dict if _stripped(n) == "pos_embed"), None)
    if wanted is None or name is None or state_dict[name].shape == wanted.shape:
        return state_dict, ()
    count = state_dict[name].shape[1] if state_dict[name].ndim == 3 else 0
    resized = resized_positions(state_dict[name], wanted.shape[1])
    if resized is None:
        return state_dict, ()
    note = (
        f"{count} positions were resampled (bicubic) to {wanted.shape[1]}, for another image size"
    )
    return {**state_dict, name: resized}, (note,)


def is_bare(state_dict: Mapping[str, Any]) -> bool:
    """Return True for the state dict of a backbone alone, without an embedder's own layers.

    Args:
      state_dict: tensors by name.
    """
    return not any(_stripped(name) in _OWN_WEIGHTS for name in state_dict)


def head_rows(state_dict: Mapping[str, np.ndarray]) -> int | None:
    """Return the number of classes of the embedder's classifier in a state dict; None without one.

    Args:
      state_dict: arrays by name.
    """
    weights = [array for name, array in state_dict.items() if _stripped(name) == "fc2.weight"]
    return int(weights[0].shape[0]) if weights and weights[0].ndim else None


def overlap(
    state_dict: Mapping[str, np.ndarray], template: Mapping[str, Any], shapes: bool = True
) -> float:
    """Return how well a state dict fits a backbone: 1 for the same tensors, 0 for none in common.

    Args:
      state_dict: arrays by name.
      template: {"params", "batch_stats"} of an embedder of the backbone.
      shapes: whether shapes must agree, too.
    """
    state_dict, _ = fitted(state_dict, template)
    paths = {_merge_blocks(_torch_name(path[1:])): path for path in _leaves(template)}
    wanted = {name: path for name, path in paths.items() if name.startswith("backbone.")}
    rest = {n: a for n, a in state_dict.items() if _stripped(n) not in _OWN_WEIGHTS}
    given, unknown = _matched(rest, wanted, True)

    def fits(name):
        shape = _torch_shape(wanted[name], _at(template, wanted[name]).shape)
        return not shapes or state_dict[given[name]].shape == shape

    return sum(map(fits, given)) / max(len(wanted) + len(unknown), 1)


def _leaves(variables):
    return flatten_dict({k: variables.get(k) or {} for k in ("params", "batch_stats")})


def _at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def _torch_name(path):
    modules = [_module_name(module) for module in path[:-1]]
    modules[:1] = [_TOP_LEVEL.get(module, module) for module in modules[:1]]
    return ".".join([*modules, _LEAVES.get(path[-1], path[-1])])


def _module_name(module):
    if match := _STAGES.fullmatch(module):
        return ".".join(["stages", *match.groups()])
    return _NESTED.get(module) or _INDEXED.sub(_number, module)


def _number(match):
    return f"{match[1]}{'.blocks' if match[2] else ''}.{match[3]}"


def _torch_shape(path, shape):
    if path[-1] != "kernel":
        return shape
    return tuple(shape[axis] for axis in _TO_TORCH[len(shape)])


def _merge_blocks(name):
    return name.replace(".blocks.", ".")


def _forms(name):
    """A name with ever fewer of the modules that its network is wrapped in."""
    modules = [part for part in name.split(".") if part != _COMPILED]
    yield ".".join(modules)
    while len(modules) > 1 and modules[0] in _WRAPPERS:
        modules = modules[1:]
        yield ".".join(modules)


def _stripped(name):
    *_, last = _forms(name)
    return last


def _matched(state_dict, wanted, bare):
    """Given names by the network's names, and the given names that the network does not know."""
    found: dict[str, str] = {}
    unknown = []
    for given in state_dict:
        if is_counter(given):
            continue
        forms = list(_forms(given))
        known = [_merge_blocks(n) for form in forms for n in (form, f"backbone.{form}")]
        names = [name for name in known if name in wanted]
        if not bare and forms[-1] == "fc2.weight":  # the network has none if its simplex is fixed
            names.append("fc2.weight")
        if names and names[0] in found:
            raise UserError(
                f"{shown(found[names[0]])} and {shown(given)} are the same tensor: leave one of them out"
            )
        if names:
            found[names[0]] = given
        elif not bare or forms[-1] not in _FOREIGN_HEADS:
            unknown.append(given)
    return found, unknown


def _check_prototypes(weight, wanted, template):
    """Refuse a fixed classifier that is not the simplex: it belongs to another network."""
    if "fc1.weight" not in wanted:
        return
    num_prototypes = _at(template, wanted["fc1.weight"]).shape[1] + 1
    if weight.shape != (num_prototypes, num_prototypes - 1):
        raise UserError(
            f"fc2.weight has shape {weight.shape}, the simplex of num_prototypes={num_prototypes} "
            f"has {(num_prototypes, num_prototypes - 1)}: give the num_prototypes of the file, or "
            "its method if that has a learnable classifier (er)",
            "num_prototypes",
        )
    distance = float(np.abs(weight - np.asarray(simplex.prototypes(num_prototypes))).max())
    if not distance < 1e-3:
        raise UserError(
            f"fc2.weight is not the fixed simplex (largest difference {distance:.2g}): was it trained "
            "with a learnable classifier? Import it with that method, or delete fc2.weight from the "
            "file"
        )


def _listed(names):
    more = f", ... ({len(names) - _LISTED} more)" if len(names) > _LISTED else ""
    return f"{', '.join(names[:_LISTED])}{more}"
