"""Damaged and hostile messages: each kind has its own error, and none costs more than the manifest allows."""

from __future__ import annotations

import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("constriction", reason="messages need the 'federated' extra")

from fstq_infer import errors
from fstq_infer.federated import message as messages
from fstq_infer.federated.tensors import TensorManifest
from tests.loading import load_make

from . import reference
from .test_golden import FOLDER
from .test_golden import make as golden

ATTACKS = Path(__file__).parent / "attacks"

make = load_make(ATTACKS)
MANIFEST = TensorManifest(make.SHAPES)
WHOLE = (ATTACKS / "whole.fstm").read_bytes()


@pytest.mark.parametrize("case", make.CASES)
def test_attack(case: str) -> None:
    blob, error = (ATTACKS / f"{case}.fstm").read_bytes(), make.CASES[case][0]
    messages.decode(WHOLE, MANIFEST)  # what is imported and cached on first use is not part of the message's cost
    began = time.perf_counter()
    tracemalloc.start()
    try:
        if error is None:
            found = messages.decode(blob, MANIFEST, make.BASE, make.ROUND)
            values = messages.dense(found, MANIFEST)
        else:
            with pytest.raises(errors.MessageError) as caught:
                messages.decode(blob, MANIFEST, make.BASE, make.ROUND)
            assert type(caught.value) is getattr(errors, f"Message{error}Error"), caught.value
            assert str(caught.value).isprintable() and str(caught.value).endswith((".", "?"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50_000 and time.perf_counter() - began < 5
    if error is None:
        assert messages.encode(found, MANIFEST) == blob
        assert values.tolist() == reference.read(blob, make.SHAPES)


def test_corpus_is_what_make_writes() -> None:
    assert {path.stem for path in ATTACKS.glob("*.fstm")} == set(make.CASES)
    for case, (_, build) in make.CASES.items():
        assert (ATTACKS / f"{case}.fstm").read_bytes() == build()


def test_every_error_has_an_attack() -> None:
    declared = {name for name in vars(errors) if name.startswith("Message") and name != "MessageError"}
    assert {f"Message{error}Error" for error, _ in make.CASES.values() if error} == declared


def test_first_damage_is_reported_first() -> None:
    """A message damaged in several ways has the error of the earliest check."""
    body = make.layer(fixed=make.fixed(bits=2**32 - 1), scales=make.halves(0, 0))
    for name, header in (
        ("Format", {"magic": b"FSTX", "version": 2, "crc": 0}),
        ("Version", {"version": 2, "length": 2**32 - 1}),
        ("Size", {"length": 2**32 - 1, "crc": 0}),
        ("Trailing", {"length": 60, "crc": 0}),
        ("Checksum", {"crc": 0, "base": bytes(16)}),
        ("Model", {"base": bytes(16), "manifest": bytes(16)}),
        ("Manifest", {"manifest": bytes(16), "round": 1}),
        ("Round", {"round": 1, "layers": 9}),
        ("Scale", {}),
    ):
        with pytest.raises(getattr(errors, f"Message{name}Error")):
            messages.decode(make.message(body, **header), MANIFEST, make.BASE, make.ROUND)


def test_a_small_message_cannot_claim_much_memory() -> None:
    """However much a message claims, decoding allocates a small multiple of the delta that the server awaits."""
    manifest = TensorManifest((("w", (1_000_000,)),))
    for code, table in ((4, make.halves(make.ONE)), (12, b""), (1, b"")):
        body = make.bare(b"" if code == 1 else make.halves(make.ONE), (code,), (0,), (1_000_000,)) + table
        if code == 12:  # every symbol is the first: an empty ANS stream holds a million of them
            body += reference.planes([4096] + [0] * 254, 13)
        blob = reference.header(body, manifest.tensors, make.BASE, 1 << code)
        tracemalloc.start()
        try:
            if code == 12:
                assert (messages.dense(messages.decode(blob, manifest), manifest) == -1).all()
            else:
                with pytest.raises(errors.MessageTruncatedError):
                    messages.decode(blob, manifest)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 40 * manifest.parameters if code == 12 else peak < 100_000


def sealed(blob: bytes) -> bytes:
    """With length and CRC put right, so that a mutation reaches the checks behind them."""
    if len(blob) < 56:
        return blob
    front, back = blob[:8] + struct.pack("<I", len(blob)), blob[16:]
    return front + struct.pack("<I", zlib.crc32(back, zlib.crc32(front))) + back


VALID = [
    *((golden.MANIFEST, (FOLDER / f"{case}.fstm").read_bytes()) for case in golden.CASES),
    *((MANIFEST, (ATTACKS / f"{case}.fstm").read_bytes()) for case, (error, _) in make.CASES.items() if not error),
]


def check_mutation(data: st.DataObject) -> None:
    """Any damage gives a MessageError, or another valid message that has just these bytes."""
    manifest, valid = data.draw(st.sampled_from(VALID))
    blob = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(blob)))
        if data.draw(st.booleans()) and start < len(blob):
            blob[start] ^= 1 << data.draw(st.integers(0, 7))
        else:
            blob[start : start + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    damaged = bytes(blob)
    if damaged != valid:
        with pytest.raises(errors.MessageError):
            messages.decode(damaged, manifest)
    try:
        found = messages.decode(sealed(damaged), manifest)
    except errors.MessageError as error:
        assert str(error).isprintable()
    else:
        assert messages.encode(found, manifest) == sealed(damaged)
        assert np.isfinite(messages.dense(found, manifest)).all()


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_mutations(data: st.DataObject) -> None:
    check_mutation(data)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_ten_thousand_mutations(data: st.DataObject) -> None:
    check_mutation(data)
