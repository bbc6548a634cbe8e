"""Weights of an embedder to and from the state dict of its PyTorch counterpart, by name.

| here | PyTorch |
|---|---|
| module `layer1_0`, `layer1_blocks_0`, `downsample_0`, ... | `layer1.0`, `layer1.blocks.0`, ... |
| convolution `kernel` [h, w, in, out] | `weight` [out, in, h, w] |
| linear `kernel` [in, out] | `weight` [out, in] |
| norm `scale`, `bias` | `weight`, `bias` |
| BatchNorm `mean`, `var` (of the unbiased variance in both) | `running_mean`, `running_var` |
| - | `num_batches_tracked`: written as 0, not read (momentum is fixed) |
| fixed simplex, which has no variable | `fc2.weight`: written as the prototypes, checked when read |

What is not in the weights agrees by construction: `models.layers.BatchNorm` keeps PyTorch's epsilon
of 1e-5 and its momentum (0.1 there is 0.9 here). Values move without a change: a round trip returns
the same bits.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from compat_jax import simplex
from compat_jax.errors import UserError

# Modules that PyTorch numbers inside a container; a trailing number of any other (`bn_1`) is a name.
_INDEXED = re.compile(r"(layer\d+|stage_\d+|blocks|downsample|shortcut)(_blocks)?_(\d+)")
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}
_FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0)}
# Classifiers of torchvision (fc), timm (fc, head) and of the usual CIFAR networks (linear).
_FOREIGN_HEADS = tuple(
    f"{h}.{leaf}" for h in ("fc", "head", "linear") for leaf in ("weight", "bias")
)
_LISTED = 20


def to_torch(
    variables: Mapping[str, Any], classes_seen: int | None = None
) -> dict[str, np.ndarray]:
    """Variables of an embedder as the state dict of the reference's network.

    Args:
      variables: {"params", "batch_stats"} of an `Embedder`, leaves float32.
      classes_seen: rows of a learnable `fc2` to write, as the reference's grows with the classes;
        None writes all. Of no effect on a fixed simplex.

    Returns:
      Arrays by name, such that `load_state_dict(..., strict=True)` of the reference accepts them.

    Source: names of `Incremental_ResNet` in `src/iamcl2r/models/__init__.py`.
    """
    state = {}
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
    """A PyTorch state dict as variables of an embedder.

    Read are state dicts of the reference's network (with DDP's `module.` prefix, with or without the
    `.blocks.` infix) and of a bare backbone, such as torchvision's and timm's ResNets and timm's
    ViTs. The classifier of a bare backbone is dropped, and what it does not hold of the embedder
    (`fc1`, `fc2`) stays as it is in the template.

    Args:
      state_dict: arrays by name; of any float type, cast to float32.
      template: {"params", "batch_stats"} of the embedder, for its names and shapes.

    Returns:
      {"params", "batch_stats"} with the template's structure.

    Raises:
      UserError: unknown, missing or misshapen tensors, each by name; a fixed classifier that is not
        the simplex.
    """
    bare, found, given_names = _canonical(state_dict)
    wanted = {_merge_blocks(_torch_name(path[1:])): path for path in _leaves(template)}
    if bare:
        wanted = {name: path for name, path in wanted.items() if name.startswith("backbone.")}
    elif "fc2.weight" not in wanted:
        _check_prototypes(found.pop("fc2.weight", None), wanted, template)
    arrays, misshapen = {}, []
    for name in wanted.keys() & found.keys():
        path = wanted[name]
        array = found[name]
        if path[-1] == "kernel" and array.ndim in _FROM_TORCH:
            array = array.transpose(_FROM_TORCH[array.ndim])
        shape = _at(template, path).shape
        if array.shape == shape:
            arrays[path] = np.array(array, np.float32, order="C")
        else:
            wanted_shape = _torch_shape(path, shape)
            misshapen.append(
                f"{given_names[name]} (wanted {wanted_shape}, found {found[name].shape})"
            )
    missing = [_torch_name(wanted[name][1:]) for name in wanted.keys() - found.keys()]
    unknown = [given_names[name] for name in found.keys() - wanted.keys()]
    _report(missing, unknown, misshapen)
    merged = {"params": {}, "batch_stats": {}} | unflatten_dict(_leaves(template) | arrays)
    return {collection: merged[collection] for collection in ("params", "batch_stats")}


def unwrap(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict inside a checkpoint: under "net" in the reference's, else the whole."""
    for key in ("net", "state_dict", "model"):
        if isinstance(checkpoint.get(key), Mapping):
            return checkpoint[key]
    return checkpoint


def is_bare(state_dict: Mapping[str, Any]) -> bool:
    """Whether a state dict is a backbone's alone, without the embedder around it."""
    return not any(_strip(name).startswith("backbone.") for name in state_dict)


def _leaves(variables):
    return flatten_dict({k: variables.get(k) or {} for k in ("params", "batch_stats")})


def _at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def _torch_name(path):
    modules = [_INDEXED.sub(_number, module) for module in path[:-1]]
    return ".".join([*modules, _LEAVES.get(path[-1], path[-1])])


def _number(match):
    return f"{match[1]}{'.blocks' if match[2] else ''}.{match[3]}"


def _torch_shape(path, shape):
    if path[-1] != "kernel":
        return shape
    return tuple(shape[axis] for axis in _TO_TORCH[len(shape)])


def _strip(name):
    return name.removeprefix("module.")


def _merge_blocks(name):
    return name.replace(".blocks.", ".")


def _canonical(state_dict):
    """Whether it is a bare backbone; arrays, and given names, by names that all forms share."""
    bare = is_bare(state_dict)
    found, given_names = {}, {}
    for given, array in state_dict.items():
        name = _strip(given)
        if name.endswith("num_batches_tracked") or (bare and name in _FOREIGN_HEADS):
            continue
        name = _merge_blocks(f"backbone.{name}" if bare else name)
        found[name], given_names[name] = np.asarray(array), given
    return bare, found, given_names


def _check_prototypes(weight, wanted, template):
    """A fixed classifier carries nothing to load, but another one tells of another network."""
    if weight is None or "fc1.weight" not in wanted:
        return
    num_classes = _at(template, wanted["fc1.weight"]).shape[1] + 1
    if weight.shape != (num_classes, num_classes - 1):
        raise UserError(
            f"fc2.weight has shape {weight.shape}, the simplex of num_classes={num_classes} has "
            f"{(num_classes, num_classes - 1)}: give the num_classes of the file, or its method if "
            "that has a learnable classifier (er)"
        )
    distance = float(np.abs(weight - np.asarray(simplex.prototypes(num_classes))).max())
    if not distance < 1e-3:
        raise UserError(
            f"fc2.weight is not the fixed simplex (largest difference {distance:.2g}): was it trained "
            "with a learnable classifier? Import it with that method, or delete fc2.weight from the "
            "file"
        )


def _report(missing, unknown, misshapen):
    groups = {"missing": missing, "unknown": unknown, "misshapen": misshapen}
    parts = []
    for kind, names in groups.items():
        names = sorted(names)
        if names:
            more = f", ... ({len(names) - _LISTED} more)" if len(names) > _LISTED else ""
            parts.append(f"{kind}: {', '.join(names[:_LISTED])}{more}")
    if parts:
        raise UserError(
            f"the state dict does not fit the network; {'; '.join(parts)}. Give the backbone and the "
            "number of classes that it was made with"
        )
