"""fstq_infer.bundle and fstq_infer.atomic: every check of docs/bundle-format.md, and writers that are killed."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fstq_infer
from fstq_infer import bundle as module
from fstq_infer import errors
from fstq_infer.bundle import (
    DTYPES,
    FILE_CAPS,
    REQUIRED_FILES,
    Bundle,
    BundleWriter,
    Contract,
    FileEntry,
    GenerationDefaults,
    Manifest,
    ModelInfo,
    Provenance,
    Pruning,
    atomic_directory,
    sha256_file,
)
from fstq_infer.runtime.engine import Stage

CORRUPT = Path(__file__).parent / "corrupt"
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX file types and signals")


def load_make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("corrupt_make", CORRUPT / "make.py")
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


make = load_make()
BARE = replace(Manifest.from_json(make.encode(make.manifest())), files={})  # what an exporter hands to commit()


def write(path: Path, data: Any = None, raw: bytes | None = None) -> Path:
    """A bundle at ``path`` with make.py's files and the given manifest."""
    path.mkdir()
    for name, content in make.CONTENT.items():
        (path / name).write_bytes(content)
    (path / "manifest.json").write_bytes(make.encode(data or make.manifest()) if raw is None else raw)
    return path


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write(tmp_path / "whole")


def fails(error: type[errors.BundleError], path: Path, match: str | None = None) -> None:
    """Opening raises exactly ``error``, with a message that a terminal can print and that says what to do."""
    with pytest.raises(error, match=match) as caught:
        Bundle.open(path)
    assert type(caught.value) is error
    assert len(str(caught.value)) < 1500 and str(caught.value).isprintable()


# ---- manifest: round trip ----------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=30)
hexes = st.text("0123456789abcdef", min_size=64, max_size=64)
finite = st.floats(allow_nan=False, allow_infinity=False)
small = st.integers(0, 2**31 - 1)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    size = st.integers(1, 2**31 - 1)
    model = ModelInfo(
        draw(texts), draw(texts), draw(st.integers(1, 200)), draw(size), draw(size), draw(size), draw(size),
        draw(st.sampled_from(DTYPES)),
    )  # fmt: skip
    layers = draw(st.sets(st.integers(1, model.layers - 1), max_size=5)) if model.layers > 1 else set()
    ratio, token = st.floats(0, 1, exclude_min=True), st.integers(0, model.vocab_size - 1)
    measured = st.builds(Contract, st.booleans(), texts, st.floats(0, 1e300), finite)
    names = st.sets(st.sampled_from([name for name in FILE_CAPS if name not in REQUIRED_FILES]))
    return Manifest(
        model=model,
        stages=tuple(Stage(layer, draw(small), draw(small)) for layer in sorted(layers)),
        pruning=Pruning(draw(ratio), draw(texts), draw(st.booleans()), draw(st.none() | measured)),
        generation=GenerationDefaults(
            bos_token_id=draw(st.none() | token),
            eos_token_ids=tuple(draw(st.lists(token, max_size=4))),
            temperature=draw(st.floats(0, 1e300)),
            top_k=draw(small),
            top_p=draw(ratio),
            repetition_penalty=draw(st.floats(0, 1e300, exclude_min=True)),
        ),
        provenance=Provenance(
            draw(texts), draw(hexes), draw(st.dictionaries(texts, texts, max_size=3)), draw(small), draw(texts),
            draw(texts),
        ),
        files={
            name: FileEntry(draw(st.integers(0, 2**63 - 1)), draw(hexes)) for name in {*REQUIRED_FILES, *draw(names)}
        },
    )  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(manifests())
def test_manifest_round_trip(manifest: Manifest) -> None:
    text = manifest.to_json()
    assert Manifest.from_json(text) == Manifest.from_json(text.encode()) == manifest
    shuffled = replace(manifest, files=dict(reversed(manifest.files.items())))
    assert shuffled.to_json() == text


def test_unknown_keys_are_ignored(whole: Path) -> None:
    data = make.manifest()
    for part in (
        data,
        data["model"],
        data["graph"],
        data["graph"]["stages"][0],
        data["pruning"],
        data["files"]["model.onnx"],
    ):
        part["added-later"] = {"anything": [None, 1.5]}
    assert Manifest.from_json(make.encode(data)) == Bundle.open(whole).manifest


