"""One writer a folder: a lock that its holder's death releases, whatever killed it."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)


class LockedError(ValueError):
    """Another process holds the lock; the message says which one."""


@contextmanager
def locked(path: Path, what: str, wait_seconds: float = 0.0) -> Iterator[None]:
    """Holds the lock file `path` within the block (its folder is made, and taken away again if nothing else came into it).

    The kernel releases the lock when the process ends, SIGKILL included. It is flock: it holds between the processes of one
    machine on any disk, and between machines on NFS 4 and most cluster file systems, which may take their lease time (about
    a minute) to notice that a machine died. Where the storage does not offer it, there is a warning and no lock.

    Args:
        what: what the lock is for, in the error.
        wait_seconds: how long to wait for another holder.

    Raises LockedError naming host, process and time of the holder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, locked(Path(folder) / "lock", "the run"):
    ...     with locked(Path(folder) / "lock", "the run"):  # doctest: +ELLIPSIS
    ...         pass
    Traceback (most recent call last):
    ...
    mtrec.locking.LockedError: the run is being written by process ... of host ... since ...
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _acquire(path, what, wait_seconds)
    try:
        yield
    finally:
        if path.parent.is_dir() and [each.name for each in path.parent.iterdir()] == [path.name]:
            path.unlink()  # while it is held: one who waits for it looks whether its file is still there
            with contextlib.suppress(OSError):  # somebody put something into it
                path.parent.rmdir()
        file.close()


def _acquire(path: Path, what: str, wait_seconds: float) -> IO[str]:
    until = time.monotonic() + wait_seconds
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = _holder(path)
            file.close()
            if time.monotonic() >= until:
                raise LockedError(
                    f"{what} is being written by {held}. Wait until it has ended, or stop it (lock: {path})."
                ) from None
            time.sleep(0.2)
            continue
        except OSError as error:
            log.warning("%s: this storage offers no locks (%s); see to it that only one command writes here.", path, error)
            return file
        if _is_same(file, path):
            break
        file.close()  # the one before took its file away
    file.seek(0)
    file.truncate()
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    file.write(json.dumps(holder))
    file.flush()
    return file


def _is_same(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "another process"  # it has the lock and has not written its name yet
    return f"process {found['pid']} of host {found['host']} since {found['since']}"
