"""Independent models: what each version could be without any regard for the old ones."""

from typing import Annotated

from compat_jax.fields import Rule
from compat_jax.methods.base import LossInputs, Method
from compat_jax.methods.registry import register


@register("Independent models", "the upper reference (phi*) of every table of compatible training")
def independent(
    data: Annotated[
        str,
        Rule(
            "what a version learns: all images of the classes seen, or those of its task and the memory",
            choices=("seen", "task"),
        ),
    ] = "seen",
) -> Method:
    """Train each version anew with cross-entropy, by a classifier of its own.

    A version starts from the pre-trained model that its generation started from, else from fresh
    weights drawn for its task. Its own test is the denominator of the update gain; against an old
    gallery it finds by chance, unless both started from one pre-trained model.

    Args:
      data: "seen" or "task".
    """
    return Method(
        "independent",
        LossInputs.cross_entropy,
        fixed_simplex=False,
        fresh_start=True,
        all_data=data == "seen",
    )
