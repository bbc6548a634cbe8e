"""A program of launch/ with the backbone `flat`: python run_flat.py launch.train --flag=value ..."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flat  # noqa: F401, registers it

sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
