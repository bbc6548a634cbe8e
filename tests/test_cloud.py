"""Names and places of a slice; its startup script, run by bash with fake commands."""

import json
import os
import subprocess
import sys

import pytest
from fake_gcloud import PROGRAM, WORKDIR, Cloud, group, instance

from launch.tpu import cloud
from launch.tpu.errors import Mistake

LOGS = f"{WORKDIR}/logs/tpu-a"
AT = "--zone=us-east5-b --project=my-project"
DELETE_GROUP = f"compute instance-groups managed delete tpu-a {AT} --quiet"


@pytest.fixture
def fake(tmp_path):
    return Cloud(tmp_path)


@pytest.mark.parametrize(
    ("name", "zone", "project", "words"),
    [
        ("Tpu_A", "us-east5-b", "my-project", "--name='Tpu_A' is malformed"),
        ("a" * 51, "us-east5-b", "my-project", "is malformed: give 1-50 small letters"),
        ("tpu-", "us-east5-b", "my-project", "--name='tpu-' is malformed"),
        ("tpu-a", None, "my-project", "--zone is missing"),
        ("tpu-a", "everywhere", "my-project", "--zone='everywhere' is malformed"),
        ("tpu-a", "us-east5-b", None, "--project is missing"),
        ("tpu-a", "us-east5-b", "My Project", "--project='My Project' is malformed"),
    ],
)
def test_a_malformed_place_is_refused(name, zone, project, words):
    with pytest.raises(Mistake, match=words):
        cloud.check_place(name, zone, project)
    cloud.check_place("tpu-a", "northamerica-northeast1-c", "example.com:my-project")


@pytest.mark.parametrize("workdir", ["/home/me", "gs://", "gs://b/run*", "gs://my-bucket/a b"])
def test_a_workdir_outside_a_bucket_is_refused(workdir):
    with pytest.raises(Mistake, match=r"is malformed: give a folder in a bucket"):
        cloud.check_workdir(workdir)
    cloud.check_workdir("gs://my-bucket/runs/a_1")


@pytest.mark.parametrize(
    ("accelerator", "words"),
    [
        ("v6e-12", "Did you mean 'v6e-128'. Valid: v6e-1, v6e-128, v6e-16"),
        ("v6e", "unknown accelerator 'v6e'"),
        ("v6-16", "Did you mean 'v6e'. Valid: tpu7x, v2"),
        ("h100-8", "unknown accelerator family"),
    ],
)
def test_an_unknown_accelerator_is_refused(accelerator, words):
    with pytest.raises(Mistake, match=words.replace("'. Valid", r"'\? Valid")):
        cloud.shape_of(accelerator)


def test_durations():
    assert cloud.seconds_of("4h") == 14400
    assert cloud.seconds_of("1d2h3m4s") == 93784
    for text in ("soon", "", "0h", "4", "30m4h"):
        with pytest.raises(Mistake, match="is no duration: write it like 4h or 1d12h30m"):
            cloud.seconds_of(text)


@pytest.mark.parametrize(
    ("accelerator", "provisioning", "expected"),
    [
        ("v6e-1", "spot", {"--provisioning-model=SPOT", "--max-run-duration=2d"}),
        ("v6e-1", "flex", {"--provisioning-model=FLEX_START", "--max-run-duration=2d"}),
        ("v6e-1", "on_demand", {"--provisioning-model=STANDARD", "--max-run-duration=2d"}),
        ("v5e-8", "spot", {"--spot"}),
        ("v5e-8", "flex", {"--provisioning-model=flex-start", "--max-run-duration=2d"}),
        ("v5e-8", "on_demand", set()),
    ],
)
def test_flags_that_ask_for_capacity(accelerator, provisioning, expected):
    shape = cloud.shape_of(accelerator)
    place = ("tpu-a", "us-east5-b", "my-project", shape, WORKDIR)
    (part,) = cloud.parts(cloud.Job(*place, provisioning=provisioning, max_run="2d"))
    asked = {a for a in part.create if a.startswith(("--spot", "--provisioning", "--max-run"))}
    assert asked == expected
    # Flex is an alpha command of the Cloud TPU API.
    assert (part.create[1] == "alpha") == (accelerator == "v5e-8" and provisioning == "flex")


@pytest.mark.parametrize(
    ("accelerator", "output", "was_running", "state"),
    [
        ("v5e-8", "ACTIVE\n", False, "running"),
        ("v5e-8", "WAITING_FOR_RESOURCES\n", False, "waiting"),
        ("v5e-8", "SUSPENDING\n", True, "waiting"),
        ("v5e-8", "FAILED\n", False, "lost"),
        ("v6e-8", instance("PENDING"), False, "waiting"),
        ("v6e-8", instance("TERMINATED"), True, "lost"),
        ("v6e-8", instance("RUNNING", name="other"), True, "foreign"),
        ("v6e-8", '{"status": "RUNNING"}', True, "foreign"),
        ("v6e-16", "[]", False, "waiting"),
        ("v6e-16", "[]", True, "lost"),
        ("v6e-16", group("RUNNING", "STAGING"), False, "waiting"),
        ("v6e-16", group("RUNNING", "STOPPED"), False, "lost"),
        ("v6e-16", group(*["RUNNING"] * 3), True, "lost"),
        ("v6e-16", group(*["RUNNING"] * 4), True, "running"),
        ("v6e-16", group("RUNNING", template="website"), True, "foreign"),
    ],
)
def test_the_state_of_a_slice_is_read_from_the_output(accelerator, output, was_running, state):
    job = cloud.Job("tpu-a", "us-east5-b", "my-project", cloud.shape_of(accelerator))
    assert cloud.read_state(job, output, was_running)[0] == state


