"""The commands of launch.upgrade, from flags to what is printed; each returns its exit code."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from compat_jax.errors import UserError
from compat_jax.meter import counted
from launch import _cli as cli
from launch import _evaluation as evaluation
from launch._upgrade_inputs import (
    lasting,
    list_pictures,
    need_labels,
    numbered,
    open_gallery,
    read_check,
    read_keys,
    read_retrieval,
)

if TYPE_CHECKING:  # import JAX, which programs do after they have parsed their flags
    from compat_jax.chain import Chain
    from compat_jax.data.listing import Picture
    from compat_jax.gallery.gallery import Gallery

EXIT = {"go": 0, "go with loss": 3, "no-go": 4}
DOES_NOT_HOLD = 1  # a claim of the manifest
NOTHING_THERE = 1  # of what was to be deleted
_LINES, _NEAREST = 20, 3  # queries and answers that are printed


def check() -> int:
    """Measure whether a new version may answer in an old one's gallery."""
    args = flags.FLAGS
    chain_path = cli.require("chain", "runs/shop/chain")
    cli.start_jax()
    from compat_jax import metrics
    from compat_jax.chain import Chain
    from compat_jax.gallery.checking import check
    from compat_jax.gallery.rule import Terms
    from compat_jax.spaces import differences

    metrics.get(args.metric)
    terms = Terms(
        margin=args.margin,
        limit=args.limit,
        k=args.k,
        far=args.far,
        threshold=args.threshold,
        dtype=args.dtype,
    )
    chain = Chain(chain_path, args.backbone).require()
    cache = chain.path.parent / "evaluation" / "cache"  # as launch.evaluate's
    session = evaluation.session(cache, cli.StopSignal())
    old, new = chain.open(args.old), chain.open(args.new)
    if old.number == new.number:
        raise UserError(f"--old and --new are both version {old.number}: name two")
    query = gallery = None
    if not differences(old, new):  # no picture is read for a refusal
        query, gallery = read_retrieval(chain, old, session)
    verdict = check(
        old, new, query=query, gallery=gallery, metric=args.metric, terms=terms, session=session
    )
    say(verdict.text(), verdict.summary())
    return EXIT[verdict.word]


def index() -> int:
    """Embed pictures and put them into a store."""
    args = flags.FLAGS
    pictures = list_pictures(cli.require("pictures", "photos/shop"))
    shard = cli.shard(args.shard)
    gallery = open_gallery(make=True)
    version, now = _given("version", gallery.chain), gallery.manifest().query
    if version not in (None, now):
        raise UserError(
            f"version {now} embeds queries and new pictures of this gallery: leave --version out, which "
            f"is for a new store, or let version {version} embed both: launch.upgrade switch "
            f"--to={version}",
            "version",
        )
    done = gallery.index(pictures, replace=args.replace, shard=shard)
    if shard == (0, 1):  # else others may still be writing
        gallery.refresh()
    say(done.sentence(), dataclasses.asdict(done))
    return 0


def query() -> int:
    """Find the nearest pictures of some."""
    args = flags.FLAGS
    asked = [picture.path for picture in list_pictures(cli.require("pictures", "new.jpg"))]
    gallery = open_gallery()
    found = gallery.search(asked, args.k, version=_given("version", gallery.chain))
    from compat_jax.report.answers import Answer, write_answers

    answers = [
        [
            Answer(key, float(score), int(version))
            for key, score, version in zip(keys, scores, versions, strict=False)
        ]
        for keys, scores, versions in zip(found.keys, found.scores, found.versions, strict=True)
    ]
    who = f"version {found.version} asks"
    count = "1 query" if len(asked) == 1 else f"{len(asked):,} queries"
    lines = [f"{who}: {count}; " + _shares(found.shares())]
    most = args.k if len(asked) == 1 else _NEAREST
    for path, nearest in list(zip(asked, answers, strict=True))[:_LINES]:
        lines.append(path)
        lines += [f"  {a.score:.4f}  {a.picture} (version {a.version})" for a in nearest[:most]]
    if args.out:
        drawn = [[a._replace(picture=_place(gallery, a.picture)) for a in row] for row in answers]
        page, *others = write_answers(
            asked, drawn, args.out, title="Answers", subtitle=lines[0] + "."
        )
        lines.append(f"{page} ({len(others)} pictures, tables and figures beside it)")
    summary = {
        "version": found.version,
        "shares": {str(number): share for number, share in found.shares().items()},
        "queries": [
            {"picture": path, "answers": [answer._asdict() for answer in row]}
            for path, row in zip(asked, answers, strict=True)
        ],
    }
    say("\n".join(lines), summary)
    return 0


def switch() -> int:
    """Let another version embed queries, or undo that."""
    args = flags.FLAGS
    if args.rollback == (args.to is not None):
        raise UserError("give one of --to=NUMBER and --rollback")
    gallery = open_gallery()
    before = gallery.manifest().query
    now = gallery.rollback() if args.rollback else gallery.switch(numbered(gallery.chain, args.to))
    text = f"version {now.query} embeds queries and new pictures"
    text += " already" if before == now.query else f" in the place of version {before}"
    say(text, {"before": before, "query": now.query, "previous": now.previous})
    return 0


def backfill() -> int:
    """Embed rows of other versions again."""
    args = flags.FLAGS
    gallery = open_gallery()
    done = gallery.backfill(
        budget=args.budget, until=args.until, order=args.order, to=_given("to", gallery.chain)
    )
    say(done.sentence(), {**dataclasses.asdict(done), "share": done.share})
    return 0


