"""Command lines made from the schema: whatever a user types ends in one line and exit code 2.

Every field of every configuration gets values of other types, out of range, not finite, empty, huge,
unset. The folder of the run cannot be made, so that a value that is fine after all ends there.
"""

import inspect
import random
from pathlib import Path

import programs
import pytest
import tiny

from compat_jax.config_schema import schema

ROOT = Path(__file__).parents[1]
NOWHERE = "/proc/nowhere/run"
HOSTILE = {
    int: ("-1", "0", "1.5", "10**3", "1000000000000000000000", "nan", "", "x", "None", "(1,)", "é"),
    float: ("-1", "nan", "inf", "1e400", "1e6x", "", "None", "(1,)", "é"),
    bool: ("2", "maybe", "None", "1.5", ""),
    str: ("", "nonsense", "é", "None", "a,b", "=", "~nobody/x", "s4://x", "x" * 5000, "\x01"),
    tuple: ("()", "(1", "(-1,)", "(1.5,)", "('a',)", "1", "None", "(0,1000000000)", "[nan]", "x"),
}
PROGRAMS = (
    ("launch.train", "configs/glyphs.py:replace=false", tiny.TRAIN),
    ("launch.train", "configs/iamcl2r.py:method=fd,replace=false", {}),
    ("launch.pretrain", "configs/pretrain.py:data=glyphs", tiny.PRETRAIN),
    ("launch.train", "configs/photos.py:path=/nowhere", {}),
    ("launch.pretrain", "configs/pretrain.py:data=folder", {}),
)
OTHERS = (
    ("launch.evaluate", "--chain=/nowhere/chain"),
    ("launch.evaluate", "--chain="),
    ("launch.evaluate", "--chain=s4://x/y"),
    ("launch.evaluate", "--chain=/tmp/[x]"),
    ("launch.evaluate", "--chain=/nowhere", "--metric=recall"),
    ("launch.evaluate", "--chain=/nowhere", "--metric=recall@0"),
    ("launch.evaluate", "--chain=/nowhere", "--dtype=float16"),
    ("launch.evaluate", "--chain=/nowhere", "--batch_size=0"),
    ("launch.evaluate", "--nosuchflag"),
    ("launch.evaluate", "word"),
    ("launch.train",),
    ("launch.train", "--workdir=~nobody/x"),
    ("launch.train", "--workdir=/tmp/x*y", "--config=configs/glyphs.py:replace=false"),
    ("launch.train", "--config=nowhere.py", "--workdir=/tmp/x"),
    ("launch.train", "--config=README.md", "--workdir=/tmp/x"),
    ("launch.train", "--config=configs/glyphs.py:seed=x", "--workdir=/tmp/x"),
    ("launch.train", "--config=configs/glyphs.py:sede=1", "--workdir=/tmp/x"),
    ("launch.train", "--config=configs/iamcl2r.py:tasks=8", "--workdir=/tmp/x"),
    ("launch.quickstart", "--methods="),
    ("launch.quickstart", "--methods=hoc,nonsense"),
    ("launch.quickstart", "--seed=-1"),
    ("launch.quickstart", "--workdir=/tmp/[q]"),
    ("launch.train", "--config=configs/photos.py", "--workdir=/tmp/never"),
    ("launch.train", "--config=configs/photos.py:size=0,path=.", "--workdir=/tmp/never"),
    ("launch.embed", "--chain=/nowhere", "--pictures=/nowhere", "--out=/tmp/never.npz"),
    ("launch.embed", "--chain=/nowhere", "--pictures=.", "--out=/tmp/never.txt"),
    ("launch.embed", "--chain=/nowhere", "--pictures=", "--out=/tmp/never.npz"),
    ("launch.embed", "--chain=/n", "--pictures=.", "--out=/tmp/never.npz", "--shard=2/2"),
    ("launch.embed", "--chain=/n", "--pictures=.", "--out=/tmp/never.npz", "--version=x"),
    ("launch.enlarge", "--chain=/nowhere", "--num_prototypes=4096", "--out=/tmp/never"),
    ("launch.enlarge", "--chain=/nowhere", "--num_prototypes=1", "--out=/tmp/never"),
    ("launch.enlarge", "--chain=/nowhere", "--out=/tmp/never"),
    ("launch.export_torch", "--chain=/nowhere", "--out=/tmp/x.safetensors"),
    ("launch.import_torch", "--weights=/nowhere.safetensors", "--out=/tmp/never"),
)


def commands() -> list[tuple[str, ...]]:
    """Every program's configuration with every hostile value of each of its fields."""
    made = [*OTHERS]
    for program, config, overrides in PROGRAMS:
        begin = (program, f"--config={config}", *tiny.flags(overrides), f"--workdir={NOWHERE}")
        for field in schema():
            kind = next(k for k in HOSTILE if k.__name__ in str(field.kind))
            role = "train" if "pretrain" in program else "query"
            name = field.name.replace("ROLE", role)
            made += [(*begin, f"--config.{name}={value}") for value in HOSTILE[kind]]
    return made


def failures(chosen) -> list[str]:
    """The commands that do not end as they should, with what they said."""
    bad = []
    for command in chosen:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TFDS_DATA_DIR", "/nowhere")
            code, _, said = programs.call(command[0].removeprefix("launch."), *command[1:])
        lines = said.strip().splitlines()
        if code != 2 or len(lines) != 1 or not lines[0].startswith("error: ") or len(said) > 6000:
            bad.append(f"{code}: {' '.join(command)[-300:]}: {said[-300:]!r}")
    return bad


def test_every_field_has_hostile_values():
    assert len(commands()) > 1000
    assert all(f.rule.help and f.default is not inspect for f in schema())


def test_some_hostile_commands_end_in_one_line():
    chosen = random.Random(0).sample(commands(), 25)
    assert not failures([*OTHERS[::4], *chosen])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_all_hostile_commands_end_in_one_line(part):
    assert not failures(commands()[part::8])
