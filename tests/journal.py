"""A file in which a process that tests kill acknowledges what it has done, on disk before it goes on."""

import json
import os
from pathlib import Path


class Journal:
    """Lines of JSON in a folder's file `acknowledged`."""

    def __init__(self, folder):
        self.path = Path(folder) / "acknowledged"

    def say(self, **facts):
        """Write a line and wait until it is on disk."""
        with open(self.path, "a") as file:
            file.write(json.dumps(facts) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict]:
        """Return the whole lines; a kill may cut one off, and later processes write on after it."""
        lines = self.path.read_text().split("\n") if self.path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]
