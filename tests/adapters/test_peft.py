"""fstq_infer.adapters.peft, .pattern and .fit: reading PEFT folders, and fitting them to a graph."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fstq_infer.adapters import pattern, peft
from fstq_infer.adapters.fit import deltas, fit
from fstq_infer.errors import AdapterError, AdapterFormatError, AdapterKindError, AdapterMismatchError
from tests.adapters.samples import MODULES, PREFIX, matrices, ports, write

HASH = "ab" * 32


def test_the_inputs_of_a_graph_give_the_modules_product(tmp_path: Path) -> None:
    adapter = peft.read(write(tmp_path / "a"))
    assert adapter.rank == 2 and adapter.config.base == "somewhere/tiny"
    arrays, gains = fit(adapter, ports(), HASH), deltas(adapter)
    for one in ports().linears:
        a, b = (arrays[name] for name in one.ports)
        rows = [row for first, count in one.runs for row in range(first, first + count)]
        np.testing.assert_allclose(a @ b, gains[one.module][rows].T, rtol=1e-5, atol=1e-6)
        assert a.flags.c_contiguous and b.flags.c_contiguous


def test_scale_with_rank_stabilisation_and_patterns(tmp_path: Path) -> None:
    arrays = matrices() | {
        key: array for key, array in matrices(1, rank=3).items() if "layers.1.mlp" in key or "layers.0.mlp" in key
    }
    plain = peft.read(
        write(
            tmp_path / "a",
            arrays,
            rank_pattern={"down_proj": 3},
            alpha_pattern={r"layers\.1\..*": 9, "mlp.down_proj": 4},
        )
    )
    scales = {module: pair.scale for module, pair in plain.pairs.items()}
    assert scales == {
        "model.layers.0.self_attn.qkv_proj": 3.0,
        "model.layers.0.mlp.down_proj": 4 / 3,
        "model.layers.1.self_attn.qkv_proj": 4.5,
        "model.layers.1.mlp.down_proj": 3.0,
    }
    root = peft.read(write(tmp_path / "b", use_rslora=True))
    assert {pair.scale for pair in root.pairs.values()} == {6 / math.sqrt(2)}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "DoRA"),
    ({"peft_type": "LOHA"}, "'LOHA'"),
    ({"peft_type": "VERA"}, "'VERA'"),
    ({"peft_type": "IA3"}, "'IA3'"),
    ({"peft_type": ["x"]}, "a list"),
    ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
    ({"bias": "all"}, "biases"),
    ({"lora_bias": True}, "lora_bias"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"use_qalora": True}, "QALoRA"),
    ({"layer_replication": [[0, 1]]}, "replicated"),
    ({"alora_invocation_tokens": [3]}, "aLoRA"),
    ({"target_parameters": ["w"]}, "target_parameters"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*path_initial_model"),
    ({"init_lora_weights": "olora"}, "olora"),
    ({"rank_pattern": {"(a+)+$": 2}}, "does not try"),
    ({"alpha_pattern": {"x" * 300: 2}}, "does not try"),
]


@pytest.mark.parametrize(("changes", "match"), REFUSED, ids=[match[:20] for _, match in REFUSED])
def test_other_kinds_are_refused_by_name(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterKindError, match=match):
        peft.read(write(tmp_path / "a", **changes))


DAMAGED: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "r is 0"),
    ({"r": True}, "r is true"),
    ({"r": 10**9}, "r is 1000000000"),
    ({"lora_alpha": "8"}, "lora_alpha"),
    ({"lora_alpha": 0}, "lora_alpha"),
    ({"rank_pattern": [1]}, "rank_pattern"),
    ({"rank_pattern": {"x": -1}}, "rank_pattern"),
    ({"alpha_pattern": {"x": None}}, "alpha_pattern"),
    ({"layers_to_transform": "1"}, "layers_to_transform"),
    ({"target_modules": [1]}, "target_modules"),
    ({"exclude_modules": [1]}, "exclude_modules"),
    ({"fstq_base_sha256": "xyz"}, "fstq_base_sha256"),
]


@pytest.mark.parametrize(("changes", "match"), DAMAGED, ids=[match for _, match in DAMAGED])
def test_bad_values_are_named(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match=match):
        peft.read(write(tmp_path / "a", **changes))


def changed(**more: np.ndarray | None) -> dict[str, np.ndarray]:
    arrays: dict[str, Any] = matrices() | {PREFIX + key: array for key, array in more.items()}
    return {key: array for key, array in arrays.items() if array is not None}


FIRST = "model.layers.0.mlp.down_proj"
KEYS: list[tuple[dict[str, np.ndarray], type[AdapterError], str]] = [
    ({}, AdapterFormatError, "no lora_A and lora_B"),
    (changed(**{f"{FIRST}.lora_B.weight": None}), AdapterFormatError, "only lora_A"),
    (changed(**{f"{FIRST}.lora_B.weight": np.ones((12, 3), np.float32)}), AdapterFormatError, "do not fit"),
    (changed(**{f"{FIRST}.lora_A.weight": np.ones((2, 8, 1, 1), np.float32)}), AdapterFormatError, "convolutions"),
    (changed(**{f"{FIRST}.lora_A.weight": np.full((2, 8), np.nan, np.float32)}), AdapterFormatError, "finite"),
    (changed(**{f"{FIRST}.lora_magnitude_vector": np.ones(12, np.float32)}), AdapterKindError, "DoRA"),
    (changed(**{f"{FIRST}.lora_B.bias": np.ones(12, np.float32)}), AdapterKindError, "lora_bias"),
    (changed(**{"lm_head.modules_to_save.weight": np.ones((2, 2), np.float32)}), AdapterKindError, "modules_to_save"),
    (changed(**{"model.embed_tokens.lora_embedding_A": np.ones((2, 8), np.float32)}), AdapterKindError, "embeddings"),
    (changed(**{"x\n\x1b[31m": np.ones(1, np.float32)}), AdapterFormatError, "expected only"),
    (matrices(rank=3), AdapterMismatchError, "rank 3, but adapter_config.json says 2"),
]


@pytest.mark.parametrize(("arrays", "error", "match"), KEYS, ids=[match[:20] for _, _, match in KEYS])
def test_odd_tensors(arrays: dict[str, np.ndarray], error: type[AdapterError], match: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=match) as caught:
        peft.read(write(tmp_path / "a", arrays))
    assert str(caught.value).isprintable()


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match="no folder"):
        peft.read(tmp_path / "absent")
    folder = write(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterFormatError, match="can run code"):
        peft.read(folder)
    for content in (b"{", b"[]", b"\xff", b"[" * 100_000, b'{"r": ' + b"9" * 5000 + b"}"):
        (folder / "adapter_config.json").write_bytes(content)
        with pytest.raises((AdapterFormatError, AdapterKindError)):
            peft.read(folder)
    (folder / "adapter_config.json").write_bytes(b" " * (peft.CONFIG_CAP + 1))
    with pytest.raises(AdapterFormatError, match="expected at most"):
        peft.read(folder)


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    arrays = {key.replace("layers.1", "layers.7"): array for key, array in matrices().items()}
    with pytest.raises(AdapterMismatchError, match=r"layers\.7.* is no linear layer .*did you mean .*somewhere/tiny"):
        fit(peft.read(write(tmp_path / "a", arrays)), ports(), HASH)
    wide = {k: np.repeat(v, 2, 1) if "lora_A" in k else v for k, v in matrices().items()}
    with pytest.raises(AdapterMismatchError, match="16 inputs and 12 outputs, but 8 and 12"):
        fit(peft.read(write(tmp_path / "b", wide)), ports(), HASH)
    with pytest.raises(AdapterMismatchError, match="rank 2, but the bundle takes ranks up to 1"):
        fit(peft.read(write(tmp_path / "c")), ports(1), HASH)
    with pytest.raises(AdapterMismatchError, match=r"cdcdcd.* the bundle is made of abab"):
        fit(peft.read(write(tmp_path / "d", fstq_base_sha256="cd" * 32)), ports(), HASH)
    fit(peft.read(write(tmp_path / "e", fstq_base_sha256=HASH)), ports(), HASH)


def test_targets_and_layers_have_to_be_those_of_the_file(tmp_path: Path) -> None:
    def read(**changes: Any) -> None:
        fit(peft.read(write(tmp_path / "a", only, **changes)), ports(), HASH)

    only = {key: array for key, array in matrices().items() if "layers.1" in key}
    read(layers_to_transform=[1])
    read(layers_to_transform=1)
    with pytest.raises(AdapterMismatchError, match=r"lacks model\.layers\.0"):
        read()
    with pytest.raises(AdapterMismatchError, match=r"holds model\.layers\.1.* does not target"):
        read(layers_to_transform=[0])
    with pytest.raises(AdapterMismatchError, match="does not target"):
        read(layers_to_transform=[1], target_modules=["down_proj"])
    read(target_modules=".*proj")  # a pattern: the weights themselves say what it matched
    read(target_modules=["all-linear"])


def test_excluded_modules_are_no_targets(tmp_path: Path) -> None:
    def read(arrays: dict[str, np.ndarray], **changes: Any) -> None:
        fit(peft.read(write(tmp_path / "a", arrays, **changes)), ports(), HASH)

    only = {key: array for key, array in matrices().items() if "down_proj" not in key}
    read(only, exclude_modules=["down_proj"])
    read(only, exclude_modules=["layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"])
    read(only, exclude_modules=".*down_proj")  # a pattern: the weights themselves say what it matched
    read(matrices(), exclude_modules=[])
    with pytest.raises(AdapterMismatchError, match=r"down_proj, which .* does not target"):
        read(matrices(), exclude_modules=["down_proj"])
    with pytest.raises(AdapterMismatchError, match=r"lacks model\.layers\.0\.mlp\.down_proj"):
        read(only, exclude_modules=["layers.1.mlp.down_proj"])


names = st.from_regex(r"[a-z]{1,3}(\.[a-z0-9]{1,3}){0,4}", fullmatch=True)


@settings(deadline=None)
@given(names, st.sampled_from(["a", "a.b", r"a\.b", "[ab]+", ".*b", "a.*c", "^a.b", "a|b", "(a|b).c", "x$", "a?b"]))
def test_patterns_match_as_in_peft(name: str, text: str) -> None:
    import re

    pattern.check([text], "test")
    assert pattern.matches(text, name) == bool(re.match(rf"(.*\.)?({text})$", name))


def test_patterns_take_little_time() -> None:
    for text in (".*.*x", "[a.]+[a.]+x", "a*a*x"):  # a dangerous one would not come back
        pattern.check([text], "test")
        assert not pattern.matches(text, "a" * 250)
    for text in ("(a*)*x", "(a|a)+x", "a{2,}{3,}", "a*a*a*x", "(?=a)", "(?P<x>a)", r"\1", "a\nb", "^a|b"):
        with pytest.raises(AdapterKindError, match=r"does not try|which is none"):
            pattern.check([text], "test")


def test_long_names_and_many_patterns_are_refused(tmp_path: Path) -> None:
    arrays = {f"{PREFIX}{'a.' * 300}a.lora_{side}.weight": np.ones((2, 2), np.float32) for side in "AB"}
    with pytest.raises(AdapterFormatError, match=r"a name of 601 characters, expected at most 512") as caught:
        peft.read(write(tmp_path / "a", arrays))
    assert "a." * 50 not in str(caught.value)
    with pytest.raises(AdapterKindError, match="4097 patterns, expected at most 4096"):
        pattern.check((f"layers.{n}" for n in range(4097)), "test")
    many = {f"{PREFIX}m{n}.lora_{side}.weight": np.ones((2, 2), np.float32) for n in range(200) for side in "AB"}
    ranks = {f"x{n}": 2 for n in range(2700)}
    with pytest.raises(AdapterKindError, match="2700 patterns for 200 modules take too long to try, expected at most"):
        peft.read(write(tmp_path / "b", many, rank_pattern=ranks))


def test_json_of_the_sample_is_what_peft_would_write(tmp_path: Path) -> None:
    lora = pytest.importorskip("peft", reason="peft is not installed; it comes with the 'dev' extra")
    config = lora.LoraConfig.from_pretrained(str(write(tmp_path / "a")))
    assert config.r == 2 and set(config.target_modules) == set(json.loads(json.dumps(list(config.target_modules))))
    assert {m.rpartition(".")[2] for m in MODULES} == set(config.target_modules)
