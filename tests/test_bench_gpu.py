"""bench/gpu.py: what it does without a GPU, and its rows where engines work."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("onnxruntime", reason="needs the 'ort' extra")
pytest.importorskip("onnx_ir", reason="needs the 'ort' extra")

from fstq_infer.bundle import Bundle
from fstq_infer.errors import EngineError
from fstq_infer.runtime.cuda import Cuda
from fstq_infer.runtime.ort import OrtEngine
from tests.runtime.fake_tensorrt import Device

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("gpu", "common"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import gpu

    return gpu


def test_without_a_gpu_it_says_so(bench: Any, monkeypatch: Any, capsys: Any, tiny_bundle: Bundle) -> None:
    monkeypatch.setattr(bench.gpu, "this_gpu", lambda: None)
    with pytest.raises(SystemExit) as ended:
        bench.main([str(tiny_bundle.path)])
    assert ended.value.code == 0 and "no CUDA GPU" in capsys.readouterr().out


def test_bandwidth_copies_and_gives_back(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "COPY", 4096)
    device = Device()
    assert bench.bandwidth(Cuda(device)) > 0 and not device.memory


def test_rows_hold_parity_and_roofline_or_the_reason(bench: Any, monkeypatch: Any, tiny_bundle: Bundle) -> None:
    def opened(bundle: Bundle, backend: str) -> OrtEngine:
        if backend == "tensorrt":
            raise EngineError("not here")
        return OrtEngine(bundle.path, bundle, threads=1)

    monkeypatch.setattr(bench, "open_backend", opened)
    options = SimpleNamespace(prompt=60, new=4, keep=[1.0, 0.5], repeats=1)
    assert bench.measured(tiny_bundle, "tensorrt", options, 1e9) == [{"backend": "tensorrt", "error": "not here"}]
    dense, pruned = bench.measured(tiny_bundle, "onnxruntime-gpu", options, 1e9)
    assert dense["parity"]["difference"] == 0 and dense["kept"] == 60 > pruned["kept"]
    assert dense["roofline_tokens_per_s"] == 1e9 / (bench.weights(tiny_bundle) + dense["kv_bytes"])
