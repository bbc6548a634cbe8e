"""Too little memory ends in one line that says what fits, before the system kills the program."""

import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

from compat_jax import memory
from compat_jax import mesh as meshes
from compat_jax.chain import Chain
from compat_jax.errors import UserError
from compat_jax.mesh import check_batch, make_mesh
from compat_jax.training import Trainer, pretrain

MACHINE = "MemTotal: 100 kB\nMemAvailable: 50 kB\nSwapFree: 7 kB\n"
WHOLE = 1024 * (50 + 7)


def system(folder, table="0::/user/job\n", **groups):
    """A machine's /proc and its control groups, {folder with __ for /: {file: content}}."""
    (folder / "proc" / "self").mkdir(parents=True)
    (folder / "proc" / "meminfo").write_text(MACHINE)
    (folder / "proc" / "self" / "cgroup").write_text(table)
    for name, files in groups.items():
        group = folder / "groups" / name.replace("__", "/").strip(".")
        group.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (group / f"memory.{file}").write_text(f"{content}\n")
    return folder / "proc", folder / "groups"


def group(limit, current=700, inactive=30, active=20):
    stat = f"anon 1\ninactive_file {inactive}\nactive_file {active}\nslab_reclaimable 5"
    return {"max": limit, "current": current, "stat": stat}


OLD = {
    "limit_in_bytes": 900,
    "usage_in_bytes": 700,
    "stat": "active_file 1\ntotal_active_file 20\ntotal_inactive_file 30",
}


@pytest.mark.parametrize(
    ("table", "groups", "free"),
    [
        ("0::/user/job", {}, WHOLE),
        ("0::/user/job", {"user__job": group("max")}, WHOLE),
        ("0::/user/job", {"user__job": group(10**9)}, WHOLE),
        ("0::/user/job", {"user__job": group(900)}, 255),  # files are given back
        ("0::/user/job", {"user__job": group("max"), "user": group(900)}, 255),
        ("0::/of/the/host", {".": group(900)}, 255),  # a container sees its own group as the root
        ("4:cpu,memory:/docker/x\n0::/", {"memory__docker__x": OLD}, 250),
        ("5:memory:/docker/y\n1:name=systemd:/", {"memory": OLD}, 250),
    ],
)
def test_what_is_free_is_that_of_the_machine_or_of_its_container(tmp_path, table, groups, free):
    assert memory.free_bytes(*system(tmp_path, table, **groups)) == free


def test_without_groups_the_machine_counts_and_without_linux_nothing_is_known(tmp_path):
    proc, groups = system(tmp_path)
    (proc / "self" / "cgroup").unlink()
    assert memory.free_bytes(proc, groups) == WHOLE
    assert memory.free_bytes(tmp_path / "nowhere") is None


def step_of(needed):
    """A compiled step that takes so many bytes of scratch on a device."""
    return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(temp_size_in_bytes=needed))


@pytest.mark.parametrize("devices", [1, 8])
def test_the_batch_to_try_is_smaller_and_divides_over_the_devices(devices):
    rng, mesh = np.random.default_rng(0), make_mesh(f"data:{devices}", jax.devices()[:devices])
    for _ in range(200):
        needed, free = (int(10 ** rng.uniform(3, 12)) for _ in range(2))
        batch = devices * int(rng.integers(1, 100))
        if needed * devices <= free:
            memory.check(step_of(needed), mesh, batch, free, remat="none")
            continue
        with pytest.raises(UserError, match=r"of scratch memory, and .* are free: try ") as caught:
            memory.check(step_of(needed), mesh, batch, free, remat="none")
        assert caught.value.argument == "batch_size"
        assert str(caught.value).endswith("smaller pictures or remat='blocks'")
        if found := re.search(r"try batch_size=(\d+) or", str(caught.value)):
            tried = int(found[1])
            assert tried < batch and needed * devices * tried / batch <= free
            check_batch(mesh, tried)
    memory.check(step_of(10**15), mesh, 8, None, remat="none")  # nobody knows
    with pytest.raises(UserError, match=r"try smaller pictures$"):
        memory.check(step_of(10**15), mesh, 8, 10, remat="blocks")


def test_a_step_that_does_not_fit_is_refused_before_it_runs_and_the_batch_to_try_runs(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(memory, "free_bytes", lambda: 3000)
    with pytest.raises(UserError, match=r"a training step takes .* and 0 MB are free"):
        tiny.train(tiny.run(), tmp_path / "run")
    assert Chain(tmp_path / "run" / "chain").numbers() == []
    data = tiny.dataset(per_class=80)
    monkeypatch.setattr(memory, "free_bytes", lambda: 600_000)
    with pytest.raises(UserError, match="try batch_size=") as caught:
        tiny.train(tiny.run(batch_size=128), tmp_path / "large", data)
    batch = int(re.search(r"batch_size=(\d+)", str(caught.value))[1])
    # In the same folder, which the refused call does not own.
    assert len(tiny.train(tiny.run(batch_size=batch), tmp_path / "large", data)) == 3
    monkeypatch.setattr(memory, "free_bytes", lambda: 3000)
    with pytest.raises(UserError, match=r"a training step takes .* and 0 MB are free"):
        pretrain(tiny.run("sce"), data, tmp_path / "models", class_counts=(4,))
    monkeypatch.undo()
    longer = tiny.run("sce", epochs=3)
    assert len(pretrain(longer, data, tmp_path / "models", class_counts=(4,))) == 1


def test_a_device_that_is_full_is_one_line(tmp_path, monkeypatch):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(Trainer, "advance", full)
    with pytest.raises(UserError, match=r"is full \(Out of memory allocating 9 bytes\.\): take a"):
        tiny.train(tiny.run(), tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(meshes, "device_put", full)
    with pytest.raises(UserError, match="keep pictures on the host") as caught:
        tiny.train(tiny.run(), tmp_path / "data")
    assert caught.value.argument == "device_budget"
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory.shortage(""):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
