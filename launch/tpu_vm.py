"""Rent a Cloud TPU slice, run a program on it until it ends, and give the slice back.

  SLICE="--name=tpu-a --accelerator=v6e-16 --zone=us-east5-b --project=my-project"
  RUN="--workdir=gs://my-bucket/run-a"
  python -m launch.tpu_vm up $SLICE $RUN -- launch.train --config=configs/NAME.py

What comes before the lone `--` is for this program. What comes after it runs on every host, with
--workdir added (--chain for launch.evaluate; --multihost on a slice of several hosts). With
--dry_run, `up` prints what it would do as a shell script and runs nothing.

  up      creates the slice and watches it. A preempted slice is deleted and created again, at most
          --retries times; the program resumes from --workdir. The slice is deleted when the program
          has ended or --max_run_duration is over. Ctrl-C only stops the watching; the same command
          takes it up again. Exit code: 0 the program ended well, 75 not finished (the same command
          goes on), 1 failed, 2 a mistake in the command.
  status  tells how the slice and the run are.
  logs    prints the end of every host's log, also when the slice is gone.
  down    deletes whatever `up` has made; an `up` that still watches stops.
  list    lists the slices in --zone of --project.

  python -m launch.tpu_vm up $SLICE $RUN --flex --max_run_duration=8h -- launch.train ...
  python -m launch.tpu_vm up $SLICE $RUN --nospot -- launch.train ...
  python -m launch.tpu_vm up $SLICE $RUN --repo=https://github.com/ME/FORK#my-branch -- ...
  python -m launch.tpu_vm logs $SLICE $RUN
  python -m launch.tpu_vm down $SLICE $RUN

Accelerators: v2 v3 v4 v5e through the Cloud TPU API; v5p v6e tpu7x through Compute Engine. The
number counts chips for v5e and v6e, cores (two a chip) for the others.
"""

import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from absl import app, flags

from compat_jax import cloud
from compat_jax.errors import UserError, unknown

VERBS = ("up", "status", "logs", "down", "list")
ROOT = Path(__file__).resolve().parents[1]
RESUME = 75  # EX_TEMPFAIL: not finished, the same command goes on
DOWN = 130  # stored by `down`, so that an `up` that watches elsewhere stops
STUBBORN = 5  # this many unreadable answers in a row end the watching


class LaunchError(RuntimeError):
    """The cloud refused: told on one line, exit code 1."""


@dataclass(frozen=True)
class Answer:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def missing(self) -> bool:
        """The thing asked for does not exist (unlike: the question failed)."""
        return self.code != 0 and bool(re.search(r"not.?found", self.err, re.I))

    @property
    def tail(self) -> str:
        """The last 100 lines."""
        return "\n".join(self.out.splitlines()[-100:])

    @property
    def words(self) -> str:
        """The error on one line."""
        return " ".join(self.err.split()) or f"exit code {self.code}"


@dataclass(frozen=True)
class Plan:
    """What `up` does: the job, its startup script's path, commands to run before, and patience."""

    job: cloud.Job
    script: str
    before: list[list[str]]
    retries: int
    poll: float


