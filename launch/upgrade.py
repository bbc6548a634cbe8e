"""Upgrade the model of a gallery without embedding its pictures again.

  python -m launch.upgrade check --chain=runs/shop/chain --old=0 --new=1
  python -m launch.upgrade index --chain=runs/shop/chain --store=runs/shop.lance --pictures=photos/shop
  python -m launch.upgrade query --chain=runs/shop/chain --store=runs/shop.lance --pictures=new.jpg
  python -m launch.upgrade switch --chain=runs/shop/chain --store=runs/shop.lance --to=1
  python -m launch.upgrade backfill --chain=runs/shop/chain --store=runs/shop.lance --budget=10000
  python -m launch.upgrade status --chain=runs/shop/chain --store=runs/shop.lance
  python -m launch.upgrade verify --chain=runs/shop/chain --store=runs/shop.lance
  python -m launch.upgrade delete --chain=runs/shop/chain --store=runs/shop.lance --keys=photos/a.jpg
  python -m launch.upgrade enlarge --chain=runs/shop/chain --store=runs/shop.lance \\
      --larger=runs/larger/chain --target=runs/larger.lance

  check     measures whether a new version may answer in the gallery of an old one, and the way back
  index     embeds pictures and puts them into a store, which it makes; resumable, one host or many
  query     finds the nearest pictures of some, writes a page of them
  switch    lets another version embed queries and new pictures; --rollback undoes the last switch
  backfill  embeds rows of other versions again, as many as you say, while the gallery answers
  status    says which versions the rows and the answers are of, and what is left to do
  verify    holds every claim of the gallery against its rows and the chain
  delete    deletes rows
  enlarge   copies a gallery for a chain that launch.enlarge has given more prototypes

Each says more by itself: python -m launch.upgrade backfill --help. --store is a table of LanceDB
(runs/shop.lance, gs://bucket/shop, s3://bucket/shop) or a collection of a Qdrant server
(qdrant:http://localhost:6333/shop). The whole procedure is in docs/upgrading.md.
"""

import sys

from absl import flags

from compat_jax.errors import UserError, unknown
from launch import _cli as cli
from launch import _evaluation as evaluation

