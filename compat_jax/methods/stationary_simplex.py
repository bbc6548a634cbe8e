"""CoReS: the fixed simplex, from scratch on all data seen."""

from compat_jax.methods.base import LossInputs, Method
from compat_jax.methods.registry import register


@register("CoReS (simplex, from scratch)", "Biondi et al., CoReS, TPAMI 2023")
def cores() -> Method:
    """Train each version anew, on all images of the classes seen, with the simplex cross-entropy.

    Nothing of the old model is used: compatible is what shares the prototypes. The loss is that of
    `sce`; the scenario differs, and costs a training from scratch for each version.

    Source: `src/cores/train.py` of NiccoBiondi/cores-compatibility.
    """
    return Method(
        "cores", LossInputs.cross_entropy, fresh_start=True, all_data=True, takes_padding=True
    )
