"""Compare the ways to upgrade between two versions of a chain."""

import time
from collections.abc import Callable, Sequence

import numpy as np

from compat_jax import align, evaluation
from compat_jax.afterwards.measuring import Spaces, left_out, measure
from compat_jax.afterwards.plan import Plan
from compat_jax.afterwards.results import Comparison, packed, unpacked
from compat_jax.array_cache import Cache
from compat_jax.chain import Chain, Version
from compat_jax.data.dataset import Dataset
from compat_jax.data.roles import check_same_classes
from compat_jax.data.same_pictures import same_pictures
from compat_jax.errors import Stopped, UserError
from compat_jax.evaluation import Maps
from compat_jax.models import computed_in
from compat_jax.retrieval import embed
from compat_jax.retrieval import metric as metrics_by_name
from compat_jax.retrieval.metric import Metric
from compat_jax.retrieval.mixed import Both
from compat_jax.session import Session

METRICS = ("identification", "recall@1")  # one by classes, one by images
SAMPLE = 2000  # queries: every way searches the gallery once a share and metric
_TIMED = 256  # images by which the time to embed one is measured


def compare(
    chain: Chain,
    query: Dataset,
    gallery: Dataset,
    *,
    metrics: Sequence[Metric | str] = METRICS,
    plan: Plan | None = None,
    dtype: str = "float32",
    session: Session | None = None,
) -> Comparison:
    """Measure all ways between two versions of a chain, on at most 2,000 queries.

    A way that cannot be measured on these data is left out, and the result says why: maps on fewer than
    four gallery images, `slerp` where no class has two of the images to fit on, `naive` where the
    features of the versions have different sizes.

    Args:
      chain: with at least two versions.
      query: labelled images that ask.
      gallery: labelled images that answer.
      metrics: names or `Metric` objects, of different names. Of those of yours nothing is kept in the
        cache but the features.
      plan: the versions, and what maps are fitted on.
      dtype: of the networks' computation.
      session: devices and the cache: what an evaluation with it has embedded is not embedded again, and
        a second comparison computes nothing.

    Raises:
      Stopped: the session asked to stop.
      UserError: a chain of one version, versions out of order, unknown metrics, classes of query and
        gallery that differ, a plan without a way that can be measured.
    """
    session, plan, dtype = session or Session(), plan or Plan(), computed_in(dtype)
    found = metrics_by_name.chosen(metrics)
    check_same_classes(query, gallery)
    old, new = _versions(chain, plan)
    settings = f"{dtype} {query.fingerprint()} {gallery.fingerprint()}"
    made_of = [f"{v.sha256} {v.record}" for v in (old, new)]
    made_of += [plan.address(), *(metric.name for metric in found)]

    def features(data):
        if session.should_stop():
            raise Stopped
        return [evaluation.features(v, data, dtype=dtype, session=session) for v in (old, new)]

    def compute():
        spaces = _spaces((query, gallery), plan, features, mesh=session.devices())
        gone = left_out(spaces, plan)
        if not set(plan.ways) - gone.keys():
            named = "; ".join(f"{way}: {reason}" for way, reason in gone.items())
            raise UserError(f"no way can be measured ({named})", "ways")
        seconds = _seconds_an_image(new, gallery, dtype=dtype, session=session)
        ways = tuple(measure(spaces, found, plan, seconds_an_image=seconds))
        return packed(
            Comparison(
                (old.number, new.number),
                ways,
                gallery_size=len(gallery),
                queries=len(spaces.queries.labels),
                candidates=plan.candidates,
                from_gallery=plan.pictures is None,
                seconds_an_image=seconds,
                left_out=gone,
            )
        )

    cache = evaluation.scores_cache(Cache(session.cache, settings), found)
    return unpacked(cache.get("ways", made_of, compute))


def sampled(count: int) -> np.ndarray:
    """Return the rows of at most 2,000 of `count` queries, drawn with seed 0, ascending."""
    if count <= SAMPLE:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, SAMPLE, replace=False))


def _versions(chain: Chain, plan: Plan) -> tuple[Version, Version]:
    numbers = chain.require_whole().numbers()
    if len(numbers) < 2:
        raise UserError(f"{chain.path} has one version: there is nothing to upgrade", "chain")
    try:
        old, new = numbers[plan.old], numbers[plan.new]
    except IndexError as error:
        raise UserError(
            f"{chain.path} has {len(numbers)} versions: there is no {plan.old} or no {plan.new}"
        ) from error
    if old >= new:
        raise UserError(
            f"the gallery's version must be older than that of the queries, got {old} and {new}"
        )
    return chain.open(old), chain.open(new)


def _spaces(data: tuple[Dataset, Dataset], plan: Plan, features: Callable, *, mesh) -> Spaces:
    query, gallery = data
    asked, own = sampled(len(query)), same_pictures(query, gallery)
    old, new = features(gallery)
    answering = Both(old, new, gallery.need_labels())
    old, new = features(query)
    rows = None if own is None else own[asked]
    asking = Both(old[asked], new[asked], query.need_labels()[asked], rows)
    fitted = None if plan.pictures is not None else _rows(plan, len(answering.labels))
    pairs = _pairs(plan, answering, features)
    return Spaces(asking, answering, pairs, mesh, fitted=fitted)


def _rows(plan: Plan, count: int) -> np.ndarray:
    return Maps(pairs=plan.pairs, seed=plan.seed).drawn(count)


def _pairs(plan: Plan, gallery: Both, features: Callable) -> align.Pairs:
    """The pairs to fit maps on: the first gallery images of the order, or the pictures of the plan."""
    if plan.pictures is None:
        rows = _rows(plan, len(gallery.labels))
        return align.Pairs(gallery.old[rows], gallery.new[rows], gallery.labels[rows])
    order = np.random.default_rng(plan.seed).permutation(len(plan.pictures))
    chosen = plan.pictures.take(np.sort(order[: plan.pairs]))
    old, new = features(chosen)
    return align.Pairs(old, new, chosen.need_labels())


def _seconds_an_image(version, data, *, dtype, session) -> float:
    """Time a second pass over some images: the first one compiles."""
    rows = np.arange(min(_TIMED, len(data)))
    options = {"mesh": session.devices(), "batch_size": session.batch_size, "dtype": dtype}
    some = data.take(rows)
    for _ in range(2):
        began = time.perf_counter()
        embed(version, some, **options)
        seconds = (time.perf_counter() - began) / len(rows)
    return seconds
