"""Methods on a model axis, where the simplex's columns are padded to divide over devices."""

import dataclasses

from compat_jax import mesh as meshes
from compat_jax.methods.base import Forward, LossInputs, Method, TaskStart
from compat_jax.models import Outputs


def without_padding(method: Method, size: int, padded: int) -> Method:
    """Return the method for a network whose projection has columns of zeros behind its own.

    The method sees features and projections of its own columns only.

    Args:
      method: that does not take padding.
      size: its own columns, K-1.
      padded: columns of the network's projection.
    """

    def cut(tree):
        return meshes.resize_projection(tree, size)

    def pad(tree):
        return meshes.resize_projection(tree, padded)

    def features(outputs: Outputs) -> Outputs:
        return outputs._replace(features=outputs.features[:, :size])

    def shown(inputs: LossInputs) -> LossInputs:
        return inputs._replace(outputs=features(inputs.outputs), frozen=cut(inputs.frozen))

    def teach(forward: Forward, frozen, carried):
        def own(variables):
            return features(forward(pad(variables)))

        return method.teach(own, cut(frozen), cut(carried))

    def update(carried, variables, inputs: LossInputs):
        return pad(method.update(cut(carried), cut(variables), shown(inputs)))

    def freeze(start: TaskStart):
        return pad(method.freeze(dataclasses.replace(start, variables=cut(start.variables))))

    return dataclasses.replace(
        method,
        loss=lambda inputs: method.loss(shown(inputs)),
        freeze=freeze,
        teach=teach,
        init=lambda variables: pad(method.init(cut(variables))),
        update=update,
    )
