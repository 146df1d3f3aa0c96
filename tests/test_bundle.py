"""fstq_infer.bundle.Bundle: the reader's checks of docs/bundle-format.md that concern files."""

from __future__ import annotations

import hashlib
import os
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fstq_infer import bundle as module
from fstq_infer import errors
from fstq_infer.bundle import Bundle, sha256_file
from fstq_infer.manifest import FILE_CAPS, REQUIRED_FILES, FileEntry, Manifest
from fstq_infer.runtime.engine import Stage

from .bundles import CORRUPT, fails, make, name_of, posix, write


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write(tmp_path / "whole")


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


@pytest.mark.parametrize("path", ["absent", "absent/deeper", "nul\0", "empty"])
def test_not_found(whole: Path, path: str) -> None:
    (whole.parent / "empty").mkdir()
    fails(errors.BundleNotFoundError, whole.parent / path, "fstq export")


def test_not_found_says_what_lies_there_instead(whole: Path, tmp_path: Path) -> None:
    fails(errors.BundleNotFoundError, whole / "model.onnx", f"a file of one: give '{whole}' instead")
    for name, words in (
        ("config.json", "make a bundle of it: fstq export"),
        ("adapter_config.json", "fstq adapter add"),
    ):
        (tmp_path / name).mkdir()
        fails(errors.BundleNotFoundError, tmp_path / name)
        (tmp_path / f"with-{name}").mkdir()
        (tmp_path / f"with-{name}" / name).write_text("{}")
        fails(errors.BundleNotFoundError, tmp_path / f"with-{name}", words)


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
