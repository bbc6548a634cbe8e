"""The flag --config: files of the clone from any folder, and errors that name its fields."""

import sys

import programs
import pytest
import tiny
from absl import flags as absl_flags

from compat_jax.errors import UserError
from launch import _cli as cli
from launch import _config_flag


def test_an_error_of_a_configuration_file_is_told(tmp_path):
    file, missing = tmp_path / "own.py", tmp_path / "classes.txt"
    file.write_text(f"def get_config(_=None):\n    return open({str(missing)!r}).read()\n")
    reason = f"failed (FileNotFoundError: [Errno 2] No such file or directory: '{missing}')"
    for program, flags in (
        ("train", ["--help"]),
        ("train", ["--config.epochs=1", "--workdir=/proc/nowhere"]),
        ("sweep", ["--grid=seed=0", "--workdir=/proc/nowhere"]),
    ):
        code, out, err = programs.call(program, f"--config={file}", *flags)
        assert (code, out, err.count("\n")) == (2, "", 1) and reason in err


def test_the_configurations_of_the_clone_are_found_from_any_folder(tmp_path, monkeypatch):
    clone, file = str(programs.ROOT / "configs" / "glyphs.py"), "configs/glyphs.py:method=er,seed=3"
    monkeypatch.chdir(programs.ROOT)
    assert (
        _config_flag.config_file(file) == file
        and _config_flag.examples() == "configs/ has some to start from"
    )
    monkeypatch.chdir(tmp_path)
    assert _config_flag.config_file(file) == f"{clone}:method=er,seed=3"
    for name in ("configs/none.py", "glyphs.py", ""):
        with pytest.raises(
            UserError, match=f"file {name!r}: {programs.ROOT}/configs has some"
        ) as error:
            _config_flag.config_file(f"{name}:seed=3")
        assert error.value.argument == "config"
    for name in (clone, "configs/glyphs.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()  # of the user's own
        assert _config_flag.config_file(name) == name


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize("given", [[], ["--config", "configs/pretrain.py"]])
def test_a_default_configuration_is_found_from_any_folder(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_SHOWN", [])
    monkeypatch.setattr(cli, "_end_quietly_on_interrupt", lambda: None)
    monkeypatch.setattr(sys, "argv", ["pretrain", *given, "--config.epochs=3"])
    with tiny.own_flags():
        cli.define_config("configs/pretrain.py")
        absl_flags.FLAGS(sys.argv)
        _config_flag.check()
        config = absl_flags.FLAGS.config
        assert config.epochs == 3 and config.pretrain_classes
        absl_flags.FLAGS.unparse_flags()


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_an_error_names_only_a_flag_that_the_program_has(monkeypatch):
    monkeypatch.setattr(cli, "_SHOWN", [])
    monkeypatch.setattr(cli, "_end_quietly_on_interrupt", lambda: None)
    monkeypatch.setattr(sys, "argv", ["pretrain"])
    told = ("optim.lr", "epochs", "out", None, "kind", "optim.kind", "epochs.kind", "kind.lr")
    with tiny.own_flags():
        absl_flags.DEFINE_string("out", None, "file")
        assert [cli._flag_of(UserError("no", name)) for name in told[:3]] == [
            "",
            "",
            " (flag --out)",
        ]
        cli.define_config("configs/pretrain.py")
        found = [cli._flag_of(UserError("no", name)) for name in told]
    named = ["--config.optim.lr", "--config.epochs", "--out"]
    assert found == [*(f" (flag {name})" for name in named), *[""] * 5]
