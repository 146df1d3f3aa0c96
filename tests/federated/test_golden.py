"""Messages of version 1 keep their bytes and their meaning; a second implementation reads them alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("constriction", reason="messages need the 'federated' extra")

from fstq_infer.federated import message as messages
from fstq_infer.federated.codes import CODES
from tests.loading import load_make

from . import reference

FOLDER = Path(__file__).parents[1] / "golden" / "messages"

make = load_make(FOLDER)


@pytest.mark.parametrize("case", make.CASES)
def test_golden_message(case: str) -> None:
    golden = (FOLDER / f"{case}.fstm").read_bytes()
    assert make.message(case) == golden
    found = messages.decode(golden, make.MANIFEST, make.BASE, make.ROUND)
    assert messages.encode(found, make.MANIFEST) == golden
    assert messages.dense(found, make.MANIFEST).tolist() == reference.read(golden, make.SHAPES)


def test_golden_messages_use_every_code_and_support() -> None:
    found = [messages.decode((FOLDER / f"{case}.fstm").read_bytes(), make.MANIFEST) for case in make.CASES]
    layers = [layer for message in found for layer in message.layers]
    assert {id for layer in layers for id in layer.blocks} == {code.id for code in CODES.values()}
    assert max(len(message.layers) for message in found) == 3
    sizes = make.MANIFEST.sizes
    assert any((layer.rice == 31).any() for layer in layers)
    assert any((layer.counts == sizes).any() for layer in layers)
    assert len({k for layer in layers for k in layer.rice.tolist()}) > 4


def test_lossless_is_lossless() -> None:
    delta = make.MANIFEST.flatten(make.numbers(1))
    read = messages.dense(messages.decode((FOLDER / "fp32-100.fstm").read_bytes(), make.MANIFEST), make.MANIFEST)
    assert np.array_equal(read.view(np.uint32), delta.view(np.uint32))


def test_no_stray_files() -> None:
    assert {path.name for path in FOLDER.glob("*.fstm")} == {f"{case}.fstm" for case in make.CASES}
