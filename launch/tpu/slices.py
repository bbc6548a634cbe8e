"""Make a slice, watch it until its program has ended, make it again when it is lost, delete it."""

import re
import time
from dataclasses import dataclass

from launch.tpu import cloud, wheel
from launch.tpu.errors import Mistake, Refused
from launch.tpu.shell import Shell
from launch.tpu.source import Code

RESUME = 75  # EX_TEMPFAIL: not finished, the same command resumes the run
DOWN = 130  # stored by `down`, so that an `up` that watches on another machine stops
STUBBORN = 5  # this many unreadable answers in a row end the watching


@dataclass(frozen=True)
class Exit:
    """End of a run, as the bucket tells it.

    Attributes:
      code: exit code that the first host has stored; None if there is none, or it is not known.
      unreadable: why it is not known, in the cloud's words; empty if it is.
    """

    code: int | None = None
    unreadable: str = ""


@dataclass(frozen=True)
class Rental:
    """A run to rent a slice for.

    Attributes:
      job: the run.
      script: path of the startup script of its hosts.
      code: how the hosts get their code.
      retries: how many times a lost slice is made again.
      poll: seconds between two looks at the slice.
    """

    job: cloud.Job
    script: str
    code: Code
    retries: int
    poll: float


def make(shell: Shell, job: cloud.Job, script: str) -> None:
    """Create the slice; if a part is refused, delete the parts made before it.

    A lack of capacity is only printed: `watch` tries again.

    Raises:
      Refused: the cloud refused a part for another reason.
    """
    made = []
    for part in cloud.parts(job, script):
        answer = shell.run(part.create)
        if answer.code and re.search(r"already.?exists", answer.err, re.I):
            # Left over from an interrupted run; it may hold an older startup script.
            shell.run(part.delete)
            answer = shell.run(part.create)
        if answer.code:
            for done in reversed(made):
                shell.run(done.delete)
            remedy = cloud.remedy(answer.words)
            refusal = f"the {part.what} was refused: {answer.words}. Remedy: {remedy}"
            if not cloud.no_capacity(answer.words):
                raise Refused(refusal)
            print(refusal, flush=True)
            return
        made.append(part)


def unmake(shell: Shell, job: cloud.Job) -> None:
    """Delete every part of the slice that exists.

    Raises:
      Refused: some parts could not be deleted; the message names them.
    """
    left = []
    for part in reversed(cloud.parts(job)):
        answer = shell.run(part.delete)
        if answer.code and not answer.missing:
            left.append(f"{part.what} ({answer.words})")
    if left:
        raise Refused(
            f"not deleted, and perhaps still billed: {'; '.join(left)}. Remedy: run `down` again"
        )


def look(shell: Shell, job: cloud.Job, was_running: bool) -> tuple[str, str]:
    """Ask for the state of the slice.

    Args:
      shell: runs the commands.
      job: the run.
      was_running: all hosts have been seen running since the slice was made.

    Returns:
      "running", "waiting", "lost", "missing" or "unknown", and the cloud's own words.

    Raises:
      Mistake: another program has made a resource of this name.
    """
    answer = shell.run(cloud.state_command(job), question=True)
    if answer.missing:
        return "missing", "does not exist"
    if answer.code:
        return "unknown", answer.words
    state, words = cloud.read_state(job, answer.out, was_running)
    if state == "foreign":
        raise Mistake(f"{job.name} is {words}, so `up` did not make it: choose another --name")
    if state == "waiting" and job.shape.backend == "gce" and job.shape.hosts > 1:
        error = shell.run(cloud.errors_command(job), question=True).out.strip()
        words += f"; newest error: {error}" if error else ""
    return state, words


def stored_exit(shell: Shell, job: cloud.Job) -> Exit:
    """Ask for the exit code of the run; only an object that is missing means that it goes on."""
    answer = shell.run(cloud.exit_command(job), question=True)
    if answer.no_object:
        return Exit()
    if answer.code:
        return Exit(unreadable=answer.words)
    if re.fullmatch(r"[0-9]{1,3}", answer.out.strip()):
        return Exit(int(answer.out))
    return Exit(unreadable=f"{job.logs}/exit holds {answer.out!r:.80}, which is no exit code")


def settled_exit(shell: Shell, job: cloud.Job, pause: float) -> int | None:
    """Return the exit code of the run, None while it goes on; ask again where it is not known.

    Args:
      shell: runs the commands.
      job: the run.
      pause: seconds between two questions.

    Raises:
      Refused: it stays unknown.
    """
    for left in reversed(range(STUBBORN)):
        ended = stored_exit(shell, job)
        if not ended.unreadable:
            return ended.code
        if left:
            print(f"{job.name}: whether it has ended is unknown, asking again: {ended.unreadable}")
            time.sleep(pause)
    raise Refused(
        f"{job.name} may have ended, so nothing is rented: {ended.unreadable}. Remedy: see "
        "`status`; `gcloud auth login` if the login has expired"
    )


