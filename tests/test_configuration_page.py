"""docs/configuration.md lists the schema as it is."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_is_what_the_program_writes():
    # In a process of its own, which knows of no backbones that tests registered.
    code = "import write_configuration; print(write_configuration.page(), end='')"
    folder = ROOT / "docs"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.stdout == (folder / "configuration.md").read_text(), (
        "run docs/write_configuration.py"
    )