def test_every_slice_adds_up():
    for family, (cores, _, _, _, topologies) in cloud.GCE.items():
        for topology in topologies:
            chips = 1
            for side in topology.split("x"):
                chips *= int(side)
            shape = cloud.shape_of(f"{family}-{chips * cores}")
            assert shape.topology == topology
            assert f"-{chips // shape.hosts}t" in shape.machine_type
    # Spot checks against published tables.
    assert cloud.shape_of("v6e-256").hosts == 64
    assert cloud.shape_of("v5p-128").topology == "4x4x4"
    assert cloud.shape_of("TPU7x-16").hosts == 2
    assert cloud.shape_of("v5e-256").hosts == 64
    assert cloud.shape_of("v4-4096").hosts == 512


FAKE_PYTHON = r"""#!{python} -SE
import json, os, signal, sys, time
here = os.environ["HERE"]
with open(here + "/runs.jsonl", "a") as runs:
    runs.write(json.dumps([os.getcwd(), *sys.argv[1:]]) + "\n")
codes = open(here + "/codes").read().split()
open(here + "/codes", "w").write(" ".join(codes[1:]))
if codes[0] == "until-term":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    time.sleep(20)
print("the program speaks")
sys.exit(int(codes[0]))
"""
FAKES = {
    "uv": """[ "$1" = venv ] && mkdir -p "$4/bin" && cp "$HERE/bin/fake-python" "$4/bin/python"
echo "uv $*" >> "$HERE/others" """,
    "git": 'echo "git $*" >> "$HERE/others"; mkdir -p "${@: -1}"',
    "hostname": 'echo "$HOST"',
    "curl": """case "${@: -1}" in */agent-worker-number) [ -n "$WORKER" ] && echo "$WORKER" ;;
*/worker-network-endpoints) echo "$ENDPOINTS" ;; esac""",
    # Waits only for the end of the slice's time, shortened; all other pauses end at once.
    "sleep": '[ "$1" = "$SHORTENED" ] && exec /bin/sleep 1; exit 1',
    "systemctl": "echo running",
    "shutdown": 'echo "shutdown $*" >> "$HERE/others"',
    "snap": "exit 1",
    "apt-get": "exit 1",
}


def run_host(
    fake, codes: str, accelerator="v6e-16", program=PROGRAM, fail=(), long_run="1200", **env
):
    """Run the startup script of a job; return the finished process and the runs of the program."""
    job = cloud.Job(
        *("tpu-a", "us-east5-b", "my-project", cloud.shape_of(accelerator), WORKDIR),
        program=tuple(program),
        source=("repo", "https://example.com/me/code", "v1"),
        setup="""echo "$(basename "$TFDS_DATA_DIR") 'here'" > fetched""",
    )
    script = fake.folder / "startup.sh"
    text = cloud.startup_script(job)
    assert text.count("-gt 1200 ") == 1
    script.write_text(text.replace("-gt 1200 ", f"-gt {long_run} "))
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    fake.scenario([], fail=fail)
    fake.command("fake-python", FAKE_PYTHON.replace("{python}", sys.executable))
    for name, text in FAKES.items():
        fake.command(name, f"#!/bin/bash\n{text}\n")
    (fake.folder / "codes").write_text(codes)
    env = os.environ | {
        "PATH": f"{fake.bin}:/usr/bin:/bin",
        "HERE": str(fake.folder),
        "COMPAT_JAX_ROOT": str(fake.folder / "opt"),
        **{"WORKER": "0", "ENDPOINTS": "10.0.0.1", "SHORTENED": "-", "HOST": "tpu-a-x7k2"},
        **env,
    }
    done = subprocess.run(["bash", script], capture_output=True, text=True, env=env, timeout=60)
    path = fake.folder / "runs.jsonl"
    runs = path.read_text().splitlines() if path.exists() else []
    return done, [json.loads(run) for run in runs]


