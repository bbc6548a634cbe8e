"""d-Simplex with cross-entropy only."""

from compat_jax.methods.base import LossInputs, Method
from compat_jax.methods.registry import register


@register("d-Simplex, cross-entropy only", "the same paper's ablation without the contrast")
def sce() -> Method:
    """Train with the cross-entropy over the fixed simplex alone."""
    return Method("sce", LossInputs.cross_entropy, takes_padding=True)
