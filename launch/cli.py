"""What the programs share: one-line errors, flags, the compilation cache, stopping in good order."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from compat_jax.errors import Stopped, UserError, unknown

RESUME = 75  # EX_TEMPFAIL: run the same command again and it goes on


def run(main: Callable[[Sequence[str]], None], doc: str) -> None:
    """Parse the flags and run `main`; a UserError becomes one line and exit code 2.

    Args:
      main: takes what is left of argv.
      doc: shown by --help.
    """
    sys.modules["__main__"].__doc__ = doc
    try:
        app.run(lambda argv: _guarded(main, argv), flags_parser=_parse)
    except SystemExit as end:
        if "compat_jax.hosts" in sys.modules and isinstance(end.code, int | None):
            sys.modules["compat_jax.hosts"].leave(end.code or 0)
        raise


def _parse(argv):
    try:
        return flags.FLAGS(argv)
    except SystemExit:  # absl has printed the help that was asked for, and calls that a failure
        sys.exit(0)
    except (flags.Error, UserError, AttributeError, KeyError, TypeError, ValueError) as error:
        if any(a in ("--help", "-h", "--helpfull", "--helpshort", "-help") for a in argv):
            raise
        _fail(error)


def _guarded(main, argv):
    try:
        if len(argv) > 1:
            raise UserError(f"unknown argument {argv[1]!r}: flags begin with --, see --help")
        logging.set_verbosity(logging.WARNING)  # Orbax and JAX tell every file at INFO
        # Orbax also logs the traceback of each of its threads before it raises the error.
        logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
        _check_config_file()
        main(argv)
    except (UserError, OSError) as error:
        _fail(error)
    except Stopped:
        print("stopped and saved; the same command goes on", file=sys.stderr)
        sys.exit(RESUME)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last save", file=sys.stderr)
        sys.exit(RESUME)


def _fail(error):
    print(f"error: {_one_line(error)}", file=sys.stderr)
    sys.exit(2)


def _one_line(error):
    while error.args and isinstance(error.args[0], Exception):  # ml_collections wraps its errors
        error = error.args[0]
    # What a configuration raised arrives as the text of its traceback.
    text = str(error).rpartition("compat_jax.errors.UserError: ")[2]
    if "has no attribute 'get_config'" in text:
        text = "the configuration file has no get_config(): configs/ has some to start from"
    elif isinstance(error, KeyError | AttributeError):
        text = f"unknown field of the configuration: {error.args[0]}"
    return " ".join(text.split())


def define_config(default: str | None = None) -> None:
    """--config=FILE.py:arguments, overridden by --config.FIELD=VALUE."""
    try:  # reads the overrides at once
        config_flags.DEFINE_config_file("config", default, "FILE.py:key=value,... of the run")
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        _fail(error)


def _check_config_file():
    if "config" not in flags.FLAGS or flags.FLAGS["config"].value is None:
        return
    path = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
    if not Path(path).is_file():
        raise UserError(f"no configuration file {path!r}: configs/ has some to start from")


def require(name: str, example: str) -> str:
    """The value of a flag that must be given.

    Raises:
      UserError: it is not.
    """
    value = flags.FLAGS[name].value
    if not value:
        raise UserError(f"--{name} is missing: for example --{name}={example}")
    return value


def check_choice(kind: str, value: str, choices: Sequence[str]) -> str:
    """`value`, if it is one of the choices.

    Raises:
      UserError: it is not.
    """
    if value not in choices:
        raise unknown(kind, value, choices)
    return value


def cache_folder() -> Path:
    """Where rendered data and compiled programs are kept: $COMPAT_JAX_CACHE or ~/.cache."""
    return Path(os.environ.get("COMPAT_JAX_CACHE") or Path.home() / ".cache" / "compat_jax")


def define_hosts() -> None:
    """--multihost and what it needs elsewhere than on TPU VMs."""
    flags.DEFINE_bool("multihost", False, "join the other hosts; each runs the same command")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0; TPU VMs need none")
    flags.DEFINE_integer("num_processes", None, "how many processes join; TPU VMs need none", 1)
    flags.DEFINE_integer("process_id", None, "number of this process; TPU VMs need none", 0)


def start_jax() -> None:
    """Join the other hosts, turn on the compilation cache; call before the first computation."""
    import jax

    args = flags.FLAGS
    if "multihost" in args:
        given = (args.coordinator, args.num_processes, args.process_id)
        if args.multihost or given != (None, None, None):
            from compat_jax import hosts

            hosts.start(*given)
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def say(text: object) -> None:
    """Print, on the first host only."""
    from compat_jax import hosts

    if hosts.is_first():
        print(text)


class StopSignal:
    """Set by SIGTERM, which Cloud sends before it takes a machine away."""

    def __init__(self):
        self.received = False
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_):
        self.received = True

    def __call__(self) -> bool:
        """Whether the signal came, to any of the hosts: they stop at the same step."""
        from compat_jax import hosts

        return hosts.any_says(self.received)
