"""Ctrl-C in a script or notebook: save first, then raise KeyboardInterrupt."""

import contextlib
import dataclasses
import signal
import sys
import threading
from collections.abc import Iterator

from compat_jax import hosts
from compat_jax.errors import Stopped
from compat_jax.session import Session


@contextlib.contextmanager
def saved_on_interrupt(session: Session) -> Iterator[Session]:
    """Turn the first Ctrl-C within a block into a request to stop; the second one interrupts at once.

    Does nothing where the program handles Ctrl-C itself, outside of the main thread, or with several
    hosts, which must agree on when to stop.

    Args:
      session: of the run.

    Yields:
      The session, whose `should_stop` also says whether Ctrl-C came.

    Raises:
      KeyboardInterrupt: in place of `Stopped`, if Ctrl-C was the reason.
    """
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    is_main = threading.current_thread() is threading.main_thread()
    if not is_default or not is_main or hosts.is_distributed():
        yield session
        return
    asked: list[int] = []

    def receive(number, frame):
        if asked:
            signal.default_int_handler(number, frame)
        asked.append(number)
        with contextlib.suppress(RuntimeError):  # the block may be printing itself
            print("\nstopping: saves first; Ctrl-C again interrupts at once", file=sys.stderr)

    signal.signal(signal.SIGINT, receive)
    try:
        should_stop = session.should_stop
        yield dataclasses.replace(session, should_stop=lambda: bool(asked) or should_stop())
    except Stopped as stopped:
        if asked:
            what = "saved" if "saved" in str(stopped) else "stopped with nothing left to save"
            raise KeyboardInterrupt(f"{what}: call again to resume") from stopped
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
