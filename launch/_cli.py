"""Shared by all programs: flags, one-line errors, exit codes, the compilation cache, orderly stops."""

import contextlib
import os
import re
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from compat_jax.errors import Stopped, UserError, unknown
from compat_jax.files import absolute, first_line
from launch import _config_flag

if TYPE_CHECKING:  # imports JAX, which programs do after they have parsed their flags
    from compat_jax.session import Session

HELP_FLAGS = ("--help", "-h", "--helpfull", "--helpshort", "-help", "--help=true")
RESUME = 75  # EX_TEMPFAIL: run the same command again and it resumes


def run(main: Callable[[Sequence[str]], None], doc: str) -> None:
    """Parse the flags and run `main`; a UserError becomes one line and exit code 2.

    Args:
      main: takes what is left of argv.
      doc: shown by --help.
    """
    sys.modules["__main__"].__doc__ = doc
    for stream in (sys.stdout, sys.stderr):  # "CL²R" on a terminal that is not UTF-8
        stream.reconfigure(errors="backslashreplace")
    try:
        app.run(lambda argv: _guarded(main, argv), flags_parser=_parse)
    except BrokenPipeError:  # the reader of a pipe, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except SystemExit as end:
        if "compat_jax.hosts" in sys.modules and isinstance(end.code, int | None):
            sys.modules["compat_jax.hosts"].shut_down(end.code or 0)
        raise


def _parse(argv):
    wants_help = any(a in HELP_FLAGS for a in argv)
    try:
        if wants_help and _SHOWN and "config" in flags.FLAGS:
            from launch._help import help_of

            flags.FLAGS([a for a in argv if a not in HELP_FLAGS])
            _config_flag.unset(flags.FLAGS)
            _config_flag.check()
            text = help_of(_SHOWN, _config_flag.file() if flags.FLAGS["config"].present else "")
            print(f"{sys.modules['__main__'].__doc__}\n{text}")
            sys.exit(0)
        rest = flags.FLAGS(argv)
        _config_flag.unset(flags.FLAGS)
        return rest
    except SystemExit as end:
        if wants_help:  # absl has printed it, and calls that a failure
            sys.exit(0)
        _fail(UserError(f"the configuration file ended the program (exit {end.code})"))
    except Exception as error:  # a configuration file is code of the user's and may raise anything
        _fail(error)


def _guarded(main, argv):
    try:
        if len(argv) > 1:
            raise UserError(f"unknown argument {argv[1]!r}: flags begin with --, see --help")
        logging.set_verbosity(logging.WARNING)  # Orbax and JAX tell every file at INFO
        # Orbax also logs the traceback of each of its threads before it raises the error.
        logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
        _config_flag.check()
        main(argv)
    except BrokenPipeError:  # see `run`
        raise
    except (UserError, OSError) as error:
        _fail(error)
    except Stopped as stopped:
        print(f"{str(stopped) or 'stopped'}; run the same command to resume", file=sys.stderr)
        sys.exit(RESUME)
    except KeyboardInterrupt:  # see `StopSignal`
        print("\nstopped before there was anything to save; run the same command", file=sys.stderr)
        sys.exit(RESUME)


def _fail(error):
    print(f"error: {_one_line(error)}{_flag_of(error)}", file=sys.stderr)
    sys.exit(2)


def _flag_of(error):
    """The flag of the argument that an error names, where the message does not say it."""
    argument = getattr(error, "argument", None)
    if not argument:
        return ""
    own = argument in flags.FLAGS
    flag = f"--{argument}" if own else f"--config.{argument}"
    if flag in str(error) or not (own or _config_flag.has_field(argument)):
        return ""
    return f" (flag {flag})"


@contextlib.contextmanager
def given_as(flag: str, argument: str) -> Iterator[None]:
    """Let errors about an argument of the library name the flag that gave it, within a block.

    Raises:
      UserError: whatever the block raises.
    """
    try:
        yield
    except UserError as error:
        if error.argument == argument:
            error.argument = flag
        raise


def _one_line(error):
    while error.args and isinstance(error.args[0], Exception):  # ml_collections wraps its errors
        error = error.args[0]
    if isinstance(error, flags.UnrecognizedFlagError) and _belongs_in_grid(error.flagname):
        field, value = error.flagname.removeprefix("config."), error.flagvalue.partition("=")[2]
        return f"--{error.flagname} is no flag of a sweep: put {field}={value or '...'} into --grid"
    if str(error).startswith("Configuration is not available") and error.__cause__ is not None:
        return f"the configuration file failed ({first_line(error.__cause__)})"
    # What a configuration raised arrives as the text of its traceback.
    text = str(error).rpartition("compat_jax.errors.UserError: ")[2]
    if "has no attribute 'get_config'" in text:
        text = f"the configuration file has no get_config(): {_config_flag.examples()}"
    elif isinstance(error, KeyError | AttributeError):
        text = f"unknown field of the configuration: {error.args[0]}"
    elif not isinstance(error, UserError | OSError | flags.Error | TypeError | ValueError):
        text = f"the configuration file failed ({type(error).__name__}: {error})"
    return " ".join(text.split())


def _belongs_in_grid(flag):
    """Return whether a field was given as a flag to a program that takes fields in a grid."""
    return flag.startswith("config.") and "grid" in flags.FLAGS


_SHOWN: list[str] = []  # how the fields begin that --help lists; empty for no configuration


