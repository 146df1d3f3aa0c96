"""The few calls of CUDA that an engine needs, by cuda-python; every error is an EngineError that names the call."""

from __future__ import annotations

import importlib
from typing import Any

from fstq_infer.errors import EngineError

TO_DEVICE, TO_HOST, ON_DEVICE = 1, 2, 3  # cudaMemcpyKind
RELAXED = 2  # cudaStreamCaptureModeRelaxed
MAJOR, MINOR = 75, 76  # cudaDevAttrComputeCapabilityMajor, Minor
HOW = "Install it with: pip install 'fstq-infer[tensorrt]' (JetPack 6 has CUDA 12: add 'cuda-python<13')"


class Cuda:
    """cuda-python's runtime module, its return codes checked. Addresses are integers, handles its own."""

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime

    @classmethod
    def load(cls) -> Cuda:
        """Raises EngineError without cuda-python, without a driver or without a GPU."""
        for name in ("cuda.bindings.runtime", "cuda.cudart"):  # since 12.8, and before
            try:
                runtime = importlib.import_module(name)
            except ImportError:
                continue
            cuda = cls(runtime)
            if not cuda("cudaGetDeviceCount"):
                raise EngineError(
                    "CUDA finds no GPU; check the driver with nvidia-smi, on a Jetson with jetson_release"
                )
            return cuda
        raise EngineError(f"TensorRT engines run by cuda-python, which is not installed. {HOW}.")

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Call ``name``; returns its one result, or several as a tuple, or None."""
        code, *rest = getattr(self.runtime, name)(*arguments)
        if int(code):
            raise EngineError(f"{name} failed: {getattr(code, 'name', code)}{_memory(code)}")
        return rest[0] if len(rest) == 1 else tuple(rest) or None

    def kind(self, which: int) -> Any:
        """A cudaMemcpyKind."""
        return self.runtime.cudaMemcpyKind(which)

    def device_name(self) -> str:
        """Of the first GPU."""
        name = self("cudaGetDeviceProperties", 0).name
        return name.decode(errors="replace").rstrip("\0") if isinstance(name, bytes) else str(name)

    def architecture(self) -> int:
        """Compute capability of the first GPU as one number, such as 87."""
        attribute = self.runtime.cudaDeviceAttr
        major, minor = (self("cudaDeviceGetAttribute", attribute(which), 0) for which in (MAJOR, MINOR))
        return int(10 * major + minor)

    def version(self) -> str:
        """Of the CUDA runtime, such as "12.6"."""
        number = int(self("cudaRuntimeGetVersion"))
        return f"{number // 1000}.{number % 1000 // 10}"

    def allocate(self, size: int) -> int:
        """Address of ``size`` bytes of device memory, zeroed."""
        address = self("cudaMalloc", max(1, size))
        self("cudaMemset", address, 0, max(1, size))
        return int(address)


def _memory(code: Any) -> str:
    return " (too little memory: use a shorter context or fewer bits)" if int(code) == 2 else ""
