"""Rent a Cloud TPU slice, run a program on it until it ends, and give the slice back.

  SLICE="--name=tpu-a --accelerator=v6e-16 --zone=us-east5-b --project=my-project"
  RUN="--workdir=gs://my-bucket/run-a"
  PROGRAM="launch.train --config=configs/glyphs.py:replace=false"
  python -m launch.tpu_vm up $SLICE $RUN -- $PROGRAM

Everything before the lone `--` is for this program. Everything after it runs on every host, with
--workdir added (--chain for launch.evaluate; --multihost on a slice of several hosts). With
--dry_run, `up` prints what it would do as a shell script and runs nothing.

  up      creates the slice and watches it. A preempted slice is deleted and created again, at most
          --retries times; the program resumes from --workdir. The slice is deleted when the program
          has ended or --max_run_duration is over. Ctrl-C only stops the watching; the same command
          takes it up again. Exit code: 0 the program ended well, 75 not finished (the same command
          resumes it), 1 failed, 2 a mistake in the command.
  status  prints the states of the slice and of the run.
  logs    prints the end of every host's log, even after the slice is gone.
  down    deletes everything that `up` has made; an `up` that still watches stops.
  list    lists the slices in --zone of --project.
  wheel   builds a wheel of this clone for --wheel, into --out: the library with the programs and
          the configurations, which a wheel of `pip wheel` lacks. Prints its path.

  python -m launch.tpu_vm up $SLICE $RUN --flex --max_run_duration=8h -- $PROGRAM
  python -m launch.tpu_vm up $SLICE $RUN --nospot -- $PROGRAM
  python -m launch.tpu_vm up $SLICE $RUN --repo=https://github.com/ME/FORK#my-branch -- $PROGRAM
  WHEEL=$(python -m launch.tpu_vm wheel --out=dist)
  python -m launch.tpu_vm up $SLICE $RUN --wheel=$WHEEL -- $PROGRAM
  python -m launch.tpu_vm status $SLICE $RUN
  python -m launch.tpu_vm logs $SLICE $RUN
  python -m launch.tpu_vm down $SLICE $RUN
  python -m launch.tpu_vm list --zone=us-east5-b --project=my-project

Accelerators: v2 v3 v4 v5e through the Cloud TPU API; v5p v6e tpu7x through Compute Engine. The
number counts chips for v5e and v6e, cores (two a chip) for the others.
"""

import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from absl import app, flags

from launch.tpu import cloud, slices, source, wheel
from launch.tpu.errors import Mistake, Refused, unknown
from launch.tpu.shell import Shell

VERBS = ("up", "status", "logs", "down", "list", "wheel")


def define_flags() -> None:
    """Define the flags of this program; not at import, so that programs can be imported together."""
    flags.DEFINE_string("name", None, "Name of the slice and of the run; keep it to resume.")
    flags.DEFINE_string("accelerator", None, "What to rent, e.g. v6e-16, v5e-8, v5p-8, v4-32.")
    flags.DEFINE_string("zone", None, "Zone that has it, e.g. us-east5-b.")
    flags.DEFINE_string("project", None, "Google Cloud project id.")
    flags.DEFINE_string("workdir", None, "gs:// folder: chain, checkpoints, and logs/NAME in it.")
    flags.DEFINE_bool("spot", True, "Preemptible and cheap; --nospot for on demand.")
    flags.DEFINE_bool("flex", False, "Queue for capacity and keep it, for 7 days at most.")
    flags.DEFINE_string("max_run_duration", "24h", "Longest life of a slice; it saves before.")
    flags.DEFINE_string("repo", None, "git address[#branch]; else this clone's last commit.")
    flags.DEFINE_string("wheel", None, "Wheel made by `wheel` to install: a file here or on gs://.")
    flags.DEFINE_string("out", ".", "Folder that `wheel` writes to.")
    flags.DEFINE_integer("retries", 10, "How often a lost slice is created again.", lower_bound=0)
    flags.DEFINE_float("poll_seconds", 60, "Time between two looks at the slice.", lower_bound=0)
    flags.DEFINE_string("setup", "", "Shell code for every host before the program, to get data.")
    flags.DEFINE_multi_string("gcloud_arg", [], "For the create command, e.g. --subnet=S.")
    flags.DEFINE_bool("dry_run", False, "Print the commands and run none.")