def test_to_json_refuses_nan() -> None:
    with pytest.raises(errors.ManifestError, match="finite"):
        replace(BARE, pruning=replace(BARE.pruning, keep=float("nan"))).to_json()


# ---- the committed corpus ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", make.CASES)
def test_corrupt_bundle(case: str) -> None:
    if make.CASES[case]:
        fails(getattr(errors, make.CASES[case]), CORRUPT / case)
    else:
        assert Bundle.open(CORRUPT / case).manifest.stages == (Stage(1, 4, 16),)


def test_corpus_is_what_make_writes() -> None:
    assert {path.name for path in CORRUPT.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(make.CASES)
    for case in make.CASES:
        on_disk = {path.name: path.read_bytes() for path in (CORRUPT / case).iterdir()}
        assert on_disk == make.contents(case)
        assert sum(map(len, on_disk.values())) < 4096


# ---- manifest: keys, types, ranges -------------------------------------------------------------------------------

Place = tuple[str | int, ...]


def places(data: Any, at: Place = ()) -> list[Place]:
    """Every key of the manifest, as a path to it."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path for key, value in items for path in [(*at, key), *places(value, (*at, key))]]


def put(at: Place, value: Any) -> bytes:
    """The manifest with ``value`` at a place; ``put`` itself as the value deletes the key."""
    data = make.manifest()
    parent = data
    for key in at[:-1]:
        parent = parent[key]
    if value is put:
        del parent[at[-1]]
    else:
        parent[at[-1]] = value
    return make.encode(data)


def name_of(value: Any) -> str:
    return ".".join(map(str, value)) if isinstance(value, tuple) else "deleted" if value is put else repr(value)[:20]


ALL = places(make.manifest())
OPTIONAL = {("files", name) for name in FILE_CAPS if name not in REQUIRED_FILES} | {("provenance", "libraries", "onnx")}
NULLABLE = {("pruning", "contract"), ("generation", "bos_token_id")}
REAL = {"keep", "max_drop", "drop", "temperature", "top_p", "repetition_penalty"}


def has_type(at: Place, value: Any) -> bool:
    """True where ``value`` is of the type that the spec gives to the key."""
    now: Any = make.manifest()
    for key in at:
        now = now[key]
    if value is None:
        return at in NULLABLE
    if at[-1] in REAL:
        return type(value) in (int, float)
    return type(value) is type(now)


@pytest.mark.parametrize("at", [at for at in ALL if at not in OPTIONAL and not isinstance(at[-1], int)], ids=name_of)
def test_required_key_missing(at: Place) -> None:
    with pytest.raises(errors.ManifestError, match="missing") as caught:
        Manifest.from_json(put(at, put))
    assert repr(at[-1]) in str(caught.value)


@pytest.mark.parametrize("at", ALL, ids=name_of)
def test_wrong_type(at: Place) -> None:
    for value in (None, True, 1, 1.0, "1", [1], {"1": 1}):
        if not has_type(at, value):
            with pytest.raises(errors.ManifestError, match="expected"):
                Manifest.from_json(put(at, value))


HUGE = 2**63
OUT_OF_RANGE: list[tuple[str, list[Any]]] = [
    ("files model.onnx bytes", [-1, HUGE]),
    ("files model.onnx sha256", ["", "0" * 63, "0" * 65, "G" * 64, "A" * 64, "٠" * 64]),
    ("model architecture", ["", "x" * 4097, "a\x1b[2J", "a\n", "\ud800"]),
    ("model layers", [0, -1, HUGE]),
    ("model hidden_size", [0, HUGE]),
    ("model vocab_size", [0, HUGE]),
    ("model max_positions", [0, HUGE]),
    ("model parameters", [0, HUGE]),
    ("model dtype", ["", "float64", "FLOAT32"]),
    ("graph contract", [0, 2]),
    ("graph stages", [[{"layer": 2, "sink": 0, "window": 0}] * 2, [1], [[]]]),
    ("graph stages", [[{"layer": layer, "sink": 0, "window": 0} for layer in (2, 1)], [{}] * 4097]),
    ("graph stages 0 layer", [-1, 0, 4, HUGE]),
    ("graph stages 0 sink", [-1, HUGE]),
    ("graph stages 0 window", [-1, HUGE]),
    ("pruning keep", [0, -0.5, 1.001, 10**19]),
    ("pruning contract max_drop", [-0.01]),
    ("generation bos_token_id", [-1, 256]),
    ("generation eos_token_ids", [[-1], [256], [True], [1.0], ["1"], [None], [1] * 4097]),
    ("generation temperature", [-0.1]),
    ("generation top_k", [-1, HUGE]),
    ("generation top_p", [0, 1.5]),
    ("generation repetition_penalty", [0, -1]),
    ("provenance source_sha256", ["", "0" * 63]),
    ("provenance seed", [-1, HUGE]),
    ("provenance libraries", [{str(i): "1" for i in range(4097)}]),
]


@pytest.mark.parametrize(("at", "values"), OUT_OF_RANGE, ids=name_of)
def test_out_of_range(at: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(errors.ManifestError, match="expected") as caught:
            Manifest.from_json(put(tuple(int(key) if key == "0" else key for key in at.split()), value))
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "1" * 100_000])
@pytest.mark.parametrize("key", [b'"temperature": 0.7', b'"drop": -0.002', b'"max_positions": 512', b'"version": 1'])
def test_numbers_that_are_none(key: bytes, number: str) -> None:
    text = make.encode(make.manifest()).replace(key, key.split()[0] + b" " + number.encode())
    with pytest.raises(errors.ManifestError):
        Manifest.from_json(text)


def test_long_integers_are_not_converted() -> None:
    """Even under an unknown key: int() takes quadratic time, and old Pythons have no limit of their own."""
    with pytest.raises(errors.ManifestError, match="integer of 1000 digits"):
        Manifest.from_json(b'{"later": %s}' % (b"9" * 1000))


@pytest.mark.parametrize(
    "raw",
    [b"", b"null", b"[]", b'"x"', b"1", b"{", b"{}", b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0", b"{}{}", b"{'format': 1}"],
)
def test_no_json_object(tmp_path: Path, raw: bytes) -> None:
    fails(errors.ManifestError, write(tmp_path / "b", raw=raw))


@pytest.mark.parametrize("pair", [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("depth", [900, 5000, 80_000])
def test_deep_nesting(tmp_path: Path, pair: tuple[str, str], depth: int) -> None:
    start, end = pair
    text = start * depth + "1" + end * depth
    fails(errors.ManifestError, write(tmp_path / "whole", raw=text.encode()))
    fails(errors.ManifestError, write(tmp_path / "key", raw=f'{{"format": {text}}}'.encode()))


@pytest.mark.parametrize("key", [b'"version"', b'"layer"', b'"sha256"', b'"model.onnx"', b'"onnx"', b'"drop"'])
def test_duplicate_key(tmp_path: Path, key: bytes) -> None:
    raw = make.encode(make.manifest()).replace(key + b": ", key + b": 1, " + key + b": ", 1)
    fails(errors.ManifestError, write(tmp_path / "b", raw=raw), "twice")


@pytest.mark.parametrize(("version", "said"), [(0, "older"), (-3, "older"), (2, "newer"), (10**18, "newer")])
def test_version_is_reported_before_other_keys(tmp_path: Path, version: int, said: str) -> None:
    raw = make.encode({"format": "fstq-bundle", "version": version, "files": []})
    fails(errors.BundleVersionError, write(tmp_path / "b", raw=raw), said)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_manifest(whole: Path, data: st.DataObject) -> None:
    """Any damage to manifest.json gives a BundleError, or another valid manifest that survives a round trip."""
    text = bytearray(make.encode(make.manifest()))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text) - 1))
        length = data.draw(st.integers(0, 8))
        text[start : start + length] = data.draw(
            st.binary(max_size=8) | st.sampled_from([b'"', b"[", b"9", b"null", b"-"])
        )
    (whole / "manifest.json").write_bytes(text)
    try:
        opened = Bundle.open(whole)
    except errors.BundleError as error:
        assert str(error).isprintable()
    else:
        assert Manifest.from_json(opened.manifest.to_json()) == opened.manifest
        assert opened.manifest_sha256 == hashlib.sha256(text).hexdigest()


# ---- files on disk -----------------------------------------------------------------------------------------------


def test_open(whole: Path) -> None:
    for path in (whole, str(whole)):
        opened = Bundle.open(path)
        assert opened.manifest_sha256 == sha256_file(whole / "manifest.json")
        assert opened.path == whole and opened.file("model.onnx") == whole / "model.onnx"
        assert opened.file("manifest.json") == whole / "manifest.json"
    assert opened.manifest.files["model.onnx.data"] == FileEntry(64, hashlib.sha256(bytes(range(64))).hexdigest())


@pytest.mark.parametrize("name", ["", "x", "../whole/model.onnx", "/etc/passwd", "model.onnx\0"])
def test_file_gives_only_listed_names(whole: Path, name: str) -> None:
    with pytest.raises(errors.BundlePathError):
        Bundle.open(whole).file(name)


def test_optional_files_may_be_absent(whole: Path) -> None:
    data = make.manifest()
    for name in FILE_CAPS:
        if name not in REQUIRED_FILES:
            (whole / name).unlink()
            del data["files"][name]
    (whole / "manifest.json").write_bytes(make.encode(data))
    with pytest.raises(errors.BundlePathError, match="chat_template"):
        Bundle.open(whole).file("chat_template.jinja")


@pytest.mark.parametrize("path", ["absent", "absent/deeper", "whole/model.onnx", "nul\0", "empty"])
def test_not_found(whole: Path, path: str) -> None:
    (whole.parent / "empty").mkdir()
    fails(errors.BundleNotFoundError, whole.parent / path, "fstq export")


def test_unreadable_path(tmp_path: Path) -> None:
    fails(errors.BundleError, tmp_path / ("x" * 300))


@pytest.mark.parametrize("name", FILE_CAPS)
def test_damaged_file(tmp_path: Path, name: str) -> None:
    content = make.CONTENT[name]
    for position in (0, len(content) // 2, len(content) - 1):
        path = write(tmp_path / f"flip-{position}")
        flipped = bytearray(content)
        flipped[position] ^= 0x10
        (path / name).write_bytes(flipped)
        fails(errors.BundleChecksumError, path, name)
        assert Bundle.open(path, checksums=False).manifest.files[name].bytes == len(content)
    for label, damaged in {"cut": content[:-1], "empty": b"", "longer": content + b"\0"}.items():
        path = write(tmp_path / label)
        (path / name).write_bytes(damaged)
        fails(errors.BundleSizeError, path, name)
        with pytest.raises(errors.BundleSizeError):
            Bundle.open(path, checksums=False)


@posix
@pytest.mark.parametrize(
    "kind", ["link", "inner link", "dangling link", "directory link", "directory", "fifo", "socket", "gone"]
)
@pytest.mark.parametrize("name", [*FILE_CAPS, "manifest.json"])
def test_no_regular_file(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str) -> None:
    path = whole / name
    (tmp_path / "outside").write_bytes(path.read_bytes())
    path.unlink()
    if kind == "link":
        path.symlink_to(tmp_path / "outside")
    elif kind == "inner link":
        (whole / "copy").write_bytes((tmp_path / "outside").read_bytes())
        path.symlink_to("copy")
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "directory link":
        path.symlink_to(tmp_path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(whole)  # socket paths are short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
    gone = kind == "gone" and name == "manifest.json"
    fails(errors.BundleNotFoundError if gone else errors.BundlePathError, whole)


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/b", "a\\b", "model.onnx\0", "./model.onnx", "", ".", "..", "MODEL.ONNX", "manifest.json",
     "model.onnx ", "x" * 5000, "\ud800", "report.html\n"],
    ids=name_of,
)  # fmt: skip
def test_name_not_allowed(tmp_path: Path, name: str) -> None:
    data = make.manifest()
    data["files"][name] = data["files"]["model.onnx"]
    fails(errors.BundlePathError, write(tmp_path / "b", data))


def traced(action: Callable[[], object]) -> int:
    """Peak bytes allocated while ``action`` runs."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def sparse(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


@pytest.fixture
def no_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise AssertionError("a file was read before its size was checked")

    monkeypatch.setattr(module, "sha256_file", refuse)


@pytest.mark.usefixtures("no_reads")
@pytest.mark.parametrize("name", FILE_CAPS)
def test_oversized_file(tmp_path: Path, name: str) -> None:
    path, size = tmp_path / "b", FILE_CAPS[name] + 1
    data = make.manifest()
    data["files"][name]["bytes"] = size
    sparse(write(path, data) / name, size)
    assert traced(lambda: fails(errors.BundleSizeError, path, f"{size} bytes")) < 2 << 20


@pytest.mark.usefixtures("no_reads")
@pytest.mark.parametrize("name", FILE_CAPS)
def test_file_larger_than_declared(whole: Path, name: str) -> None:
    sparse(whole / name, 1 << 40)
    assert traced(lambda: fails(errors.BundleSizeError, whole, "the manifest says")) < 2 << 20


@pytest.mark.parametrize("size", [(1 << 20) + 1, 1 << 40])
def test_huge_manifest(whole: Path, size: int) -> None:
    sparse(whole / "manifest.json", size)
    assert traced(lambda: fails(errors.BundleSizeError, whole)) < 1 << 20


def test_manifest_of_the_largest_size(whole: Path) -> None:
    text = make.encode(make.manifest())
    (whole / "manifest.json").write_bytes(text + b" " * ((1 << 20) - len(text)))
    Bundle.open(whole)


def test_checksums_are_streamed(whole: Path) -> None:
    data, size = make.manifest(), 24 << 20
    digest = hashlib.sha256()
    for _ in range(24):
        digest.update(bytes(1 << 20))
    data["files"]["model.onnx.data"] = {"bytes": size, "sha256": digest.hexdigest()}
    (whole / "manifest.json").write_bytes(make.encode(data))
    (whole / "model.onnx.data").write_bytes(b"")
    sparse(whole / "model.onnx.data", size)
    assert traced(lambda: Bundle.open(whole)) < 4 << 20


def test_sha256_file_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert sha256_file(path) == sha256_file(path, 3) == hashlib.sha256(b"abc").hexdigest()
    for size, found in ((2, "more than 2"), (4, "read 3"), (0, "more than 0")):
        with pytest.raises(errors.BundleSizeError, match=found):
            sha256_file(path, size)


@posix
def test_other_files_are_not_looked_at(whole: Path) -> None:
    os.mkfifo(whole / "notes")
    (whole / "outside").symlink_to("/etc/passwd")
    Bundle.open(whole)


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_no_permission(whole: Path) -> None:
    (whole / "model.onnx").chmod(0)
    fails(errors.BundleError, whole, "permissions")


# ---- writer ------------------------------------------------------------------------------------------------------


def fill(path: Path, names: tuple[str, ...] = tuple(make.CONTENT)) -> None:
    for name in names:
        (path / name).write_bytes(make.CONTENT[name])


def listing(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def test_writer(tmp_path: Path) -> None:
    out = tmp_path / "new" / "b"
    with BundleWriter(out) as writer:
        assert writer.path.name == f".b.partial-{os.getpid()}"
        fill(writer.path)
        assert not out.exists()
        written = writer.commit(BARE)
        assert written == Bundle.open(out)
    assert listing(out.parent) == {"b"} and listing(out) == {*make.CONTENT, "manifest.json"}
    assert written.manifest == replace(BARE, files=written.manifest.files)
    with BundleWriter(tmp_path / "again") as writer:
        fill(writer.path)
        assert writer.commit(BARE).manifest_sha256 == written.manifest_sha256


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt, SystemExit, None])
def test_leaving_without_commit_removes_everything(tmp_path: Path, stop: type[BaseException] | None) -> None:
    def work() -> None:
        with BundleWriter(tmp_path / "b") as writer:
            fill(writer.path)
            if stop:
                raise stop

    if stop:
        with pytest.raises(stop):
            work()
    else:
        work()
    assert listing(tmp_path) == set()


