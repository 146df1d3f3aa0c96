"""What is known of a machine, read from its environment: device, software, memory, power, clocks. No judgement."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fstq_infer import device
from fstq_infer.doctor.environment import PYTHON, Environment

KIB = 1024
BLOCK = 4096  # bytes of a page
LARGE_ORDER = 10  # blocks of 2^10 pages, 4 MiB: the largest that the kernel's allocator keeps
# A model of one Add, 63 bytes: whether a provider that is listed is also used is only known by a session.
ADD = (
    "08073a350a0e0a01780a017812017922034164641201675a0f0a0178120a0a08080112040a020801620f0a0179120a0a08080112040a0208014204"
    "0a00100d"
)
ORT_PROBE = f"""# onnxruntime
import json, onnxruntime as ort
found = {{"version": ort.__version__, "available": ort.get_available_providers(), "sessions": {{}}}}
ort.set_default_logger_severity(4)
for name in found["available"]:
    if name in ("CUDAExecutionProvider", "TensorrtExecutionProvider"):
        try:
            made = ort.InferenceSession(bytes.fromhex("{ADD}"), providers=[name])
            found["sessions"][name] = made.get_providers()
        except Exception as error:
            found["sessions"][name] = [str(error)[:200]]
print(json.dumps(found))"""
TRT_PROBE = """# tensorrt
import json, tensorrt
print(json.dumps({"version": tensorrt.__version__}))"""
SMI = (
    "nvidia-smi",
    "--query-gpu=name,driver_version,memory.total,memory.free,compute_cap",
    "--format=csv,noheader,nounits",
)
DPKG = ("dpkg-query", "-W", "-f", "${Package} ${Version}\\n")
DEBIAN = ("nvidia-jetpack", "nvidia-l4t-core", "libnvinfer[0-9]*", "python3-libnvinfer")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. large_free: free bytes in blocks of 4 MiB or more, None where the kernel does not say."""

    total: int
    available: int
    free: int
    large_free: int | None


@dataclass(frozen=True, slots=True)
class Swap:
    """A swap area: device or file, bytes, bytes used."""

    name: str
    size: int
    used: int

    @property
    def in_memory(self) -> bool:
        """Whether it is zram, compressed pages in the same memory."""
        return "zram" in self.name


@dataclass(frozen=True, slots=True)
class Power:
    """nvpmodel: the mode that is on, and all by number."""

    mode: str | None
    modes: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Clock:
    """GPU clock in Hz: bounds of the governor, and now."""

    lowest: int
    highest: int
    now: int


@dataclass(frozen=True, slots=True)
class Facts:
    """A machine. jetson: the device tree's model; l4t: such as (36, '4.3'); None where it is no Jetson or not known."""

    system: str
    python: str
    jetson: str | None
    profile: device.Profile | None
    l4t: tuple[int, str] | None
    debian: Mapping[str, str]
    cuda: str | None
    tensorrt: str | None
    onnxruntime: Mapping[str, Any] | None
    packages: Mapping[str, str]
    gpus: tuple[tuple[str, ...], ...]
    memory: Memory | None
    swaps: tuple[Swap, ...]
    power: Power | None
    clock: Clock | None
    temperatures: Mapping[str, float]
    power_sources: tuple[str, ...]
    groups: tuple[str, ...] | None
    container: bool
    gpu_nodes: bool
    desktop: bool


def gather(env: Environment) -> Facts:
    """Ask for everything once; takes seconds, most of them for importing onnxruntime."""
    model = env.read("/proc/device-tree/model") or ""
    jetson = (
        model.strip()
        if "Jetson" in model or "nvidia,tegra" in (env.read("/proc/device-tree/compatible") or "")
        else None
    )
    memory = memory_of(env)
    ids = env.run("id", "-nG") if jetson else None
    return Facts(
        system=env.run("uname", "-srm") or "unknown",
        python=(env.run(PYTHON, "--version") or "").removeprefix("Python ") or "unknown",
        jetson=jetson,
        profile=device.matching(jetson, memory.total) if jetson and memory else None,
        l4t=l4t_of(env.read("/etc/nv_tegra_release") or ""),
        debian=_debian(env) if jetson else {},
        cuda=cuda_of(env),
        tensorrt=(_json(env.run(PYTHON, "-c", TRT_PROBE)) or {}).get("version"),
        onnxruntime=_json(env.run(PYTHON, "-c", ORT_PROBE)),
        packages=env.packages(),
        gpus=tuple(
            tuple(part.strip() for part in line.split(","))
            for line in (env.run(*SMI) or "").splitlines()
            if "," in line
        ),
        memory=memory,
        swaps=swaps_of(env.read("/proc/swaps") or ""),
        power=power_of(env) if jetson else None,
        clock=clock_of(env) if jetson else None,
        temperatures=temperatures_of(env),
        power_sources=sources_of(env) if jetson else (),
        groups=None if ids is None else tuple(ids.split()),
        container=bool(env.glob("/.dockerenv") or env.glob("/run/.containerenv")),
        gpu_nodes=bool(env.glob("/dev/nvhost*") or env.glob("/dev/nvgpu/*") or env.glob("/dev/nvidia*")),
        desktop=env.run("systemctl", "get-default") == "graphical.target",
    )


