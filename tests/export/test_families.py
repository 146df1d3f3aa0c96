"""Every family is either verified against Transformers, dense and pruned, or refused by name. Never wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed; it comes with the 'export' extra")
pytest.importorskip("mobius", reason="mobius-onnx is not installed; it comes with the 'export' extra")

from fstq_export import source
from fstq_export.masks import check_masks, visible_keys
from fstq_export.reference import reference

from fstq_infer.errors import ExportError, UnsupportedModelError
from fstq_infer.runtime.engine import Stage

from . import families

ONE, TWO = (Stage(2, 2, 8),), (Stage(1, 1, 6), Stage(3, 2, 8))
CLOSE = 1e-4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that were made so far, by family."""
    return {}


def check(name: str, folder: Path, stages: tuple[Stage, ...], model: Path) -> None:
    probes = families.exported(model, folder / "out", stages)
    result = families.verified(model, folder / "out", stages, probes)
    assert result.prompts == 4
    assert len(result.by_layer) == families.LAYERS
    assert max(result.by_layer) < CLOSE and result.dense < CLOSE
    assert result.pruned is not None and result.pruned < CLOSE
    assert result.kept_equal is True


@pytest.mark.parametrize("stages", [ONE, TWO], ids=["one-stage", "two-stages"])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_family(
    name: str,
    stages: tuple[Stage, ...],
    models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
) -> None:
    if name not in models:
        models[name] = families.make(name, tmp_path_factory.mktemp(name))
    check(name, tmp_path, stages, models[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", families.MORE)
def test_further_family(name: str, tmp_path: Path) -> None:
    check(name, tmp_path, TWO, families.make(name, tmp_path / "model"))


@pytest.mark.parametrize("name", families.BY_CONFIG)
def test_refused_by_its_configuration(name: str, tmp_path: Path) -> None:
    families.config_of(name).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(UnsupportedModelError, match=families.BY_CONFIG[name][2]):
        source.resolve(str(tmp_path))


QUICK = ("gemma3_27b", "glm", "mixtral")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in families.BY_GRAPH]
)
def test_refused_when_built_or_verified(name: str, tmp_path: Path) -> None:
    model = families.make(name, tmp_path / "model")
    with pytest.raises((UnsupportedModelError, ExportError), match=families.BY_GRAPH[name][2]):
        check(name, tmp_path, ONE, model)


@pytest.mark.parametrize("stream", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt2"])
def test_masks_of_long_contexts(name: str, stream: bool, tmp_path: Path) -> None:
    resolved = source.resolve(str(families.make(name, tmp_path)))
    with reference(resolved, stream) as decoder:
        seen = visible_keys(decoder, 200)
        assert [int(seen[i].sum()) for i in range(4)] == [window or 200 for window in resolved.windows]
        assert all(row[-1] for row in seen.values())
        assert all("forward" not in layer.__dict__ for layer in decoder.layers) or stream
        check_masks(decoder, name)


def test_other_windows_than_the_masks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = source.resolve(str(families.make("mistral", tmp_path)))
    monkeypatch.setattr("fstq_export.masks.layer_windows", lambda config: (None, None, None, None))
    with reference(resolved) as decoder, pytest.raises(ExportError, match=r"decoder layer 0 .* attend to 32 tokens"):
        check_masks(decoder, "Mistral")


def test_a_context_beyond_the_first_longrope_is_cut(tmp_path: Path) -> None:
    model = families.make("phi3_longrope", tmp_path / "model")
    resolved = source.resolve(str(model))
    assert resolved.config.max_position_embeddings == 100
    families.exported(model, tmp_path / "out", ())
    run = families.Runner(tmp_path / "out" / "model.onnx", tmp_path)
    tokens = np.array([families.ids(101)])
    run.fresh(input_ids=tokens[:, :100], position_ids=np.arange(100)[None])
    with pytest.raises(Exception, match="indices element out of data bounds"):
        run.fresh(input_ids=tokens, position_ids=np.arange(101)[None])