def test_existing_output(whole: Path) -> None:
    before = Bundle.open(whole)
    with pytest.raises(errors.BundleExistsError, match="--force"):
        BundleWriter(whole).__enter__()
    with BundleWriter(whole, overwrite=True) as writer:
        fill(writer.path, REQUIRED_FILES)
        assert Bundle.open(whole) == before
        after = writer.commit(BARE)
    assert listing(whole.parent) == {"whole"}
    assert Bundle.open(whole) == after != before and not (whole / "report.html").exists()


def test_overwrite_takes_only_bundles_and_empty_directories(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"x")
    write(tmp_path / "whole")
    (tmp_path / "link").symlink_to("whole")
    before = listing(tmp_path)
    for name in ("photos", "file", "link"):
        with pytest.raises(errors.BundleExistsError, match="will not be replaced"):
            BundleWriter(tmp_path / name, overwrite=True).__enter__()
    assert listing(tmp_path) == before
    (tmp_path / "empty").mkdir()
    with BundleWriter(tmp_path / "empty", overwrite=True) as writer:
        fill(writer.path)
        writer.commit(BARE)
    Bundle.open(tmp_path / "empty")


@pytest.mark.parametrize("out", ["/", "..", "", "nul\0"])
def test_no_output_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.BundleError):
        BundleWriter(out).__enter__()


