"""The lease of a backfill: one process at a time, whose right ends by itself if the process does."""

import contextlib
import hashlib
import os
import socket
import time
import uuid
from pathlib import Path

from compat_jax.errors import Stopped, UserError
from compat_jax.gallery.manifest import Lease, Manifest
from compat_jax.gallery.opened import Opened
from compat_jax.meter import duration

SECONDS = 600.0


class Holder:
    """Takes the lease of a gallery, renews it, gives it back; a context manager.

    A lease that ran out, or whose process on this host and in this container has ended, is taken over.
    Hosts compare their clocks: they must agree to within a few minutes.

    Args:
      gallery: the gallery.
      query: version that embeds queries while the lease is held; a switch ends the work. None for
        work that goes on after one.
      seconds: how long it lasts unless it is renewed.

    Raises:
      UserError: another process has it.
    """

    def __init__(self, gallery: Opened, query: int | None, seconds: float = SECONDS):
        self.gallery, self.query, self.seconds = gallery, query, seconds
        self.owner = owner(os.getpid(), uuid.uuid4().hex[:8])
        self._due = 0.0

    def __enter__(self) -> "Holder":
        def take(now: Manifest) -> Manifest:
            lease = now.lease
            if lease is not None and lease.until > time.time() and not _has_ended(lease.owner):
                left = duration(lease.until - time.time())
                raise UserError(
                    f"another backfill of this gallery is running ({lease.owner}): wait for it; if it "
                    f"was killed on another host, its lease runs out in {left}"
                )
            self._check_query(now)
            return now.replaced(lease=self._lease())

        self.gallery.change(take)
        return self

    def __exit__(self, kind, *_) -> None:
        def give_back(now: Manifest) -> Manifest | None:
            return now.replaced(lease=None) if self._is_ours(now) else None

        try:
            self.gallery.change(give_back)
        except Exception:  # of a store that is broken: what broke it is the error to hear of
            if kind is None:
                raise

    def renew(self) -> None:
        """Renew the lease when a third of it has passed; cheap otherwise.

        Raises:
          Stopped: see `check`.
        """
        if time.time() < self._due:
            return

        def extend(now: Manifest) -> Manifest:
            self._check(now)
            return now.replaced(lease=self._lease())

        self.gallery.change(extend)

    def check(self) -> None:
        """Check that the lease is still held and that queries are embedded by the same version.

        Raises:
          Stopped: it was taken over, or a switch came.
        """
        self._check(self.gallery.manifest())

    def _check(self, now: Manifest) -> None:
        if not self._is_ours(now):
            raise Stopped("the lease of this backfill ran out and was taken over by another one")
        self._check_query(now)

    def _check_query(self, now: Manifest) -> None:
        if self.query not in (None, now.query):
            raise Stopped(
                f"version {now.query} embeds queries since a switch: the rows that were embedded stay; "
                "start the backfill again to go on to that version"
            )

    def _is_ours(self, now: Manifest) -> bool:
        return now.lease is not None and now.lease.owner == self.owner

    def _lease(self) -> Lease:
        now = time.time()
        self._due = now + self.seconds / 3
        return Lease(self.owner, now + self.seconds)


def owner(process: int, token: str) -> str:
    """Return the owner of a lease that a process of this host and container holds.

    Args:
      process: its number.
      token: that tells its leases apart.
    """
    return f"{socket.gethostname()}/{process}/{_numbering()}/{token}"


def _numbering() -> str:
    """Return a text that is the same where numbers of processes mean the same: one boot, one container.

    Containers may share a name of host; what a system does not say counts as equal.
    """
    found = []
    with contextlib.suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
    with contextlib.suppress(OSError):
        found.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return hashlib.blake2b(" ".join(found).encode(), digest_size=6).hexdigest()


def _has_ended(holder: str) -> bool:
    """Return whether the process of a lease is known to have ended: only on its own host."""
    host, _, rest = holder.partition("/")
    number, _, rest = rest.partition("/")
    here = (host, rest.partition("/")[0]) == (socket.gethostname(), _numbering())
    if not here or not number.isdecimal() or not 0 < int(number[:10]) < 2**31:
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:  # of another user
        return False
    return False
