"""The programs: thin command lines that parse, call one function, and report.

`python -m launch` lists them.
"""

from typing import NamedTuple

from launch._huge_pages import restart_with_huge_pages

restart_with_huge_pages()


class Program(NamedTuple):
    """A program of this package.

    Attributes:
      name: module to run with `python -m`.
      summary: one line that says what the program does.
      folder: flag that takes the folder of the run, "workdir" or "chain"; empty for a program that
        does not run on the hosts of a rented slice.
    """

    name: str
    summary: str
    folder: str = ""


PROGRAMS = (
    Program("launch.quickstart", "see the paper's claim on a laptop", "workdir"),
    Program("launch.tour", "take a tour in the plane: three classes, two versions, one query"),
    Program("launch.pretrain", "pre-train the models that replace others", "workdir"),
    Program(
        "launch.train", "train the next version on new photos, or a sequence of tasks", "workdir"
    ),
    Program("launch.evaluate", "compare every version of a chain with every older one", "chain"),
    Program("launch.report", "put chains side by side on one page"),
    Program("launch.sweep", "run a grid of configurations, print mean and spread"),
    Program("launch.embed", "write the features of pictures by a version of a chain"),
    Program("launch.upgrade", "upgrade a gallery: check, switch, backfill, roll back"),
    Program("launch.demo", "open a page: ask an old gallery by each version, embed it again"),
    Program("launch.enlarge", "move a chain to a larger K without reading a picture again"),
    Program("launch.import_torch", "make a chain of PyTorch weights"),
    Program("launch.export_torch", "write a version as a PyTorch state dict"),
    Program("launch.plan", "compile a configuration for TPUs or GPUs without renting them"),
    Program("launch.tpu_vm", "rent a TPU slice, run a program on it, give it back"),
    Program("launch.benchmark", "measure speed and memory"),
    Program("launch.compare_reference", "run the PyTorch reference beside this package"),
)
