"""Several processes that compute together, one a host: who speaks, and what all must agree on.

With one process every function here does the plain thing. With several, all of them must call it, in
the same order.
"""

import functools
import os
import sys
import uuid
from collections.abc import Callable

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils

from compat_jax.errors import UserError

_MESSAGE_BYTES = 1024
# What `whole` puts on every device at a time.
_BLOCK_BYTES = 1 << 26


def start(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the other processes; call before the first computation.

    Args:
      coordinator: HOST:PORT of process 0; None where JAX finds out, as on TPU VMs.
      num_processes: how many there are.
      process_id: number of this one.

    Raises:
      UserError: some of the three only, or JAX does not find out by itself.
    """
    given = (coordinator, num_processes, process_id)
    if any(x is not None for x in given) and None in given:
        raise UserError("--coordinator, --num_processes and --process_id go together: give all")
    if num_processes is not None and not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id must lie in 0..{num_processes - 1} (--num_processes), got {process_id}"
        )
    try:
        jax.distributed.initialize(*given)
    except (RuntimeError, ValueError) as error:
        if "DEADLINE_EXCEEDED" in str(error):  # the others did not come in time: no mistake
            raise
        raise UserError(
            f"cannot join the other processes ({str(error).splitlines()[0]}): on TPU VMs "
            "--multihost is all, elsewhere give --coordinator=HOST:PORT --num_processes=N "
            "--process_id=I"
        ) from error


def leave(code: int) -> None:
    """End a process that has joined others, once all of them do; nothing in one that has not.

    At once, since taking the interpreter down hangs now and then: the destructors of the CPU backend's
    collectives (gloo) wait for a process that has ended.

    Args:
      code: exit code.
    """
    if not jax.distributed.is_initialized():
        return
    jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def several() -> bool:
    """Whether there is more than one process."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def first_does(action: Callable[[], object]) -> None:
    """The first process acts, the others wait; what it raises, all raise.

    Raises:
      UserError: with the message of what the first process raised, in the others.
    """
    if not several():
        action()
        return
    raised = None
    if is_first():
        try:
            action()
        except Exception as error:  # told to the others, then raised again
            raised = error
    text = "" if raised is None else str(raised) or type(raised).__name__
    told = _from_first(text.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")).rstrip(b"\0")
    if raised is not None:
        raise raised
    if told:
        raise UserError(told.decode(errors="replace"))


def first_says(value: bool) -> bool:
    """The answer of the first process, for all."""
    return _from_first(bytes([value])) != b"\0" if several() else value


def any_says(value: bool) -> bool:
    """Whether any process says yes."""
    if not several():
        return value
    return bool(multihost_utils.process_allgather(np.uint8(value)).any())


def token() -> str:
    """Eight random letters, the same for all."""
    mine = uuid.uuid4().bytes[:4]
    return (_from_first(mine) if several() else mine).hex()


def total(array: np.ndarray) -> np.ndarray:
    """The sum of float64[n] over all processes, in double precision."""
    if not several():
        return array
    # JAX would round float64 down: it travels as integers.
    parts = multihost_utils.process_allgather(array.view(np.uint32))
    return np.asarray(parts).view(np.float64).sum(axis=0)


def whole(array: jax.Array | np.ndarray) -> np.ndarray:
    """All of an array that may be spread over devices of several processes."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    count = array.shape[0]
    rows = min(count, max(1, _BLOCK_BYTES * count // max(array.nbytes, 1)))
    blocks = []
    for start in range(0, count, rows):
        first = min(start, count - rows)  # where a dynamic slice would begin as well
        block = multihost_utils.process_allgather(_rows(array, np.int32(first), rows), tiled=True)
        blocks.append(np.asarray(block)[start - first :])
    return np.concatenate(blocks)


@functools.partial(jax.jit, static_argnames="rows")
def _rows(array, first, rows):
    return lax.dynamic_slice_in_dim(array, first, rows)


def _from_first(content: bytes) -> bytes:
    array = multihost_utils.broadcast_one_to_all(np.frombuffer(content, np.uint8))
    return np.asarray(array).astype(np.uint8).tobytes()
