"""A CUDA and a TensorRT that compute on the CPU, through ONNX Runtime, and mind what the real ones would mind.

Device memory is host memory whose bounds are checked at each copy; a CUDA graph is a list of recorded operations; an
execution context refuses shapes outside its profile, missing addresses and buffers that are too small.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

TYPES = {
    "tensor(float)": ("FLOAT", np.float32),
    "tensor(float16)": ("HALF", np.float16),
    "tensor(int64)": ("INT64", np.int64),
}


class Device:
    """Allocations and what was called, in order; names of calls are those of cuda-python's runtime module."""

    def __init__(self, architecture: int = 86, fails: dict[str, int] | None = None) -> None:
        self.memory: dict[int, Any] = {}
        self.calls: list[str] = []
        self.recording: list[Callable[[], None]] | None = None
        self.uploads: list[int] = []  # where to, while recording
        self.graphs: list[Any] = []
        self.streams = 0
        self.architecture, self.fails = architecture, fails or {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda"):
            raise AttributeError(name)
        if name in ("cudaMemcpyKind", "cudaDeviceAttr", "cudaStreamCaptureMode"):
            return int
        handler = getattr(self, f"_{name[4:].removesuffix('Async')}")

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            if name in self.fails:
                return (self.fails[name],)
            result = handler(*arguments)
            return (0,) if result is None else (0, result)

        return call

    def inside(self, address: int, size: int) -> None:
        """Raises IndexError where no allocation holds all of it."""
        if size and not any(at <= address and address + size <= at + len(b) for at, b in self.memory.items()):
            raise IndexError(f"{size} bytes at {address:#x} lie in no allocation")

    def do(self, action: Callable[[], None]) -> None:
        """Now, or when the graph that is being recorded is launched."""
        if self.recording is None:
            action()
        else:
            self.recording.append(action)

    def _GetDeviceCount(self) -> int:
        return 1

    def _DeviceGetAttribute(self, which: int, _device: int) -> int:
        return divmod(self.architecture, 10)[which - 75]

    def _StreamCreate(self) -> int:
        self.streams += 1
        return 7

    def _StreamDestroy(self, _stream: int) -> None:
        self.streams -= 1

    def _StreamSynchronize(self, _stream: int) -> None:
        assert self.recording is None, "synchronised while capturing"

    def _Malloc(self, size: int) -> int:
        assert self.recording is None, "allocated while capturing"
        block = (ctypes.c_ubyte * size)(*([0xFF] * min(size, 64)))
        address = ctypes.addressof(block)
        self.memory[address] = block
        return address

    _MallocHost = _Malloc

    def _Free(self, address: int) -> None:
        del self.memory[address]

    _FreeHost = _Free

    def _Memset(self, address: int, value: int, size: int, *_stream: Any) -> None:
        self.inside(address, size)
        self.do(lambda: ctypes.memset(address, value, size) and None)

    def _Memcpy(self, to: int, source: int, size: int, _kind: int, _stream: int) -> None:
        self.inside(to, size)
        self.inside(source, size)
        if self.recording is not None and _kind == 1:
            self.uploads.append(to)
        self.do(lambda: ctypes.memmove(to, source, size) and None)

    def _Memcpy2D(
        self, to: int, to_pitch: int, source: int, pitch: int, width: int, rows: int, _kind: int, _stream: int
    ) -> None:
        assert width <= to_pitch and width <= pitch
        for row in range(rows):
            self._Memcpy(to + row * to_pitch, source + row * pitch, width, _kind, _stream)

    def _StreamBeginCapture(self, _stream: int, _mode: int) -> None:
        self.recording, self.uploads = [], []

    def _StreamEndCapture(self, _stream: int) -> list[Callable[[], None]]:
        made, self.recording = self.recording or [], None
        return made

    def _GraphInstantiate(self, graph: list[Callable[[], None]], _flags: int) -> list[Callable[[], None]]:
        self.graphs.append(list(graph))
        return self.graphs[-1]

    def _GraphDestroy(self, _graph: Any) -> None:
        pass

    def _GraphExecDestroy(self, graph: Any) -> None:
        self.graphs[:] = [other for other in self.graphs if other is not graph]

    def _GraphLaunch(self, graph: list[Callable[[], None]], _stream: int) -> None:
        for action in graph:
            action()


class Plan:
    """A deserialized engine: a session over a lowered graph, with the profiles it was built with."""

    def __init__(self, session: Any, profiles: list[dict[str, tuple[int, int, int]]], device: Device) -> None:
        self.session, self.profiles, self.device = session, profiles, device
        self.inputs = {port.name: port for port in session.get_inputs()}
        self.ports = self.inputs | {port.name: port for port in session.get_outputs()}
        self.num_io_tensors = len(self.ports)
        self.contexts: list[Context] = []

    def get_tensor_name(self, index: int) -> str:
        return list(self.ports)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self.inputs else "output"

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=TYPES[self.ports[name].type][0])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else -1 for d in self.ports[name].shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        dims = self.ports[name].shape
        return [tuple(d if isinstance(d, int) else self.profiles[profile][d][i] for d in dims) for i in range(3)]

    def create_execution_context(self, strategy: str = "static") -> Context:
        assert strategy == "on profile change"
        self.contexts.append(Context(self))
        return self.contexts[-1]


