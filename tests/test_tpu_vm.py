"""`launch.tpu_vm` against a `gcloud` that records its arguments and fails on demand."""

import os
import re
import shlex
import subprocess
import sys
import zipfile

import pytest
from fake_gcloud import PLACE, PROGRAM, ROOT, WORKDIR, Cloud, group, instance

from launch import PROGRAMS, tpu_vm
from launch.tpu import cloud, slices, source, wheel
from launch.tpu.errors import Mistake
from launch.tpu.shell import Answer, Shell

LOGS = f"{WORKDIR}/logs/tpu-a"


@pytest.fixture
def fake(tmp_path):
    return Cloud(tmp_path)


RUNS = "ACTIVE", instance("RUNNING"), group(*["RUNNING"] * 4)
AT = "--zone=us-east5-b --project=my-project"
GCE_MACHINE = (
    "--provisioning-model=SPOT --instance-termination-action=DELETE --max-run-duration=24h "
    "--maintenance-policy=TERMINATE --image-family=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e "
    "--image-project=ubuntu-os-accelerator-images --boot-disk-size=200GB --scopes=cloud-platform "
    "--labels=compat_jax=tpu-a --metadata-from-file=startup-script=S"
)
TPU_API_TAIL = (
    "--spot --scopes=https://www.googleapis.com/auth/cloud-platform --labels=compat_jax=tpu-a "
    "--metadata-from-file=startup-script=S"
)
DELETE_GROUP = [
    f"compute instance-groups managed delete tpu-a {AT} --quiet",
    "compute instance-templates delete tpu-a-template --project=my-project --quiet",
    "compute resource-policies delete tpu-a-policy --region=us-east5 --project=my-project --quiet",
]


def group_of(machine: str, topology: str, hosts: int) -> list[str]:
    return [
        "compute resource-policies create workload-policy tpu-a-policy --type=HIGH_THROUGHPUT "
        f"--accelerator-topology={topology} --region=us-east5 --project=my-project",
        "compute instance-templates create tpu-a-template --project=my-project "
        f"--machine-type={machine} {GCE_MACHINE}",
        f"compute instance-groups managed create tpu-a {AT} --template=tpu-a-template "
        f"--size={hosts} --target-size-policy-mode=bulk --default-action-on-vm-failure=do-nothing "
        "--workload-policy=projects/my-project/regions/us-east5/resourcePolicies/tpu-a-policy",
    ]


@pytest.mark.parametrize(
    ("accelerator", "running", "why", "create", "delete"),
    [
        (
            "v5e-16",
            RUNS[0],
            "4 hosts, through tpu_api: only the Cloud TPU API",
            [
                f"compute tpus queued-resources create tpu-a {AT} --node-id=tpu-a "
                "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite "
                + TPU_API_TAIL
            ],
            [f"compute tpus queued-resources delete tpu-a {AT} --force --quiet"],
        ),
        (
            "v4-8",
            RUNS[0],
            "1 host, through tpu_api: only the Cloud TPU API",
            [
                f"compute tpus queued-resources create tpu-a {AT} --node-id=tpu-a "
                "--accelerator-type=v4-8 --runtime-version=tpu-ubuntu2204-base " + TPU_API_TAIL
            ],
            [f"compute tpus queued-resources delete tpu-a {AT} --force --quiet"],
        ),
        (
            "v6e-8",
            RUNS[1],
            "1 host ct6e-standard-8t, through gce: Compute Engine is the recommended way",
            [f"compute instances create tpu-a {AT} --machine-type=ct6e-standard-8t " + GCE_MACHINE],
            [f"compute instances delete tpu-a {AT} --quiet"],
        ),
        (
            "v6e-16",
            RUNS[2],
            "4 hosts ct6e-standard-4t, through gce",
            group_of("ct6e-standard-4t", "4x4", 4),
            DELETE_GROUP,
        ),
        (
            "v5p-32",
            RUNS[2],
            "4 hosts ct5p-hightpu-4t, through gce",
            group_of("ct5p-hightpu-4t", "2x2x4", 4),
            DELETE_GROUP,
        ),
    ],
)
def test_up_creates_watches_and_deletes(fake, accelerator, running, why, create, delete):
    fake.scenario(["MISSING", running, "MISSING"], exits=(None, None, 0))
    done = fake.up(accelerator)
    assert (done.returncode, done.stderr) == (0, "")
    assert why in done.stdout.splitlines()[0]
    assert "tpu-a: ended well" in done.stdout
    assert fake.calls(" create ", " delete ") == create + delete
    # Each command is printed before it runs, as the shell would read it.
    printed = [shlex.split(line[2:]) for line in done.stdout.splitlines() if line[:2] == "$ "]
    assert all(command[0] == "gcloud" for command in printed)
    assert {" ".join(c[1:3]) for c in printed} == {" ".join(c.split()[:2]) for c in fake.calls()}


