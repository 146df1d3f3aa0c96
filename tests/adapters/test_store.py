"""fstq_infer.adapters.store, .info and .ports: adapters of a bundle, its manifest, and what keeps engines valid."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fstq_infer.adapters import store, tensors
from fstq_infer.adapters.library import Library
from fstq_infer.adapters.ports import LoraPorts, runs_of
from fstq_infer.bundle import Bundle, BundleWriter
from fstq_infer.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    AdapterNameError,
    BundleChecksumError,
    BundleError,
    BundlePathError,
    BundleSizeError,
    ManifestError,
    OptionError,
)
from fstq_infer.manifest import Manifest, Pruning
from fstq_infer.strict_json import JsonObject
from tests.adapters.samples import ports, write
from tests.bundles import BARE, fill

MODEL = replace(BARE.model, layers=2, dtype="float32")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    with BundleWriter(tmp_path / "b") as writer:
        fill(writer.path)
        writer.commit(replace(BARE, model=MODEL, stages=(), pruning=replace(BARE.pruning, keep=1.0), lora=ports()))
    return tmp_path / "b"


def test_add_load_replace_remove(bundle: Path, tmp_path: Path) -> None:
    before = Bundle.open(bundle)
    one = store.add(bundle, "med", write(tmp_path / "med"))
    assert list(one.manifest.adapters) == ["med"] and one.manifest.adapters["med"].rank == 2
    assert one.manifest_sha256 != before.manifest_sha256
    assert one.model_sha256 == before.model_sha256 == before.manifest_sha256  # engines stay valid
    loaded = store.load(Bundle.open(bundle), "med")
    assert len(loaded.arrays) == 12 and loaded.pruning is None and not loaded.probe
    with pytest.raises(AdapterNameError, match="already"):
        store.add(bundle, "MED", tmp_path / "med")
    other = write(tmp_path / "other", r=2, lora_alpha=60)
    two = store.add(bundle, "MED", other, force=True)
    assert list(two.manifest.adapters) == ["MED"]
    with pytest.raises(AdapterNameError, match="did you mean 'MED'"):
        store.remove(bundle, "MEB")
    store.remove(bundle, "MED")
    after = Bundle.open(bundle)
    assert after.manifest_sha256 == before.manifest_sha256 and list((bundle / "adapters").iterdir()) == []


def test_a_bundle_without_inputs_says_what_to_do(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b") as writer:
        fill(writer.path)
        writer.commit(BARE)
    with pytest.raises(AdapterMismatchError, match="--adapter-targets all"):
        store.add(tmp_path / "b", "x", write(tmp_path / "a"))
    with pytest.raises(AdapterNameError, match="it has none"):
        store.remove(tmp_path / "b", "x")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "-a", "x" * 65, "a.b", "\u00e4"])
def test_bad_names(name: str, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterNameError, match="no name"):
        store.add(bundle, name, write(tmp_path / "a"))


def test_names_from_the_command_line(tmp_path: Path) -> None:
    assert store.named("x=some/where") == ("x", Path("some/where"))
    (tmp_path / "a=b").mkdir()
    with pytest.raises(AdapterNameError):
        store.named(str(tmp_path / "a=b"))
    assert store.named(str(tmp_path / "med"))[0] == "med"


def test_nothing_changes_where_an_adapter_does_not_fit_or_the_disk_fails(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (bundle / "manifest.json").read_bytes()
    with pytest.raises(AdapterMismatchError):
        store.add(bundle, "x", write(tmp_path / "a", fstq_base_sha256="1" * 64))

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "replace_file", full)
    with pytest.raises(BundleError, match="No space"):
        store.add(bundle, "x", write(tmp_path / "b"))
    assert (bundle / "manifest.json").read_bytes() == before
    Bundle.open(bundle)


def test_a_manifest_that_would_be_too_large(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (bundle / "manifest.json").read_bytes()
    monkeypatch.setattr(store, "MANIFEST_CAP", len(before) + 10)
    with pytest.raises(BundleError, match=r"would have \d+ bytes, expected at most \d+\. Remove adapters"):
        store.add(bundle, "x", write(tmp_path / "a"))
    assert (bundle / "manifest.json").read_bytes() == before and not (bundle / "adapters").exists()


def test_the_old_adapter_stays_where_the_new_one_cannot_be_written(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(bundle, "med", write(tmp_path / "med"))
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BundleError, match="cannot be changed"):
        store.add(bundle, "med", write(tmp_path / "other", lora_alpha=60), force=True)
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before
    Bundle.open(bundle)


def test_nothing_is_written_through_a_link(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", bundle / "adapters")
    with pytest.raises(BundlePathError, match="is a link"):
        store.add(bundle, "med", write(tmp_path / "med"))
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_file_without_an_entry_is_not_looked_at(bundle: Path) -> None:
    """What a writer leaves that dies between the adapter's file and the manifest."""
    (bundle / "adapters").mkdir()
    (bundle / "adapters" / "half.safetensors").write_bytes(b"half")
    assert Bundle.open(bundle).manifest.adapters == {}


