"""Check, by querying, whether a new version may answer in the gallery that an old one embedded."""

from compat_jax.chain import Version
from compat_jax.data.dataset import Dataset
from compat_jax.data.roles import check_same_classes
from compat_jax.errors import UserError
from compat_jax.gallery.rule import DEFAULT_TERMS, Terms, judge
from compat_jax.gallery.stages import Asked, measure
from compat_jax.gallery.verdict import NO_GO, Measured, Verdict
from compat_jax.retrieval import metric as metrics
from compat_jax.retrieval.metric import Metric
from compat_jax.session import Session
from compat_jax.spaces import differences


def check(
    old: Version,
    new: Version,
    *,
    query: Dataset,
    gallery: Dataset,
    metric: Metric | str = "recall@1",
    terms: Terms = DEFAULT_TERMS,
    session: Session | None = None,
) -> Verdict:
    """Check whether a new version may answer in the gallery of an old one, and the way back.

    Versions that share no space (see `differences`) are a "no-go" without being measured. Of others the
    quality of the answers is measured at every stage of an upgrade (`verdict.STAGES`): today, after the
    switch, with a fiftieth, a tenth and half of the rows embedded again (drawn with seed 0), with all of
    them, and with the old version asking again at the last two, which a rollback meets. The verdict:

    - "go": no stage loses more than `terms.margin` against today, whatever the queries drawn: the 95 %
      intervals of all changes end above it.
    - "no-go": the switch loses more than `terms.limit`, and that it loses more than the margin is no
      chance of the draw.
    - "go with loss": all between, and whatever too few queries leave open. The reasons say what is lost
      at which stage.

    With labels the quality is the metric. Without labels in both data sets it is the share of the new
    version's own k answers, with every row embedded again, that are found: today's answers count by it
    as well, so it tells whether the switch brings the gallery nearer to a full re-index, and takes for
    granted that the new version is the better one.

    Query pictures that are in the gallery as well are not their own answers.

    Args:
      old: version that embedded the gallery and answers today.
      new: version that is to answer.
      query: images that ask.
      gallery: images that answer; a sample of the gallery will do.
      metric: name of a metric or a `Metric`, for data with labels.
      terms: see `rule.Terms`.
      session: devices, batch size, progress bars, and the cache of features.

    Returns:
      `Verdict`. Intervals are of a paired bootstrap over the queries.

    Raises:
      UserError: unknown metric, classes that differ, or too few pictures: without labels 2 `terms.k`.
    """
    session, metric, refused = session or Session(), metrics.get(metric), differences(old, new)
    numbers, digests = (old.number, new.number), (old.sha256, new.sha256)
    if refused:
        return Verdict(NO_GO, refused, *numbers, sha256=digests)
    labelled = query.labels is not None and gallery.labels is not None
    if labelled:
        check_same_classes(query, gallery)
    else:
        _refuse_few(len(gallery), terms.k)
    asked = Asked.embedded((old, new), query, gallery, terms=terms, session=session)
    found = measure(asked, metric if labelled else None, terms)
    word, reasons = judge(found.stages, terms)
    unknown = _not_known(new, asked, found)
    return Verdict(word, reasons, *numbers, sha256=digests, not_known=unknown, measured=found)


def _refuse_few(count: int, k: int) -> None:
    """Refuse a gallery without labels of which all versions would have much the same k nearest."""
    if count < 2:
        raise UserError(
            "without labels a check needs at least 2 pictures that answer: give more, or labels",
            "gallery",
        )
    if 2 * k > count:
        raise UserError(
            f"without labels a version's {k} nearest pictures are compared, and the gallery has only "
            f"{count}, of which so many are much the same for every version: give at least {2 * k} "
            f"pictures, k of at most {count // 2}, or labels",
            "k",
        )


def _not_known(new: Version, asked: Asked, found: Measured) -> tuple[str, ...]:
    sentences = []
    if not found.labelled:
        sentences.append(
            "whether the answers are right, since there are no labels. The quality is agreement with "
            f"what version {new.number} would answer if it had embedded every picture, which takes for "
            f"granted that it is the better version. Flips, false pairs and Definition 1 need labels."
        )
    if asked.own is not None:
        inside = int((asked.own >= 0).sum())
        sentences.append(
            f"how {inside} of the queries fare that are pictures of the gallery: each leaves itself out."
        )
    return tuple(sentences)
