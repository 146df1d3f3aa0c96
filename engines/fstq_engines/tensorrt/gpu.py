"""This machine's GPU by cuda-python: name, architecture, CUDA version. No GPU, or no cuda-python, is None."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from fstq_engines.cache import Cpu
from fstq_infer.errors import FstqError


@dataclass(frozen=True, slots=True)
class Gpu:
    """sm: architecture, such as 87. cuda: version of the runtime, such as "12.6". elsewhere: not this machine's."""

    name: str
    sm: int
    cuda: str
    elsewhere: bool = False

    @property
    def identity(self) -> Cpu:
        """What an engine depends on: TensorRT's plans fit one architecture and one CUDA version."""
        text = f"{self.name}, SM {self.sm}, CUDA {self.cuda}"
        return Cpu(text, hashlib.sha256(text.encode()).hexdigest(), "GPU")


def this_gpu() -> Gpu | None:
    """The first GPU, None where there is none that cuda-python can use."""
    from fstq_infer.runtime.cuda import Cuda

    try:
        cuda = Cuda.load()
        return Gpu(cuda.device_name(), cuda.architecture(), cuda.version())
    except FstqError:
        return None
