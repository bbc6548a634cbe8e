"""What the backward pass keeps of the forward pass, and what it computes again to save memory."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from compat_jax.errors import unknown

_PRODUCT = "product"
# By setting, what is kept of the inside of a block; None for all that autodiff keeps.
REMAT = {"none": None, "elementwise": (_PRODUCT,), "blocks": ()}
_setting = contextvars.ContextVar("remat", default="none")


@contextlib.contextmanager
def rematerializing(remat: str) -> Iterator[None]:
    """Make networks that are applied within compute a part of their blocks again for the gradient.

    Args:
      remat: "none"; "elementwise" keeps the results of convolutions and dense layers, and computes
        norms, activations and what else is cheap again; "blocks" keeps the inputs of blocks only.

    Raises:
      UserError: another name.

    Source: Chen et al., "Training deep nets with sublinear memory cost", 2016.
    """
    if remat not in REMAT:
        raise unknown("remat", remat, REMAT)
    token = _setting.set(remat)
    try:
        yield
    finally:
        _setting.reset(token)


def block(kind: Any, *static: int) -> Any:
    """Return the class of a block, or one with the same variables that computes its inside again.

    Args:
      kind: Linen module, whose call maps the result of the block before to its own.
      *static: positions of arguments of the call that are no arrays; the module itself is 0.
    """
    names = REMAT[_setting.get()]
    if names is None:
        return kind
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    return nn.remat(kind, static_argnums=static, policy=policy)


def product(x: jax.Array) -> jax.Array:
    """Mark the result of a convolution or a dense layer; its value stays the same."""
    return checkpoint_name(x, _PRODUCT)