def test_flex_in_the_create_command(fake):
    argv = ("--flex", "--max_run_duration=2d", "--gcloud_arg=--subnet=s", "--dry_run")
    printed = fake.up("v6e-1", *argv).stdout.splitlines()
    create = next(line for line in printed if "create tpu-a" in line)
    assert create.endswith(" --request-valid-for-duration=2h --async --subnet=s")
    assert " --provisioning-model=FLEX_START " in create
    assert " --max-run-duration=2d " in create


@pytest.mark.parametrize(
    ("accelerator", "life"),
    [
        ("v5e-16", ["PROVISIONING", "ACTIVE", "SUSPENDING", "SUSPENDED", "ACTIVE"]),
        ("v4-32", ["ACTIVE", "PREEMPTED", "WAITING_FOR_RESOURCES", "ACTIVE"]),
        ("v6e-4", [instance("STAGING"), instance("RUNNING"), "MISSING", instance("RUNNING")]),
        ("v6e-16", [group("STAGING", "RUNNING"), RUNS[2], group(*["RUNNING"] * 3), RUNS[2]]),
    ],
)
def test_a_preempted_slice_is_made_again_with_the_same_script(fake, accelerator, life):
    fake.scenario(["MISSING", *life], exits=[None] * len(life) + [0])
    done = fake.up(accelerator)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lost, creating it again, 1 of 10" in done.stdout
    creates, deletes = fake.calls(" create "), fake.calls(" delete ")
    parts = 3 if accelerator == "v6e-16" else 1
    assert creates == 2 * creates[:parts]  # nothing in the second life differs: same name, workdir
    assert deletes == 2 * deletes[:parts]
    order = [call.split().count("create") for call in fake.calls(" create ", " delete ")]
    assert order == ([1] * parts + [0] * parts) * 2


def test_when_retries_run_out_the_exit_code_is_75(fake):
    fake.scenario(["MISSING", "SUSPENDED", "SUSPENDED", "SUSPENDED"])
    done = fake.up("v5e-8", "--retries=2")
    assert done.returncode == 75
    assert "lost after 2 retries (--retries); the same command resumes it" in done.stdout
    assert len(fake.calls(" create ")) == len(fake.calls(" delete ")) == 3


def test_a_refused_create_is_reported_on_one_line(fake):
    quota = ("queued-resources create", "ERROR: (gcloud) Quota limit\n 'TPUV5s' exceeded", 1)
    fake.scenario(["MISSING"], fail=[quota])
    done = fake.up("v5e-8")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: the queued resource was refused: ERROR: (gcloud) Quota limit 'TPUV5s' exceeded. "
        "Remedy: ask for quota"
    )
    assert done.stderr.count("\n") == 1


def test_a_refused_part_takes_the_earlier_parts_with_it(fake):
    quota = ("instance-templates create", "ERROR: Invalid value for field 'resource'", 1)
    fake.scenario(["MISSING"], fail=[quota])
    done = fake.up("v6e-16")
    assert done.returncode == 1
    assert "the instance template was refused" in done.stderr
    assert fake.calls(" delete ") == DELETE_GROUP[2:]


