"""fstq_infer.adapters.tensors: safetensors files, whole, damaged and hostile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load, save

from fstq_infer.adapters import tensors
from fstq_infer.errors import AdapterFormatError

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
named = st.dictionaries(
    st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__"),
    st.sampled_from([np.float32, np.float16]).flatmap(
        lambda kind: arrays.arrays(kind, arrays.array_shapes(min_dims=0, max_dims=4, max_side=4))
    ),
    max_size=4,
)


def raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: Any = (2,), span: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


@quick
@given(named)
def test_the_library_reads_what_we_write_and_we_read_what_it_writes(
    tmp_path: Path, given: dict[str, np.ndarray]
) -> None:
    theirs = load(tensors.encode(given))
    (tmp_path / "t").write_bytes(save(given))
    ours = tensors.read(tmp_path / "t")
    assert theirs.keys() == ours.keys() == given.keys()
    for name, array in given.items():
        np.testing.assert_array_equal(theirs[name], array)
        np.testing.assert_array_equal(ours[name].array(), array)
        assert ours[name].array().dtype == array.dtype


def test_bfloat16_becomes_float32(tmp_path: Path) -> None:
    values = np.array([1.5, -3.0, 1e30], ml_dtypes.bfloat16)
    (tmp_path / "t").write_bytes(raw({"x": entry("BF16", (3,), (0, 6))}, values.tobytes()))
    found = tensors.read(tmp_path / "t")["x"].array()
    np.testing.assert_array_equal(found, values.astype(np.float32))


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "header of 0 bytes"),
    "short": (b"\x02\0\0", "header"),
    "huge-header": ((2**62).to_bytes(8, "little") + b"{}", "header of"),
    "header-past-the-end": ((100).to_bytes(8, "little") + b"{}", "header of 100"),
    "no-json": (raw(b"{{{{"), "no JSON"),
    "no-utf8": (raw(b'{"\xff": 1}'), "no JSON"),
    "deep": (raw(b"[" * 100_000 + b"]" * 100_000), "no JSON"),
    "twice": (raw(b'{"x": {}, "x": {}}'), "no JSON"),
    "long-integer": (raw(b'{"x": ' + b"9" * 4000 + b"}"), "no JSON"),
    "list": (raw([1, 2]), "no object"),
    "metadata": (raw({"__metadata__": {"a": 1}}), "metadata"),
    "extra-key": (raw({"x": entry() | {"more": 1}}, bytes(8)), "alone"),
    "unknown-type": (raw({"x": entry("X9")}, bytes(8)), "unknown type"),
    "no-type": (raw({"x": entry() | {"dtype": [1]}}, bytes(8)), "type"),
    "integers": (raw({"x": entry("I64", (1,))}, bytes(8)), "I64; expected F32"),
    "negative": (raw({"x": entry(shape=(-2,))}, bytes(8)), "natural"),
    "fractions": (raw({"x": entry(shape=(2.0,))}, bytes(8)), "natural"),
    "booleans": (raw({"x": entry(shape=(True,), span=(0, 4))}, bytes(4)), "natural"),
    "five-dims": (raw({"x": entry(shape=(1, 1, 1, 1, 2))}, bytes(8)), "natural"),
    "overflow": (raw({"x": entry(shape=(2**31, 2**31, 2**31))}, bytes(8)), "do not fit"),
    "past-the-end": (raw({"x": entry(shape=(4,), span=(0, 16))}, bytes(8)), "do not fit"),
    "backwards": (raw({"x": entry(shape=(0,), span=(8, 0))}, bytes(8)), "do not fit"),
    "shape-and-bytes": (raw({"x": entry(shape=(3,))}, bytes(8)), "do not fit"),
    "gap": (raw({"x": entry(span=(4, 12))}, bytes(12)), "gap"),
    "overlap": (raw({"x": entry(), "y": entry(span=(4, 12))}, bytes(12)), "overlap"),
    "bytes-behind": (raw({"x": entry()}, bytes(9)), "belong to no tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    data, match = BAD[name]
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(AdapterFormatError, match=match) as caught:
        tensors.read(tmp_path / "t")
    assert len(str(caught.value)) < 800 and str(caught.value).isprintable()


@quick
@given(st.binary(max_size=40), st.integers(0, 200), st.integers(0, 255))
def test_no_other_error_whatever_the_bytes(tmp_path: Path, junk: bytes, at: int, byte: int) -> None:
    whole = bytearray(tensors.encode({"x": np.ones((2, 2), np.float32), "y": np.ones(3, np.float16)}))
    whole[at % len(whole)] = byte
    for data in (junk, bytes(whole), bytes(whole) + junk):
        (tmp_path / "t").write_bytes(data)
        try:
            for tensor in tensors.read(tmp_path / "t").values():
                tensor.array()
        except AdapterFormatError:
            pass


def test_no_file_and_no_regular_file(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match="cannot be read"):
        tensors.read(tmp_path / "nothing")
    with pytest.raises(AdapterFormatError, match="no regular file"):
        tensors.read(tmp_path)


def test_a_large_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "FILE_CAP", 10)
    (tmp_path / "t").write_bytes(bytes(11))
    with pytest.raises(AdapterFormatError, match="11 bytes, expected at most 10"):
        tensors.read(tmp_path / "t")


def test_equal_tensors_give_equal_bytes() -> None:
    one = {"b": np.ones(3, np.float32), "a": np.zeros((2, 2), np.float16)}
    assert tensors.encode(one) == tensors.encode(dict(reversed(one.items())))
