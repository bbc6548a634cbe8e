"""Open a page in the browser: what an old gallery answers to each version of a chain.

  python -m launch.demo --chain=runs/quickstart/hoc/chain
  python -m launch.demo --chain=runs/shop/chain --store=runs/shop.lance --root=photos

Drop a picture on the page, or pick one: the nearest rows are shown as each version finds them, with the
version that embedded each row. A slider embeds the gallery again, from nothing to everything. It writes
to no store: before the page opens, --sample rows are read and each is embedded by the version that it
lacks, so that any share can be shown at once.

Without --store the gallery is that of the chain's own configuration, in memory, as --old embeds it;
that needs no photos after launch.quickstart. With --store it is the one that launch.upgrade has made;
give the same --root. --picks is a folder of pictures to pick from, one folder a class with --labels; by
default they are the configuration's queries, or pictures of the rows.

The page is served on this machine only, until Ctrl-C. --host=ADDRESS serves it on another address,
without a password, to everybody who reaches it; --names are names by which they may call it. Pictures
that are sent are read in memory and not kept; more than --megabytes or --megapixels are refused. It has
32 connections and waits for requests that are half sent: for strangers put a proxy with time limits
before it.
Needs pip install 'compat_jax[demo]'.
"""

import contextlib
import importlib.util
import socket
from typing import TYPE_CHECKING

from absl import flags

from compat_jax.errors import UserError
from launch import _cli as cli

if TYPE_CHECKING:  # imports JAX, which programs do after they have parsed their flags
    from compat_jax.chain import Chain
    from compat_jax.demo import Pick, Showcase

flags.DEFINE_string("chain", None, "folder of the chain")
flags.DEFINE_string("store", None, "table of LanceDB, e.g. runs/shop.lance, or qdrant:ADDRESS/NAME")
flags.DEFINE_string("root", None, "folder that the pictures of the store are in")
flags.DEFINE_string("picks", None, "folder, pattern or table of pictures to pick from")
flags.DEFINE_bool("labels", False, "whether --picks has class folders, or a column label")
flags.DEFINE_integer("old", None, "version of the gallery; the first, or that of most rows")
flags.DEFINE_integer("new", -1, "version that embeds it again; negative counts from the end")
flags.DEFINE_list("asking", None, "versions that ask; the last eight, and the old one, by default")
flags.DEFINE_integer("sample", 2000, "rows to show, drawn at random; 0 for all", 0)
flags.DEFINE_string("backbone", None, "import path of your own backbone, package.module:Name")
flags.DEFINE_integer("batch_size", 64, "pictures per batch", lower_bound=1)
flags.DEFINE_string("dtype", "float32", "of the network's computation: float32, bfloat16 or auto")
flags.DEFINE_bool("progress", True, "show progress bars")
flags.DEFINE_string("host", "127.0.0.1", "address to serve on")
flags.DEFINE_list("names", [], "other names by which the page may be called")
flags.DEFINE_integer("port", 8000, "to serve on; 0 for a free one", 0, 65535)
flags.DEFINE_float("megabytes", 20, "of a picture's file at most", 0.001, 1000)
flags.DEFINE_float("megapixels", 50, "of a picture at most", 0.001, 1000)

LOCAL = ("127.0.0.1", "localhost", "[::1]")
_ALL = ("0.0.0.0", "::", "")
_AT_ONCE = 32  # requests


def main(_) -> None:
    """Read and embed what is shown, then serve it until Ctrl-C."""
    args = flags.FLAGS
    cli.require("chain", "runs/quickstart/hoc/chain")
    check_installed()
    asking = numbers("asking", args.asking)
    names = names_of(args.host, args.names)
    with listen(args.host, args.port) as listener:  # a port that is taken is known before any work
        cli.start_jax()
        from compat_jax.demo import Limits, application

        limits = Limits(size=round(args.megabytes * 1e6), pixels=round(args.megapixels * 1e6))
        app = application(show(asking), hosts=names, limits=limits)
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print(f"Open in a browser: http://{host}:{port}/ (Ctrl-C ends)", flush=True)
        serve(app, listener)
    print("\nended")