def test_damaged_adapter_files(bundle: Path, tmp_path: Path) -> None:
    store.add(bundle, "med", write(tmp_path / "med"))
    path, opened = bundle / "adapters" / "med.safetensors", Bundle.open(bundle)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(BundleChecksumError, match=r"med\.safetensors"):
        Bundle.open(bundle)
    with pytest.raises(AdapterFormatError, match="has changed"):
        store.load(opened, "med")
    path.write_bytes(whole + b"x")
    with pytest.raises(BundleSizeError):
        Bundle.open(bundle, checksums=False)
    path.unlink()
    with pytest.raises(BundlePathError):
        Bundle.open(bundle, checksums=False)
    (tmp_path / "elsewhere").mkdir()
    path.parent.rmdir()
    os.symlink(tmp_path / "elsewhere", path.parent)
    (tmp_path / "elsewhere" / "med.safetensors").write_bytes(whole)
    with pytest.raises(BundlePathError, match="is a link"):
        Bundle.open(bundle)


def forge(bundle: Path, arrays: dict[str, np.ndarray], **entry: Any) -> Bundle:
    """A bundle whose manifest vouches for any content."""
    data = tensors.encode(arrays)
    (bundle / "adapters" / "med.safetensors").write_bytes(data)
    manifest = json.loads((bundle / "manifest.json").read_text())
    import hashlib

    manifest["adapters"]["med"] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} | entry
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return Bundle.open(bundle)


def test_files_that_do_not_fit_the_graph(bundle: Path, tmp_path: Path) -> None:
    store.add(bundle, "med", write(tmp_path / "med"))
    good = dict(store.load(Bundle.open(bundle), "med").arrays)
    a, b = "lora.0.mlp.down_proj.A", "lora.0.mlp.down_proj.B"
    bad: list[dict[str, Any]] = [
        {a: good[a][:, :1]},
        {a: good[a].astype(np.float16)},
        {b: good[b].T.copy()},
        {a: np.ones((8, 5), np.float32), b: np.ones((5, 12), np.float32)},
        {"lora.9.mlp.down_proj.A": good[a]},
        {"fstq.probe.1.skip.bias": np.ones(1, np.float32)},
    ]
    for change in bad:
        with pytest.raises(AdapterFormatError, match=r"med\.safetensors"):
            store.load(forge(bundle, good | change), "med")
    only = forge(bundle, {name: array for name, array in good.items() if name != b})
    with pytest.raises(AdapterFormatError, match="does not fit"):
        store.load(only, "med")


def test_probes_are_those_that_the_manifest_says(bundle: Path, tmp_path: Path) -> None:
    store.add(bundle, "med", write(tmp_path / "med"))
    good = dict(store.load(Bundle.open(bundle), "med").arrays)
    data = json.loads((bundle / "manifest.json").read_text())
    data["graph"]["lora"]["probes"] = {"p": [2, 3], "q": [2]}
    (bundle / "manifest.json").write_text(json.dumps(data))
    own = {"p": np.ones((2, 3), np.float32), "q": np.ones(2, np.float32)}
    assert store.load(forge(bundle, good | own, probe=True), "med").probe
    assert not store.load(forge(bundle, good, probe=False), "med").probe
    for arrays, probe, match in ((good | {"p": own["p"]}, True, "lacks 'q'"), (good | own, False, "holds 'p'")):
        with pytest.raises(AdapterFormatError, match=match):
            store.load(forge(bundle, arrays, probe=probe), "med")


