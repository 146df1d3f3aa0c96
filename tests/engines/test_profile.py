"""fstq_engines.profile: real kernels of tiny shapes, the shapes of a bundle, and files that cannot be written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the ONNX Runtime backend needs the 'ort' extra")
ir = pytest.importorskip("onnx_ir", reason="measuring kernels needs the 'ort' extra")

from fstq_engines import profile  # noqa: E402
from fstq_engines.quantized import QuantizedLayers  # noqa: E402

from fstq_infer.bundle import Bundle  # noqa: E402
from fstq_infer.cli import main  # noqa: E402
from fstq_infer.errors import OptionError  # noqa: E402
from fstq_infer.quant.formats import CPU_FORMATS, FORMATS  # noqa: E402
from fstq_infer.quant.latency import Profile, costs_on  # noqa: E402


def test_every_format_is_measured() -> None:
    found = profile.measure([(48, 32), (24, 80)], [1, 9], threads=1, seconds=0.0)
    assert set(found.kernels) == {(o, i, f, t) for o, i in ((48, 32), (24, 80)) for f in CPU_FORMATS for t in (1, 9)}
    assert all(0 < seconds < 60 for seconds in found.kernels.values())
    assert "1 threads, onnxruntime" in found.device


@pytest.mark.parametrize("form", CPU_FORMATS)
def test_kernels_are_those_of_an_engine(form: str) -> None:
    model = profile.layer(FORMATS[form], 24, 80)
    lowering = QuantizedLayers()
    lowering(model)
    assert lowering.rounding == (FORMATS[form].inputs is not None)
    session = profile._session(FORMATS[form], 24, 80, 1)
    assert session.run(None, {"x": np.ones((1, 3, 80), np.float32)})[0].shape == (1, 3, 24)


def test_the_shapes_of_a_bundle(tiny_bundle: Bundle) -> None:
    found = profile.shapes(tiny_bundle)
    assert {(96, 32), (64, 32), (32, 64), (32, 32), (16, 32)} <= set(found)  # head, gate and up, down, q and o, k and v
    assert found == sorted(set(found))


def test_a_profile_is_written_whole(tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "shapes", lambda _: [(48, 32)])
    monkeypatch.setattr(profile, "SECONDS", 0.0)
    made = profile.write(tiny_bundle, tmp_path / "p.toml", 9, threads=1)
    read = costs_on(str(tmp_path / "p.toml"))
    assert (
        isinstance(read, Profile)
        and set(read.kernels) == set(made.kernels)
        and [path.name for path in tmp_path.iterdir()] == ["p.toml"]
    )


@pytest.mark.parametrize("place", ["", "none/p.toml"])
def test_places_that_cannot_be_written(tiny_bundle: Bundle, tmp_path: Path, place: str) -> None:
    with pytest.raises(OptionError, match="cannot be written"):
        profile.write(tiny_bundle, tmp_path / place, 9)


def test_no_tokens(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="profile-tokens is 0"):
        profile.write(tiny_bundle, tmp_path / "p.toml", 0)


@pytest.mark.parametrize("options", [["--profile", "none/p.toml"], ["--profile", "p.toml", "--profile-tokens", "0"]])
def test_a_wrong_option_ends_a_build_before_it_begins(
    tiny_bundle: Bundle, tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FSTQ_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as ended:
        main(["build", str(tiny_bundle.path), *options])
    assert ended.value.code == 1 and not any(tmp_path.iterdir())
