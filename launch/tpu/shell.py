"""Run commands of the cloud one by one, each printed before it runs."""

import re
import shlex
import subprocess
from dataclasses import dataclass, field

from launch.tpu.errors import Mistake


@dataclass(frozen=True)
class Answer:
    """The result of a command.

    Attributes:
      code: exit code.
      out: standard output.
      err: standard error.
    """

    code: int
    out: str
    err: str

    @property
    def missing(self) -> bool:
        """True if the resource does not exist, False if the question itself failed."""
        # Whole words: ServerNotFoundError is a network that is down.
        return self.code != 0 and bool(re.search(r"\bnot[ _]?found\b", self.err, re.I))

    @property
    def no_object(self) -> bool:
        """True if a bucket has no such object, False if the question itself failed."""
        words = r"matched no objects|no urls matched|gs://[^/\s]+/\S+ not found"
        return self.code != 0 and bool(re.search(words, self.words, re.I))

    @property
    def tail(self) -> str:
        """The last 100 lines of the output."""
        return "\n".join(self.out.splitlines()[-100:])

    @property
    def words(self) -> str:
        """The error on one line."""
        return " ".join(self.err.split()) or f"exit code {self.code}"


@dataclass
class Shell:
    """Run commands and print them; a question that is repeated is printed once."""

    asked: set[str] = field(default_factory=set)

    def run(self, command: list[str], question: bool = False, feed: str = "") -> Answer:
        """Run a command to its end.

        Args:
          command: the program and its arguments.
          question: the command only reads, so that printing it once is enough.
          feed: standard input of the command.

        Raises:
          Mistake: the program is not installed.
        """
        line = shlex.join(command)
        if not (question and line in self.asked):
            print(f"$ {line}", flush=True)
        if question:
            self.asked.add(line)
        try:
            done = subprocess.run(command, input=feed, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise Mistake(
                f"{command[0]} is not on PATH: install it "
                "(gcloud: https://cloud.google.com/sdk/docs/install, then `gcloud auth login`)"
            ) from None
        return Answer(done.returncode, done.stdout, done.stderr)