def test_output_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for out in (tmp_path / "file" / "b", tmp_path / ("x" * 300)):
        with pytest.raises(errors.BundleError, match="choose another path"):
            BundleWriter(out).__enter__()


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("notes.txt", "BundlePathError"),
        ("manifest.json", "BundlePathError"),
        ("chat_template.jinja", "BundleSizeError"),
    ],
)
def test_commit_refuses_what_no_reader_would_take(tmp_path: Path, name: str, error: str) -> None:
    with pytest.raises(getattr(errors, error)), BundleWriter(tmp_path / "b") as writer:
        fill(writer.path, REQUIRED_FILES)
        (writer.path / name).write_bytes(bytes((256 << 10) + 1))
        writer.commit(BARE)
    assert listing(tmp_path) == set()


def test_commit_refuses_a_wrong_manifest(tmp_path: Path) -> None:
    wrong = [
        replace(BARE, pruning=replace(BARE.pruning, keep=0.0)),
        replace(BARE, generation=replace(BARE.generation, temperature=float("inf"))),
        replace(BARE, stages=(Stage(2, 0, 0), Stage(1, 0, 0))),
        replace(BARE, provenance=replace(BARE.provenance, libraries={str(i): "v" * 4000 for i in range(300)})),
    ]
    for number, manifest in enumerate(wrong):
        kind = errors.BundleSizeError if number == 3 else errors.ManifestError
        with pytest.raises(kind), BundleWriter(tmp_path / "b") as writer:
            fill(writer.path)
            writer.commit(manifest)
    missing = pytest.raises(errors.ManifestError, match=r"'tokenizer.json' in 'files' is missing")
    with missing, BundleWriter(tmp_path / "b") as writer:
        fill(writer.path, ("model.onnx", "report.json"))
        writer.commit(BARE)
    assert listing(tmp_path) == set()


