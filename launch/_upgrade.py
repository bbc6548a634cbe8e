"""The commands of launch.upgrade, from flags to what is printed; each returns its exit code."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from compat_jax.errors import UserError
from compat_jax.files import absolute
from compat_jax.meter import counted
from launch import _cli as cli
from launch import _evaluation as evaluation

if TYPE_CHECKING:  # import JAX, which programs do after they have parsed their flags
    from compat_jax.chain import Chain, Version
    from compat_jax.data import Dataset
    from compat_jax.data.listing import Picture
    from compat_jax.gallery.gallery import Gallery
    from compat_jax.session import Session

EXIT = {"go": 0, "go with loss": 3, "no-go": 4}
DOES_NOT_HOLD = 1  # a claim of the manifest
_LINES, _NEAREST = 20, 3  # queries and answers that are printed


def check() -> int:
    """Measure whether a new version may answer in an old one's gallery."""
    args = flags.FLAGS
    chain_path = cli.require("chain", "runs/shop/chain")
    cli.start_jax()
    from compat_jax import metrics
    from compat_jax.chain import Chain
    from compat_jax.gallery.checking import check
    from compat_jax.gallery.comparing import differences
    from compat_jax.gallery.rule import Terms

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
    lines = [f"{who}: {len(asked):,} queries; " + _shares(found.shares())]
    for path, nearest in list(zip(asked, answers, strict=True))[:_LINES]:
        lines.append(path)
        lines += [f"  {a.score:.4f}  {a.picture} (version {a.version})" for a in nearest[:_NEAREST]]
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
    count = gallery.delete(keys)
    say(
        f"{counted(count, 'row')} deleted, {len(set(keys)) - count:,} not there", {"deleted": count}
    )
    return 0


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


def open_gallery(make: bool = False) -> "Gallery":
    """Open the gallery of --store as one of --chain.

    Args:
      make: whether to make it where there is none.

    Raises:
      UserError: a flag is missing, or see `Gallery.open`.
    """
    args = flags.FLAGS
    chain_path, place = (
        cli.require("chain", "runs/shop/chain"),
        cli.require("store", "runs/shop.lance"),
    )
    cli.start_jax()
    from compat_jax.chain import Chain
    from compat_jax.gallery.gallery import Gallery
    from compat_jax.gallery.places import open_store

    work = _work()
    chain = Chain(chain_path, args.backbone).require()
    if not make:
        return Gallery.open(open_store(place), chain, root=args.root, work=work)
    version = numbered(chain, -1 if args.version is None else args.version)
    store = open_store(lasting(place), chain.record(version).feature_size)
    if store.manifest() is None:
        try:
            return Gallery.create(store, chain, version=version, root=args.root, work=work)
        except UserError:
            if store.manifest() is None:  # else another host was first
                raise
    return Gallery.open(store, chain, root=args.root, work=work)


def lasting(place: str) -> str:
    """Return the place of a gallery to make, which must outlive the program.

    Raises:
      UserError: it is in memory.
    """
    if place.startswith("memory:"):
        raise UserError(
            f"{place} would end with this program: give a table of LanceDB, e.g. runs/shop.lance, or "
            "qdrant:ADDRESS/NAME",
            "store",
        )
    return place


def _work():
    """How pictures are read and embedded, by the flags that the command has."""
    from compat_jax.gallery.originals import Work

    args = flags.FLAGS
    names = {field.name for field in dataclasses.fields(Work)} & set(args)
    return Work(**{name: args[name].value for name in names}, should_stop=cli.StopSignal())


def numbered(chain: "Chain", number: int) -> int:
    """Return the number of a version; negative ones count from the end.

    Raises:
      UserError: there is no such version.
    """
    chain.record(number)
    return number if number >= 0 else chain.numbers()[number]


def _given(name: str, chain: "Chain") -> int | None:
    """Return the version that a flag names; None without it."""
    number = flags.FLAGS[name].value
    return None if number is None else numbered(chain, number)


def list_pictures(path: str) -> list["Picture"]:
    """List the pictures of a folder, pattern or table; with --labels those of class folders."""
    from compat_jax.data import listing

    args = flags.FLAGS
    if path.lower().endswith(listing.TABLES):
        return listing.list_table(path)
    if "labels" in args and args.labels:
        return listing.list_labelled(path)
    return [listing.Picture(file) for file in listing.list_pictures(path)]


