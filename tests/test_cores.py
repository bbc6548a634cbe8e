"""The measures of a machine's cores and memory, small."""

import os
import subprocess
import sys

import pytest

from launch import benchmarks
from launch.benchmarks import timing


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_processes_and_devices_do_the_same_work():
    lines = list(benchmarks.measure(["processes"], sizes_name="tiny", dtypes=["float32"]))
    sides = [line.what.rpartition(": ")[2] for line in lines]
    features = ["one process", "one process, 2 devices", "2 processes, a share of the cores each"]
    assert sides == [*features, *features, *features[:2]]
    assert all(line.value > 0 and line.unit == "images/s" for line in lines)
    assert [line.ratio for line in lines if line.what.endswith("one process")] == [1, 1, 1]


@pytest.mark.slow
def test_memory_of_a_step_by_what_it_computes_again():
    lines = list(
        benchmarks.measure(["step_memory"], sizes_name="tiny", dtypes=["float32"], variants=())
    )
    settings = [line.what.partition(",")[0:3][2].split(",")[0] for line in lines]
    assert settings == [" remat=none", " remat=elementwise", " remat=blocks"]
    assert lines[0].ratio == 1 and all(line.value > 50 for line in lines)


def test_the_peak_of_another_process_begins_anew():
    code = "x = bytearray(200 << 20); del x; print('ready', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        child.stdout.readline()
        assert timing.peak_bytes(child.pid) > 200 << 20
        timing.reset_peak(child.pid)
        assert timing.peak_bytes(child.pid) < 100 << 20
        child.communicate(b"\n")


def test_what_is_measured_at_real_sizes_is_judged_in_the_same_types():
    assert benchmarks.chosen_dtypes((), ["step_memory"]) == benchmarks.chosen_dtypes(
        (), ["photo_step"]
    )