def test_commit_once_and_inside(tmp_path: Path) -> None:
    writer = BundleWriter(tmp_path / "b")
    with writer:
        fill(writer.path)
        writer.commit(BARE)
        with pytest.raises(errors.BundleError):
            writer.commit(BARE)
    with pytest.raises(errors.BundleError):
        writer.commit(BARE)
    Bundle.open(tmp_path / "b")


@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_old_bundle_is_restored_when_the_rename_fails(
    whole: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    before, rename = Bundle.open(whole), os.rename

    def failing(source: Path, target: Path) -> None:
        if ".partial-" in str(source):
            raise stop
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises((errors.BundleError, KeyboardInterrupt)), BundleWriter(whole, overwrite=True) as writer:
        fill(writer.path, REQUIRED_FILES)
        writer.commit(BARE)
    assert Bundle.open(whole) == before and listing(whole.parent) == {"whole"}


def test_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(errors.BundleExistsError), BundleWriter(tmp_path / "b") as writer:
        fill(writer.path)
        (tmp_path / "b").mkdir()
        writer.commit(BARE)
    assert listing(tmp_path) == {"b"}


def test_atomic_directory(tmp_path: Path) -> None:
    out = tmp_path / "engine"
    with atomic_directory(out, marker="engine.json") as path:
        (path / "sub").mkdir()
        (path / "sub" / "engine.json").write_text("1")
    assert (out / "sub" / "engine.json").read_text() == "1"
    with pytest.raises(errors.BundleExistsError, match=r"no engine\.json"), atomic_directory(out, True, "engine.json"):
        pass
    (out / "engine.json").write_text("1")
    with pytest.raises(ZeroDivisionError), atomic_directory(out, True, "engine.json"):
        raise ZeroDivisionError
    assert (out / "sub").exists()
    with atomic_directory(out, True, "engine.json"):
        pass
    assert listing(out) == set() and listing(tmp_path) == {"engine"}


# ---- killed writers ----------------------------------------------------------------------------------------------


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python process that has run ``code`` up to its print('ready')."""
    path = os.pathsep.join([str(Path(fstq_infer.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


WRITING = """
import signal, sys, time
from fstq_infer.bundle import BundleWriter
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
with BundleWriter(sys.argv[1]) as writer:
    (writer.path / "model.onnx").write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(60)
"""


def ended(process: subprocess.Popen[str]) -> int:
    with process:
        return process.wait(20)


@posix
def test_kill_leaves_no_bundle_and_the_next_writer_cleans_up(tmp_path: Path) -> None:
    process = child(WRITING, str(tmp_path / "b"))
    leftover = f".b.partial-{process.pid}"
    with BundleWriter(tmp_path / "b") as writer:  # it is alive: nothing of it is touched
        assert listing(tmp_path) == {leftover, writer.path.name}
    process.kill()
    ended(process)
    assert listing(tmp_path) == {leftover}
    with BundleWriter(tmp_path / "other"):
        assert leftover in listing(tmp_path)
    with BundleWriter(tmp_path / "b") as writer:
        assert listing(tmp_path) == {writer.path.name}
        fill(writer.path)
        writer.commit(BARE)
    Bundle.open(tmp_path / "b")


@posix
def test_ctrl_c_removes_the_partial_directory(tmp_path: Path) -> None:
    process = child(WRITING, str(tmp_path / "b"))
    process.send_signal(signal.SIGINT)
    assert ended(process) != 0
    assert listing(tmp_path) == set()


DYING_BETWEEN_RENAMES = """
import os, signal, sys
from fstq_infer.atomic import atomic_directory
rename = os.rename
def dying(source, target):
    if ".partial-" in str(source):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.rename = dying
with atomic_directory(sys.argv[1], overwrite=True):
    print("ready", flush=True)
"""


@posix
def test_bundle_set_aside_by_a_killed_writer_comes_back(whole: Path) -> None:
    before = Bundle.open(whole)
    process = child(DYING_BETWEEN_RENAMES, str(whole))
    ended(process)
    assert listing(whole.parent) == {f".whole.{kind}-{process.pid}" for kind in ("partial", "old")}
    with pytest.raises(errors.BundleExistsError):
        BundleWriter(whole).__enter__()
    assert Bundle.open(whole) == before and listing(whole.parent) == {"whole"}


@posix
def test_only_leftovers_of_dead_writers_are_removed(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    process = child("print('ready', flush=True)")
    ended(process)
    keep = {f".b.partial-{os.getppid()}", ".b.partial-x", ".b.partial-", ".bb.partial-1", ".b.partial-1.zip"}
    keep |= {f".B.old-{process.pid}", f".b.old-{process.pid}0000000000", f".b.partial-{process.pid}"}
    gone = {f".b.partial-{os.getpid()}", f".b.old-{process.pid}"}  # an own process id: containers reuse them
    for name in keep | gone:
        (tmp_path / name).mkdir()
    (tmp_path / "b").mkdir()
    locked = os.open(tmp_path / f".b.partial-{process.pid}", os.O_RDONLY)
    fcntl.flock(locked, fcntl.LOCK_EX)  # a live writer in another container: its process id means nothing here
    try:
        with BundleWriter(tmp_path / "b", overwrite=True) as writer:
            assert listing(tmp_path) == {"b", writer.path.name} | keep
    finally:
        os.close(locked)


def test_two_writers_of_one_process(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b") as first:
        with pytest.raises(errors.BundleExistsError, match="already"):
            BundleWriter(tmp_path / "b").__enter__()
        fill(first.path)
        first.commit(BARE)
    Bundle.open(tmp_path / "b")


def test_manifest_on_disk_is_the_spec(tmp_path: Path) -> None:
    """The writer's JSON has the keys and values of make.py's, which was written from the spec alone."""
    with BundleWriter(tmp_path / "b") as writer:
        fill(writer.path)
        writer.commit(BARE)
    expected = copy.deepcopy(make.manifest())
    assert json.loads((tmp_path / "b" / "manifest.json").read_text()) == expected
