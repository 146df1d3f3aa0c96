"""Checks of software: JetPack, CUDA, TensorRT, ONNX Runtime, and wheels that do not go together."""

from __future__ import annotations

import re

from fstq_infer.doctor.facts import Facts, jetpack_of
from fstq_infer.doctor.findings import Finding
from fstq_infer.versions import LIBRARIES

OLDEST_L4T, NEWEST_L4T = 36, 39
OLDEST_TENSORRT = (10, 3)
CUDA_OF_JETPACK = {36: "12", 38: "13", 39: "13"}
GPU_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
INSTALL = "jetson/install.sh sets up a fitting environment (docs/jetson.md)"


def versions(facts: Facts) -> list[Finding]:
    """What is installed, for a bug report."""
    found = versions_of(facts)
    tool = f"fstq-infer {found.pop('fstq-infer', 'not installed as a package')}, Python {facts.python}"
    return [Finding("versions", "info", "; ".join([tool, *(f"{name} {version}" for name, version in found.items())]))]


def versions_of(facts: Facts) -> dict[str, str]:
    """Of this toolkit and of the libraries that it may use."""
    return {name: facts.packages[name] for name in ("fstq-infer", *LIBRARIES) if name in facts.packages}


def device(facts: Facts) -> list[Finding]:
    """What this machine is."""
    if facts.jetson is None:
        gpu = ", ".join(row[0] for row in facts.gpus)
        kind = f"a workstation with {gpu}" if gpu else "a machine without an NVIDIA GPU"
        return [Finding("device", "info", f"{facts.system}: {kind}, no Jetson; engines run on ONNX Runtime")]
    if facts.profile is None:
        todo = "fstq plan --device FILE.toml takes a profile of your own; jetson/profiles has examples"
        return [Finding("device", "warning", f"{facts.jetson}: no profile matches its name and memory", todo)]
    return [Finding("device", "ok", f"{facts.jetson} (profile {facts.profile.name}, SM {facts.profile.sm})")]


def jetpack(facts: Facts) -> list[Finding]:
    """Jetson Linux and what it is called."""
    if facts.jetson is None:
        return []
    if facts.l4t is None:
        todo = "mount the host's /etc/nv_tegra_release into the container, or flash with SDK Manager"
        return [Finding("jetpack", "warning", "/etc/nv_tegra_release cannot be read: the release is not known", todo)]
    major, revision = facts.l4t
    package = facts.debian.get("nvidia-jetpack")
    name = f"Jetson Linux {major}.{revision}, JetPack {package or jetpack_of(facts.l4t)}"
    if major < OLDEST_L4T:
        return [Finding("jetpack", "error", f"{name} is too old", "flash JetPack 6.2 or 7 with SDK Manager")]
    if major > NEWEST_L4T:
        return [Finding("jetpack", "info", f"{name} is newer than this version of fstq-infer knows")]
    core = facts.debian.get("nvidia-l4t-core", "")
    if core and not core.startswith(f"{major}.{revision}"):
        todo = "sudo apt update && sudo apt full-upgrade, then reboot; flash again when it stays so"
        return [Finding("jetpack", "warning", f"{name}, but nvidia-l4t-core is {core}: half of an upgrade", todo)]
    return [Finding("jetpack", "ok", name)]


def cuda(facts: Facts) -> list[Finding]:
    """The CUDA toolkit of a Jetson, whose major version its JetPack decides."""
    if facts.jetson is None:
        return []
    wanted = CUDA_OF_JETPACK.get(facts.l4t[0]) if facts.l4t else None
    if facts.cuda is None:
        todo = "sudo apt install nvidia-jetpack"
        return [Finding("cuda", "warning", "/usr/local/cuda holds no CUDA toolkit", todo)]
    if wanted and facts.cuda.partition(".")[0] != wanted:
        todo = f"point /usr/local/cuda at CUDA {wanted}: sudo update-alternatives --config cuda"
        return [
            Finding("cuda", "warning", f"CUDA {facts.cuda}, but this JetPack's libraries are of CUDA {wanted}", todo)
        ]
    return [Finding("cuda", "ok", f"CUDA {facts.cuda}")]


def tensorrt(facts: Facts) -> list[Finding]:
    """TensorRT's Python module beside the library that JetPack installed."""
    library = next((v for name, v in sorted(facts.debian.items()) if re.fullmatch(r"libnvinfer\d+", name)), None)
    if facts.tensorrt is None:
        if library:
            todo = f"make the virtual environment with --system-site-packages; {INSTALL}"
            return [Finding("tensorrt", "error", f"TensorRT {library} is installed, but Python cannot import it", todo)]
        if facts.jetson:
            return [Finding("tensorrt", "error", "TensorRT is not installed", "sudo apt install nvidia-jetpack")]
        return [Finding("tensorrt", "info", "no TensorRT; it is needed on a Jetson only")]
    if facts.jetson and "tensorrt" in facts.packages and library and _numbers(library) != _numbers(facts.tensorrt):
        todo = "pip uninstall tensorrt: its wheels are not for Jetson; --system-site-packages gives JetPack's"
        found = f"Python imports TensorRT {facts.tensorrt} from a wheel, JetPack's library is {library}"
        return [Finding("tensorrt", "error", found, todo)]
    if _numbers(facts.tensorrt)[:2] < OLDEST_TENSORRT:
        todo = "flash JetPack 6.2 or newer" if facts.jetson else "pip install --upgrade tensorrt"
        return [Finding("tensorrt", "error", f"TensorRT {facts.tensorrt} is older than 10.3", todo)]
    return [Finding("tensorrt", "ok", f"TensorRT {facts.tensorrt}")]


