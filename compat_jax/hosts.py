"""Coordination of several processes that compute together, one per host.

With a single process every function here is trivial. With several, all processes must call the same
functions in the same order.
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
# Upper bound on the bytes that `gather` replicates on every device at a time.
_BLOCK_BYTES = 1 << 26


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the other processes; call before the first computation.

    On TPU VMs JAX finds all three arguments by itself: leave them out.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: number of processes.
      process_id: number of this process, 0..num_processes-1.

    Raises:
      UserError: only some of the three are given, `process_id` is out of range, or none is given and
        JAX cannot find them.
    """
    given = (coordinator, num_processes, process_id)
    if any(x is not None for x in given) and None in given:
        raise UserError("coordinator, num_processes and process_id go together: give all or none")
    count, number = num_processes, process_id
    if count is not None and number is not None and not 0 <= number < count:
        raise UserError(
            f"process_id must lie in 0..{count - 1} for num_processes={count}, got {number}",
            "process_id",
        )
    try:
        jax.distributed.initialize(*given)
    except (RuntimeError, ValueError) as error:
        if "DEADLINE_EXCEEDED" in str(error):  # the other processes were late: not the user's error
            raise
        raise UserError(
            f"cannot join the other processes ({str(error).splitlines()[0]}): TPU VMs need no "
            "argument, elsewhere give coordinator (HOST:PORT), num_processes and process_id",
            "coordinator",
        ) from error


def shut_down(code: int) -> None:
    """End this process once all joined processes get here; do nothing if it never joined others.

    The process ends without the interpreter's clean-up, which hangs now and then: the destructors of
    the CPU backend's collectives (gloo) wait for processes that have already ended.

    Args:
      code: exit code.
    """
    if not jax.distributed.is_initialized():
        return
    jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_distributed() -> bool:
    """Return True if there is more than one process."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Return True in process 0, the one that writes files and prints."""
    return jax.process_index() == 0


def on_first(action: Callable[[], object]) -> None:
    """Run an action in the first process while the others wait for it to finish.

    Args:
      action: called without arguments.

    Raises:
      UserError: in the other processes, if `action` raised, with the message of its exception. The
        first process raises the exception itself.
    """
    if not is_distributed():
        action()
        return
    raised = None
    if is_first():
        try:
            action()
        except Exception as error:  # sent to the other processes, then raised again
            raised = error
    text = "" if raised is None else str(raised) or type(raised).__name__
    padded = text.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    message = _from_first(padded).rstrip(b"\0")
    if raised is not None:
        raise raised
    if message:
        raise UserError(message.decode(errors="replace"))


def broadcast(value: bool) -> bool:
    """Return the first process's value, in every process."""
    return _from_first(bytes([value])) != b"\0" if is_distributed() else value


def any_process(value: bool) -> bool:
    """Return True in every process if `value` is true in at least one."""
    if not is_distributed():
        return value
    return bool(multihost_utils.process_allgather(np.uint8(value)).any())


def token() -> str:
    """Return eight random hexadecimal digits, the same in every process."""
    own = uuid.uuid4().bytes[:4]
    return (_from_first(own) if is_distributed() else own).hex()


def sum_over_processes(array: np.ndarray) -> np.ndarray:
    """Sum an array over all processes, in double precision.

    Args:
      array: float64[n], of the same length in every process.

    Returns:
      float64[n], the same in every process.
    """
    if not is_distributed():
        return array
    # JAX would round float64 to float32, so send the bits as integers.
    parts = multihost_utils.process_allgather(array.view(np.uint32))
    return np.asarray(parts).view(np.float64).sum(axis=0)


def gather(array: jax.Array | np.ndarray) -> np.ndarray:
    """Copy an array to host memory whole, also if it is sharded over devices of several processes.

    Args:
      array: a NumPy array, or a JAX array with any sharding.

    Returns:
      The whole array, in every process.
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    count = array.shape[0]
    rows = min(count, max(1, _BLOCK_BYTES * count // max(array.nbytes, 1)))
    blocks = []
    for start in range(0, count, rows):
        first = min(start, count - rows)  # dynamic_slice clamps its start in the same way
        block = multihost_utils.process_allgather(_rows(array, np.int32(first), rows), tiled=True)
        blocks.append(np.asarray(block)[start - first :])
    return np.concatenate(blocks)


@functools.partial(jax.jit, static_argnames="rows")
def _rows(array, first, rows):
    return lax.dynamic_slice_in_dim(array, first, rows)


def _from_first(content: bytes) -> bytes:
    array = multihost_utils.broadcast_one_to_all(np.frombuffer(content, np.uint8))
    return np.asarray(array).astype(np.uint8).tobytes()
