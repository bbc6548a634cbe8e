"""The documents: every shell and Python block of README.md and docs/*.md runs, or says why it cannot.

A block runs unless the line before it is `<!-- not run: REASON -->`. The blocks of a page run in order
in one process (this file as a program), in an empty folder with small drawn pictures. `SMALLER` shrinks
the Python blocks, `flags_for` the commands; a Python block that begins with `# NAME.py` is also saved
under that name. `<!-- meanwhile: draw FOLDER CLASS,CLASS COUNT from FIRST -->` adds drawn photos, as a
reader adds photos between two commands.
"""

import contextlib
import importlib.util
import os
import re
import runpy
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import drawn_photos
import numpy as np
import pytest
from PIL import Image

import compat_jax as cj

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))
BLOCK = re.compile(
    r"^<!-- meanwhile: (?P<meanwhile>.*?) -->$|"
    r"(?:^<!--(?P<note>[^\n]*?)-->\n)?^```(?P<kind>sh|python)\n(?P<text>.*?)^```$",
    re.M | re.S,
)
SET_UP = (
    "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/python -m launch.quickstart",
    "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest",
)
# What a reader has, and what a test can afford.
SMALLER = (
    ('backbone="resnet18"', 'backbone="one_conv"'),
    ('backbone="resnet_small"', 'backbone="one_conv"'),
    ("size=64", "size=8"),
    ("initial=10, increment=15", "initial=2, increment=2"),
    ("epochs=10", "epochs=1, batch_size=8"),  # all tasks have batches of one size: one program
    ("class_counts=(5, 10)", "class_counts=(2, 3)"),
)
CLASSES = {"train": range(4), "query": range(4, 7), "gallery": range(4, 7), "other": range(7, 10)}


# The first Python block of the README makes what these pages begin with.
AFTER = dict.fromkeys(("docs/other-programs.md", "docs/upgrading.md"), "README.md")


