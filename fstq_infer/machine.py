"""What is known of the machine and of this process: processor, usable cores, memory. Imports no other library."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path
from typing import Any

from fstq_infer.errors import OptionError

MEMINFO = Path("/proc/meminfo")
MOST_THREADS = 64  # on any machine; more than there are cores only wait for each other


def physical_cores() -> int:
    """Physical cores that this process may run on; hyperthreads of one core count once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def check_threads(threads: Any) -> None:
    """Raises OptionError unless ``threads`` is None or a number that this machine can be asked for."""
    most = max(MOST_THREADS, 4 * (os.cpu_count() or 1))
    if threads is None or (isinstance(threads, int) and not isinstance(threads, bool) and 1 <= threads <= most):
        return
    expected = f"1 to {most}" if isinstance(threads, int) and threads > most else ">= 1"
    raise OptionError(f"threads={threads!r} is not accepted; expected a whole number {expected}")


def peak_rss() -> int:
    """Largest resident memory of this process so far, bytes; 0 where it is not known."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back_memory() -> None:
    """Return freed memory to the system: glibc keeps freed arrays of up to 32 MiB, gigabytes of them, for itself."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # not glibc
        return


def available_memory() -> int | None:
    """Bytes that can be had without swapping; None where that is not known."""
    try:
        lines = MEMINFO.read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def description() -> dict[str, Any]:
    """Processor, usable cores, operating system and Python, for results."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    system = f"{platform.system()} {platform.machine()}"
    return {"cpu": name, "cores": physical_cores(), "system": system, "python": platform.python_version()}