def job_from_flags() -> cloud.Job:
    """Return the checked job, without the fields that only `up` needs."""
    values = flags.FLAGS
    cloud.check_place(values.name, values.zone, values.project)
    if not values.accelerator:
        raise Mistake("--accelerator is missing: give what to rent, as in --accelerator=v6e-16")
    shape = cloud.shape_of(values.accelerator)
    cloud.check_workdir(values.workdir)
    return cloud.Job(
        name=values.name,
        zone=values.zone,
        project=values.project,
        shape=shape,
        workdir=values.workdir.rstrip("/"),
    )


def run_up(job: cloud.Job, program: list[str]) -> int:
    """Check the rest of the command, write the startup script, create the slice and watch it."""
    values, shape = flags.FLAGS, job.shape
    if values.flex and values.spot and values["spot"].present:
        raise Mistake("--spot and --flex are both given: keep one")
    if cloud.seconds_of(values.max_run_duration) > 7 * 86400 and values.flex:
        raise Mistake(f"--max_run_duration={values.max_run_duration}: --flex lends 7d at most")
    known = source.check_program(program, foreign=bool(values.repo or values.wheel))
    with tempfile.TemporaryDirectory(prefix="compat_jax-") as folder:
        folder = "." if values.dry_run else folder
        code = source.pick(
            values.repo, values.wheel, program=program, bucket=job.logs, folder=folder
        )
        job = replace(
            job,
            program=tuple(program),
            folder=known.folder,
            source=code.source,
            provisioning="flex" if values.flex else "spot" if values.spot else "on_demand",
            max_run=values.max_run_duration,
            setup=values.setup,
            extra=tuple(values.gcloud_arg),
        )
        hosts = f"{shape.hosts} host{'s' * (shape.hosts > 1)} {shape.machine_type}".strip()
        print(f"# {shape.accelerator}: {hosts}, through {shape.backend}: {shape.reason}")
        script = cloud.startup_script(job)
        if values.dry_run:
            commands = list(code.commands)
            print(
                cloud.as_shell_script(job, commands, script=script, retries=values.retries), end=""
            )
            return 0
        path = Path(folder, "startup.sh")
        path.write_text(script)
        rental = slices.Rental(
            job=job,
            script=str(path),
            code=code,
            retries=values.retries,
            poll=values.poll_seconds,
        )
        return slices.up(Shell(), rental)


def act(verb: str, program: list[str]) -> int:
    """Do what the verb says; return the exit code."""
    shell, values = Shell(), flags.FLAGS
    if verb == "wheel":
        print(wheel.build(source.ROOT, Path(values.out)))
        return 0
    if verb == "list":
        cloud.check_place(values.name or "any", values.zone, values.project)
        commands = cloud.list_commands(values.zone, values.project)
    else:
        job = job_from_flags()
        if verb == "up":
            return run_up(job, program)
        deletes = [part.delete for part in reversed(cloud.parts(job))]
        commands = {
            "down": [cloud.store_exit_command(job), *deletes],
            "status": [cloud.state_command(job), cloud.exit_command(job)],
            "logs": [cloud.log_command(job, worker) for worker in range(job.shape.hosts)],
        }[verb]
    if values.dry_run:
        print("\n".join(shlex.join(command) for command in commands))
        return 0
    if verb == "list":
        return slices.show(shell, commands)
    return {"down": slices.down, "status": slices.status, "logs": slices.logs}[verb](shell, job)


def main(argv: list[str]) -> None:
    """Run the verb in `argv`: [program, verb, "--", program on the hosts...]."""
    try:
        words, program = argv[1:], []
        if "--" in words:
            cut = words.index("--")
            words, program = words[:cut], words[cut + 1 :]
        if not words:
            raise Mistake(f"say what to do: one of {', '.join(VERBS)} (--help has examples)")
        if words[0] not in VERBS:
            raise unknown("verb", words[0], VERBS)
        if words[1:]:
            raise Mistake(f"{words[1]!r} is no flag: a lone -- goes before the program to run")
        sys.exit(act(words[0], program))
    except (Mistake, Refused) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, Mistake) else 1)
    except KeyboardInterrupt:
        print("\nno longer watching; the slice goes on (`down` deletes it)", file=sys.stderr)
        sys.exit(130)


def parse(argv: list[str]) -> list[str]:
    """Parse the flags before the lone `--`, and leave everything after it alone."""
    cut = argv.index("--") if "--" in argv else len(argv)
    try:
        flags.FLAGS.set_gnu_getopt(True)
        return [*flags.FLAGS(argv[:cut]), *argv[cut:]]
    except SystemExit:  # absl has printed --help, and calls that a failure
        sys.exit(0)
    except flags.Error as error:
        print(f"error: {error} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse)