def test_odd_arguments_reach_the_program_in_one_piece(fake):
    odd = ["--config.note=a b; rm -rf /", 'it\'s $HOME `id` "x"\\', "two\nlines", "*", "", "ä"]
    done, runs = run_host(fake, "0", program=[*PROGRAM, *odd])
    assert runs == [
        [
            *(f"{fake.folder}/opt/source", "-m", *PROGRAM, *odd),
            *(f"--workdir={WORKDIR}", "--multihost"),
        ]
    ]
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the program speaks" in done.stdout
    others = (fake.folder / "others").read_text().splitlines()
    assert others[0].startswith("git clone --depth=1 --branch v1 -- https://example.com/me/code")
    assert others[2].endswith("/opt/source[tpu]")
    assert (fake.folder / "opt/fetched").read_text() == "data 'here'\n"
    # At the end: the log, the exit code, and then the slice goes.
    stored = [call.split()[-1] for call in fake.calls("storage cp")]
    assert stored[-2:] == [f"{LOGS}/worker-0.log", f"{LOGS}/exit"]
    assert (fake.folder / "opt/exit").read_text() == "0\n"
    assert fake.calls()[-1] == DELETE_GROUP


@pytest.mark.parametrize(
    ("argv", "folder"),
    [([], f"--chain={WORKDIR}/chain"), (["--chain=gs://b/c"], "--chain=gs://b/c")],
)
def test_evaluation_is_given_the_chain_of_the_run(argv, folder):
    place = ("tpu-a", "us-east5-b", "my-project", cloud.shape_of("v6e-4"), WORKDIR)
    job = cloud.Job(*place, program=("launch.evaluate", *argv), folder="chain")
    script = cloud.startup_script(job)
    assert f"PROGRAM=(-m launch.evaluate {folder})" in script.splitlines()


def test_a_program_that_exits_with_75_is_run_again(fake):
    done, runs = run_host(fake, "75 75 1 75 1 0")
    assert (len(runs), done.returncode) == (6, 0)
    assert all(run == runs[0] for run in runs)


@pytest.mark.parametrize(("codes", "runs_expected", "code"), [("1 1 1 0", 3, 1), ("2 0", 1, 2)])
def test_a_program_that_fails_again_and_again_gives_the_slice_back(
    fake, codes, runs_expected, code
):
    done, runs = run_host(fake, codes)
    assert (len(runs), done.returncode) == (runs_expected, code)
    assert (fake.folder / "opt/exit").read_text() == f"{code}\n"
    assert fake.calls()[-1] == DELETE_GROUP


def test_failures_with_a_long_run_before_each_do_not_add_up(fake):
    done, runs = run_host(fake, "1 1 1 1 0", long_run="-1")  # seconds: every run is a long one
    assert (len(runs), done.returncode) == (5, 0)


def test_storing_the_exit_code_is_tried_again_before_the_slice_goes(fake):
    run_host(fake, "0", fail=[(f"{LOGS}/exit", "ERROR: HTTPError 503", 3)])
    *stores, delete = fake.calls("/exit", " delete ")
    assert [call.endswith(f"{LOGS}/exit") for call in stores] == [True] * 4
    assert delete == DELETE_GROUP


@pytest.mark.parametrize(
    ("accelerator", "env", "worker"),
    [
        ("v5e-16", {"HOST": "t1v-n-1a2b-w-3"}, 3),
        ("v6e-1", {}, 0),
        ("v6e-16", {"HOST": "tpu-a-w-3"}, None),
        ("v5e-8", {"ENDPOINTS": "h0,h1"}, None),
    ],
)
def test_a_host_without_a_number_is_not_taken_for_the_first(fake, accelerator, env, worker):
    done, runs = run_host(fake, "0", accelerator=accelerator, WORKER="", **env)
    if worker is None:
        assert (done.returncode, runs) == (1, [])
        assert "the VM has no agent-worker-number to say which" in done.stdout
        assert [call.split()[-1] for call in fake.calls("/exit")] == [f"{LOGS}/exit"]
        assert " delete tpu-a " in fake.calls()[-1]
        return
    assert (done.returncode, len(runs)) == (0, 1)
    assert fake.calls(f"/worker-{worker}.log") and bool(fake.calls("/exit")) == (worker == 0)


def test_only_the_first_host_ends_the_run(fake):
    done, runs = run_host(fake, "1 1 1 1 1 0", WORKER="3")
    assert (len(runs), done.returncode) == (6, 0)
    assert not fake.calls("delete", "/exit")
    assert fake.calls("storage cp")[-1].endswith("/worker-3.log")


def test_before_its_time_is_over_the_program_gets_sigterm(fake):
    done, _ = run_host(fake, "until-term", accelerator="v5e-8", SHORTENED=str(24 * 3600 - 300))
    assert done.returncode == 75
    assert (fake.folder / "opt/exit").read_text() == "75\n"
    assert fake.calls()[-1] == f"compute tpus queued-resources delete tpu-a {AT} --force --quiet"


@pytest.mark.parametrize(("endpoints", "several"), [("10.0.0.1", False), ("h0,h1", True)])
def test_one_host_in_the_table_asks_the_metadata_for_their_number(fake, endpoints, several):
    _, runs = run_host(fake, "0", accelerator="v5e-8", ENDPOINTS=endpoints)
    assert ("--multihost" in runs[0]) == several


def test_a_vm_that_may_not_delete_itself_is_stopped(fake):
    refused = ("instances delete", "ERROR: permission denied", 1)
    run_host(fake, "0", accelerator="v6e-1", fail=[refused])
    assert "shutdown -h now" in (fake.folder / "others").read_text()