def test_no_capacity_is_waited_for(fake):
    full = ("instances create", "ERROR: ZONE_RESOURCE_POOL_EXHAUSTED", 2)
    fake.scenario(["MISSING"] * 3 + [RUNS[1]] * 2, exits=[None] * 4 + [0], fail=[full])
    done = fake.up("v6e-1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(fake.calls(" create ")) == 3


def test_leftovers_of_an_interrupted_up_are_replaced(fake):
    there = ("resource-policies create", "ERROR: The resource 'tpu-a-policy' already exists", 1)
    fake.scenario(["MISSING", RUNS[2]], exits=(None, 0), fail=[there])
    assert fake.up("v6e-16").returncode == 0
    names = [call.split()[1:3] for call in fake.calls("resource-policies")]
    assert [verb for _, verb in names] == ["create", "delete", "create", "delete"]


def test_up_again_takes_up_the_watching_or_has_nothing_to_do(fake):
    fake.scenario(["ACTIVE", "ACTIVE"], exits=(None, 0))
    done = fake.up("v5e-8")
    assert done.returncode == 0
    assert "exists already: ACTIVE; watching it" in done.stdout
    assert not fake.calls(" create ")
    fake.scenario(["MISSING"], exits=(0,))
    done = fake.up("v5e-8")
    assert (done.returncode, fake.calls(" create ")) == (0, [])
    assert "has already ended well; another run needs another --name" in done.stdout


def test_a_failed_run_is_reported_deleted_and_can_be_run_again(fake):
    fake.scenario(["MISSING", "ACTIVE"], exits=(None, 3))
    done = fake.up("v5e-8")
    assert done.returncode == 3
    assert f"failed with exit code 3; see `logs`, or {LOGS}/worker-0.log" in done.stdout
    fake.scenario(["MISSING", "ACTIVE"], exits=(3, 0))
    assert fake.up("v5e-8").returncode == 0
    assert fake.calls("storage rm") == [f"storage rm {LOGS}/exit"]


def test_an_old_exit_code_that_stays_is_not_taken_for_that_of_a_new_try(fake):
    fake.scenario(["MISSING"], exits=(3,), fail=[("storage rm", DOWN_503, 1)])
    done = fake.up("v5e-8")
    assert (done.returncode, fake.calls(" create ")) == (1, [])
    assert "the exit code of the last try was not deleted: ERROR: HTTPError 503" in done.stderr


def test_out_of_time_exits_with_75(fake):
    fake.scenario(["MISSING", "ACTIVE"], exits=(None, 75))
    done = fake.up("v5e-8")
    assert done.returncode == 75
    assert "out of time and saved; the same command resumes it" in done.stdout
    assert len(fake.calls(" delete ")) == 1


def test_an_unreadable_answer_never_deletes(fake):
    fake.scenario(["MISSING", "ACTIVE", *["BROKEN"] * 4, "ACTIVE", *["BROKEN"] * 5])
    done = fake.up("v5e-8")
    assert done.returncode == 1
    assert "tpu-a may still exist: ERROR: (gcloud) There was a problem" in done.stderr
    assert (len(fake.calls(" create ")), fake.calls(" delete ")) == (1, [])


DOWN_503 = "ERROR: HTTPError 503: Service Unavailable"


@pytest.mark.parametrize(
    ("words", "code", "is_known"),
    [
        ("7", 7, True),
        ("ERROR: (gcloud.storage.cat) The following URLs matched no objects or files:", None, True),
        ("CommandException: No URLs matched: gs://my-bucket/exit", None, True),
        (f"ERROR: (gcloud.storage.cat) {LOGS}/exit not found: 404.", None, True),
        ("ERROR: (gcloud.storage.cat) gs://my-bucket not found: 404.", None, False),
        (DOWN_503, None, False),
        ("ERROR: gcloud crashed (ServerNotFoundError): Unable to find the server", None, False),
        ("", None, False),
    ],
)
def test_only_a_missing_object_means_that_the_run_goes_on(words, code, is_known):
    class Storage(Shell):
        def run(self, command, question=False, feed=""):
            failed = not (words.isdigit() or words == "")
            return Answer(int(failed), "" if failed else words, words if failed else "")

    job = cloud.Job("tpu-a", "us-east5-b", "my-project", cloud.shape_of("v5e-8"), WORKDIR)
    found = slices.stored_exit(Storage(), job)
    assert (found.code, not found.unreadable) == (code, is_known)


def test_a_network_that_is_down_is_no_missing_slice():
    assert Answer(1, "", "ERROR: NOT_FOUND: Resource 'x' was not found").missing
    assert not Answer(1, "", "ERROR: gcloud crashed (ServerNotFoundError): Unable to find").missing


def test_a_finished_run_whose_exit_code_cannot_be_read_is_not_rented_again(fake):
    fake.scenario(["MISSING", "ACTIVE", "MISSING", "MISSING"], exits=(None, None, DOWN_503, 0))
    done = fake.up("v5e-8")
    assert (done.returncode, len(fake.calls(" create "))) == (0, 1)
    assert (
        "does not exist; whether the run has ended is unknown, asking again: ERROR" in done.stdout
    )
    fake.scenario(["MISSING"], exits=(DOWN_503, 0))
    done = fake.up("v5e-8")
    assert (done.returncode, len(fake.calls(" create "))) == (0, 1)
    assert "asking again: ERROR: HTTPError 503" in done.stdout
    assert "has already ended well" in done.stdout


@pytest.mark.parametrize("before", [0, 1])
def test_an_exit_code_that_stays_unreadable_ends_the_watching(fake, before):
    """Before anything is rented, and while a slice is watched."""
    fake.scenario(["MISSING"] * 6, exits=[None] * before + [DOWN_503] * 5)
    done = fake.up("v5e-8")
    assert (done.returncode, len(fake.calls(" create "))) == (1, before)
    assert "503" in done.stderr and done.stderr.count("\n") == 1
    assert not fake.calls(" delete ")


@pytest.mark.parametrize(
    ("verb", "accelerator", "found"),
    [
        ("up", "v6e-4", instance("TERMINATED", name="other")),
        ("down", "v6e-16", group("TERMINATED", template="website")),
    ],
)
def test_resources_of_others_are_left_alone(fake, verb, accelerator, found):
    fake.scenario([found])
    done = fake.up(accelerator) if verb == "up" else fake.verb("down", accelerator)
    assert done.returncode == 2
    assert "`up` did not make it: choose another --name" in done.stderr
    assert not fake.calls(" create ", " delete ")


def test_down_deletes_all_that_up_made_and_stops_an_up_that_watches(fake):
    fake.scenario([RUNS[2]])
    assert fake.verb("down", "v6e-16").returncode == 0
    assert fake.calls(" delete ", " cp ") == [
        f"storage cp --no-clobber - {LOGS}/exit",
        *DELETE_GROUP,
    ]
    fake.scenario(["MISSING", "MISSING"], exits=(None, 130))
    done = fake.up("v6e-16")
    assert (done.returncode, len(fake.calls("managed create"))) == (130, 1)
    assert "tpu-a: taken down; the same command resumes it" in done.stdout


def test_down_goes_on_after_a_failure_and_names_what_may_cost_money(fake):
    gone = ("instance-groups managed delete", "ERROR: The resource 'tpu-a' was not found", 1)
    stuck = ("instance-templates delete", "ERROR: permission denied", 1)
    fake.scenario([RUNS[2]], fail=[gone, stuck])
    done = fake.verb("down", "v6e-16")
    assert done.returncode == 1
    assert (
        "not deleted, and perhaps still billed: instance template (ERROR: permission" in done.stderr
    )
    assert "group" not in done.stderr
    assert fake.calls(" delete ") == DELETE_GROUP


def test_logs_show_the_other_hosts_when_one_is_unreachable(fake):
    silent = ("/worker-2.log", "ERROR: matched no objects", 1)
    unreachable = ("--worker=2", "ERROR: ssh exited with 255", 1)
    fake.scenario([], fail=[silent, unreachable])
    done = fake.verb("logs", "v5e-16")
    assert done.returncode == 1
    shown = [line[:12] for line in done.stdout.splitlines() if line.startswith("---")]
    assert shown == ["--- worker 0", "--- worker 1", "--- worker 3"]
    assert (
        "no stored log of worker 2, and unreachable: 2 (ERROR: ssh exited with 255)" in done.stderr
    )
    assert done.stderr.count("\n") == 1
    assert "--command=sudo tail -n 200 /opt/compat_jax/run.log" in fake.calls("ssh")[0]


def test_logs_of_compute_engine_fall_back_to_the_serial_console(fake):
    fake.scenario([RUNS[2]], fail=[("/worker-1.log", "ERROR: matched no objects", 1)])
    done = fake.verb("logs", "v6e-16")
    assert done.returncode == 0
    consoles = [call.split()[3] for call in fake.calls("get-serial-port-output")]
    assert consoles == ["tpu-a-0", "tpu-a-1", "tpu-a-2", "tpu-a-3"]


def test_status_and_list(fake):
    quota = ("list-errors", "", 0)
    fake.scenario([group("RUNNING", "STAGING"), "MISSING"], exits=(None, 0), fail=[quota])
    done = fake.verb("status", "v6e-16")
    assert done.returncode == 0
    assert "slice tpu-a: waiting, 1 of 4 hosts running; newest error: output of" in done.stdout
    assert "run: has not ended" in done.stdout
    done = fake.verb("status", "v6e-16")
    assert (done.returncode, "ended with exit code 0" in done.stdout) == (1, True)
    fake.scenario([], fail=[("tpus queued-resources list", "ERROR: API tpu is disabled", 1)])
    done = fake.run("list", *PLACE)
    assert done.returncode == 1
    assert "API tpu is disabled" in done.stdout
    assert "output of compute instances list" in done.stdout


def test_dry_run_runs_nothing_and_is_a_script_that_does_the_same(fake):
    done = fake.up("v6e-16", "--dry_run", program=[*PROGRAM, "--config.note=it's; END_OF_SCRIPT"])
    assert done.returncode == 0
    assert fake.calls() == []
    deletes = fake.verb("down", "v6e-16", "--dry_run").stdout.splitlines()
    assert deletes[1:] == [f"gcloud {command}" for command in DELETE_GROUP]
    assert fake.calls() == []
    env = os.environ | {"PATH": f"{fake.bin}:/usr/bin:/bin"}
    subprocess.run(
        ["bash", "-e"], input=done.stdout, text=True, env=env, cwd=fake.folder, check=True
    )
    assert fake.calls() == group_of("ct6e-standard-4t", "4x4", 4)
    assert "--config.note=it" in (fake.folder / "startup.sh").read_text()


GOOD = [f"--workdir={WORKDIR}", "--accelerator=v6e-16", "--repo=https://example.com/me/code"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["up", *GOOD, *PLACE, "--", *PROGRAM], "--name is missing: give 1-50 small letters"),
        (["up", "--name=a", *PLACE, *GOOD[1:], "--", *PROGRAM], "--workdir is missing: give a"),
        (["up", "--name=a", *PLACE, *GOOD[:1], "--", *PROGRAM], "--accelerator is missing"),
        (["up", "--name=a", *PLACE, *GOOD], "no program: end the command with -- launch.train"),
        (["up", "--name=a", *PLACE, *GOOD, "launch.train"], "no flag: a lone -- goes before the"),
        (["up", "--nmae=a", *PLACE, *GOOD], "Unknown command line flag 'nmae'. Did you mean: name"),
        (["up", "--name=a", *PLACE, *GOOD, "--spot", "--flex"], "--spot and --flex are both given"),
        (
            ["up", "--name=a", *PLACE, *GOOD, "--flex", "--max_run_duration=8d"],
            "--max_run_duration=8d: --flex lends 7d at most",
        ),
        (["list", "--zone=us-east5", "--project=my-project"], "is a region: add the zone's letter"),
        (["statsu"], "unknown verb 'statsu'. Did you mean 'status'?"),
        ([], "say what to do: one of up, status, logs, down, list, wheel"),
    ],
)
def test_mistakes_are_refused_on_one_line_before_anything_runs(fake, argv, words):
    done = fake.run(*argv)
    assert (done.returncode, done.stderr.count("\n"), fake.calls()) == (2, 1, [])
    assert done.stderr.startswith("error: ")
    assert words in done.stderr


