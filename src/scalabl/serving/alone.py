"""One call at a time in a directory: a lock of the operating system, and on a store an object that its owner renews.

A store has no lock. There a call puts an object with its machine and process into the directory, and then looks for
those of others: of two calls at least the later one sees the other's and goes. The owner writes its object anew while
it is at work; one that was not for EXPIRY seconds, by the store's own clock, or whose process on this machine is gone,
is left over from a kill. So a call that could not reach the store for that long may find that another has begun: both
then write the same answers. Imports no torch and no Ray.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import threading
import uuid
from collections.abc import Iterator

import psutil
from filelock import FileLock, Timeout

from scalabl.core.errors import UserError
from scalabl.core.locations import Location, StorePath

EXPIRY = 120.0  # seconds
_RENEWED = 20.0  # seconds


@contextlib.contextmanager
def alone(work: Location) -> Iterator[None]:
    """Keep a second call out of a directory, which is there.

    Raises:
        UserError: another call is at work in it.
    """
    output = work.parent
    busy = UserError(f"Another call writes into {output}; wait for its end, or choose another --output.")
    if isinstance(work, StorePath):
        with _claimed(work, busy):
            yield
        return
    try:
        with FileLock(work / "lock", timeout=0):
            yield
    except Timeout:
        raise busy from None


@contextlib.contextmanager
def _claimed(work: StorePath, busy: UserError) -> Iterator[None]:
    machine = re.sub(r"[^A-Za-z0-9-]", "-", platform.node())
    mine = work / f"lock.{machine}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    over = threading.Event()

    def renew() -> None:
        while not over.wait(_RENEWED):
            with contextlib.suppress(UserError):  # what cannot be reached now may be in a while
                mine.write_bytes(b"")

    mine.write_bytes(b"")
    renewing = threading.Thread(target=renew, name="scalabl-lock", daemon=True)
    try:
        now = mine.info().mtime_ns or 0
        for other in work.iterdir():
            if not other.name.startswith("lock.") or other == mine:
                continue
            _, node, process, _ = other.name.split(".")
            gone = node == machine and not psutil.pid_exists(int(process))
            written = other.info().mtime_ns or now  # a store that tells no times: until it is taken away by hand
            if not gone and now - written < EXPIRY * 1e9:
                raise busy
            other.unlink(missing_ok=True)
        renewing.start()
        yield
    finally:
        over.set()
        if renewing.ident is not None:
            renewing.join()
        with contextlib.suppress(UserError):
            mine.unlink(missing_ok=True)