@dataclass
class Shell:
    """Runs commands, each printed first; a question that is repeated is printed once."""

    asked: set[str] = field(default_factory=set)

    def run(self, command: list[str], question: bool = False, feed: str = "") -> Answer:
        """Run one command to its end, with `feed` to read; UserError if it is not installed."""
        line = shlex.join(command)
        if not (question and line in self.asked):
            print(f"$ {line}", flush=True)
        if question:
            self.asked.add(line)
        try:
            done = subprocess.run(command, input=feed, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise UserError(
                f"{command[0]} is not on PATH: install it "
                "(gcloud: https://cloud.google.com/sdk/docs/install, then `gcloud auth login`)"
            ) from None
        return Answer(done.returncode, done.stdout, done.stderr)


def make(shell: Shell, job: cloud.Job, script: str) -> None:
    """Create the slice; if a part is refused, the parts before it are deleted again.

    Raises:
      LaunchError: refused, unless for lack of capacity, which the watching waits for.
    """
    made = []
    for part in cloud.parts(job, script):
        answer = shell.run(part.create)
        if answer.code and re.search(r"already.?exists", answer.err, re.I):
            # Left over by a run that was interrupted; it may hold an older startup script.
            shell.run(part.delete)
            answer = shell.run(part.create)
        if answer.code:
            for done in reversed(made):
                shell.run(done.delete)
            remedy = cloud.remedy(answer.words)
            refusal = f"the {part.what} was refused: {answer.words}. Remedy: {remedy}"
            if not cloud.no_capacity(answer.words):
                raise LaunchError(refusal)
            print(refusal, flush=True)
            return
        made.append(part)


def unmake(shell: Shell, job: cloud.Job) -> None:
    """Delete every part of the slice that is there; LaunchError names those that stay."""
    left = []
    for part in reversed(cloud.parts(job)):
        answer = shell.run(part.delete)
        if answer.code and not answer.missing:
            left.append(f"{part.what} ({answer.words})")
    if left:
        raise LaunchError(
            f"not deleted, and perhaps still billed: {'; '.join(left)}. Remedy: run `down` again"
        )


def look(shell: Shell, job: cloud.Job, was_running: bool) -> tuple[str, str]:
    """State of the slice: running, waiting, lost, missing or unknown; and the cloud's words."""
    answer = shell.run(cloud.state_command(job), question=True)
    if answer.missing:
        return "missing", "not there"
    if answer.code:
        return "unknown", answer.words
    state, words = cloud.read_state(job, answer.out, was_running)
    if state == "foreign":
        raise UserError(f"{job.name} is {words}, so `up` has not made it: choose another --name")
    if state == "waiting" and job.shape.backend == "gce" and job.shape.hosts > 1:
        error = shell.run(cloud.errors_command(job), question=True).out.strip()
        words += f"; newest error: {error}" if error else ""
    return state, words


def stored_exit(shell: Shell, job: cloud.Job) -> int | None:
    """How the run ended, as its first host has stored it; None while it has not."""
    answer = shell.run(cloud.exit_command(job), question=True)
    return int(answer.out) if answer.code == 0 and answer.out.strip().isdigit() else None


def up(shell: Shell, plan: Plan) -> int:
    """Create the slice and watch it; returns 0 (ended well), 75 (not finished) or the failure."""
    job = plan.job
    ended = stored_exit(shell, job)
    if ended == 0:
        print(f"{job.name} has ended well already; another run needs another --name")
        return down(shell, job)
    if ended is not None:
        shell.run(["gcloud", "storage", "rm", f"{job.logs}/exit"])
    state, words = look(shell, job, was_running=False)
    if state == "unknown":
        raise LaunchError(words)
    if state in ("missing", "lost"):
        # Once: a slice that is created again runs the same code.
        for command in plan.before:
            answer = shell.run(command)
            if answer.code:
                raise LaunchError(f"the code was not sent: {answer.words}")
        if state == "lost":
            unmake(shell, job)
        make(shell, job, plan.script)
    else:
        print(f"{job.name} is there already: {words}; watching it")
    return watch(shell, plan)


def watch(shell: Shell, plan: Plan) -> int:
    """The loop of `up`: look, and create the slice again when it is lost."""
    job, said, was_running, unreadable, lost = plan.job, "", False, 0, 0
    while True:
        time.sleep(plan.poll)
        # In this order: a slice that has deleted itself has stored its exit code before.
        state, words = look(shell, job, was_running)
        ended = stored_exit(shell, job)
        if ended is not None:
            return end(shell, job, ended)
        if words != said:
            print(f"{time.strftime('%H:%M:%S')} {job.name}: {words}", flush=True)
        said, was_running = words, was_running or state == "running"
        unreadable = unreadable + 1 if state == "unknown" else 0
        if unreadable == STUBBORN:
            raise LaunchError(f"{job.name} may still be there: {words}. Remedy: see `status`")
        if state not in ("lost", "missing"):
            continue
        unmake(shell, job)
        if lost == plan.retries:
            print(f"{job.name}: lost after {lost} retries (--retries); the same command goes on")
            return RESUME
        lost, was_running = lost + 1, False
        print(f"{job.name}: lost, creating it again, {lost} of {plan.retries}", flush=True)
        make(shell, job, plan.script)


def end(shell: Shell, job: cloud.Job, code: int) -> int:
    """Report how the run ended, and delete what is left of the slice."""
    report = f"failed with exit code {code}; see `logs`, or {job.logs}/worker-0.log"
    if code in (RESUME, DOWN):
        why = "out of time and saved" if code == RESUME else "taken down"
        report = f"{why}; the same command goes on"
    print(f"{job.name}: {report if code else 'ended well'}", flush=True)
    unmake(shell, job)
    return code


def down(shell: Shell, job: cloud.Job) -> int:
    """Delete whatever `up` has made, and nothing else of that name."""
    look(shell, job, was_running=False)
    if stored_exit(shell, job) is None:
        shell.run(cloud.tell_command(job), feed=f"{DOWN}\n")
    unmake(shell, job)
    return 0


def status(shell: Shell, job: cloud.Job) -> int:
    """Print the states of the slice and of the run."""
    state, words = look(shell, job, was_running=False)
    ended = stored_exit(shell, job)
    print(f"slice {job.name}: {state}, {words}")
    print(f"run: {'has not ended' if ended is None else f'ended with exit code {ended}'}")
    return 0 if state in ("running", "waiting") else 1


def logs(shell: Shell, job: cloud.Job) -> int:
    """Print every host's log: the stored one, else by ssh or from the serial console."""
    silent = []
    for worker in range(job.shape.hosts):
        answer = shell.run(cloud.log_command(job, worker))
        if answer.code:
            silent.append(worker)
        else:
            print(f"--- worker {worker}: {job.logs}/worker-{worker}.log\n{answer.tail}")
    hosts = silent
    if silent and job.shape.backend == "gce":
        # The serial console goes by the host's name, which does not tell the worker's number.
        listed = shell.run(cloud.state_command(job)).out
        hosts = cloud.host_names(listed) if job.shape.hosts > 1 else [job.name]
    unreachable = []
    for host in hosts:
        answer = shell.run(cloud.console_command(job, host))
        if answer.code:
            unreachable.append(f"{host} ({answer.words})")
        else:
            print(f"--- host {host}\n{answer.tail}")
    if unreachable or (silent and not hosts):
        raise LaunchError(
            f"no stored log of worker {', '.join(map(str, silent))}, and unreachable: "
            f"{', '.join(unreachable) or 'all'}. Remedy: a log is stored a minute after the boot; "
            "see `status`"
        )
    return 0


def list_all(shell: Shell, commands: list[list[str]]) -> int:
    """Print what is there, of both back ends, also when one of them does not answer."""
    code = 0
    for command in commands:
        answer = shell.run(command)
        print(answer.out or answer.err, end="", flush=True)
        code = code or answer.code
    return min(code, 1)


def pick_source(repo: str | None, wheel: str | None, there: str, folder: str) -> tuple:
    """The Job's source, and the commands that put it `there` (gs://) by way of `folder` here."""
    if repo and wheel:
        raise UserError("--repo and --wheel are both given: keep one")
    if repo:
        address, _, revision = repo.partition("#")
        return ("repo", address, revision), []
    if wheel:
        if wheel.startswith("gs://"):
            return ("wheel", wheel, ""), []
        if not Path(wheel).is_file():
            raise UserError(f"--wheel={wheel!r} is no file: build one with `pip wheel --no-deps .`")
        there = f"{there}/{Path(wheel).name}"
        return ("wheel", there, ""), [["gcloud", "storage", "cp", wheel, there]]
    if not (ROOT / ".git").exists():
        raise UserError(f"{ROOT} is no git checkout to send: give --repo=URL or --wheel=FILE")
    archive, there = f"{folder}/source.tar.gz", f"{there}/source.tar.gz"
    pack = ["git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output={archive}", "HEAD"]
    return ("archive", there, ""), [pack, ["gcloud", "storage", "cp", archive, there]]


def check_program(program: list[str], own_code: bool) -> tuple[str, ...]:
    """The program to run on the hosts; known by name if they get this checkout (`own_code`)."""
    if not program:
        raise UserError("no program: end the command with -- launch.train --config=...")
    here = sorted(f"launch.{p.stem}" for p in (ROOT / "launch").glob("[a-z]*.py"))
    here.remove("launch.tpu_vm")
    if not re.fullmatch(r"launch\.\w+", program[0]) or (own_code and program[0] not in here):
        raise unknown("program", program[0], here)
    if any(re.fullmatch(r"--?workdir(=.*)?", argument, re.S) for argument in program[1:]):
        raise UserError("--workdir comes before the lone --: the hosts are given it from there")
    return tuple(program)


def define_flags() -> None:
    """Flags of this program; not at import, so that the programs can be imported side by side."""
    flags.DEFINE_string("name", None, "Name of the slice and of the run; keep it to resume.")
    flags.DEFINE_string("accelerator", None, "What to rent, e.g. v6e-16, v5e-8, v5p-8, v4-32.")
    flags.DEFINE_string("zone", None, "Zone that has it, e.g. us-east5-b.")
    flags.DEFINE_string("project", None, "Google Cloud project id.")
    flags.DEFINE_string("workdir", None, "gs:// folder: chain, checkpoints, and logs/NAME in it.")
    flags.DEFINE_bool("spot", True, "Preemptible and cheap; --nospot for on demand.")
    flags.DEFINE_bool("flex", False, "Queue for capacity and keep it, for 7 days at most.")
    flags.DEFINE_string("max_run_duration", "24h", "Longest life of a slice; it saves before.")
    flags.DEFINE_string("repo", None, "git address[#branch]; else this checkout's last commit.")
    flags.DEFINE_string("wheel", None, "Wheel to install instead: a file here or on gs://.")
    flags.DEFINE_integer("retries", 10, "How often a lost slice is created again.", lower_bound=0)
    flags.DEFINE_float("poll_seconds", 60, "Time between two looks at the slice.", lower_bound=0)
    flags.DEFINE_string("setup", "", "Shell code for every host before the program, to get data.")
    flags.DEFINE_multi_string("gcloud_arg", [], "For the create command, e.g. --subnet=S.")
    flags.DEFINE_bool("dry_run", False, "Print the commands and run none.")


def job_from_flags() -> cloud.Job:
    """The checked Job, without what only `up` needs."""
    values = flags.FLAGS
    cloud.check_place(values.name, values.zone, values.project)
    if not values.accelerator:
        raise UserError("--accelerator is missing: give what to rent, as in --accelerator=v6e-16")
    shape = cloud.shape_of(values.accelerator)
    cloud.check_workdir(values.workdir)
    place = values.name, values.zone, values.project
    return cloud.Job(*place, shape, values.workdir.rstrip("/"))


def run_up(job: cloud.Job, program: list[str]) -> int:
    """`up`: check the rest of the command, write the startup script, create, watch."""
    values, shape = flags.FLAGS, job.shape
    if values.flex and values.spot and values["spot"].present:
        raise UserError("--spot and --flex are both given: keep one")
    if cloud.seconds_of(values.max_run_duration) > 7 * 86400 and values.flex:
        raise UserError(f"--max_run_duration={values.max_run_duration}: --flex lends 7d at most")
    with tempfile.TemporaryDirectory(prefix="compat_jax-") as folder:
        folder = "." if values.dry_run else folder
        program = check_program(program, own_code=not (values.repo or values.wheel))
        source, before = pick_source(values.repo, values.wheel, job.logs, folder)
        job = replace(
            job,
            program=program,
            source=source,
            provisioning="flex" if values.flex else "spot" if values.spot else "on_demand",
            max_run=values.max_run_duration,
            setup=values.setup,
            extra=tuple(values.gcloud_arg),
        )
        hosts = f"{shape.hosts} host{'s' * (shape.hosts > 1)} {shape.machine_type}".strip()
        print(f"# {shape.accelerator}: {hosts}, through {shape.backend}: {shape.reason}")
        script = cloud.startup_script(job, (ROOT / "launch/tpu_startup.sh").read_text())
        if values.dry_run:
            print(cloud.as_shell_script(job, before, script, values.retries), end="")
            return 0
        path = Path(folder, "startup.sh")
        path.write_text(script)
        return up(Shell(), Plan(job, str(path), before, values.retries, values.poll_seconds))


def act(verb: str, program: list[str]) -> int:
    """Do what the verb says; returns the exit code."""
    shell, values = Shell(), flags.FLAGS
    if verb == "list":
        cloud.check_place(values.name or "any", values.zone, values.project)
        commands = cloud.list_commands(values.zone, values.project)
    else:
        job = job_from_flags()
        if verb == "up":
            return run_up(job, program)
        commands = {
            "down": [cloud.tell_command(job), *(p.delete for p in reversed(cloud.parts(job)))],
            "status": [cloud.state_command(job), cloud.exit_command(job)],
            "logs": [cloud.log_command(job, worker) for worker in range(job.shape.hosts)],
        }[verb]
    if values.dry_run:
        print("\n".join(shlex.join(command) for command in commands))
        return 0
    if verb == "list":
        return list_all(shell, commands)
    return {"down": down, "status": status, "logs": logs}[verb](shell, job)


def main(argv: list[str]) -> None:
    """Run the verb in `argv`: [program, verb, "--", program on the hosts...]."""
    try:
        words, program = argv[1:], []
        if "--" in words:
            cut = words.index("--")
            words, program = words[:cut], words[cut + 1 :]
        if not words:
            raise UserError(f"say what to do: one of {', '.join(VERBS)} (--help has examples)")
        if words[0] not in VERBS:
            raise unknown("verb", words[0], VERBS)
        if words[1:]:
            raise UserError(f"{words[1]!r} is no flag: a lone -- goes before the program to run")
        sys.exit(act(words[0], program))
    except (UserError, LaunchError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        print("\nno longer watching; the slice goes on (`down` deletes it)", file=sys.stderr)
        sys.exit(130)


def parse(argv: list[str]) -> list[str]:
    """Flags anywhere before the lone `--`; what comes after it is left alone."""
    cut = argv.index("--") if "--" in argv else len(argv)
    try:
        flags.FLAGS.set_gnu_getopt(True)
        return [*flags.FLAGS(argv[:cut]), *argv[cut:]]
    except flags.Error as error:
        print(f"error: {error} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse)