def check_installed() -> None:
    """Refuse to begin without a server.

    Raises:
      UserError: what is missing, and how to install it.
    """
    for module in ("starlette", "uvicorn"):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{module} is not installed: pip install 'compat_jax[demo]'")


def numbers(flag: str, given: list[str] | None) -> list[int] | None:
    """Return the whole numbers of a list of texts; None for none.

    Raises:
      UserError: something else.
    """
    try:
        return None if given is None else [int(one) for one in given]
    except ValueError as error:
        raise UserError(f"{flag} are numbers of versions, e.g. 0,2, got {given}", flag) from error


def names_of(host: str, names: list[str]) -> list[str]:
    """Return the names by which the page may be asked for.

    Args:
      host: that it is served on. On every address of the machine, its own name and their numbers.
      names: others.
    """
    found = [*LOCAL, *names]
    if host not in _ALL:
        return [*found, f"[{host}]" if ":" in host else host]
    own = socket.gethostname()
    found.append(own)
    with contextlib.suppress(OSError):
        addresses = {str(one[4][0]) for one in socket.getaddrinfo(own, None)}
        found += [f"[{one}]" if ":" in one else one for one in sorted(addresses)]
    return found


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
      UserError: the port is taken, or the address is not one of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        where = f"{host} port {port}"
        raise UserError(
            f"cannot serve on {where} ({error.strerror or error}): give another --port (0 for a free "
            "one) or --host",
            "port",
        ) from error


def show(asking: list[int] | None) -> "Showcase":
    """Read and embed what the flags name."""
    from compat_jax import experiment
    from compat_jax.chain import Chain
    from compat_jax.demo import in_memory, picks_of, prepare
    from compat_jax.gallery.gallery import Gallery
    from compat_jax.gallery.originals import Work
    from compat_jax.gallery.places import open_store
    from compat_jax.session import Session

    args = flags.FLAGS
    chain = Chain(args.chain, args.backbone).require()
    old, new = numbered(chain, args.old), numbered(chain, args.new)
    work = Work(batch_size=args.batch_size, dtype=args.dtype, progress=args.progress)
    asking = None if asking is None else [numbered(chain, number) for number in asking]
    picks = read_picks(args.picks, args.labels) if args.picks else None
    if args.store:
        gallery = Gallery.open(open_store(args.store), chain, root=args.root, work=work)
    else:
        session = Session(progress=args.progress)
        query, data = experiment.load_retrieval(own_config(chain), chain, session)
        old = chain.numbers()[0] if old is None else old
        gallery = in_memory(chain, data, version=old, sample=args.sample, work=work)
        picks = picks_of(query) if picks is None else picks
    return prepare(gallery, old=old, new=new, asking=asking, sample=args.sample, picks=picks)


def numbered(chain: "Chain", number: int | None) -> int | None:
    """Return the number of a version; negative ones count from the end.

    Raises:
      UserError: there is no such version.
    """
    if number is None:
        return None
    chain.record(number)
    return number if number >= 0 else chain.numbers()[number]


def own_config(chain: "Chain"):
    """Return the configuration that a chain carries.

    Raises:
      UserError: it names no gallery.
    """
    from compat_jax import experiment

    try:
        return experiment.config_of(chain)
    except UserError as error:
        raise UserError(
            f"{chain.path} does not say what its gallery is: give --store, which "
            "python -m launch.upgrade index makes"
        ) from error


def read_picks(path: str, labels: bool) -> list["Pick"]:
    """List pictures to pick from."""
    from compat_jax.data import listing
    from compat_jax.demo.picks import PICKS, Pick, draw

    if labels or path.lower().endswith(listing.TABLES):
        found = [Pick(one.path, one.label) for one in listing.list_labelled(path)]
    else:
        found = [Pick(file) for file in listing.list_pictures(path)]
    return [found[i] for i in draw(len(found), 0, seed=1)[:PICKS]]


def serve(app, listener: socket.socket) -> None:
    """Serve an application until Ctrl-C or SIGTERM."""
    import uvicorn

    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=_AT_ONCE,
        timeout_graceful_shutdown=2,
    )
    with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again when all is closed
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    cli.run(main, __doc__)
