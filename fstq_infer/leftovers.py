"""Is a writer still at work in a partial file or directory? Told by its process id, its lock and its age."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # no flock outside POSIX; process ids alone decide there
    fcntl = None  # type: ignore[assignment]

OLD_SECONDS = 24 * 3600.0  # nothing is written to for so long; the process id that it names is another's by then


@contextlib.contextmanager
def leftover(path: Path, pid: int, by_age: bool = False) -> Iterator[bool]:
    """Whether no writer is at work in ``path``: its process is gone, and nobody holds its lock.

    by_age: one that is old will do too, where a process has the id that it names. A process of another PID namespace
    is told by its lock only. The lock is held meanwhile, so that no writer begins.
    """
    own = pid == os.getpid()  # in a container every run has the same process id, so an own one may be a leftover too
    try:
        gone = not _is_alive(pid)
        old = by_age and time.time() - os.lstat(path).st_mtime > OLD_SECONDS
        lock = try_lock(path) if own or gone or old else None
    except OSError:
        yield False
        return
    try:
        yield gone if lock is None else True
    finally:
        if lock is not None:
            os.close(lock)


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # os.kill(pid, 0) would send Ctrl-C there
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def try_lock(path: Path) -> int | None:
    """A descriptor that locks ``path`` until it is closed; None where locks do not work (Windows, some network mounts).

    Raises BlockingIOError when another writer holds the lock.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def lock_file(descriptor: int) -> None:
    """Wait for the lock of an open file; nothing where locks do not work."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
