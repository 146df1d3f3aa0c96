"""Checks of the machine: memory and its fragments, swap, power mode, clocks, heat, access to the GPU."""

from __future__ import annotations

import re

from fstq_infer.doctor.facts import Facts
from fstq_infer.doctor.findings import Finding

GIB = 2**30
LITTLE = 2 * GIB  # available memory below which building an engine is likely to fail
SMALL = 17 * GIB  # a Jetson with less than this wants swap for builds
FRAGMENTED = 0.25  # share of free memory that is left in blocks of 4 MiB
HOT = 85.0  # degrees Celsius; Orin throttles near 99
DROP = "sync; echo 3 | sudo tee /proc/sys/vm/drop_caches; echo 1 | sudo tee /proc/sys/vm/compact_memory"


def memory(facts: Facts) -> list[Finding]:
    """Free memory, which CPU and GPU share on a Jetson."""
    if facts.memory is None:
        return [Finding("memory", "info", "/proc/meminfo cannot be read: free memory is not known")]
    found = f"{facts.memory.available / GIB:.1f} of {facts.memory.total / GIB:.1f} GiB available"
    if facts.memory.available < LITTLE:
        desktop = "close programs; sudo systemctl isolate multi-user.target frees what the desktop holds"
        return [Finding("memory", "warning", found, desktop if facts.jetson else "close programs")]
    return [Finding("memory", "ok", found)]


def fragments(facts: Facts) -> list[Finding]:
    """NvMap asks the kernel for large blocks: with many small holes it fails although memory is free."""
    state = facts.memory
    if facts.jetson is None or state is None or state.large_free is None or state.free == 0:
        return []
    share = state.large_free / state.free
    found = f"{state.large_free / GIB:.1f} of {state.free / GIB:.1f} GiB of free memory are in blocks of 4 MiB"
    if share < FRAGMENTED:
        todo = f"before building or loading: {DROP}; reboot when NvMapMemAlloc errors (12) stay"
        return [Finding("nvmap", "warning", f"{found}: NvMap allocations may fail (error 12)", todo)]
    return [Finding("nvmap", "ok", found)]


def swap(facts: Facts) -> list[Finding]:
    """Swap helps a build over its peak; zram takes that memory from what the GPU needs."""
    if facts.jetson is None or facts.memory is None:
        return []
    made = []
    zram = [one for one in facts.swaps if one.in_memory]
    disk = sum(one.size for one in facts.swaps if not one.in_memory)
    if zram:
        size = sum(one.size for one in zram) / GIB
        found = f"{len(zram)} zram areas, {size:.1f} GiB: swap inside the memory that the GPU shares"
        todo = "sudo systemctl disable nvzramconfig, then a swap file on NVMe (docs/jetson.md)"
        made.append(Finding("swap-zram", "warning", found, todo))
    if facts.memory.total < SMALL and disk < 4 * GIB:
        found = f"{disk / GIB:.1f} GiB of swap on disk; building an engine of a 0.5B model peaks at about 4 GiB"
        todo = "a swap file on NVMe: sudo fallocate -l 8G /swapfile, chmod 600, mkswap, swapon (docs/jetson.md)"
        made.append(Finding("swap", "warning", found, todo))
    return made or [Finding("swap", "ok", f"{disk / GIB:.1f} GiB of swap on disk")]


def power(facts: Facts) -> list[Finding]:
    """Whether nvpmodel allows what the module can do."""
    if facts.jetson is None:
        return []
    if facts.power is None or facts.power.mode is None:
        return [
            Finding("power-mode", "info", "the power mode is not known: nvpmodel cannot be asked", "sudo nvpmodel -q")
        ]
    best = max(facts.power.modes.items(), key=lambda item: _strength(item[1]), default=None)
    mode = facts.power.mode
    if best is None or _strength(mode) >= _strength(best[1]):
        return [Finding("power-mode", "ok", f"power mode {mode}")]
    todo = f"sudo nvpmodel -m {best[0]} where cooling and supply allow it; name the mode beside every figure"
    return [Finding("power-mode", "warning", f"power mode {mode}; the fastest is {best[1]}", todo)]


def clocks(facts: Facts) -> list[Finding]:
    """Whether the GPU's clock is locked; measurements scatter where it is not."""
    if facts.jetson is None:
        return []
    if facts.clock is None:
        return [Finding("clocks", "info", "the GPU's clock cannot be read", "sudo jetson_clocks --show")]
    low, high, now = (value / 1e6 for value in (facts.clock.lowest, facts.clock.highest, facts.clock.now))
    found = f"GPU clock {low:.0f} to {high:.0f} MHz, now {now:.0f}"
    if facts.clock.lowest < facts.clock.highest:
        return [
            Finding(
                "clocks", "warning", f"{found}: not locked, so short runs are slow and scatter", "sudo jetson_clocks"
            )
        ]
    return [Finding("clocks", "ok", f"{found}: locked")]


def heat(facts: Facts) -> list[Finding]:
    """Zones that are near their limit."""
    hottest = max(facts.temperatures.items(), key=lambda item: item[1], default=None)
    if hottest is None:
        return []
    found = f"hottest zone {hottest[0]}: {hottest[1]:.0f} degrees Celsius"
    if hottest[1] >= HOT:
        return [
            Finding("heat", "warning", f"{found}: clocks may be throttled", "check fan and heat sink before measuring")
        ]
    return [Finding("heat", "ok", found)]


def access(facts: Facts) -> list[Finding]:
    """Whether this user and container reach the GPU."""
    if facts.jetson is None:
        return []
    if not facts.gpu_nodes:
        todo = "docker run --runtime nvidia ..." if facts.container else "reboot; flash again when it stays so"
        return [Finding("gpu-access", "error", "there are no GPU device files in /dev", todo)]
    missing = [name for name in ("video", "render") if facts.groups is not None and name not in facts.groups]
    if missing and facts.groups is not None and "root" not in facts.groups:
        todo = f"sudo usermod -aG {','.join(missing)} $USER, then log in again"
        return [Finding("gpu-access", "warning", f"this user is not in the groups {', '.join(missing)}", todo)]
    return [Finding("gpu-access", "ok", "the GPU's device files are there")]


def measuring(facts: Facts) -> list[Finding]:
    """How power can be read, and whether a desktop disturbs."""
    if facts.jetson is None:
        return []
    made = []
    if not facts.power_sources:
        todo = "run outside a container, or mount /run/jtop.sock and /sys/class/hwmon"
        made.append(
            Finding("power-source", "info", "no tegrastats, INA sensor or jtop: benchmarks will lack power", todo)
        )
    else:
        made.append(Finding("power-source", "ok", f"power can be read from {', '.join(facts.power_sources)}"))
    if facts.desktop and facts.memory is not None and facts.memory.total < SMALL:
        todo = "sudo systemctl set-default multi-user.target, then reboot"
        made.append(
            Finding("desktop", "info", "a desktop is started at boot: it holds 0.5 to 1 GiB and uses the GPU", todo)
        )
    return made


def _strength(mode: str) -> float:
    """Order of nvpmodel's names: MAXN_SUPER, MAXN, then by watts."""
    if mode.startswith("MAXN"):
        return 1e6 + ("SUPER" in mode)
    watts = re.search(r"(\d+)W", mode)
    return float(watts[1]) if watts else 0.0
