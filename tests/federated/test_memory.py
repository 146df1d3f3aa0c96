"""Memories on disk: what comes back, damaged files, other runs and models; interrupted writes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("safetensors", reason="memories need the 'federated' extra")

from fstq_infer.errors import StateError
from fstq_infer.federated import saved
from fstq_infer.federated.feedback import State
from fstq_infer.federated.memory import Memory, MemoryFolder
from fstq_infer.federated.tensors import TensorManifest

from .samples import BASE

MANIFEST = TensorManifest((("a", (30, 4)), ("b", (8,))))
SIZE = MANIFEST.parameters


def memory(round: int, scale: float = 1e-5) -> Memory:
    rng = np.random.default_rng(round)
    draw = [(rng.standard_normal(SIZE) * scale).astype(np.float32) for _ in range(3)]
    return Memory(State(draw[0], draw[1]), np.square(draw[2]), round, bytes([round]) * 70)


def put(folder: MemoryFolder, held: Memory, client: str = "c", run: str = "run") -> None:
    folder.save(client, MANIFEST, BASE, run, held)


def get(folder: MemoryFolder, before: int, client: str = "c", run: str = "run", base: bytes = BASE) -> Memory:
    return folder.load(client, MANIFEST, base, run, before)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 200), st.floats(1e-18, 1e18))
def test_values_come_back_to_eleven_bits(tmp_path: Path, round: int, scale: float) -> None:
    folder, held = MemoryFolder(tmp_path / "m"), memory(round, scale)
    put(folder, held, client=str(scale))
    found = get(folder, round + 1, client=str(scale))
    assert (found.round, found.message) == (round, held.message)
    for values, original in (
        (found.state.residual, held.state.residual),
        (found.state.velocity, held.state.velocity),
        (found.fisher, held.fisher),
    ):
        assert values is not None and original is not None and values.dtype == np.float32
        np.testing.assert_allclose(values, original, rtol=2**-11, atol=np.abs(original).max() * 2**-39)


def test_what_was_loaded_is_saved_unchanged(tmp_path: Path) -> None:
    """Rounding to fp16 happens once, so a client that restarts is the client that did not."""
    folder = MemoryFolder(tmp_path)
    put(folder, memory(1))
    once = get(folder, 2)
    put(folder, Memory(once.state, once.fisher, 2, once.message))
    twice = get(folder, 3)
    assert once.state.residual is not None and twice.state.residual is not None
    assert np.array_equal(once.state.residual, twice.state.residual)


def test_two_generations(tmp_path: Path) -> None:
    folder = MemoryFolder(tmp_path)
    for round in (1, 2, 5):
        put(folder, memory(round))
    assert [get(folder, before).round for before in (6, 5, 2, 1)] == [5, 2, -1, -1]
    put(folder, memory(5))  # done again: the generation before it stays
    assert [get(folder, before).round for before in (6, 5)] == [5, 2]
    put(folder, memory(3))  # the server went back
    assert [get(folder, before).round for before in (4, 3)] == [3, 2]
    assert len(list(tmp_path.iterdir())) == 2


def test_others_are_not_read(tmp_path: Path) -> None:
    folder = MemoryFolder(tmp_path)
    put(folder, memory(1))
    for options in ({"client": "d"}, {"run": "other"}, {"base": bytes(16)}):
        assert get(folder, 9, **options).round == -1  # type: ignore[arg-type]
    assert folder.load("c", TensorManifest(MANIFEST.tensors[::-1]), BASE, "run", 9).round == -1
    strange = "../../a b\n" * 40
    put(folder, memory(2), client=strange)
    assert get(folder, 9, client=strange).round == 2 and all(path.parent == tmp_path for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:20],
        lambda content: b"",
        lambda content: content[:-9] + bytes([content[-9] ^ 4]) + content[-8:],
        lambda content: b"\x80\x04K\x01." + content,
        lambda content: content.replace(b"run", b"rum"),
    ],
)
def test_a_damaged_file_is_reported_and_begun_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    folder = MemoryFolder(tmp_path)
    put(folder, memory(1))
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert get(folder, 2) == Memory()
    assert "begins anew" in caplog.text and "damaged" in caplog.text
    put(folder, memory(2))
    assert get(folder, 3).round == 2


def test_a_file_with_other_shapes_is_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = MemoryFolder(tmp_path)
    put(folder, memory(1))
    (path,) = tmp_path.iterdir()
    arrays, facts = saved.load(path)
    saved.save(path, {**arrays, "residual": np.zeros(3, np.float16)}, facts)
    assert get(folder, 2).round == -1 and "residual" in caplog.text
    saved.save(path, arrays, {**facts, "exponents": {}})
    assert get(folder, 2).round == -1
    saved.save(path, arrays, json.loads(json.dumps(facts)))
    assert get(folder, 2).round == 1


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = MemoryFolder(tmp_path)
    put(folder, memory(1))
    put(folder, memory(2))

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(StateError, match="space"):
        put(folder, memory(3))
    monkeypatch.undo()
    assert [get(folder, before).round for before in (9, 2)] == [2, 1]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("missing", "module"),
    [("flwr", "strategy"), ("flwr", "mod"), ("flwr", "server"), ("safetensors", "memory")],
)
def test_a_missing_library_names_the_extra(missing: str, module: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from fstq_infer.errors import MissingExtraError\n"
        f"try:\n import fstq_infer.federated.{module}\n"
        "except MissingExtraError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "fstq-infer[federated]" in done.stdout and missing in done.stdout
