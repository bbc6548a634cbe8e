"""A `gcloud` that records its arguments and fails on demand, and `launch.tpu_vm` run against it."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE = ["--zone=us-east5-b", "--project=my-project"]
WORKDIR = "gs://my-bucket/run-a"
PROGRAM = ["launch.train", "--config=configs/a.py"]
CODE = ("--repo=https://example.com/me/code#v1",)

FAKE_GCLOUD = r"""#!{python} -SE
import json, os, shutil, sys
here, argv = os.path.dirname(os.path.dirname(os.path.abspath(__file__))), sys.argv[1:]
with open(here + "/calls.jsonl", "a") as calls:
    calls.write(json.dumps(argv) + "\n")
scenario = json.load(open(here + "/scenario.json"))
line = " ".join(argv)

def answer(words, code):
    with open(here + "/scenario.json", "w") as file:
        json.dump(scenario, file)
    (sys.stderr if code else sys.stdout).write(words + "\n")
    sys.exit(code)

if argv[:2] == ["storage", "cp"] and os.path.exists(here + "/bucket/" + argv[2].replace("/", "_")):
    shutil.copy(here + "/bucket/" + argv[2].replace("/", "_"), argv[3])
for argument in argv:
    if argument.startswith("--metadata-from-file=startup-script=") and "create" in argv:
        shutil.copy(argument.split("=", 2)[2], here + "/startup.sh")
for failure in scenario["fail"]:
    if failure["match"] in line and failure["times"]:
        failure["times"] -= 1
        answer(failure["words"], 1)
if argv[:2] == ["storage", "cat"] and argv[2].endswith("/exit"):
    code = scenario["exit"].pop(0) if scenario["exit"] else None
    if str(code).startswith("ERROR"):
        answer(code, 1)
    answer("ERROR: matched no objects" if code is None else str(code), int(code is None))
if "describe" in argv or "list-instances" in argv:
    state = scenario["states"].pop(0)
    if state == "MISSING":
        answer("ERROR: (gcloud) NOT_FOUND: Resource 'x' was not found", 1)
    if state == "BROKEN":
        answer("ERROR: (gcloud) There was a problem refreshing your tokens", 1)
    answer(state, 0)
answer("output of " + " ".join(argv[:3]), 0)
"""


class Cloud:
    """A folder with the fake and its records, and a way to run the program against it."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        self.command("gcloud", FAKE_GCLOUD.replace("{python}", sys.executable))
        self.scenario([])

    def command(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def bucket(self, address: str, file: Path) -> None:
        """Put a file where `storage cp ADDRESS FILE` finds it."""
        (self.folder / "bucket").mkdir(exist_ok=True)
        shutil.copy(file, self.folder / "bucket" / address.replace("/", "_"))

    def scenario(self, states: list, exits: tuple = (), fail: tuple = ()) -> None:
        """Answers to come, also errors; a failure is (part of the command, words, how often)."""
        fail = [{"match": match, "words": words, "times": times} for match, words, times in fail]
        scenario = {"states": states, "exit": list(exits), "fail": fail}
        (self.folder / "scenario.json").write_text(json.dumps(scenario))

    def run(self, *argv: str) -> subprocess.CompletedProcess:
        env = os.environ | {"PATH": f"{self.bin}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "launch.tpu_vm", *argv]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=self.folder)

    def up(self, accelerator: str, *argv: str, program: list = PROGRAM, code: tuple = CODE):
        slice_ = ["--name=tpu-a", f"--accelerator={accelerator}", *PLACE, f"--workdir={WORKDIR}"]
        return self.run("up", *slice_, *code, "--poll_seconds=0", *argv, "--", *program)

    def verb(self, verb: str, accelerator: str, *argv: str):
        slice_ = ["--name=tpu-a", f"--accelerator={accelerator}", *PLACE, f"--workdir={WORKDIR}"]
        return self.run(verb, *slice_, *argv)

    def calls(self, *words: str) -> list[str]:
        """Recorded commands that contain one of the words, with the script's folder cut off."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        calls = []
        for argv in map(json.loads, lines):
            start = "--metadata-from-file=startup-script="
            argv = [start + "S" if argument.startswith(start) else argument for argument in argv]
            calls.append(" ".join(argv))
        return [call for call in calls if not words or any(word in call for word in words)]


def instance(status: str, name: str = "tpu-a") -> str:
    return json.dumps({"status": status, "labels": {"compat_jax": name}})


def group(*statuses: str, template: str = "tpu-a-template") -> str:
    hosts = [
        {
            "instance": f"https://x/zones/us-east5-b/instances/tpu-a-{index}",
            "instanceStatus": status,
            "version": {"instanceTemplate": f"https://x/instanceTemplates/{template}"},
        }
        for index, status in enumerate(statuses)
    ]
    return json.dumps(hosts)