def l4t_of(text: str) -> tuple[int, str] | None:
    """(36, '4.3') of ``# R36 (release), REVISION: 4.3, ...``."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return (int(found[1]), found[2]) if found else None


def jetpack_of(l4t: tuple[int, str]) -> str:
    """The JetPack series of a Jetson Linux release; minor versions where they follow from it."""
    major, revision = l4t
    if major == 36:
        known = {"2": "6.0", "3": "6.0", "4": "6.1 or 6.2", "5": "6.2"}
        return known.get(revision.partition(".")[0], "6")
    if major == 38:
        return "7.1" if revision.startswith("4") else "7.0"
    return {34: "5", 35: "5", 32: "4", 39: "7.2"}.get(major, "unknown")


def memory_of(env: Environment) -> Memory | None:
    """From /proc/meminfo and /proc/buddyinfo."""
    sizes = {
        name: int(value) * KIB
        for name, value in re.findall(r"^(\w+):\s+(\d+) kB", env.read("/proc/meminfo") or "", re.M)
    }
    if "MemTotal" not in sizes:
        return None
    counts = [line.split()[4:] for line in (env.read("/proc/buddyinfo") or "").splitlines() if line.startswith("Node")]
    large = [int(n) * BLOCK << order for zone in counts for order, n in enumerate(zone) if order >= LARGE_ORDER]
    free = sizes.get("MemFree", 0)
    return Memory(sizes["MemTotal"], sizes.get("MemAvailable", free), free, sum(large) if counts else None)


def swaps_of(text: str) -> tuple[Swap, ...]:
    """Of /proc/swaps."""
    rows = [line.split() for line in text.splitlines()[1:]]
    return tuple(
        Swap(row[0], int(row[2]) * KIB, int(row[3]) * KIB) for row in rows if len(row) >= 4 and row[2].isdigit()
    )


def power_of(env: Environment) -> Power | None:
    """From ``nvpmodel -q``, or without it from the number that it saved; names from its configuration."""
    text = env.read("/etc/nvpmodel.conf") or ""
    modes = {int(number): name for number, name in re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+?)\s*>", text)}
    said = re.search(r"NV Power Mode: (\S+)", env.run("nvpmodel", "-q") or "")
    saved = re.search(r"pmode:(\d+)", env.read("/var/lib/nvpmodel/status") or "")
    mode = said[1] if said else modes.get(int(saved[1])) if saved else None
    return Power(mode, modes) if modes or mode else None


def clock_of(env: Environment) -> Clock | None:
    """Of the GPU's devfreq: 17000000.gpu or 17000000.ga10b on Orin, gpu-gpc-0 on Thor."""
    for pattern in (
        "/sys/class/devfreq/*.gpu/max_freq",
        "/sys/class/devfreq/*.ga10b/max_freq",
        "/sys/class/devfreq/gpu-gpc-*/max_freq",
    ):
        for path in env.glob(pattern):
            values = [env.read(path.replace("max_freq", name)) or "" for name in ("min_freq", "max_freq", "cur_freq")]
            if all(value.isdigit() for value in values):
                return Clock(*map(int, values))
    return None


def temperatures_of(env: Environment) -> dict[str, float]:
    """Thermal zones, degrees Celsius; a zone that is switched off cannot be read."""
    found = {}
    for path in env.glob("/sys/class/thermal/thermal_zone*/temp"):
        name, value = env.read(path.replace("/temp", "/type")), env.read(path) or ""
        if name and re.fullmatch(r"-?\d+", value):
            found[name] = int(value) / 1000
    return found


def sources_of(env: Environment) -> tuple[str, ...]:
    """Where power can be read: tegrastats, INA sensors, jtop's service."""
    names = [env.read(path) or "" for path in env.glob("/sys/class/hwmon/hwmon*/name")]
    there = {
        "tegrastats": bool(env.glob("/usr/bin/tegrastats")),
        "ina": any(name.startswith("ina") for name in names),
        "jtop": bool(env.glob("/run/jtop.sock")),
    }
    return tuple(name for name, found in there.items() if found)


def cuda_of(env: Environment) -> str | None:
    """Version of the toolkit in /usr/local/cuda."""
    found: Any = _json(env.read("/usr/local/cuda/version.json")) or {}
    version = found.get("cuda", {}).get("version") if isinstance(found.get("cuda"), dict) else None
    return str(version) if version else None


def _json(text: str | None) -> dict[str, Any] | None:
    """The object in the last line of a text."""
    for part in (text, (text or "").strip().rpartition("\n")[2]):
        try:
            found = json.loads(part or "")
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    return None


def _debian(env: Environment) -> dict[str, str]:
    """Versions of installed packages. Asked for one by one: dpkg-query fails as a whole when one is unknown."""
    lines = [line.split() for name in DEBIAN for line in (env.run(*DPKG, name) or "").splitlines()]
    return {row[0]: row[1] for row in lines if len(row) == 2}