def status() -> int:
    """Say how far a gallery is."""
    args = flags.FLAGS
    pictures = list_pictures(args.pictures) if args.pictures else None
    if args.labels:
        need_labels(pictures or ())
    expected = read_check(args.check) if args.check else None
    gallery = open_gallery()
    asked = None if pictures is None else [picture.path for picture in pictures]
    found = gallery.status(asked, args.k, measure=args.measure)
    lines, summary = [found.sentence()], found.describe()
    if found.lease is not None:
        lines.append(f"a backfill is running: {found.lease.owner}")
    if pictures is not None and args.labels:
        summary["measured"] = measured = first_answers(gallery, pictures)
        lines.append(
            f"measured: {100 * measured:.1f} % of queries have a picture of their class first"
        )
    if expected is not None:
        summary["expected"] = value = at_share(expected, found.share, found.query)
        lines.append(f"expected by the check: {expected['metric']} {100 * value:.1f} %")
    say("\n".join(lines), summary)
    return 0


def verify() -> int:
    """Hold every claim of a gallery against its rows and the chain."""
    found = open_gallery().verify(flags.FLAGS.sample)
    say(found.sentence(), found.describe())
    return DOES_NOT_HOLD if found.problems else 0


def delete() -> int:
    """Delete rows."""
    args = flags.FLAGS
    keys = list(args.keys)
    if args.list:
        keys += read_keys(args.list)
    if args.pictures:
        keys += [picture.path for picture in list_pictures(args.pictures)]
    if not keys:
        raise UserError("nothing to delete: give --keys, --list or --pictures")
    gallery = open_gallery()
    found = gallery.find(keys)
    missing = sorted({str(key) for key, row in zip(keys, found, strict=True) if row is None})
    count = gallery.delete([key for key in found if key is not None])
    some = ", ".join(map(repr, missing[:_NEAREST])) + (", …" if len(missing) > _NEAREST else "")
    sentence = f"{counted(count, 'row')} deleted, {len(missing):,} not there"
    say(f"{sentence}: {some}" if missing else sentence, {"deleted": count, "missing": missing})
    return 0 if count else NOTHING_THERE


def enlarge() -> int:
    """Copy a gallery for a chain of a larger simplex."""
    args = flags.FLAGS
    larger = cli.require("larger", "runs/larger/chain")
    target = lasting(cli.require("target", "runs/larger.lance"))
    gallery = open_gallery()
    from compat_jax.chain import Chain
    from compat_jax.gallery.enlarging import enlarge

    done = enlarge(gallery, Chain(larger, args.backbone).require(), target)
    counts = {name: getattr(done, name) for name in ("moved", "present", "differing", "query")}
    say(done.sentence(), counts)
    return 0


RUN = {
    "check": check,
    "index": index,
    "query": query,
    "switch": switch,
    "backfill": backfill,
    "status": status,
    "verify": verify,
    "delete": delete,
    "enlarge": enlarge,
}


def _given(name: str, chain: "Chain") -> int | None:
    """Return the version that a flag names; None without it."""
    number = flags.FLAGS[name].value
    return None if number is None else numbered(chain, number)


def _place(gallery: "Gallery", key: str) -> str:
    """Return the path of a row's picture; its key where it leads nowhere."""
    try:
        return gallery.originals.find(key)
    except UserError:
        return key


def _shares(shares: Mapping[int, float]) -> str:
    parts = [f"{share:.1%} by version {number}" for number, share in sorted(shares.items())]
    return f"answers: rows embedded {', '.join(parts)}" if parts else "no answers"


def first_answers(gallery: "Gallery", pictures: Sequence["Picture"]) -> float:
    """Measure the share of queries whose nearest row, but their own, is of their class.

    Raises:
      UserError: rows without labels.
    """
    found = gallery.search([picture.path for picture in pictures], 2)
    right = []
    for picture, keys, payloads in zip(pictures, found.keys, found.payloads, strict=True):
        own = _own_key(gallery, picture.path)
        labels = [row.get("label") for key, row in zip(keys, payloads, strict=True) if key != own]
        if labels and labels[0] is None:
            raise UserError(
                "the rows have no labels: index --replace --labels gives them those of class folders, "
                "index --replace those of a table with a column label; nothing is embedded for it"
            )
        right.append(bool(labels) and labels[0] == picture.label)
    return float(np.mean(right))


def _own_key(gallery: "Gallery", path: str) -> str | None:
    """Return the key that a picture's row would have; None for one outside the root, which has none."""
    try:
        return gallery.originals.key(path)
    except UserError:
        return None


def at_share(expected: Mapping[str, Any], share: float, query: int) -> float:
    """Return the quality that a check expects at a share of rows, between what it measured.

    Args:
      expected: see `read_check`.
      share: of rows of the version in force.
      query: number of that version.

    Raises:
      UserError: the check was of other versions.
    """
    if query == expected["new"]:
        names = ("switched", "first", "begun", "half", "finished")
        shares: tuple[float, ...] = (0, 0.02, 0.1, 0.5, 1)
    elif query == expected["old"]:
        names, shares = ("back", "half back", "today"), (0, 0.5, 1)
    else:
        raise UserError(
            f"that check was of versions {expected['old']} and {expected['new']}, but version {query} "
            "is in force: check it",
            "check",
        )
    return float(np.interp(share, shares, [expected[name] for name in names]))


def say(text: str, summary: Mapping[str, Any]) -> None:
    """Print, on the first host only: JSON with --json, else the text."""
    cli.say(json.dumps(summary, indent=1, allow_nan=False) if flags.FLAGS.json else text)
