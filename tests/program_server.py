"""Runs programs in children of a process that has imported what they need: each starts in no time.

It reads lines of JSON. One asks for a program and is answered by its process number; another asks for
the exit code of a number, at once (null while it runs) or when it has ended. A child is a process of its
own from the fork to its last exit handler, which signals reach; the server itself starts no device.
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import sys
import threading
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

for part in ("experiment", "interop", "report"):
    importlib.import_module(f"compat_jax.{part}")

SECONDS = 300


def main():
    """Serve until the reader has left; return whether this is a child, and now the program asked for."""
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            ended, status = os.waitpid(request["wait"], 0 if request["block"] else os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if ended else None), flush=True)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the fork: there are no threads to lose yet
            child = os.fork()
        if not child:
            become(request)
            return True
        print(child, flush=True)
    return False


def become(request):
    """Take the place of the program that was asked for: its streams, variables and arguments."""
    signal.alarm(SECONDS)
    with (
        open(os.devnull) as nothing,
        open(request["out"], "wb") as out,
        open(request["err"], "wb") as err,
    ):
        for file, number in ((nothing, 0), (out, 1), (err, 2)):
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["flat"]:
        import flat  # noqa: F401, registers it
    sys.argv = request["argv"]


def run():
    """Run the program to its exit handlers; what it has imported is not taken apart: that takes time."""
    code = 0
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as asked:
        code = asked.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    if main():
        run()
