"""The tour: the program prints what the notebook says and runs its code."""

import json
import re
from pathlib import Path

import programs
import pytest
from PIL import Image

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tour.ipynb"


@pytest.mark.slow
def test_the_tour_runs_every_cell_of_the_notebook(tmp_path):
    code, text, error = programs.call("tour", f"--out={tmp_path}")
    assert (code, error) == (0, ""), error
    words = " ".join(text.split())
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            for paragraph in source.split("\n\n"):
                assert " ".join(paragraph.lstrip("# ").split()) in words
        else:  # the beginning of what each cell prints
            for begin in re.findall(r'print\(\s*f"([^{"]{8,})', source):
                assert begin in text, begin
    (old,), (cross,), (new,) = (
        [int(n) for n in re.findall(rf"^\[{cell}\] = (\d+) %:.*(?:queries, )", text, re.M)][:1]
        for cell in ("0, 0", "1, 0", "1, 1")
    )
    assert old < cross <= new and new - cross < 10  # the old gallery serves the new model
    apart = re.findall(r"^\[1, 0\] = (\d+) %", text, re.M)
    assert len(apart) == 2 and int(apart[1]) < old - 20  # without prototypes it does not
    assert "Version 1 is compatible with version 0: AC is 1." in text
    assert text.rstrip().endswith(f"The picture: {tmp_path / 'tour.png'}")
    with Image.open(tmp_path / "tour.png") as image:
        assert image.width > 600 and len(image.convert("RGB").getcolors(1 << 24)) > 50


def test_a_bucket_is_no_place_for_the_picture():
    code, _, error = programs.call("tour", "--out=gs://bucket/tour")
    assert code == 2 and error.startswith("error: ") and len(error.splitlines()) == 1
