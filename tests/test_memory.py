"""Too little memory ends in one line that says what fits, before the system kills the program."""

import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

from compat_jax import memory
from compat_jax.chain import Chain
from compat_jax.errors import UserError
from compat_jax.training import Trainer

MACHINE = "MemTotal: 100 kB\nMemAvailable: {available} kB\nSwapFree: {swap} kB\n"


def system(folder, limit=None, current=0, cached=0, available=50, swap=7):
    """A machine's /proc and its control groups."""
    proc, group = folder / "proc", folder / "groups" / "user" / "job"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(MACHINE.format(available=available, swap=swap))
    (proc / "self" / "cgroup").write_text("0::/user/job\n")
    if limit is not None:
        group.mkdir(parents=True)
        for name, text in {"max": limit, "current": current}.items():
            (group / f"memory.{name}").write_text(f"{text}\n")
        (group / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")
    return proc, folder / "groups"


def test_what_is_free_is_that_of_the_machine_or_of_its_container(tmp_path):
    whole = 1024 * (50 + 7)
    assert memory.free_bytes(*system(tmp_path / "plain")) == whole
    assert memory.free_bytes(*system(tmp_path / "unlimited", limit="max")) == whole
    assert memory.free_bytes(*system(tmp_path / "large", limit=10**9)) == whole
    assert memory.free_bytes(*system(tmp_path / "small", limit=900, current=700, cached=30)) == 230
    assert memory.free_bytes(tmp_path / "nowhere") is None


def step_of(needed):
    """A compiled step that takes so many bytes of scratch."""
    return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(temp_size_in_bytes=needed))


def test_the_batch_that_is_named_fits():
    rng = np.random.default_rng(0)
    for _ in range(200):
        needed, free = (int(10 ** rng.uniform(3, 12)) for _ in range(2))
        batch = int(rng.integers(1, 600))
        if needed <= free:
            memory.check(step_of(needed), 1, batch, free)
            continue
        with pytest.raises(UserError, match=r"of scratch memory, and .* are free") as caught:
            memory.check(step_of(needed), 1, batch, free)
        assert caught.value.argument == "batch_size"
        if found := re.search(r"batch_size=(\d+) should fit", str(caught.value)):
            assert 1 <= int(found[1]) < batch and needed * int(found[1]) / batch <= free
        else:
            assert "smaller pictures should fit" in str(caught.value)
    memory.check(step_of(10**15), 1, 8, None)  # nobody knows
    with pytest.raises(UserError):  # devices of one machine share its memory
        memory.check(step_of(600), 8, 64, 1000)


def test_a_step_that_does_not_fit_is_refused_before_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda: 3000)
    with pytest.raises(UserError, match=r"a training step takes .* and 0 MB are free"):
        tiny.train(tiny.run(), tmp_path / "run")
    assert Chain(tmp_path / "run" / "chain").numbers() == []
    monkeypatch.undo()
    assert len(tiny.train(tiny.run(), tmp_path / "run")) == 3


def test_a_device_that_is_full_is_one_line(tmp_path, monkeypatch):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(Trainer, "advance", full)
    with pytest.raises(UserError, match=r"is full \(Out of memory allocating 9 bytes\.\): take a"):
        tiny.train(tiny.run(), tmp_path)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory.shortage(""):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