class Context:
    """What is set, and the shapes of each run."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.profile = plan, -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.runs: list[dict[str, tuple[int, ...]]] = []

    def set_optimization_profile_async(self, profile: int, _stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.plan.device.recording is None, "shapes are set before capturing"
        low, _, high = self.plan.get_tensor_profile_shape(name, self.profile)
        assert len(shape) == len(low), (name, shape, low)
        assert all(a <= d <= b for a, d, b in zip(low, shape, high, strict=True)), (name, shape, low, high)
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self.plan.ports, f"there is no tensor {name}"
        self.addresses[name] = address
        return True

    def execute_async_v3(self, _stream: int) -> bool:
        plan = self.plan
        assert set(self.addresses) == set(plan.ports), set(plan.ports) ^ set(self.addresses)
        assert set(self.shapes) == set(plan.inputs), set(plan.inputs) ^ set(self.shapes)
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        if plan.device.recording is not None:
            assert self.runs and self.runs[-1] == shapes, "captured before a first run in these shapes"
            assert set(plan.device.uploads) <= set(addresses.values()), "captured with addresses of other buffers"

        def compute() -> None:
            feeds = {name: self._array(name, addresses[name], shapes[name]).copy() for name in plan.inputs}
            names = [name for name in plan.ports if name not in plan.inputs]
            for name, made in zip(names, plan.session.run(names, feeds), strict=True):
                if made.size:
                    self._array(name, addresses[name], made.shape)[...] = made
                else:
                    assert addresses[name]

        self.runs.append(shapes)
        plan.device.do(compute)
        return True

    def _array(self, name: str, address: int, shape: tuple[int, ...]) -> Any:
        kind = np.dtype(TYPES[self.plan.ports[name].type][1])
        size = int(np.prod(shape)) * kind.itemsize
        self.plan.device.inside(address, size)
        if not size:
            return np.zeros(shape, kind)
        return np.frombuffer((ctypes.c_ubyte * size).from_address(address), kind).reshape(shape)


def module(device: Device, make: Callable[[str], tuple[Any, list[dict[str, tuple[int, int, int]]]]]) -> Any:
    """A TensorRT module; make: from the text of a plan file to a session and profiles."""
    found = SimpleNamespace(
        __version__="10.3.0",
        TensorIOMode=SimpleNamespace(INPUT="input", OUTPUT="output"),
        ExecutionContextAllocationStrategy=SimpleNamespace(ON_PROFILE_CHANGE="on profile change"),
        plans=[],
    )

    class Logger:
        ERROR = 1

        def __init__(self, _level: int) -> None:
            pass

    class Runtime:
        def __init__(self, _logger: Logger) -> None:
            pass

        def deserialize_cuda_engine(self, data: bytes) -> Plan | None:
            if not data:
                return None
            found.plans.append(Plan(*make(data.decode()), device))
            return found.plans[-1]

    found.Logger, found.Runtime = Logger, Runtime
    return found


def write(folder: Path, plan: str, **details: Any) -> None:
    """An engine directory for the fake."""
    import json

    described = {"tensorrt": "10.3.0", "built_for_sm": 86} | details
    sidecar = {"backend": "tensorrt", "arguments": "--backend tensorrt --context 160", "details": described}
    (folder / "engine.json").write_text(json.dumps(sidecar), encoding="utf-8")
    (folder / "model.plan").write_text(plan, encoding="utf-8")
