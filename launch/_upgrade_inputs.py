"""Inputs of the commands of launch.upgrade: galleries, versions, pictures, labels, checks."""

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from compat_jax.errors import UserError
from compat_jax.files import absolute
from launch import _cli as cli

if TYPE_CHECKING:  # import JAX, which programs do after they have parsed their flags
    from compat_jax.chain import Chain, Version
    from compat_jax.data import Dataset
    from compat_jax.data.listing import Picture
    from compat_jax.gallery.gallery import Gallery
    from compat_jax.session import Session


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


def numbered(chain: "Chain", number: int) -> int:
    """Return the number of a version; negative ones count from the end.

    Raises:
      UserError: there is no such version.
    """
    chain.record(number)
    return number if number >= 0 else chain.numbers()[number]


def list_pictures(path: str) -> list["Picture"]:
    """List the pictures of a folder, pattern or table; with --labels those of class folders."""
    from compat_jax.data import listing

    args = flags.FLAGS
    if path.lower().endswith(listing.TABLES):
        return listing.list_table(path)
    if "labels" in args and args.labels:
        return listing.list_labelled(path)
    return [listing.Picture(file) for file in listing.list_pictures(path)]


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


def _work():
    """How pictures are read and embedded, by the flags that the command has."""
    from compat_jax.gallery.originals import Work

    args = flags.FLAGS
    names = {field.name for field in dataclasses.fields(Work)} & set(args)
    return Work(**{name: args[name].value for name in names}, should_stop=cli.StopSignal())
