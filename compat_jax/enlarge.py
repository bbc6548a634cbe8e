"""Move a chain to a simplex with room for more classes, without reading a picture again."""

import dataclasses
import functools

import numpy as np

from compat_jax import simplex
from compat_jax.chain import Chain, Record
from compat_jax.errors import UserError
from compat_jax.files import check_memory
from compat_jax.meter import track


def enlarge(
    chain: Chain, target: Chain, num_prototypes: int, *, progress: str | None = None
) -> None:
    """Write every version of a chain anew for a simplex of more prototypes.

    Each version's projection is multiplied by `simplex.enlargement`, which keeps the scores between its
    features; classes keep their numbers. Galleries move by the same product (`enlarge_features`), at
    the price of one matrix product and of rows of K'-1 instead of K-1 numbers. Call again after a kill:
    versions that were written are not written again.

    Args:
      chain: of a fixed simplex.
      target: another folder; empty, or begun by this call before.
      num_prototypes: K' of the new chain, larger than the old one's.
      progress: label of a progress bar; None for none.

    Raises:
      UserError: a learnable head, K' not larger, the target is another chain, or too little memory.
    """
    first = chain.require_whole().record(0)
    if not first.head.is_fixed:
        raise UserError("the chain has a learnable head, which grows by itself: nothing to enlarge")
    if target.path == chain.path:
        raise UserError("the enlarged chain needs a folder of its own", "out")
    check_memory(8 * num_prototypes * (first.num_prototypes + num_prototypes), "the map")
    target.sweep()
    done = target.numbers()
    for number in track(chain.numbers(), progress, "versions"):
        record = chain.record(number)
        moved = dataclasses.replace(
            record,
            num_prototypes=num_prototypes,
            feature_size=num_prototypes - 1,
            learnt={**record.learnt, "enlarged_from": record.num_prototypes},
        )
        if number in done:
            _check_same(target.record(number), moved, target)
            continue
        version = chain.open(number)
        turn = _map(record, num_prototypes)
        kernel = np.asarray(version.variables["params"]["projection"]["kernel"])
        projection = {"kernel": (kernel.astype(np.float64) @ turn).astype(np.float32)}
        params = {**version.variables["params"], "projection": projection}
        target.add({**version.variables, "params": params}, moved, number)


def enlarge_features(features: np.ndarray, record: Record, num_prototypes: int) -> np.ndarray:
    """Move features that a version extracted to the simplex that `enlarge` moved the version to.

    Args:
      features: float[n, K-1], as the version of the record extracted them.
      record: of the version before it was enlarged.
      num_prototypes: K' of the new chain.

    Returns:
      float32[n, K'-1] with the same norms and the same inner products.

    Raises:
      UserError: features of another size, or K' not larger.
    """
    if features.ndim != 2 or features.shape[1] != record.feature_size:
        raise UserError(
            f"the version's features have {record.feature_size} columns, got shape {features.shape}",
            "features",
        )
    return (features @ _map(record, num_prototypes)).astype(np.float32)


def _map(record: Record, num_prototypes: int) -> np.ndarray:
    order: simplex.LabelOrder = record.label_order  # type: ignore[assignment]
    return _kept_map(record.num_prototypes, num_prototypes, order)


# A gallery is moved a page at a time, by the same map.
_kept_map = functools.lru_cache(maxsize=1)(simplex.enlargement)


def _check_same(found: Record, wanted: Record, target: Chain) -> None:
    if found != wanted:
        raise UserError(
            f"there is another chain in {target.path}: enlarge into another folder", "out"
        )