def blocks(page: str) -> list[tuple[str, str, str, int]]:
    """Return (kind, text, note, line) of each block of a page, and of what happens between them."""
    text = (ROOT / page).read_text()
    return [
        (
            m["kind"] or "meanwhile",
            m["text"] or m["meanwhile"],
            (m["note"] or "").strip(),
            text[: m.start()].count("\n") + 1,
        )
        for m in BLOCK.finditer(text)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_a_block_that_does_not_run_says_why(page):
    for kind, _, note, line in blocks(page):
        if note:
            assert re.fullmatch(r"not run: \S.{10,}", note), f"{page}:{line} ({kind}): {note!r}"
    fences = re.findall(r"^\s*```(\w*)", (ROOT / page).read_text(), re.M)
    assert set(fences) <= {"", "sh", "python", "text", "bibtex"}


# The run of a folder: by command its configuration, in Python the function.
COMMAND = re.compile(r"python -m launch\.(?:pretrain|train) (?P<flags>.*)")
FLAG = r"--{}=(?P<value>\S+)"
CALL = re.compile(r"cj\.(?P<name>train|pretrain|update)\(.*?\"(?P<folder>runs/\w[^\"]*)\"", re.S)


def runs_of(page):
    """(folder, run) of each training of a page. Months of photos are one run with other settings."""
    for kind, text, *_ in blocks(page):
        for command in COMMAND.finditer(text.replace("\\\n", " ")) if kind == "sh" else ():
            flags = command["flags"]
            config, folder = (
                re.search(FLAG.format(n), flags)["value"] for n in ("config", "workdir")
            )
            yield folder, config.split(":")[0] if "photos.py" in config else flags
        for call in CALL.finditer(text) if kind == "python" else ():
            yield call["folder"], call["name"] if call["name"] == "update" else call[0]


def test_two_runs_of_the_documents_never_share_a_folder():
    """A reader of several pages is not refused because another page's run is there."""
    found = {}
    for page in PAGES:
        for folder, run in runs_of(page):
            found.setdefault(folder, {}).setdefault(run, page)
    assert len(found) > 20 and found["runs/shop"].keys() == {"configs/photos.py"}
    assert not {folder: runs for folder, runs in found.items() if len(runs) > 1}


# Pages whose blocks train again what other tests train; test_upgrade.py runs the runbook's commands.
SLOW_PAGES = tuple(
    f"docs/{name}.md"
    for name in ("extending", "other-programs", "own-data", "sequences", "upgrading")
)
RUNNING = [
    pytest.param(p, marks=pytest.mark.slow if p in SLOW_PAGES else ())
    for p in PAGES
    if any(not block[2] for block in blocks(p))
]


@pytest.mark.parametrize("page", RUNNING)
def test_the_blocks_of_a_page_run(page, tmp_path, cache_folder):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(tmp_path)]),
        "COMPAT_JAX_CACHE": cache_folder,
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": os.path.join(cache_folder, "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    done = subprocess.run(
        [sys.executable, __file__, page],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not done.returncode, done.stdout[-3000:] + done.stderr[-3000:]


def defined(name):
    """The function that a listing of extending.md defines; what the listing does with it is left out."""
    text = next(text for _, text, *_ in blocks("docs/extending.md") if f"def {name}(" in text)
    unregistered = types.SimpleNamespace(register=lambda *_: lambda function: function)
    stand_in = types.SimpleNamespace(methods=unregistered, Method=cj.Method, metrics=cj.metrics)
    found = {"cj": stand_in, "np": np}
    exec(re.split(r"^\w+ = ", text, flags=re.M)[0], found)
    return found[name]


@pytest.mark.parametrize(("num_old", "known"), [(0, 0), (2, 2), (2, 0), (2, 4)])
def test_the_old_classifier_of_the_page_is_that_of_the_library(num_old, known):
    rng = np.random.default_rng(0)
    kernel, means = rng.normal(size=(3, 5)), rng.normal(size=(5, 3))
    variables = {"params": {"head": {"kernel": kernel.astype(np.float32)}}}
    start = cj.methods.TaskStart(variables, num_old, 4, lambda: means, num_known=known)
    theirs, ours = defined("my_bct")().freeze(start), cj.methods.bct().freeze(start)
    assert theirs["weight"] == ours["weight"] == (num_old > 0)
    if num_old:  # of no weight before there is an old model
        np.testing.assert_allclose(
            theirs["old_head"][:, :4], ours["old_head"][:, :4], rtol=1e-6, atol=1e-7
        )


def test_the_metric_of_the_page_leaves_a_querys_own_picture_out():
    features = np.eye(4, dtype=np.float32)[[0, 0, 1, 2]]
    labels, own = np.array([0, 0, 1, 1]), np.array([0, 1, -1, 3])
    galleries = [(features, labels)]
    found = defined("margin")(cj.metrics.Queries(features, labels, own), galleries)
    np.testing.assert_array_equal(found, [[1, 1, 1, 0]])  # the last has the other of its class only
    alone = cj.metrics.Queries(features[2:3], labels[2:3], np.array([0]))
    np.testing.assert_array_equal(
        defined("margin")(alone, [(features[2:], np.array([1, 0]))]), [[np.nan]]
    )


def test_readme_fits_and_begins_with_what_to_do():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 140
    assert [s for s in SET_UP if s in lines[:40]] == list(SET_UP)


@pytest.mark.parametrize("page", (*PAGES, "CHANGELOG.md"))
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert heading in [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]


@pytest.mark.parametrize("page", PAGES)
def test_a_test_that_a_page_names_exists(page):
    text = (ROOT / page).read_text()
    for file, name in re.findall(r"(test_\w+\.py)(?:::(test_\w*))?", text):
        assert not name or f"def {name}" in (ROOT / "tests" / file).read_text(), (file, name)
        assert (ROOT / "tests" / file).exists(), file


def test_the_citation_is_of_this_version():
    version = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)[1]
    assert version == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == version