HELP = {
    "check": """Measure whether a new version may answer in the gallery that an old one embedded.

  python -m launch.upgrade check --chain=runs/shop/chain
  python -m launch.upgrade check --chain=runs/shop/chain --old=0 --new=2 \\
      --query=photos/asked --gallery=photos/shop --labels

Pictures are those of the chain's configuration, or --query and --gallery: folders, patterns or tables;
with --labels folders of one folder per class. Versions that share no space are refused. Others are tried
by querying: today, after the switch, with a fiftieth, a tenth, half and all rows embedded again, and
with the old version asking again, which a rollback meets. Without labels answers are compared with those
that the new version would give had it embedded everything, and a gallery of fewer than 2 * --k pictures
is refused. What launch.evaluate has embedded is not embedded again. A table of labels has a column
label.

Exit code: 0 go: no stage loses more than --margin, by its 95 % interval;
           3 go with loss: something is lost, or too few queries asked to exclude it;
           4 no-go: the switch loses more than --limit, and not by chance of the draw alone; or the
             versions share no space;
           2 the input was refused.
""",
    "index": """Embed pictures and put them into a store.

  python -m launch.upgrade index --chain=runs/shop/chain --store=runs/shop.lance --pictures=photos/shop
  python -m launch.upgrade index --chain=runs/shop/chain --store=gs://bucket/shop \\
      --pictures=gs://bucket/photos.parquet --shard=0/4
  python -m launch.upgrade index --chain=runs/shop/chain --store=qdrant:http://localhost:6333/shop \\
      --pictures=photos/shop --root=photos

A store that is not there is made. Pictures that have a row are passed over: killed at any time, or with
more pictures, run the same command again. --replace also looks at those: a row whose file has changed is
embedded anew, one whose label differs gets the label. The version in force embeds; --version chooses it
for a new store, the chain's last one by default, and another one is refused afterwards. A table's column
label is kept beside the row; with --labels the names of class folders are. On several hosts give each
the same command with its --shard=I/N; when all have ended, give it once without: it embeds what a host
has left, and has the store build its index.

A row's key is the picture's absolute path, or with --root its path below that folder, which then may
move: give every command the same --root.
""",
    "query": """Find the nearest pictures of some, whatever version embedded their rows.

  python -m launch.upgrade query --chain=runs/shop/chain --store=runs/shop.lance --pictures=new.jpg
  python -m launch.upgrade query --chain=runs/shop/chain --store=runs/shop.lance \\
      --pictures='photos/asked/*' --out=runs/answers

--out gets index.html, which needs no network, its pictures (PNG), and the answers as CSV and JSON. The
version in force embeds the queries; --version tries another, which changes nothing in the store.
Printed are all answers of one query, of several the three nearest of the first 20; --json has all.
""",
    "switch": """Let another version embed queries and new pictures. No row is touched.

  python -m launch.upgrade switch --chain=runs/shop/chain --store=runs/shop.lance --to=1
  python -m launch.upgrade switch --chain=runs/shop/chain --store=runs/shop.lance --rollback

One compare and set of the store's manifest: of two programs that switch at once one wins, the other is
told so. Programs that serve see it at their next query. --rollback goes back to the version before;
rows that were embedded since then stay and go on answering, as `check` measured ("back"). To return
them as well: backfill after the rollback.
""",
    "backfill": """Embed rows of other versions again, while the gallery answers.

  python -m launch.upgrade backfill --chain=runs/shop/chain --store=runs/shop.lance --budget=10000
  python -m launch.upgrade backfill --chain=runs/shop/chain --store=runs/shop.lance \\
      --until=0.5 --order=best

The version in force embeds them. --budget is a number of pictures, --until the share of rows that
shall be of that version; without either all are. The progress is what the rows say themselves: killed
at any time, run the same command again. Rows are updated, never inserted: a picture deleted meanwhile
stays deleted, one that was replaced keeps its own feature. A second backfill at the same time is
refused.

--order: random; best, rows first that lie nearest to the mean of their class (to a prototype, where
rows have no label); worst, the farthest first; or a field of the rows' payload, the smallest first,
-FIELD the largest. While rows are mixed the new ones give nearly all answers: see docs/upgrading.md.
--to embeds with another version than the one in force, e.g. the old one after a rollback.
""",
    "status": """Say which versions the rows are of, and what is left to embed again.

  python -m launch.upgrade status --chain=runs/shop/chain --store=runs/shop.lance
  python -m launch.upgrade status --chain=runs/shop/chain --store=runs/shop.lance \\
      --pictures=photos/asked --labels --check=check.json --measure=64

With --pictures these are searched for: the share of each version among the answers, beside its share
among the rows, and with --labels the share of queries whose nearest picture is of their class.
--check, a file that `check --json` printed, adds what that check expects at this share. --measure embeds
so many pictures to say how long the rest takes.
""",
    "verify": """Hold every claim of a gallery's manifest against its rows and the chain.

  python -m launch.upgrade verify --chain=runs/shop/chain --store=runs/shop.lance
  python -m launch.upgrade verify --chain=runs/shop/chain --store=runs/shop.lance --sample=0

--sample rows are embedded again and compared with what the store has; 0 takes none. Exit code: 0 every
claim holds, 1 one does not, 2 the input was refused.
""",
    "delete": """Delete rows of a gallery.

  python -m launch.upgrade delete --chain=runs/shop/chain --store=runs/shop.lance --keys=photos/a.jpg
  python -m launch.upgrade delete --chain=runs/shop/chain --store=runs/shop.lance --list=gone.txt
  python -m launch.upgrade delete --chain=runs/shop/chain --store=runs/shop.lance --pictures=photos/old

--keys and --list (a file with one a line) are keys or paths, of pictures that need not be there any
more (with --root a relative one is a key, or else a path); --pictures is a folder, pattern or file that
is. A backfill never brings a deleted row back. Exit code: 0 rows were deleted, 1 none was there, 2 the
input was refused.
""",
    "enlarge": """Copy a gallery for a chain with room for more classes. No picture is read.

  python -m launch.enlarge --chain=runs/shop/chain --num_prototypes=4096 --out=runs/larger/chain
  python -m launch.upgrade enlarge --chain=runs/shop/chain --store=runs/shop.lance \\
      --larger=runs/larger/chain --target=runs/larger.lance

Every feature is multiplied by the matrix that its version was multiplied by, so scores stay what they
are; keys, labels and versions are copied. The old gallery answers meanwhile and stays. Killed, or with
rows that came meanwhile: run the same command again. What you delete or replace meanwhile, delete or
replace in both. Afterwards give every command the new chain and the new store.
""",
}


def take_command(argv: list[str]) -> str:
    """Remove the command from the arguments of a program; "" where there is none of ours."""
    return argv.pop(1) if len(argv) > 1 and argv[1] in HELP else ""


COMMAND = take_command(sys.argv)


def _define_check() -> None:
    cli.define_config(fields=("data.ROLE.", "data.photos."))
    flags.DEFINE_integer("old", -2, "version of today; negative counts from the end")
    flags.DEFINE_integer("new", -1, "version that is to answer")
    flags.DEFINE_string("query", None, "folder, pattern or table of pictures that ask")
    flags.DEFINE_string("gallery", None, "folder, pattern or table of pictures that answer")
    flags.DEFINE_bool(
        "labels",
        False,
        "whether --query and --gallery are class folders, or tables with a column label",
    )
    flags.DEFINE_integer("sample", 10_000, "pictures of each, drawn at random; 0 for all", 0)
    flags.DEFINE_string("metric", "recall@1", "of the quality, with labels; see launch.evaluate")
    flags.DEFINE_float("margin", 0.01, "loss of quality that counts as none")
    flags.DEFINE_float("limit", 0.05, "loss of quality that is a no-go")
    flags.DEFINE_integer("k", 10, "answers of a query whose change is measured")
    flags.DEFINE_float("far", 0.01, "share of false pairs that the fixed threshold lets pass today")
    flags.DEFINE_float(
        "threshold", None, "cosine that your product compares with, instead of --far"
    )
    evaluation.define_places()