def test_library_finds_what_was_added_later_and_loads_once(bundle: Path, tmp_path: Path) -> None:
    library = Library(Bundle.open(bundle))
    assert library.names == () and library.get(None) is None
    with pytest.raises(AdapterNameError, match="it has none"):
        library.get("med")
    store.add(bundle, "med", write(tmp_path / "med"))
    first = library.get("med")
    assert first is not None and library.get("med") is first
    with pytest.raises(AdapterNameError, match="did you mean 'med'"):
        library.get("mad")
    with pytest.raises(OptionError, match="adapter=3"):
        library.get(3)  # type: ignore[arg-type]


def test_library_finds_what_was_replaced_later(bundle: Path, tmp_path: Path) -> None:
    store.add(bundle, "med", write(tmp_path / "med"))
    library = Library(Bundle.open(bundle))
    store.add(bundle, "med", write(tmp_path / "other", lora_alpha=60), force=True)
    found, now = library.get("med"), store.load(Bundle.open(bundle), "med")
    assert found is not None and all((found.arrays[name] == array).all() for name, array in now.arrays.items())
    damaged = Library(Bundle.open(bundle))
    path = bundle / "adapters" / "med.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(AdapterFormatError, match="has changed"):
        damaged.get("med")


def test_manifest_round_trip_with_adapters(bundle: Path, tmp_path: Path) -> None:
    manifest = store.add(bundle, "med", write(tmp_path / "med")).manifest
    measured = replace(manifest.adapters["med"], pruning=Pruning(1.0, "gate", True, None, None), probe=True)
    changed = replace(manifest, adapters={"med": measured}, lora=replace(ports(), probes={"p": (2, 3)}))
    assert Manifest.from_json(changed.to_json()) == changed


def broken(data: dict[str, Any], *path: str, value: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(data))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copy


LINEAR = ("graph", "lora", "linears", "0.self_attn.k_proj")
BROKEN: list[tuple[tuple[str, ...], Any]] = [
    (("graph", "lora"), None),
    (("graph", "lora"), 3),
    (("graph", "lora", "rank"), 0),
    (("graph", "lora", "rank"), 10**6),
    (("graph", "lora", "linears"), []),
    (("graph", "lora", "probes"), {"x": []}),
    (("graph", "lora", "probes"), {"x": [0]}),
    ((*LINEAR, "inputs"), 0),
    ((*LINEAR, "inputs"), 9),
    ((*LINEAR, "of"), 13),
    ((*LINEAR, "runs"), [0, 5]),
    ((*LINEAR, "runs"), [0, 6, 1]),
    ((*LINEAR, "runs"), [8, 6]),
    ((*LINEAR, "runs"), [-1, 6]),
    ((*LINEAR, "runs"), "all"),
    ((*LINEAR, "module"), "\x1b[31m"),
    (
        ("graph", "lora", "linears", "2.mlp.up_proj"),
        {"module": "m", "inputs": 1, "outputs": 1, "of": 1, "runs": [0, 1]},
    ),
    (("graph", "lora", "linears", "q_proj"), {"module": "m", "inputs": 1, "outputs": 1, "of": 1, "runs": [0, 1]}),
    (("adapters",), []),
    (("adapters", "../x"), {}),
    (("adapters", "med", "sha256"), "0"),
    (("adapters", "med", "bytes"), 2**50),
    (("adapters", "med", "pruning"), {}),
    (("adapters", "MED"), {}),
]


@pytest.mark.parametrize(("path", "value"), BROKEN, ids=[f"{'.'.join(p)[-24:]}={str(v)[:12]}" for p, v in BROKEN])
def test_broken_manifests(path: tuple[str, ...], value: Any, bundle: Path, tmp_path: Path) -> None:
    data = json.loads(store.add(bundle, "med", write(tmp_path / "med")).manifest.to_json())
    with pytest.raises(ManifestError):
        Manifest.from_json(json.dumps(broken(data, *path, value=value)))


def test_runs() -> None:
    assert runs_of([4, 5, 6, 0, 9, 8]) == ((4, 3), (0, 1), (9, 1), (8, 1))
    assert LoraPorts.from_json(JsonObject(ports().to_json(), "'lora'"), 2) == ports()