def test_the_picture_of_the_concepts_is_what_its_script_draws(tmp_path):
    spec = importlib.util.spec_from_file_location("draw_concepts", ROOT / "docs/draw_concepts.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.draw(tmp_path / "drawn.png")
    drawn, kept = tmp_path / "drawn.png", ROOT / "docs/concepts.png"
    assert kept.stat().st_size < 200_000
    with Image.open(drawn) as a, Image.open(kept) as b:
        # Other releases of matplotlib draw letters a little differently.
        difference = np.abs(np.asarray(a.convert("L"), float) - np.asarray(b.convert("L"), float))
    assert difference.mean() < 2


def run_page(page: str) -> None:
    """Run the blocks of a page in the current folder."""
    importlib.import_module("tiny")  # registers its backbone
    importlib.import_module("grain")  # whose flags are not to go with those of a program
    draw_photos(Path("photos"))
    namespace, shell = {"__name__": "__main__"}, ""
    first = before_python(AFTER[page]) if page in AFTER else []
    for kind, text, note, line in first + blocks(page):
        if note:
            continue
        print(f"--- {page}:{line}", flush=True)
        if kind == "meanwhile":
            add_photos(*text.split())
        elif kind == "python":
            if name := re.match(r"# (\w+\.py)\n", text):
                Path(name[1]).write_text(text)
            for large, small in SMALLER:
                text = text.replace(large, small)
            exec(compile("\n" * line + text, page, "exec"), namespace)
        else:
            before, shell = len(commands(shell)), shell + text
            for program, *arguments in commands(shell)[before:]:
                smaller = flags_for(program, arguments)
                names = {flag.partition("=")[0] for flag in smaller}
                kept = [a for a in arguments if a.partition("=")[0] not in names]
                run_program(program, kept + smaller)


def before_python(page: str) -> list[tuple[str, str, str, int]]:
    """Return the first Python block of a page, and the photos that are added before it."""
    found = [b for b in blocks(page) if b[0] != "sh"]
    first = next(i for i, block in enumerate(found) if block[0] == "python")
    return found[: first + 1]


def add_photos(verb, folder, classes, count, *first) -> None:
    """Draw photos, as `<!-- meanwhile: draw ... -->` says."""
    assert verb == "draw", verb
    start = int(first[1]) if first else 0
    drawn_photos.draw(Path(folder), classes.split(","), int(count), start)


def draw_photos(folder: Path) -> None:
    """Draw class folders: photos/ROLE/CLASS/NUMBER.png."""
    rng = np.random.default_rng(0)
    for role, classes in CLASSES.items():
        for c in classes:
            place = folder / role / f"class{c}"
            place.mkdir(parents=True)
            for i in range(8):
                noise = rng.integers(0, 60, (12, 10, 3))
                Image.fromarray((noise + 18 * c).astype(np.uint8)).save(place / f"{i}.png")


def commands(shell: str) -> list[list[str]]:
    """Return the arguments of each `python -m` in a shell script; anything else but `X=Y` fails."""
    collect = 'python() { shift; printf "%s\\0" "$@"; printf "\\n\\0"; }\n'
    answer = subprocess.run(
        ["/bin/bash", "-e", "-c", collect + shell], env={"PATH": ""}, capture_output=True, text=True
    )
    assert not answer.returncode, answer.stderr
    found = [[]]
    for part in answer.stdout.split("\0")[:-1]:
        if part == "\n":
            found.append([])
        else:
            found[-1].append(part)
    return found[:-1]


def flags_for(program: str, arguments: list[str]) -> list[str]:
    """Return the flags that shrink a command."""
    tiny = importlib.import_module("tiny")
    text, quiet = " ".join(arguments), ["--noprogress"]
    if program in ("launch.evaluate", "launch.embed", "launch.enlarge"):
        return quiet
    if program == "launch.upgrade":
        return flags_for_upgrade(arguments)
    if program not in ("launch.train", "launch.pretrain"):
        return []
    if "configs/photos.py" in text:
        other = 4 if "backbone=resnet50" in text else 16
        smaller = {"backbone.name": "one_conv", "backbone.arguments": {"width": other}}
        photos = {"epochs": 1, "batch_size": 8, "mesh": "data:1", "data.photos.size": 8}
        return [*tiny.flags({**smaller, **photos}), *quiet]
    smaller = tiny.TRAIN if program == "launch.train" else tiny.PRETRAIN
    smaller = {**tiny.with_backbone("one_conv", smaller), "epochs": 1}
    if "glyphs" in text:
        smaller |= {"tasks.replace_at": (0, 1)} if program == "launch.train" else {}
    else:  # class folders have the classes and pictures that they have
        smaller = {k: v for k, v in smaller.items() if not k.endswith(("classes", "per_class"))}
        smaller |= {"pretrain_classes": (2, 3)} if program == "launch.pretrain" else {}
    return [*tiny.flags(smaller), *quiet]


def flags_for_upgrade(arguments: list[str]) -> list[str]:
    """Return the flags that let a command of launch.upgrade run without servers and go well."""
    quiet = ["--noprogress"] if arguments[0] in ("check", "index", "backfill", "enlarge") else []
    go = ["--margin=1", "--limit=1"] if arguments[0] == "check" else []
    places = {"qdrant:http": "qdrant:runs/qdrant/shop", "gs:": "lance:runs/bucket/shop"}
    elsewhere = [
        f"--store={here}"
        for there, here in places.items()
        if any(argument.startswith(f"--store={there}") for argument in arguments)
    ]
    return [*quiet, *go, *elsewhere]


def run_program(program: str, arguments: list[str]) -> None:
    """Run `python -m PROGRAM ARGUMENTS` in this process, where the commands find `configs/`."""
    from absl import flags

    if not Path("configs").exists():
        Path("configs").symlink_to(ROOT / "configs")
    before = set(flags.FLAGS)
    sys.argv = [program, *arguments]
    print("$", program, *arguments, flush=True)
    with contextlib.suppress(KeyError):
        del sys.modules[program]
    try:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, f"{program} ended with exit code {end.code}"
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


if __name__ == "__main__":
    run_page(sys.argv[1])
