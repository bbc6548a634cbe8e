"""A grid of runs: cells, results that resume, a table of means and spreads."""

import importlib
import json
import re

import numpy as np
import programs
import pytest
import tiny

from compat_jax.errors import UserError
from compat_jax.files import absolute
from compat_jax.sweep import Cell, Results, grid, table


def test_the_last_name_varies_fastest():
    cells = grid("method=hoc,er; seed=0,1")
    assert [c.name for c in cells] == [
        "method=hoc,seed=0",
        "method=hoc,seed=1",
        "method=er,seed=0",
        "method=er,seed=1",
    ]


def test_commas_within_brackets_are_part_of_a_value():
    assert [c.values for c in grid("tasks.replace_at=(0, 2),()")] == [
        {"tasks.replace_at": "(0, 2)"},
        {"tasks.replace_at": "()"},
    ]


@pytest.mark.parametrize("text", ["", "method", "method=", "=hoc", "seed=0;seed=1"])
def test_a_grid_of_another_form_is_refused(text):
    with pytest.raises(UserError) as caught:
        grid(text)
    assert caught.value.argument == "grid"


def test_folders_have_names_that_any_system_takes():
    (cell,) = grid("pretrained=gs://a/b*c;x=" + "y" * 300)
    assert len(cell.name) < 120 and re.fullmatch(r"[\w=,.() -]+", cell.name)
    assert cell.name != grid("pretrained=gs://a/b*d;x=" + "y" * 300)[0].name


def test_results_resume(tmp_path):
    results = Results(absolute(tmp_path / "results.jsonl"))
    cell = Cell({"method": "hoc", "seed": "0"})
    assert results.of(cell) == {} and list(results) == []
    results.add(cell, {"map AC": 0.5}, chain="/c", settings="one")
    results.add(cell, {"recall@1 AC": 0.25}, settings="one")
    assert results.of(cell, "one") == {"map AC": 0.5, "recall@1 AC": 0.25}
    assert results.of(Cell({"method": "hoc", "seed": "1"}), "one") == {}
    assert next(iter(results))["chain"] == "/c"
    with pytest.raises(UserError, match="hoc,seed=0 with another configuration"):
        results.of(cell, "two")
    with results.path.open("a") as file:
        file.write('{"cell": 3')
    with pytest.raises(UserError, match=r"line 3 of .*results\.jsonl is broken"):
        list(results)


def test_the_table_has_mean_and_sample_deviation():
    ac = {"hoc": [0.5, 0.6, 0.9], "er": [0.1]}
    entries = [
        {"cell": {"method": m, "epochs": "8", "seed": str(s)}, "metrics": {"AC": a, "AA": None}}
        for m, values in ac.items()
        for s, a in enumerate(values)
    ]
    mean, spread = np.mean(ac["hoc"]), np.std(ac["hoc"], ddof=1)
    head, hoc, er = table(entries).splitlines()
    assert head.split() == ["method", "runs", "AC", "AA"]  # epochs are the same everywhere
    assert hoc.split() == ["hoc", "3", f"{mean:.3f}", "±", f"{spread:.3f}", "-"]
    assert er.split() == ["er", "1", "0.100", "-"]
    assert table([]) == "no cell has a result yet"


def test_the_names_of_a_cell_are_filled_in():
    with tiny.own_flags():
        filled_in = importlib.import_module("launch.sweep").filled_in
    values = {"method": "hoc", "optim.lr": "0.01", "data.train.classes": "(0,{4})"}
    text = "runs/{method}-{optim.lr}/{data.train.classes}{/chain"
    assert filled_in(text, values) == "runs/hoc-0.01/(0,{4}){/chain"
    for name in ("optim", "metod", "method!r", ""):
        with pytest.raises(UserError, match=r"unknown name of the grid .* Valid: data") as caught:
            filled_in("runs/{method}/{" + name + "}", values)
        assert caught.value.argument == "pretrained"


@pytest.mark.slow
def test_the_command_resumes_and_prints_the_table(tmp_path):
    fields = {**tiny.with_backbone("flat", tiny.TRAIN), "epochs": 1}
    shared = ";".join(f"{k}={v}" for k, v in fields.items())
    call = (
        "sweep",
        "--config=configs/glyphs.py:replace=false",
        f"--workdir={tmp_path}",
        "--noprogress",
        f"--grid=method=hoc,er;seed=0,1;{shared}",
    )
    code, out, err = programs.call(*call, flat=True)
    assert code == 0, err
    assert out.count("cell ") == 4 and out.splitlines()[-3].split()[:2] == ["method", "runs"]
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    columns = {"identification AC", "identification AA"}
    assert len(lines) == 4 and set(json.loads(lines[0])["metrics"]) == columns
    again = programs.call(*call, flat=True)
    assert (
        again[0] == 0
        and "cell " not in again[1]
        and again[1].splitlines()[-3:] == out.splitlines()[-3:]
    )
    # Another metric is measured, not confused with the first; another configuration is refused.
    code, out, err = programs.call(*call, "--metric=map", flat=True)
    assert code == 0 and "map AA" in out and "identification" not in out, err
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 8
    other = [part.replace("replace=false", "replace=false,optimizer=adamw") for part in call]
    code, out, err = programs.call(*other, flat=True)
    assert code == 2 and "another configuration" in err
