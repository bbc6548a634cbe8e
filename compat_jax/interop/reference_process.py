"""The reference's program in a process of its own, which does a step at a time when asked.

A process of its own, because two thread pools in one process spin against each other, and because its
`main` takes the command line, the log and the random state of the process that it runs in. Both ends
are here: `Process` asks, `python -m compat_jax.interop.reference_process` answers, a line each.
"""

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from compat_jax.errors import UserError
from compat_jax.interop import reference_run
from compat_jax.interop.reference import open_clone

_INPUTS, _OUTCOME = "inputs.pickle", "outcome.pickle"  # of this program for itself


class Process:
    """`reference_run.run` elsewhere.

    Args:
      clone: folder of a clone of iamcl2r.
      inputs: see `reference_run`.
      folder: empty, for its files; they must stay as long as this does.
      before_step: called with the number of each step, while the other process waits.

    Raises:
      UserError: it fails; its last words say why.

    Attributes:
      outcome: what came out.
    """

    def __init__(
        self,
        clone: str,
        inputs: reference_run.Inputs,
        folder: Path,
        before_step: Callable[[int], None] = lambda step: None,
    ):
        (folder / _INPUTS).write_bytes(pickle.dumps(inputs))
        self._words = (folder / "words.txt").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(clone), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        while (word := self._hear()).startswith("step"):
            before_step(int(word.split()[1]))
            self._say("go on")
        # Written by the process that this one started, into a folder of this one's.
        self.outcome: reference_run.Outcome = pickle.loads((folder / _OUTCOME).read_bytes())

    def seconds(self, work: str) -> float:
        """Do "evaluate" (all versions) or "features" (of the queries, last version) once more."""
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
            raise UserError(f"the reference's program failed; its last words: {last}")
        return word


def _main(clone: str, folder: Path) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what the clone prints must not look like answers

    def answer(word):
        answers.write(f"{word}\n")
        answers.flush()

    def before_step(step):
        answer(f"step {step}")
        sys.stdin.readline()

    modules = open_clone(clone, "iamcl2r")
    inputs = pickle.loads((folder / _INPUTS).read_bytes())
    outcome = reference_run.run(modules, inputs, folder, before_step)
    works = {"evaluate": outcome.evaluate}
    if inputs.query is not None:
        works["features"] = reference_run.feature_work(modules, inputs, outcome.states[-1])
    (folder / _OUTCOME).write_bytes(pickle.dumps(outcome._replace(evaluate=None)))
    answer("done")
    for line in sys.stdin:
        began = time.perf_counter()
        works[line.strip()]()
        answer(time.perf_counter() - began)


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
