"""A program of launch/ with the backbone `flat`: python run_flat.py launch.train --flag=value ..."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flat import Flat

from compat_jax import models

models.BACKBONES["flat"] = Flat
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