def up(shell: Shell, rental: Rental) -> int:
    """Create the slice and watch it.

    Returns:
      0 if the program ended well, 75 if the same command resumes the run, else its failure.

    Raises:
      Refused: the cloud refused a command, or does not say whether the run has ended.
      Mistake: a downloaded wheel is not for the hosts; nothing has been rented.
    """
    job = rental.job
    ended = settled_exit(shell, job, min(rental.poll, 10))
    if ended == 0:
        print(f"{job.name} has already ended well; another run needs another --name")
        return down(shell, job)
    if ended is not None:
        answer = shell.run(["gcloud", "storage", "rm", f"{job.logs}/exit"])
        if answer.code and not answer.no_object:  # `watch` would take it for the end of this try
            raise Refused(f"the exit code of the last try was not deleted: {answer.words}")
    state, words = look(shell, job, was_running=False)
    if state == "unknown":
        raise Refused(words)
    if state in ("missing", "lost"):
        send(shell, rental)
        if state == "lost":
            unmake(shell, job)
        make(shell, job, rental.script)
    else:
        print(f"{job.name} exists already: {words}; watching it")
    return watch(shell, rental)


def send(shell: Shell, rental: Rental) -> None:
    """Bring the code to the bucket, once: a slice that is made again runs the same code.

    Raises:
      Refused: a command failed.
      Mistake: a downloaded wheel is not for the hosts.
    """
    for command in rental.code.commands:
        answer = shell.run(command)
        if answer.code:
            raise Refused(f"the code was not sent: {answer.words}")
    if rental.code.unchecked:
        wheel.check(rental.code.unchecked, rental.job.program)


def watch(shell: Shell, rental: Rental) -> int:
    """Look at the slice until its program has ended, and make it again when it is lost."""
    job, said, was_running, unreadable, lost = rental.job, "", False, 0, 0
    while True:
        time.sleep(rental.poll)
        # In this order: a slice that has deleted itself has stored its exit code before.
        state, words = look(shell, job, was_running)
        ended = stored_exit(shell, job)
        if ended.code is not None:
            return end(shell, job, ended.code)
        was_running = was_running or state == "running"
        if ended.unreadable:  # then a slice that is gone may have ended well
            words = (
                f"{words}; whether the run has ended is unknown, asking again: {ended.unreadable}"
            )
            state = "unknown"
        if words != said:
            print(f"{time.strftime('%H:%M:%S')} {job.name}: {words}", flush=True)
        said = words
        unreadable = unreadable + 1 if state == "unknown" else 0
        if unreadable == STUBBORN:
            raise Refused(f"{job.name} may still exist: {words}. Remedy: see `status`")
        if state not in ("lost", "missing"):
            continue
        unmake(shell, job)
        if lost == rental.retries:
            print(f"{job.name}: lost after {lost} retries (--retries); the same command resumes it")
            return RESUME
        lost, was_running = lost + 1, False
        print(f"{job.name}: lost, creating it again, {lost} of {rental.retries}", flush=True)
        make(shell, job, rental.script)


def end(shell: Shell, job: cloud.Job, code: int) -> int:
    """Report how the run ended and delete the rest of the slice; return the exit code."""
    report = f"failed with exit code {code}; see `logs`, or {job.logs}/worker-0.log"
    if code in (RESUME, DOWN):
        why = "out of time and saved" if code == RESUME else "taken down"
        report = f"{why}; the same command resumes it"
    print(f"{job.name}: {report if code else 'ended well'}", flush=True)
    unmake(shell, job)
    return code


def down(shell: Shell, job: cloud.Job) -> int:
    """Delete everything that `up` has made, and no other resource of that name; return 0."""
    look(shell, job, was_running=False)
    if stored_exit(shell, job).code is None:  # the command keeps a code that could not be read
        answer = shell.run(cloud.store_exit_command(job), feed=f"{DOWN}\n")
        if answer.code:
            print(f"{job.name}: an `up` that still watches will make it again: {answer.words}")
    unmake(shell, job)
    return 0


def status(shell: Shell, job: cloud.Job) -> int:
    """Print the states of the slice and of the run; return 0 if the slice exists, else 1."""
    state, words = look(shell, job, was_running=False)
    ended = stored_exit(shell, job)
    print(f"slice {job.name}: {state}, {words}")
    run = "has not ended" if ended.code is None else f"ended with exit code {ended.code}"
    print(f"run: {f'unknown, {ended.unreadable}' if ended.unreadable else run}")
    return 0 if state in ("running", "waiting") else 1


def logs(shell: Shell, job: cloud.Job) -> int:
    """Print every host's log: the stored one, else by ssh or from the serial console; return 0.

    Raises:
      Refused: the log of some host could not be read.
    """
    silent = []
    for worker in range(job.shape.hosts):
        answer = shell.run(cloud.log_command(job, worker))
        if answer.code:
            silent.append(worker)
        else:
            print(f"--- worker {worker}: {job.logs}/worker-{worker}.log\n{answer.tail}")
    hosts = silent
    if silent and job.shape.backend == "gce":
        # The serial console goes by the host's name, which does not say the worker's number.
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
        raise Refused(
            f"no stored log of worker {', '.join(map(str, silent))}, and unreachable: "
            f"{', '.join(unreachable) or 'all'}. Remedy: a log is stored a minute after the boot; "
            "see `status`"
        )
    return 0


def show(shell: Shell, commands: list[list[str]]) -> int:
    """Run commands and print their output, even if one of them fails; return 0 or 1."""
    code = 0
    for command in commands:
        answer = shell.run(command)
        print(answer.out or answer.err, end="", flush=True)
        code = code or answer.code
    return min(code, 1)
