"""Run the reference's program in a separate process, one step at a time.

It is separate because two thread pools in one process spin against each other, and because the
reference's `main` takes over the command line, the log and the random state of its process. Both
ends are here: `Process` sends requests, `python -m launch.reference.clone_process` answers, one line
each.
"""

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from compat_jax.errors import UserError
from launch.reference import clone_run
from launch.reference.clone import open_clone

_INPUTS, _OUTCOME = "inputs.pickle", "outcome.pickle"  # written and read by this module only


class Process:
    """`clone_run.run` in a separate process.

    Args:
      clone: folder of a clone of iamcl2r.
      inputs: see `clone_run.Inputs`.
      folder: an empty folder for its files; keep it as long as this object is used.
      before_step: called with the number of each step, while the other process waits.

    Raises:
      UserError: the process fails; the message quotes its last line.

    Attributes:
      outcome: see `clone_run.Outcome`.
    """

    def __init__(
        self,
        clone: str,
        inputs: clone_run.Inputs,
        folder: Path,
        before_step: Callable[[int], None] = lambda step: None,
    ):
        (folder / _INPUTS).write_bytes(pickle.dumps(inputs))
        self._words = (folder / "words.txt").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "launch.reference.clone_process", str(clone), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        while (word := self._hear()).startswith("step"):
            before_step(int(word.split()[1]))
            self._say("go on")
        # Safe to unpickle: our own process wrote it, into our own folder.
        self.outcome: clone_run.Outcome = pickle.loads((folder / _OUTCOME).read_bytes())

    def seconds(self, work: str) -> float:
        """Repeat a piece of work and return its duration.

        Args:
          work: "evaluate" for all versions, "features" for the query images and the last version.
        """
        self._say(work)
        return float(self._hear())

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._words.close()

    def _say(self, word):
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()

    def _hear(self):
        word = self._process.stdout.readline()
        if not word:
            self._process.wait()
            self._words.seek(0)
            last = (self._words.read().strip().splitlines() or ["nothing"])[-1]
            raise UserError(f"the reference's program failed with: {last}")
        return word


def _main(clone: str, folder: Path) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # keep what the clone prints out of the answers

    def answer(word):
        answers.write(f"{word}\n")
        answers.flush()

    def before_step(step):
        answer(f"step {step}")
        sys.stdin.readline()

    modules = open_clone(clone, "iamcl2r")
    inputs = pickle.loads((folder / _INPUTS).read_bytes())
    outcome = clone_run.run(modules, inputs, folder, before_step=before_step)
    works = {"evaluate": outcome.evaluate}
    if inputs.query is not None:
        works["features"] = clone_run.feature_work(modules, inputs, outcome.states[-1])
    (folder / _OUTCOME).write_bytes(pickle.dumps(outcome._replace(evaluate=None)))
    answer("done")
    for line in sys.stdin:
        began = time.perf_counter()
        works[line.strip()]()
        answer(time.perf_counter() - began)


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