def test_the_examples_of_the_help_run_as_printed(fake):
    """In a shell, with a `gcloud` that says that the run has ended and a `python` of this clone."""
    done = fake.run("--help")
    assert "--accelerator: What to rent" in done.stdout
    lines = [x.strip() for x in tpu_vm.__doc__.splitlines() if re.match(r"  ([A-Z]+=|python )", x)]
    assert all(line in done.stdout for line in lines)
    if not (ROOT / ".git").exists():  # then there is no commit to send
        lines = [line for line in lines if "up $SLICE" not in line or re.search("repo|wheel", line)]
    verbs = re.findall(r"launch.tpu_vm (\w+)", "\n".join(lines))
    assert {*verbs} == {*tpu_vm.VERBS}
    # `up` finds that its run has ended well; `status` returns 0 for a slice that exists.
    seen = {"up": ["MISSING"], "down": ["MISSING"], "status": [RUNS[2]]}
    states = [state for verb in verbs for state in seen.get(verb, [])]
    fake.scenario(states, exits=[0] * 3 * len(verbs))
    fake.command("python", f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    env = os.environ | {"PATH": f"{fake.bin}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    script = "\n".join(["set -e", *lines])
    done = subprocess.run(
        ["bash"], input=script, capture_output=True, text=True, env=env, cwd=fake.folder
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("tpu-a has already ended well") == verbs.count("up")


def test_without_gcloud_the_error_says_how_to_install_it(fake):
    (fake.bin / "gcloud").unlink()
    env = {"PATH": str(fake.bin), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch.tpu_vm", "list", *PLACE]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert done.stderr.startswith("error: gcloud is not on PATH: install it")


def pick(repo=None, wheel_file=None):
    """Choose the code for PROGRAM, with /tmp/x for temporary files."""
    return source.pick(repo, wheel_file, program=PROGRAM, bucket=LOGS, folder="/tmp/x")


def test_the_code_is_the_last_commit_by_default(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "ROOT", tmp_path)
    with pytest.raises(Mistake, match="is no git clone to send: give --repo=URL or --wheel"):
        pick()
    git = ["git", "-C", tmp_path, "-c", "user.name=me", "-c", "user.email=me@example.com"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "a.py").touch()
    with pytest.raises(Mistake, match=r"configs/a\.py is not in the last commit, which the hosts"):
        pick()
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message=a"], check=True)
    code = pick()
    assert code.source == ("archive", f"{LOGS}/source.tar.gz", "")
    assert [*code.commands] == [
        shlex.split(
            f"git -C {tmp_path} archive --format=tar.gz --output=/tmp/x/source.tar.gz HEAD"
        ),
        ["gcloud", "storage", "cp", "/tmp/x/source.tar.gz", f"{LOGS}/source.tar.gz"],
    ]
    assert pick("git@h:me/x#v1").source == ("repo", "git@h:me/x", "v1")
    with pytest.raises(Mistake, match="--repo and --wheel are both given"):
        pick("git@h:me/x#v1", "c-1.whl")


# --- the program


@pytest.mark.parametrize("name", [program.name for program in PROGRAMS])
@pytest.mark.parametrize("foreign", [False, True])
def test_only_programs_that_take_a_folder_run_on_a_slice(name, foreign):
    runs = name in ("launch.quickstart", "launch.pretrain", "launch.train", "launch.evaluate")
    if runs:
        assert source.check_program([name, "-x"], foreign).name == name
    else:
        with pytest.raises(Mistake, match=f"{name} does not run on a slice: choose one of"):
            source.check_program([name, "-x"], foreign)


@pytest.mark.parametrize(
    "name",
    [
        *("launch._cli", "launch", "launch.tpu", "launch.tpu.cloud", "launch.reference"),
        *("launch.reference.clone_run", "launch.benchmarks", "launch.__main__", "train", "-c"),
    ],
)
@pytest.mark.parametrize("foreign", [False, True])
def test_a_module_that_is_no_program_is_never_rented_for(name, foreign):
    with pytest.raises(Mistake, match="unknown program"):
        source.check_program([name], foreign)


def test_a_misspelt_program_is_refused_and_one_of_a_fork_is_not():
    with pytest.raises(Mistake, match=r"Did you mean 'launch.train'\? Valid: launch.evaluate"):
        source.check_program(["launch.trian"], foreign=False)
    assert source.check_program(["launch.mine"], foreign=True).folder == "workdir"
    with pytest.raises(Mistake, match="--workdir comes before the lone --"):
        source.check_program(["launch.train", "--workdir=/tmp/x"], foreign=True)


@pytest.mark.parametrize(
    "argument",
    [
        *("--out=evaluation", "-out=/tmp/x", "--chain=runs/a/chain", "--chain=", "--out=s3://b/x"),
        *("--config.tensorboard=/tmp/x", "--out evaluation"),
    ],
)
def test_an_output_on_the_disk_of_a_host_is_refused(argument):
    flag = argument.lstrip("-").replace(" ", "=").partition("=")[0]
    words = f"--{flag}=.* would be deleted with the slice: .*--{flag}=gs://BUCKET/RUN/"
    with pytest.raises(Mistake, match=words):
        source.check_program(["launch.evaluate", *argument.split(), "--k=1"], foreign=False)


def test_outputs_in_a_bucket_or_by_default_are_taken():
    good = ["--chain=gs://b/c", "--out", "gs://b/o", "--config.tensorboard=", "--outer=x", "-x"]
    assert source.check_program(["launch.evaluate", *good], foreign=False).folder == "chain"


# --- wheels


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel built by the program."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "launch.tpu_vm", "wheel", f"--out={out}"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=out)
    assert (done.returncode, done.stderr) == (0, "")
    (path,) = out.iterdir()
    assert done.stdout == f"{path}\n"
    return path


@pytest.mark.slow
def test_a_program_starts_from_the_wheel_on_a_host(fake, built):
    """The startup script installs the wheel, here by unpacking it, and starts from it."""
    unpacked = fake.folder / "unpacked"
    zipfile.ZipFile(built).extractall(unpacked)
    python = f"""#!/bin/bash
cd "$PWD" && exec env PYTHONPATH={unpacked} {sys.executable} "$@"
"""
    fake.command("host-python", python)
    fake.command(
        "uv", '#!/bin/bash\n[ "$1" = venv ] && mkdir -p "$4/bin" && cp "$HERE" "$4/bin/python"; :\n'
    )
    for name in ("curl", "sleep"):
        fake.command(name, "#!/bin/bash\nexit 1\n")
    place = dict(name="tpu-a", zone="us-east5-b", project="my-project", workdir=WORKDIR)
    job = cloud.Job(
        **place,
        shape=cloud.shape_of("v6e-1"),
        program=("launch.train", "--config=configs/glyphs.py:replace=false", "--help"),
        source=("wheel", f"gs://my-bucket/{built.name}", ""),
    )
    script = fake.folder / "startup.sh"
    script.write_text(cloud.startup_script(job))
    env = os.environ | {
        "PATH": f"{fake.bin}:/usr/bin:/bin",
        "HERE": str(fake.bin / "host-python"),
        "COMPAT_JAX_ROOT": str(fake.folder / "opt"),
    }
    done = subprocess.run(["bash", script], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "python -m launch.train --config=" in done.stdout


def test_the_wheel_has_the_library_the_programs_and_the_configurations(tmp_path, built):
    with zipfile.ZipFile(built) as file:
        assert file.testzip() is None
        names = {*file.namelist()}
        (record,) = (name for name in names if name.endswith(".dist-info/RECORD"))
        recorded = {line.split(",")[0] for line in file.read(record).decode().splitlines()}
        file.extractall(tmp_path)
    assert names == recorded
    for program in PROGRAMS:
        assert f"{program.name.replace('.', '/')}.py" in names
    assert {"launch/tpu/startup.sh", "configs/iamcl2r.py", "compat_jax/__init__.py"} <= names
    code = "import compat_jax, configs, launch; print(compat_jax, configs, launch)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.count(str(tmp_path)) == 3


def small_wheel(path, *names):
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, "")
    return path


LIBRARY = "compat_jax/__init__.py"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([LIBRARY], "has no launch and no configs, so the hosts could not run launch.train: build"),
        ([LIBRARY, "launch/train.py"], "has no configs, so the hosts could not run launch.train"),
        ([LIBRARY, "launch/a.py", "configs/a.py"], "has no launch/train.py: build one"),
        ([LIBRARY, "launch/train.py", "configs/b.py"], "has no configs/a.py: build one"),
        (
            None,
            "is no wheel (File is not a zip file): build one in a clone with `python -m launch.",
        ),
    ],
)
@pytest.mark.parametrize("on_bucket", [False, True])
def test_a_wheel_without_the_programs_is_refused_before_anything_is_rented(
    fake, names, words, on_bucket
):
    path = fake.folder / "c-1.whl"
    path.write_text("") if names is None else small_wheel(path, *names)
    fake.scenario(["MISSING"])
    argument = f"--wheel={path}"
    if on_bucket:
        fake.bucket("gs://my-bucket/c-1.whl", path)
        argument = "--wheel=gs://my-bucket/c-1.whl"
    done = fake.up("v6e-1", argument, code=())
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert words in done.stderr
    assert not fake.calls(" create ", " delete ")
    assert bool(fake.calls()) == on_bucket


def test_a_missing_wheel_is_refused(tmp_path):
    with pytest.raises(Mistake, match=r"is no wheel \(.*No such file.*build one in a clone"):
        pick(None, str(tmp_path / "c-1.whl"))


def test_a_good_wheel_is_sent_or_checked_where_it_is(fake):
    path = small_wheel(fake.folder / "c-1.whl", LIBRARY, "launch/train.py", "configs/a.py")
    code = pick(None, str(path))
    assert code.source == ("wheel", f"{LOGS}/c-1.whl", "")
    assert [*code.commands] == [["gcloud", "storage", "cp", str(path), f"{LOGS}/c-1.whl"]]
    fake.bucket("gs://b/c-1.whl", path)
    fake.scenario(["MISSING", instance("RUNNING")], exits=(None, 0))
    done = fake.up("v6e-1", "--wheel=gs://b/c-1.whl", code=())
    assert (done.returncode, done.stderr) == (0, "")
    assert len(fake.calls(" create ")) == 1
    assert "SOURCE=gs://b/c-1.whl" in (fake.folder / "startup.sh").read_text()


def test_a_wheel_is_only_built_in_a_clone(tmp_path):
    with pytest.raises(Mistake, match=r"is no clone, it has no pyproject\.toml"):
        wheel.build(tmp_path, tmp_path / "out")
