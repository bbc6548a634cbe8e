"""Commands of `gcloud` that rent, watch and delete a TPU slice; nothing is run here."""

import json
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from launch.tpu.errors import Mistake, unknown

# Compute Engine serves v5p, v6e and TPU7x. family: (cores per chip, as the name's number counts
# them; machine image; usual machine type; machine types of other slices by their chips; topologies).
# The end of a machine type, -4t, is the number of chips of a host. Of several topologies with as many
# chips only the one nearest to a cube is listed; a v6e 2x4 of two 4-chip hosts is for GKE only. The
# bare machine types are the documented ones; those that end in `-tpu` are not used. Confirmed only in
# public code, not in Google's pages: the image of TPU7x, and that its boot disk must be a hyperdisk.
_IMAGE = "ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e"
_IMAGE_7X = "ubuntu-accel-2404-amd64-tpu-tpu7x"
_V6E_OTHERS = {1: "ct6e-standard-1t", 8: "ct6e-standard-8t"}
_CUBES = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16"
_SQUARES = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
GCE = {
    "v5p": (2, _IMAGE, "ct5p-hightpu-4t", {}, f"{_CUBES} 16x16x16 16x16x24".split()),
    "v6e": (1, _IMAGE, "ct6e-standard-4t", _V6E_OTHERS, _SQUARES.split()),
    "tpu7x": (2, _IMAGE_7X, "tpu7x-standard-4t", {}, _CUBES.split()),
}
# The older Cloud TPU API lays the slice out by itself. family: (runtime version, {number: hosts}).
# Not confirmed: sizes of v2 and v3; v5litepod-8 as one host (Google's page; some guides say two).
TPU_API = {
    "v2": ("tpu-ubuntu2204-base", {n: n // 8 for n in (8, 32, 128, 256, 512)}),
    "v3": ("tpu-ubuntu2204-base", {n: n // 8 for n in (8, 32, 64, 128, 256, 512, 1024, 2048)}),
    "v4": (
        "tpu-ubuntu2204-base",
        {n: n // 8 for n in (8, 16, 32, 64, 128, 256, 512, 1024, 1536, 2048, 4096)},
    ),
    "v5litepod": (
        "v2-alpha-tpuv5-lite",
        {1: 1, 4: 1, 8: 1} | {n: n // 4 for n in (16, 32, 64, 128, 256)},
    ),
}
ALIASES = {"v5e": "v5litepod", "v7x": "tpu7x"}

NAME = re.compile(r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?")  # 13 of RFC 1035's 63 are for the suffixes
ZONE = re.compile(r"[a-z]+-[a-z]+[0-9]+-[a-z][a-z0-9]*")
PROJECT = re.compile(r"([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]")
WORKDIR = re.compile(r"gs://[a-z0-9][-a-z0-9._]{1,220}[a-z0-9](/[^\s*?\[\]#]+)?")
_STARTUP = Path(__file__).with_name("startup.sh")
_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_LOST = ("FAILED", "SUSPENDED", "PREEMPTED", "TERMINATED", "STOPPED")
_KINDS = {"ACTIVE": "running", "RUNNING": "running"} | dict.fromkeys(_LOST, "lost")


@dataclass(frozen=True)
class Shape:
    """A slice.

    Attributes:
      accelerator: its name in the cloud.
      backend: "tpu_api" or "gce", the API that serves it.
      reason: why that API.
      hosts: number of hosts.
      runtime: runtime version (tpu_api) or image family (gce).
      topology: chips along each axis, e.g. "4x4"; empty for tpu_api.
      machine_type: of a host; empty for tpu_api.
    """

    accelerator: str
    backend: str
    reason: str
    hosts: int
    runtime: str
    topology: str = ""
    machine_type: str = ""


@dataclass(frozen=True)
class Job:
    """A run on a slice.

    Attributes:
      name: name of the slice and of the run.
      zone: zone of the slice.
      project: Google Cloud project id.
      shape: the slice.
      workdir: gs:// folder of the run.
      provisioning: "spot", "flex" or "on_demand".
      max_run: longest life of the slice, e.g. "24h".
      program: module that the hosts run, and its arguments.
      folder: flag of the program that takes the run's folder, "workdir" or "chain".
      source: ("archive", "repo" or "wheel"; its address; branch of a repository).
      setup: shell code that every host runs once, before the program.
      extra: further arguments of the create command.
    """

    name: str
    zone: str
    project: str
    shape: Shape
    workdir: str = ""
    provisioning: str = "spot"
    max_run: str = "24h"
    program: tuple[str, ...] = ()
    folder: str = "workdir"
    source: tuple[str, str, str] = ("archive", "", "")
    setup: str = ""
    extra: tuple[str, ...] = ()

    @property
    def where(self) -> list[str]:
        """Flags for the zone and the project, which every command takes."""
        return [f"--zone={self.zone}", f"--project={self.project}"]

    @property
    def region(self) -> str:
        """Region of the zone."""
        return self.zone.rpartition("-")[0]

    @property
    def logs(self) -> str:
        """Folder of the hosts' logs and of the run's exit code."""
        return f"{self.workdir}/logs/{self.name}"


@dataclass(frozen=True)
class Part:
    """A resource that `up` makes: its kind, the command that creates it and the one that deletes it."""

    what: str
    create: list[str]
    delete: list[str]


def shape_of(accelerator: str) -> Shape:
    """Look up the slice of an accelerator's name.

    Args:
      accelerator: e.g. "v6e-16", "v5p-8", "v5e-16" (the same as "v5litepod-16"), "tpu7x-8".

    Raises:
      Mistake: the name is not in the tables.
    """
    family, _, size = accelerator.lower().rpartition("-")
    family = ALIASES.get(family, family)
    known = _shapes(family) or _shapes(ALIASES.get(size, size))
    if f"{family}-{size}" in known:
        return known[f"{family}-{size}"]
    if known:
        raise unknown("accelerator", accelerator, known)
    kind = "accelerator family (of FAMILY-SIZE, like v6e-16)"
    raise unknown(kind, family or accelerator, [*GCE, *TPU_API, *ALIASES])


def _shapes(family: str) -> dict[str, Shape]:
    """Return the slices of a family by name; an unknown family has none."""
    if family in TPU_API:
        runtime, hosts = TPU_API[family]
        reason = f"only the Cloud TPU API (queued resources, frozen) serves {family}"
        names = {f"{family}-{number}": number for number in hosts}
        return {
            n: Shape(n, "tpu_api", reason, hosts=hosts[k], runtime=runtime)
            for n, k in names.items()
        }
    shapes = {}
    if family in GCE:
        cores, image, usual, others, topologies = GCE[family]
        reason = f"Compute Engine is the recommended way to {family}"
        for topology in topologies:
            chips = math.prod(int(side) for side in topology.split("x"))
            machine = others.get(chips, usual)
            hosts = chips // int(machine.rpartition("-")[2][:-1])
            name = f"{family}-{chips * cores}"
            shapes[name] = Shape(
                name,
                "gce",
                reason,
                hosts=hosts,
                runtime=image,
                topology=topology,
                machine_type=machine,
            )
    return shapes


def seconds_of(duration: str) -> int:
    """Convert a duration like "1h30m" to seconds.

    Raises:
      Mistake: the text is not days, hours, minutes and seconds in this order, or adds up to 0.
    """
    match = _DURATION.fullmatch(duration)
    parts = [int(part or 0) for part in match.groups()] if match else [0]
    if not sum(parts):
        raise Mistake(
            f"--max_run_duration={duration!r} is no duration: write it like 4h or 1d12h30m"
        )
    days, hours, minutes, seconds = parts
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def check_place(name: str | None, zone: str | None, project: str | None) -> None:
    """Refuse a name, zone or project that is missing or malformed.

    Raises:
      Mistake: with the flag and an example.
    """
    _check(
        "name",
        name,
        pattern=NAME,
        remedy="1-50 small letters, digits and '-', a letter first: --name=tpu-a",
    )
    if zone and re.fullmatch(r"[a-z]+-[a-z]+[0-9]+", zone):
        raise Mistake(f"--zone={zone!r} is a region: add the zone's letter, as in {zone}-a")
    _check(
        "zone",
        zone,
        pattern=ZONE,
        remedy="a zone that has this accelerator, as in --zone=us-east5-b",
    )
    _check(
        "project", project, pattern=PROJECT, remedy="the project's id (gcloud config get project)"
    )


def check_workdir(workdir: str | None) -> None:
    """Refuse a working directory that the hosts do not share.

    Raises:
      Mistake: it is missing, or no gs:// folder.
    """
    remedy = "a folder in a bucket, which every host and a recreated slice can reach"
    _check("workdir", workdir, pattern=WORKDIR, remedy=f"{remedy}: --workdir=gs://BUCKET/RUN")


def _check(flag: str, value: str | None, *, pattern: re.Pattern, remedy: str) -> None:
    if not value:
        raise Mistake(f"--{flag} is missing: give {remedy}")
    if not pattern.fullmatch(value):
        raise Mistake(f"--{flag}={value!r} is malformed: give {remedy}")


def parts(job: Job, script: str = "startup.sh") -> list[Part]:
    """Return the resources of the slice in the order of creation; delete them in reverse.

    Args:
      job: the run.
      script: path of the startup script on this machine, without a comma.
    """
    if job.shape.backend == "tpu_api":
        return [_queued_resource(job, script)]
    machine = [f"--machine-type={job.shape.machine_type}", *_lifetime(job), *_image(job, script)]
    if job.shape.hosts == 1:
        # A flex request may wait for hours: gcloud must not wait with it.
        wait = ["--request-valid-for-duration=2h", "--async"] if job.provisioning == "flex" else []
        create = ["gcloud", "compute", "instances", "create", job.name, *job.where]
        return [Part("instance", [*create, *machine, *wait, *job.extra], _delete_instance(job))]
    return _group(job, machine)


def _queued_resource(job: Job, script: str) -> Part:
    # Flex is an alpha flag of this API, and the only model whose run time it limits; for the others
    # the startup script does.
    flex = job.provisioning == "flex"
    command = ["compute", "tpus", "queued-resources"]
    create = ["gcloud", *(["alpha"] if flex else []), *command, "create", job.name, *job.where]
    create += [
        f"--node-id={job.name}",
        f"--accelerator-type={job.shape.accelerator}",
        f"--runtime-version={job.shape.runtime}",
    ]
    create += ["--spot"] if job.provisioning == "spot" else []
    if flex:
        create += ["--provisioning-model=flex-start", f"--max-run-duration={job.max_run}"]
    create += [
        "--scopes=https://www.googleapis.com/auth/cloud-platform",
        f"--labels=compat_jax={job.name}",
        f"--metadata-from-file=startup-script={script}",
    ]
    delete = ["gcloud", *command, "delete", job.name, *job.where, "--force", "--quiet"]
    return Part("queued resource", [*create, *job.extra], delete)


def _lifetime(job: Job) -> list[str]:
    model = {"spot": "SPOT", "flex": "FLEX_START", "on_demand": "STANDARD"}[job.provisioning]
    return [
        f"--provisioning-model={model}",
        "--instance-termination-action=DELETE",
        f"--max-run-duration={job.max_run}",
        "--maintenance-policy=TERMINATE",  # a TPU cannot be migrated live
    ]


def _image(job: Job, script: str) -> list[str]:
    disk = ["--boot-disk-type=hyperdisk-balanced"] if job.shape.runtime == _IMAGE_7X else []
    return [
        f"--image-family={job.shape.runtime}",
        "--image-project=ubuntu-os-accelerator-images",
        "--boot-disk-size=200GB",  # the default of 10 GB is too small for the wheels and data
        *disk,
        "--scopes=cloud-platform",
        f"--labels=compat_jax={job.name}",
        f"--metadata-from-file=startup-script={script}",
    ]


def _delete_instance(job: Job) -> list[str]:
    return ["gcloud", "compute", "instances", "delete", job.name, *job.where, "--quiet"]


def _group(job: Job, machine: list[str]) -> list[Part]:
    policy, template = f"{job.name}-policy", f"{job.name}-template"
    project, region = f"--project={job.project}", f"--region={job.region}"
    policies = ["gcloud", "compute", "resource-policies"]
    templates = ["gcloud", "compute", "instance-templates"]
    groups = ["gcloud", "compute", "instance-groups", "managed"]
    slice_ = ["--type=HIGH_THROUGHPUT", f"--accelerator-topology={job.shape.topology}"]
    # Bulk means all hosts or none: the service requires it with a TPU topology. Not confirmed for
    # spot: older pages about the bulk mode name only flex-start and reservations.
    create_group = [
        *(*groups, "create", job.name, *job.where),
        f"--template={template}",
        f"--size={job.shape.hosts}",
        "--target-size-policy-mode=bulk",
        "--default-action-on-vm-failure=do-nothing",
        f"--workload-policy=projects/{job.project}/regions/{job.region}/resourcePolicies/{policy}",
    ]
    return [
        Part(
            "workload policy",
            [*policies, "create", "workload-policy", policy, *slice_, region, project],
            [*policies, "delete", policy, region, project, "--quiet"],
        ),
        Part(
            "instance template",
            [*templates, "create", template, project, *machine, *job.extra],
            [*templates, "delete", template, project, "--quiet"],
        ),
        Part(
            "managed instance group",
            create_group,
            [*groups, "delete", job.name, *job.where, "--quiet"],
        ),
    ]


def state_command(job: Job) -> list[str]:
    """Return the command whose output `read_state` reads."""
    if job.shape.backend == "tpu_api":
        describe = ["compute", "tpus", "queued-resources", "describe", job.name, *job.where]
        return ["gcloud", *describe, "--format=value(state.state)"]
    if job.shape.hosts == 1:
        describe = ["compute", "instances", "describe", job.name, *job.where]
        return ["gcloud", *describe, "--format=json(status,labels)"]
    listing = ["compute", "instance-groups", "managed", "list-instances", job.name, *job.where]
    return ["gcloud", *listing, "--format=json"]


def read_state(job: Job, output: str, was_running: bool) -> tuple[str, str]:
    """Read the output of `state_command`.

    Args:
      job: the run.
      output: standard output of the command.
      was_running: all hosts have been seen running since the slice was made.

    Returns:
      "running", "waiting", "lost" or "foreign" (not made by `up`), and the cloud's own words.
    """
    if job.shape.backend == "tpu_api":
        return _KINDS.get(output.strip(), "waiting"), output.strip()
    found = json.loads(output or "[]")
    if job.shape.hosts == 1:
        if found.get("labels", {}).get("compat_jax") != job.name:
            return "foreign", f"an instance without the label compat_jax={job.name}"
        return _KINDS.get(found["status"], "waiting"), found["status"]
    templates = {host.get("version", {}).get("instanceTemplate") for host in found} - {None}
    if any(not template.endswith(f"/{job.name}-template") for template in templates):
        return "foreign", f"a group without the template {job.name}-template"
    states = [host.get("instanceStatus") for host in found]
    words = f"{states.count('RUNNING')} of {job.shape.hosts} hosts running"
    if states.count("RUNNING") == job.shape.hosts:
        return "running", words
    # The group does not repair itself (do-nothing): a host that is missing now stays missing.
    lost = was_running or "lost" in {_KINDS.get(state) for state in states}
    return ("lost" if lost else "waiting"), words


def host_names(output: str) -> list[str]:
    """Return the names of a group's instances, from the output of `state_command`."""
    return [host["instance"].rpartition("/")[2] for host in json.loads(output or "[]")]


def errors_command(job: Job) -> list[str]:
    """Return the command that prints the newest error of a group, e.g. a lack of quota."""
    listing = ["compute", "instance-groups", "managed", "list-errors", job.name, *job.where]
    return ["gcloud", *listing, "--limit=1", "--format=value(error.message)"]


def exit_command(job: Job) -> list[str]:
    """Return the command that prints the exit code that the first host has stored."""
    return ["gcloud", "storage", "cat", f"{job.logs}/exit"]


def store_exit_command(job: Job) -> list[str]:
    """Return the command that stores an exit code, given as its input, unless the run has one."""
    return ["gcloud", "storage", "cp", "--no-clobber", "-", f"{job.logs}/exit"]


def log_command(job: Job, worker: int) -> list[str]:
    """Return the command that prints the stored log of a host, which outlives the slice."""
    return ["gcloud", "storage", "cat", f"{job.logs}/worker-{worker}.log"]


def console_command(job: Job, host: str | int) -> list[str]:
    """Return the command that prints the log of a host that has not stored it yet."""
    if job.shape.backend == "tpu_api":
        ssh = ["compute", "tpus", "tpu-vm", "ssh", job.name, *job.where, f"--worker={host}"]
        return ["gcloud", *ssh, "--command=sudo tail -n 200 /opt/compat_jax/run.log"]
    return ["gcloud", "compute", "instances", "get-serial-port-output", str(host), *job.where]


def list_commands(zone: str, project: str) -> list[list[str]]:
    """Return the commands that list the slices in a zone, of both back ends."""
    gcloud, where = ["gcloud", "compute"], [f"--zones={zone}", f"--project={project}"]
    return [
        [*gcloud, "tpus", "queued-resources", "list", f"--zone={zone}", f"--project={project}"],
        [*gcloud, "instances", "list", *where, "--filter=labels.compat_jax:*"],
        [*gcloud, "instance-groups", "managed", "list", *where],
    ]


def startup_script(job: Job) -> str:
    """Return the script that every host runs at every boot: install, run, resume, give back.

    The values of the run come first, quoted, so that no argument can be read as shell code; then
    `startup.sh` follows.
    """
    limit, program = seconds_of(job.max_run), list(job.program)
    path = {"workdir": job.workdir, "chain": f"{job.workdir}/chain"}[job.folder]
    if not any(re.match(rf"--?{job.folder}(=|$)", argument) for argument in program):
        program.append(f"--{job.folder}={path}")
    if job.shape.hosts > 1 and "--multihost" not in program:
        program.append("--multihost")
    kind, address, revision = job.source
    values = {
        "NAME": job.name,
        "LOGS": job.logs,
        "KIND": kind,
        "SOURCE": address,
        "REVISION": revision,
        "SETUP": job.setup,
        "BACKEND": job.shape.backend,
        "HOSTS": str(job.shape.hosts),
        "LIMIT": str(limit - 300 if limit > 1200 else limit * 3 // 4),
    }
    lines = [f"{key}={shlex.quote(value)}" for key, value in values.items()]
    lines.append(f"PROGRAM=(-m {shlex.join(program)})")
    lines.append(f"DELETE=({shlex.join(parts(job)[-1].delete)})")
    return "\n".join(["#!/bin/bash", *lines, _STARTUP.read_text()])


def as_shell_script(job: Job, before: list[list[str]], *, script: str, retries: int) -> str:
    """Return the first commands of `up` as a shell script, and its loop as comments.

    Args:
      job: the run.
      before: commands that bring the code to the bucket.
      script: the startup script.
      retries: how many times a lost slice is created again.
    """
    path, mark = f"{job.name}-startup.sh", "END_OF_SCRIPT"
    while mark in script:
        mark += "_"
    lines = [shlex.join(command) for command in before]
    lines.append(f"cat > {path} <<'{mark}'\n{script}{mark}")
    lines += [shlex.join(part.create) for part in parts(job, path)]
    lines += ["# then, repeatedly, until the first prints an exit code:"]
    lines += [f"#   {shlex.join(exit_command(job))}", f"#   {shlex.join(state_command(job))}"]
    lines += [f"# at the end, and before a lost slice is created again ({retries} times at most):"]
    lines += [f"#   {shlex.join(part.delete)}" for part in reversed(parts(job))]
    return "\n".join(lines) + "\n"


def no_capacity(words: str) -> bool:
    """Return whether a refusal is for lack of capacity, and not of quota or by mistake."""
    if "quota" in words.lower():
        return False
    return bool(re.search(r"_EXHAUSTED|STOCKOUT|enough resources|no more capacity", words, re.I))


def remedy(words: str) -> str:
    """Return advice for a refused creation."""
    if "quota" in words.lower():
        return (
            "ask for quota (console: IAM & Admin > Quotas; Compute Engine and the Cloud TPU API "
            "count separately, and so do spot and on demand), or use a --zone that has it"
        )
    if no_capacity(words):
        return "try --flex (it queues), another --zone or a smaller --accelerator"
    return "see the error above; `gcloud components update` if it does not know a flag"