def define_config(default: str | None = None, fields: Sequence[str] = ("",)) -> None:
    """Define --config=FILE.py:arguments, overridden by --config.FIELD=VALUE.

    The last of several values of a field counts, and `None` unsets it. A FILE of the clone's configs/ is
    found from any folder.

    Args:
      default: file that is taken where none is given, relative to the clone.
      fields: how the names of those begin that the program reads, for its help; all by default.
    """
    _SHOWN.extend(fields)
    sys.argv[:] = _config_flag.last_values(sys.argv)
    if default is not None:
        default = str(_config_flag.CLONE / default)
    _end_quietly_on_interrupt()
    try:  # reads the file and the overrides at once
        sys.argv[:] = _config_flag.with_files(sys.argv)
        config_flags.DEFINE_config_file("config", default, "FILE.py:key=value,... of the run")
    except Exception as error:  # see `_parse`
        _fail(error)


def _end_quietly_on_interrupt():
    """End at Ctrl-C without a traceback while a program starts; `StopSignal` takes over later."""
    if getattr(sys.modules["__main__"], "__spec__", None) is None:
        return  # not run as `python -m launch.PROGRAM`

    def end(*_):
        os.write(2, b"\nstopped before it began\n")
        os._exit(130)

    signal.signal(signal.SIGINT, end)


def require(name: str, example: str) -> str:
    """Return the value of a flag that must be given.

    Raises:
      UserError: it is missing.
    """
    value = flags.FLAGS[name].value
    if not value:
        raise UserError(f"--{name} is missing: for example --{name}={example}")
    return value


def check_choice(kind: str, value: str, choices: Sequence[str]) -> str:
    """Return the value if it is one of the choices.

    Raises:
      UserError: it is not.
    """
    if value not in choices:
        raise unknown(kind, value, choices)
    return value


def shard(text: str) -> tuple[int, int]:
    """Return (number, count) of "I/N".

    Raises:
      UserError: another form, or I out of 0..N-1.
    """
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise UserError(f"shard is I/N with I below N, e.g. 0/4, got {text!r:.80}", "shard")
    return int(match[1]), int(match[2])


def cache_folder() -> Path:
    """Return the folder of drawn data and compiled programs: $COMPAT_JAX_CACHE or ~/.cache."""
    return Path(absolute(os.environ.get("COMPAT_JAX_CACHE") or "~/.cache/compat_jax"))


def define_hosts() -> None:
    """Define --multihost and the flags that it needs elsewhere than on TPU VMs."""
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

            hosts.initialize(*given)
    if jax.config.jax_compilation_cache_dir is None:
        try:
            folder = cache_folder() / "xla"
        except UserError as error:  # no home folder: works without a cache
            logging.warning("compiled programs are not kept (%s): set COMPAT_JAX_CACHE", error)
            return
        sweep_compiled(folder)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def sweep_compiled(folder: Path) -> None:
    """Delete compiled programs that a killed process left half written.

    JAX would warn of each at every start and compile it anew. Entries are checked once: a stamp's time
    says up to when.

    Args:
      folder: JAX's compilation cache; it need not exist.
    """
    stamp, began = folder / ".checked", time.time()
    since = stamp.stat().st_mtime if stamp.exists() else 0.0
    try:
        for entry in folder.glob("*-cache"):
            if entry.stat().st_mtime >= since and not _is_whole(entry.read_bytes()):
                entry.unlink(missing_ok=True)
        if folder.is_dir():
            stamp.touch()
            os.utime(
                stamp, (began - 10, began - 10)
            )  # what others write meanwhile is checked again
    except OSError:
        pass  # a cache that cannot be written to is JAX's to report


def _is_whole(content):
    if content[:1] != b"\x78":  # not zlib: JAX was built with another compression
        return bool(content)
    try:
        zlib.decompress(content)
    except zlib.error:
        return False
    return True


def say(text: object) -> None:
    """Print, on the first host only."""
    from compat_jax import hosts

    if hosts.is_first():
        print(text)


class StopSignal:
    """Becomes true at SIGTERM, which Cloud sends before it takes a machine away, or at Ctrl-C.

    The run then saves its state and ends. Before it was asked for the first time, while data are read,
    there is nothing to save: the program ends. A second Ctrl-C ends the program at once.
    """

    def __init__(self):
        self.received = self._asked = False
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        # Python runs a handler between two of its own instructions: minutes later, within a
        # compilation. The number of the signal comes through the pipe at once.
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # the pipe is shared
        threading.Thread(target=self._listen, args=(reader,), daemon=True).start()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _listen(self, reader):
        interrupts = 0
        while content := os.read(reader, 64):
            for number in content:
                self.received = self.received or number in (signal.SIGTERM, signal.SIGINT)
                if number != signal.SIGINT:
                    continue
                interrupts += 1
                if interrupts > 1:  # an exception might be raised in a callback that drops it
                    os.write(2, b"\nstopped at once; the same command goes on from the last save\n")
                    os._exit(RESUME)
                if self._asked:
                    os.write(2, b"\nstopping: saves first; Ctrl-C again ends at once\n")

    def _handle(self, number, _):
        del number
        self.received = True
        if not self._asked and not _is_distributed():  # other hosts would wait for this one
            raise KeyboardInterrupt

    def __call__(self) -> bool:
        """Return whether a signal came to this process; a `Session` asks all hosts."""
        self._asked = True
        return self.received


def _is_distributed():
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def session(config: ConfigDict, stop: StopSignal) -> "Session":
    """Make the session of a configuration, with bars as --progress says."""
    from compat_jax import config as configs

    args = flags.FLAGS
    changes = "continue_with_changes" in args and args.continue_with_changes
    return configs.session_of(config, stop, progress=args.progress, accept_changes=changes)