def onnxruntime(facts: Facts) -> list[Finding]:
    """Which ONNX Runtime there is, and whether its GPU providers do what they say."""
    wheels = sorted(
        name for name in facts.packages if re.fullmatch(r"onnxruntime(-(gpu|directml|openvino|rocm|trt.*))?", name)
    )
    if len(wheels) > 1:
        todo = f"pip uninstall {' '.join(wheels)}, then install one of them: they overwrite each other's files"
        return [Finding("onnxruntime", "error", f"{' and '.join(wheels)} are both installed", todo)]
    if facts.onnxruntime is None:
        if wheels:
            todo = "run python -c 'import onnxruntime' to see why; install a wheel for this CUDA, Python and JetPack"
            return [
                Finding("onnxruntime", "error", f"{wheels[0]} {facts.packages[wheels[0]]} cannot be imported", todo)
            ]
        todo = "pip install 'fstq-infer[ort]'" + (f"; {INSTALL}" if facts.jetson else "")
        return [Finding("onnxruntime", "error", "ONNX Runtime is not installed", todo)]
    version, available = facts.onnxruntime.get("version", "?"), facts.onnxruntime.get("available", [])
    sessions = facts.onnxruntime.get("sessions", {})
    made = []
    for name in (name for name in GPU_PROVIDERS if name in available and name not in sessions.get(name, [])):
        found = f"{name} is listed, but a session with it runs on {', '.join(sessions.get(name, [])) or 'nothing'}"
        if name == GPU_PROVIDERS[0]:
            todo = "install the wheel built for this CUDA and cuDNN (JetPack 6: CUDA 12; 7: 13), or use provider cpu"
            made.append(Finding("onnxruntime-fallback", "error", found, todo))
        else:
            made.append(Finding("onnxruntime-fallback", "info", f"{found}; fstq-infer does not use it"))
    if (facts.jetson or facts.gpus) and not set(GPU_PROVIDERS) & set(available):
        todo = "pip uninstall onnxruntime && pip install onnxruntime-gpu"
        if facts.jetson:
            todo = "install onnxruntime-gpu from an index with wheels for Jetson: jetson/install.sh --wheel-index URL"
        found = f"ONNX Runtime {version} is the wheel for the CPU: the GPU stays idle"
        return [Finding("onnxruntime", "warning", found, todo)]
    if not any(finding.severity == "error" for finding in made):
        made.append(Finding("onnxruntime", "ok", f"ONNX Runtime {version}: {', '.join(available)}"))
    return made


def wheels(facts: Facts) -> list[Finding]:
    """Python and libraries that are known not to go together."""
    made = []
    if _numbers(facts.python)[:2] < (3, 10) and facts.python != "unknown":
        made.append(Finding("python", "error", f"Python {facts.python} is older than 3.10", "use JetPack 6 or newer"))
    numpy = facts.packages.get("numpy", "0")
    runtime = next(
        (facts.packages[name] for name in ("onnxruntime-gpu", "onnxruntime") if name in facts.packages), None
    )
    if runtime and _numbers(numpy)[0] >= 2 and _numbers(runtime)[:2] < (1, 19):
        found = f"numpy {numpy} with ONNX Runtime {runtime}, which was built for NumPy 1"
        made.append(Finding("wheels", "error", found, "pip install 'numpy<2', or onnxruntime 1.19 or newer"))
    foreign = [
        name
        for name in ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12", "nvidia-cudnn-cu12")
        if name in facts.packages
    ]
    if facts.jetson and foreign:
        todo = "pip uninstall them; CUDA and cuDNN come with JetPack"
        made.append(
            Finding("wheels", "warning", f"wheels for other ARM servers are installed: {', '.join(foreign)}", todo)
        )
    if facts.jetson and "tensorrt-rtx" in facts.packages:
        found = "tensorrt-rtx is installed, which runs neither on Orin (SM 8.7) nor on Thor (SM 11.0)"
        made.append(Finding("wheels", "warning", found, "pip uninstall tensorrt-rtx; it lints on other machines"))
    return made or [Finding("wheels", "ok", f"Python {facts.python}; no wheels that are known to clash")]


def _numbers(version: str) -> tuple[int, ...]:
    """Up to three leading numbers."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3]) or (0,)
