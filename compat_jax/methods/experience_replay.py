"""Experience replay with a learnable classifier: the comparison that is not compatible."""

from compat_jax.methods.base import LossInputs, Method
from compat_jax.methods.registry import register


@register("ER (learnable classifier)", "experience replay with a growing learnable classifier")
def er() -> Method:
    """Train a growing learnable classifier with cross-entropy; features are the pooled backbone."""
    return Method("er", LossInputs.cross_entropy, fixed_simplex=False)