def _place(gallery: "Gallery", key: str) -> str:
    """Return the path of a row's picture; its key where it leads nowhere."""
    try:
        return gallery.originals.find(key)
    except UserError:
        return key


def _shares(shares: Mapping[int, float]) -> str:
    parts = [f"{share:.1%} by version {number}" for number, share in sorted(shares.items())]
    return f"answers: rows embedded {', '.join(parts)}" if parts else "no answers"


def need_labels(pictures: Sequence["Picture"]) -> None:
    """Refuse --labels for pictures without labels.

    Raises:
      UserError: there is none, or one that has no label.
    """
    bare = next((picture.path for picture in pictures if picture.label is None), None)
    if bare or not pictures:
        raise UserError(
            f"--labels needs the classes of --pictures{f', and {bare} has none' if bare else ''}: give "
            "class folders, or a table with a column label",
            "pictures",
        )


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


def read_keys(path: str) -> list[str]:
    """Read the keys of a list, one a line.

    Raises:
      UserError: no such file, or no text in UTF-8.
    """
    try:
        text = absolute(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text in UTF-8"
        raise UserError(f"the list {path} cannot be read ({reason})", "list") from error
    lines = text.split("\n")  # names may hold other breaks
    return [line.removesuffix("\r") for line in lines if line.strip()]


def read_check(path: str) -> dict[str, Any]:
    """Read the figures of a verdict that `check --json` printed.

    Raises:
      UserError: no such file, or something else.
    """
    from compat_jax.gallery.verdict import STAGES

    try:
        content = json.loads(absolute(path).read_text())
        found = {
            "metric": content["measured"]["metric"],
            "new": content["new"]["version"],
            "old": content["old"]["version"],
            **{name: content["measured"]["stages"][name]["quality"]["value"] for name in STAGES},
        }
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})", "check") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not what check --json printed ({error!r:.80})", "check"
        ) from error
    return found


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


def read_retrieval(
    chain: "Chain", version: "Version", session: "Session"
) -> tuple["Dataset", "Dataset"]:
    """Read the pictures to check with: --query and --gallery, or those of a configuration.

    Args:
      chain: whose configuration names them by default.
      version: as whose record says pictures are prepared.
      session: shows progress.

    Raises:
      UserError: one of the flags without the other, or pictures that cannot be read.
    """
    from compat_jax import experiment

    args = flags.FLAGS
    if bool(args.query) != bool(args.gallery):
        missing = "gallery" if args.query else "query"
        raise UserError(f"--{missing} is missing: give --query and --gallery, or neither")
    if not args.query:
        config = experiment.config_of(chain) if args.config is None else args.config
        session.devices()  # refuses a mesh before any data is read
        query, gallery = experiment.load_retrieval(config, chain, session)
    else:
        query, gallery = (_read(role, version, session) for role in ("query", "gallery"))
    return _sampled(query, args.sample), _sampled(gallery, args.sample)


def _read(role: str, version: "Version", session: "Session") -> "Dataset":
    """Read what a flag names; with --labels, a folder of class folders or labelled table."""
    from compat_jax.data import load
    from compat_jax.data.listing import TABLES
    from compat_jax.extraction import preparation_of

    labels, path = flags.FLAGS.labels, flags.FLAGS[role].value
    is_table = path.lower().endswith(TABLES)
    source = "table" if is_table else "folder" if labels else "pictures"
    prepared = preparation_of(version.record, None)
    how = {} if prepared is None else dataclasses.asdict(prepared)
    try:
        data = load({"source": source, "path": path, **how}, session.progress)
        if labels:
            data.need_labels()
    except UserError as error:
        error.argument = role  # the flag that named it, not the field of a configuration
        raise
    return data if labels else dataclasses.replace(data, labels=None, class_names=())


def _sampled(data: "Dataset", count: int) -> "Dataset":
    """Draw pictures with seed 0, in their order; all where there are no more, or for 0."""
    if not count or len(data) <= count:
        return data
    rows = np.sort(np.random.default_rng(0).choice(len(data), count, replace=False))
    return data.take(rows)


def say(text: str, summary: Mapping[str, Any]) -> None:
    """Print, on the first host only: JSON with --json, else the text."""
    cli.say(json.dumps(summary, indent=1, allow_nan=False) if flags.FLAGS.json else text)