def _define_store(pictures: str = "") -> None:
    flags.DEFINE_string(
        "store", None, "table of LanceDB, e.g. runs/shop.lance, or qdrant:ADDRESS/NAME"
    )
    flags.DEFINE_string("root", None, "folder that all pictures are in; keys are paths below it")
    flags.DEFINE_string("backbone", None, "import path of your own backbone, package.module:Name")
    if pictures:
        flags.DEFINE_string("pictures", None, pictures)


def _define_work() -> None:
    flags.DEFINE_integer("batch_size", 64, "pictures per batch", lower_bound=1)
    flags.DEFINE_integer("part", 4096, "rows per write", lower_bound=1)
    flags.DEFINE_string(
        "dtype", "float32", "of the network's computation: float32, bfloat16 or auto"
    )
    flags.DEFINE_bool("progress", True, "show progress bars")


def _define_index() -> None:
    _define_store("folder, pattern, file or table of the pictures")
    _define_work()
    flags.DEFINE_integer("version", None, "version in force in a new store; the last by default")
    flags.DEFINE_bool(
        "labels", False, "whether the folder is of class folders, to keep their names"
    )
    flags.DEFINE_bool("replace", False, "write rows anew whose pictures or labels have changed")
    flags.DEFINE_string("shard", "0/1", "share of this host, I/N")
    flags.DEFINE_string("on_bad", "stop", "files that are no pictures: stop or skip")


def _define_query() -> None:
    _define_store("folder, pattern or file of the pictures that ask")
    flags.DEFINE_integer("k", 10, "answers of a query", lower_bound=1)
    flags.DEFINE_integer("version", None, "version that embeds them; the one in force by default")
    flags.DEFINE_string("out", None, "folder for a page of the answers")


def _define_switch() -> None:
    _define_store()
    flags.DEFINE_integer("to", None, "version that is to embed queries and new pictures")
    flags.DEFINE_bool("rollback", False, "go back to the version before the last switch")


def _define_backfill() -> None:
    _define_store()
    _define_work()
    flags.DEFINE_integer("budget", None, "pictures to embed at most", lower_bound=1)
    flags.DEFINE_float("until", None, "share of rows that shall be of the version in force")
    flags.DEFINE_string(
        "order", "random", "random, best, worst, FIELD or -FIELD of the rows' payload"
    )
    flags.DEFINE_integer("to", None, "version that embeds them; the one in force by default")


def _define_status() -> None:
    _define_store("folder, pattern or file of pictures that ask; none by default")
    flags.DEFINE_bool("labels", False, "whether --pictures are class folders, or a labelled table")
    flags.DEFINE_integer("k", 10, "answers of a query", lower_bound=1)
    flags.DEFINE_string("check", None, "file that `check --json` printed")
    flags.DEFINE_integer("measure", 0, "pictures to embed, to say how long the rest takes", 0)


def _define_verify() -> None:
    _define_store()
    flags.DEFINE_integer("sample", 256, "rows to embed again and compare", lower_bound=0)


def _define_delete() -> None:
    _define_store("folder, pattern or file of pictures that are there")
    flags.DEFINE_list("keys", [], "keys or paths, by commas; those with a comma go into --list")
    flags.DEFINE_string("list", None, "file with a key or path a line")


def _define_enlarge() -> None:
    _define_store()
    flags.DEFINE_integer("part", 4096, "rows per write", lower_bound=1)
    flags.DEFINE_bool("progress", True, "show progress bars")
    flags.DEFINE_string("larger", None, "folder of the chain that launch.enlarge wrote")
    flags.DEFINE_string("target", None, "place of the new gallery, as --store")


DEFINE = {
    "check": _define_check,
    "index": _define_index,
    "query": _define_query,
    "switch": _define_switch,
    "backfill": _define_backfill,
    "status": _define_status,
    "verify": _define_verify,
    "delete": _define_delete,
    "enlarge": _define_enlarge,
}
if COMMAND:
    DEFINE[COMMAND]()
    flags.DEFINE_string("chain", None, "folder of the chain")
    flags.DEFINE_bool("json", False, "print JSON instead of text")


def main(_) -> None:
    """Do what the command says; its exit codes are in its help."""
    from launch import _upgrade

    code = _upgrade.RUN[COMMAND]()
    if code:
        sys.exit(code)


def refuse(given: list[str]) -> None:
    """Refuse arguments that do not begin with a command.

    Raises:
      UserError: always.
    """
    if given and not given[0].startswith("-"):
        raise unknown("command", given[0], HELP)
    raise UserError(f"the command is missing: python -m launch.upgrade {' | '.join(HELP)}")


if __name__ == "__main__":
    if COMMAND:
        cli.run(main, HELP[COMMAND])
    else:
        arguments = sys.argv[1:]
        sys.argv[1:] = [one for one in arguments if one in cli.HELP_FLAGS]
        cli.run(lambda _: refuse(arguments), __doc__)
