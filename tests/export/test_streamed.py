"""fstq_export.streamed: a streamed model computes what a resident one does, forward, backward and with codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed; it comes with the 'export' extra")
pytest.importorskip("mobius", reason="mobius-onnx is not installed; it comes with the 'export' extra")

import torch
from fstq_export import pipeline, source
from fstq_export import reference as references
from fstq_export.meter import quantize_in_place, quantized, rounding_inputs
from fstq_export.precision import Planner
from fstq_export.reference import reference
from fstq_export.sensitivity import weights
from fstq_export.streamed import StreamedLinear
from fstq_export.wanted import Precision
from torch import nn

from fstq_infer.fisher.hooks import Decoder
from fstq_infer.fisher.items import Item
from fstq_infer.quant.codes import quantize
from fstq_infer.quant.formats import FORMATS

from . import families

FAMILIES = ["qwen2", "gpt2", "phi3", "gemma2"]


def both(folder: Path, compute: Callable[[Decoder], Any]) -> tuple[Any, Any]:
    """What is computed with the model resident, and streamed."""
    found = []
    for stream in (False, True):
        with reference(source.resolve(str(folder)), stream) as decoder:
            modules = [module for module in decoder.model.modules() if isinstance(module, StreamedLinear)]
            assert bool(modules) is stream and all(module.weight.is_meta for module in modules)
            found.append(compute(decoder))
    return found[0], found[1]


def logits(decoder: Decoder) -> torch.Tensor:
    model: Any = decoder.model
    with torch.no_grad():
        given: torch.Tensor = model(input_ids=torch.tensor([families.ids(12)]), use_cache=False).logits
    return given


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_and_gradients_are_those_of_a_resident_model(name: str, tmp_path: Path) -> None:
    def compute(decoder: Decoder) -> list[torch.Tensor]:
        model: Any = decoder.model
        states = model.get_input_embeddings()(torch.tensor([families.ids(12)])).detach().requires_grad_()
        out = model(inputs_embeds=states, use_cache=False).logits
        out.square().mean().backward()
        return [out.detach(), states.grad]

    for resident, streamed in zip(*both(families.make(name, tmp_path), compute), strict=True):
        torch.testing.assert_close(streamed, resident, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("form", "stored"), [("int4-32", "bfloat16"), ("bf16", "float32")])
def test_codes_stand_in_for_weights_and_leave_again(name: str, form: str, stored: str, tmp_path: Path) -> None:
    def compute(decoder: Decoder) -> list[torch.Tensor]:
        known = weights(decoder)
        before = logits(decoder)
        codes = {n: quantize(np.ascontiguousarray(one.matrix), FORMATS[form]) for n, one in known.items()}
        with quantized(known, codes):
            during = logits(decoder)
        torch.testing.assert_close(logits(decoder), before, rtol=0, atol=0)
        quantize_in_place(decoder, codes)
        with rounding_inputs(weights(decoder), codes):
            torch.testing.assert_close(logits(decoder), during, rtol=0, atol=0)
        assert not torch.allclose(before, during, rtol=1e-5, atol=1e-5)
        assert {n: one.shape for n, one in known.items()} == {n: one.matrix.shape for n, one in known.items()}
        return [before, during]

    for resident, streamed in zip(*both(families.make(name, tmp_path, dtype=stored), compute), strict=True):
        torch.testing.assert_close(streamed, resident, rtol=1e-4, atol=1e-5)


def test_a_plan_of_a_streamed_model_is_that_of_a_resident_one(tmp_path: Path) -> None:
    def compute(decoder: Decoder) -> Any:
        texts = [Item(tuple(families.ids(30, n)), tuple(families.ids(4, n + 500))) for n in range(12)]
        found = Planner(decoder, Precision("auto", bits=5.0, tune=0), "float32", 0, lambda *_: None).run(texts, texts)
        return found.plan.formats, {name: one.dequantize() for name, one in found.weights.items()}

    (formats, numbers), (others, same) = both(families.make("qwen2", tmp_path, scale=0.5), compute)
    assert formats == others
    for name, expected in numbers.items():
        assert np.mean(same[name] != expected) < 1e-3  # a gradient's last bit may turn a code


class Own(nn.Linear):
    """A layer of a model's own making."""


def test_a_model_with_linear_layers_of_its_own_stays_resident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = references.skeleton

    def changed(config: Any) -> nn.Module:
        model = make(config)
        model.add_module("own", Own(2, 2))
        return model

    monkeypatch.setattr(references, "skeleton", changed)
    with reference(source.resolve(str(families.make("llama", tmp_path))), True) as decoder:
        assert not any(parameter.is_meta for parameter in decoder.model.parameters())


@pytest.mark.parametrize("form", ["int4-64", "int8"])
def test_a_large_model_is_exported_in_a_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """As if it were large: nothing is resident, and the written graph is that of the same codes."""
    folder = families.make("qwen2", tmp_path / "model", scale=0.5)
    done, made, create = [], list[int](), StreamedLinear.__init__

    def counted(self: StreamedLinear, *args: Any, **kwargs: Any) -> None:
        made.append(1)
        create(self, *args, **kwargs)

    monkeypatch.setattr(StreamedLinear, "__init__", counted)
    for name, limit in (("resident", references.STREAM_ABOVE), ("streamed", 0)):
        monkeypatch.setattr(references, "STREAM_ABOVE", limit)
        request = pipeline.Request(str(folder), tmp_path / name, precision=Precision(form))
        done.append(pipeline.export(request))
        assert bool(made) == (name == "streamed")
    resident, streamed = ((one.path / "model.onnx.data").read_bytes() for one in done)
    assert resident == streamed
    assert done[1].report["verification"]["dense"]["logits"] < 1e-3
