"""d-Simplex-HOC, the paper's method."""

from typing import Annotated

import jax

from compat_jax import losses
from compat_jax.fields import Rule
from compat_jax.methods.base import LossInputs, Method, previous_features, previous_variables
from compat_jax.methods.registry import register


@register("d-Simplex-HOC", "Biondi et al., TPAMI 2026 (arXiv 2606.12488)")
def hoc(
    lam: Annotated[float, Rule("weight of the cross-entropy", low=0, high=1)] = 0.1,
    mu: Annotated[float, Rule("inverse temperature of the contrast", above=0)] = 10.0,
    same_class: Annotated[
        str,
        Rule(
            "pairs of one class in the contrast: left out (paper) or counted as exp(0) (code)",
            choices=losses.SAME_CLASS,
        ),
    ] = "exclude",
) -> Method:
    """Train with lam * simplex cross-entropy + (1 - lam) * contrast against the previous model.

    Args:
      lam: weight of the cross-entropy, in [0, 1].
      mu: inverse temperature of the contrast, > 0.
      same_class: "exclude" (paper) or "as_coded" (reference), see `losses.info_nce`.

    Source: Equation 3 of the CVPR 2024 paper; `src/iamcl2r/train.py`.
    """

    def loss(inputs: LossInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        contrast = losses.info_nce(
            inputs.outputs.features,
            inputs.taught,
            inputs.targets,
            mu=mu,
            same_class=same_class,  # type: ignore[arg-type]
        )
        cross_entropy = inputs.cross_entropy()
        terms = {"cross_entropy": cross_entropy, "contrast": contrast}
        return lam * cross_entropy + (1.0 - lam) * contrast, terms

    return Method(
        "hoc",
        loss,
        freeze=previous_variables,
        teach=previous_features,
        terms=("cross_entropy", "contrast"),
        takes_padding=True,
    )
