"""fstq_engines: building, finding, checking and refusing ONNX Runtime engines; builders that are killed."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("onnxruntime", reason="the ONNX Runtime backend needs the 'ort' extra")

from fstq_engines import cache, external, lora, ort, parity
from fstq_engines.cache import SIDECAR, Cpu, Sidecar

from fstq_infer import errors, machine
from fstq_infer.bundle import Bundle
from fstq_infer.runtime.load import open_engine
from fstq_infer.runtime.ort import OrtEngine
from tests.conftest import write_bundle

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and locks")


@pytest.fixture(scope="module")
def built(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of the tiny bundle, to be copied."""
    return ort.build(tiny_bundle, directory=tmp_path_factory.mktemp("built") / "engine")


def test_a_full_disk_is_an_engine_error(tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ort, "sha256_file", full)
    with pytest.raises(errors.EngineError, match=r"No space left on device.*Free space"):
        ort.build(tiny_bundle, directory=tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_graphs_without_weights_of_their_own_share_none(tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).write_bytes(b"")
    assert lora.share_weights(tmp_path, "a.onnx", "b.onnx") == 0


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(built, tmp_path / "engine"))


def listing(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()} if path.exists() else set()


def stamps(path: Path) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_mtime_ns, file.stat().st_ino) for file in path.iterdir()}


def edit(engine: Path, **values: Any) -> None:
    data = json.loads((engine / SIDECAR).read_text()) | values
    (engine / SIDECAR).write_text(json.dumps(data))


# --- building and reusing


def test_the_engine_lies_in_the_cache_with_its_sidecar(tiny_bundle: Bundle, engine_cache: Path) -> None:
    import onnxruntime

    steps: list[str] = []
    engine = ort.build(tiny_bundle, progress=steps.append)
    assert engine.parent == engine_cache and listing(engine_cache) == {engine.name}
    assert listing(engine) == {"model.onnx", "model.onnx.data", SIDECAR}
    assert len(steps) == 6 and str(engine) in steps[-1]
    data = json.loads((engine / SIDECAR).read_text())
    assert (data["format"], data["backend"], data["version"]) == ("fstq-engine", "onnxruntime", onnxruntime.__version__)
    assert data["key"] == engine.name and data["bundle_sha256"] == tiny_bundle.manifest_sha256
    assert data["bundle_path"] == str(tiny_bundle.path) and data["machine"] and len(data["cpu_sha256"]) == 64
    assert data["build_seconds"] > 0 and data["peak_rss_bytes"] > 10 << 20
    assert data["parity"]["cases"] == ["dense", "pruned", "adaptive", "padded batch"]
    assert 0 <= data["parity"]["difference"] <= data["parity"]["tolerance"] == 1e-3
    for name in ("model.onnx", "model.onnx.data"):
        assert data["files"][name] == {
            "bytes": (engine / name).stat().st_size,
            "sha256": cache.sha256_file(engine / name),
        }
    assert Sidecar.read(engine).to_json() == (engine / SIDECAR).read_text()


def test_a_second_build_reuses_the_engine_and_force_does_not(tiny_bundle: Bundle, engine_cache: Path) -> None:
    steps: list[str] = []
    engine = ort.build(tiny_bundle)
    before = stamps(engine)
    assert ort.build(tiny_bundle, progress=steps.append) == engine
    assert ort.build(tiny_bundle, progress=steps.append, checksums=True) == engine
    assert ort.build(replace(tiny_bundle, path=tiny_bundle.path), directory=engine) == engine
    assert stamps(engine) == before and steps == []
    assert ort.build(tiny_bundle, force=True) == engine
    assert not set(stamps(engine).values()) & set(before.values())
    assert listing(engine_cache) == {engine.name}


def test_a_loaded_engine_computes_what_the_bundle_does(tiny_bundle: Bundle, engine: Path) -> None:
    made = parity.cases(tiny_bundle.manifest.model, tiny_bundle.manifest.stages)
    loaded = open_engine(tiny_bundle, directory=engine, threads=1)
    reference = OrtEngine(tiny_bundle.path, tiny_bundle)
    result = parity.compare(made, parity.run(reference, made), parity.run(loaded, made), "float32")
    assert result.difference < 1e-4 and result.tokens == 96


def test_an_engine_needs_its_bundle_no_more(tiny_graph: Path, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", tiny_graph)
    engine = ort.build(bundle, directory=tmp_path / "engine")
    shutil.rmtree(bundle.path)
    loaded = open_engine(bundle, directory=engine)
    ids = np.arange(5, dtype=np.int64)[None]
    assert np.isfinite(loaded.forward(ids, ids, np.full((1, 2), 5), loaded.empty_cache(1)).logits).all()


def test_one_session_at_a_time(tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    alive, most = [0], [0]

    class Counted(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            super().__init__(*args, **kwargs)

        def __del__(self) -> None:
            alive[0] -= 1

    monkeypatch.setattr(onnxruntime, "InferenceSession", Counted)
    ort.build(tiny_bundle, directory=tmp_path / "engine")
    gc.collect()
    assert (most[0], alive[0]) == (1, 0)


def test_nothing_is_said_on_stderr(tiny_bundle: Bundle, engine_cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ort.build(tiny_bundle)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("own", "xdg", "expected"),
    [
        ("/a", "/b", "/a/engines"),
        ("", "/b", "/b/fstq/engines"),
        ("", "relative", "/home/me/.cache/fstq/engines"),
        ("", "", "/home/me/.cache/fstq/engines"),
        ("~/x", "", "/home/me/x/engines"),
    ],
)
@posix
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, own: str, xdg: str, expected: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("FSTQ_CACHE", own)
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert cache.engines_root() == Path(expected)


def test_the_key_covers_all_an_engine_depends_on(tiny_bundle: Bundle) -> None:
    one = ort.identity(tiny_bundle)
    others = [
        replace(one, bundle_sha256="0" * 64),
        replace(one, backend="tensorrt"),
        replace(one, version="9.9"),
        replace(one, cpu=replace(one.cpu, sha256="0" * 64)),
    ]
    assert len({one.key, *(other.key for other in others)}) == 5
    assert replace(one, cpu=replace(one.cpu, description="another text")).key == one.key


@pytest.mark.parametrize(
    ("text", "same_as"),
    [
        ("processor: 0\nmodel name: A\nflags: b a\nprocessor: 1\nmodel name: A\nflags: a b\n", "flags: a b\n"),
        ("processor: 0\nFeatures: fp asimd\nCPU part: 0xd42\n", "Features: asimd fp\n"),
    ],
)
def test_cpu_features_from_cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, same_as: str) -> None:
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(cache, "CPUINFO", file)
    absent = cache.this_cpu()
    file.write_text(text)
    found = cache.this_cpu()
    assert "with 2 CPU features" in found.description
    file.write_text(same_as)
    assert cache.this_cpu().sha256 == found.sha256 != absent.sha256
    file.write_text(text.replace("a", "c"))
    assert cache.this_cpu().sha256 != found.sha256


# --- engines for something else


def test_an_engine_of_another_bundle_is_refused(
    tiny_graph: Path, tiny_bundle: Bundle, engine: Path, tmp_path: Path
) -> None:
    other = write_bundle(tmp_path / "other bundle", tiny_graph, parameters=41_000)
    with pytest.raises(errors.EngineMismatchError) as caught:
        open_engine(other, directory=engine)
    message = str(caught.value)
    for part in (tiny_bundle.manifest_sha256[:12], other.manifest_sha256[:12], str(tiny_bundle.path)):
        assert part in message
    assert f"fstq build '{other.path}' --force" in message
    assert ort.build(other, directory=engine, force=True) == engine
    open_engine(other, directory=engine)


@pytest.mark.parametrize("what", ["version", "cpu"])
def test_an_engine_of_another_version_or_cpu_is_refused(
    tiny_bundle: Bundle, engine_cache: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    import onnxruntime

    engine, version = ort.build(tiny_bundle), onnxruntime.__version__
    assert cache.rebuild_command(tiny_bundle, engine, ort.identity(tiny_bundle)).endswith("--force")
    if what == "version":
        monkeypatch.setattr(onnxruntime, "__version__", "9.8.7")
        match = rf"was onnxruntime {version}, now it is onnxruntime 9\.8\.7.*fstq build .*tiny\.bundle --force"
    else:
        monkeypatch.setattr(cache, "this_cpu", lambda: Cpu("aarch64 Orin with 9 CPU features", "f" * 64))
        match = r"the CPU was .*, now it is aarch64 Orin with 9 CPU features \(ffff.*fstq build .*tiny\.bundle --force"
    with pytest.raises(errors.EngineMismatchError, match=match):
        open_engine(tiny_bundle, directory=engine)
    assert ort.build(tiny_bundle) != engine  # in the cache it has a place of its own
    assert len(listing(engine_cache)) == 2


# --- damaged engines


def truncate(engine: Path) -> None:
    file = engine / "model.onnx.data"
    file.write_bytes(file.read_bytes()[:-1])


def flip(engine: Path) -> None:
    data = bytearray((engine / "model.onnx.data").read_bytes())
    data[1000] ^= 1
    (engine / "model.onnx.data").write_bytes(data)


def break_sidecar(engine: Path) -> None:
    (engine / SIDECAR).write_text('{"format": "fstq-engine",')


DAMAGE = {
    "truncated": truncate,
    "missing": lambda engine: (engine / "model.onnx").unlink(),
    "broken sidecar": break_sidecar,
    "older layout": lambda engine: edit(engine, layout=0),
    "wrong type": lambda engine: edit(engine, files=[1]),
    "no files": lambda engine: edit(engine, files={}),
    "escape": lambda engine: edit(engine, files={"../x": {"bytes": 1, "sha256": ""}}),
    "infinite": lambda engine: edit(engine, peak_rss_bytes=float("inf")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_engine_is_built_again(
    tiny_bundle: Bundle, engine: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    damage(engine)
    open_engine(tiny_bundle, directory=engine)
    assert "The engine is built again" in caplog.text
    Sidecar.read(engine).verify(engine, checksums=True)


def test_changed_content_is_found_when_asked(
    tiny_bundle: Bundle, engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flip(engine)
    open_engine(tiny_bundle, directory=engine)  # reading all weights would take as long as loading them
    assert caplog.text == ""
    with pytest.raises(errors.EngineError, match="content has changed"):
        Sidecar.read(engine).verify(engine, checksums=True)
    ort.build(tiny_bundle, directory=engine, checksums=True)
    assert "content has changed" in caplog.text
    Sidecar.read(engine).verify(engine, checksums=True)


def test_a_lost_sidecar_in_the_cache(tiny_bundle: Bundle, engine_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = ort.build(tiny_bundle)
    (engine / SIDECAR).unlink()
    assert ort.build(tiny_bundle) == engine
    assert "has lost its engine.json" in caplog.text
    Sidecar.read(engine).verify(engine, checksums=True)


def test_other_files_are_never_replaced(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("")
    for force in (False, True):
        with pytest.raises(errors.EngineError, match=r"holds files but no engine\.json"):
            ort.build(tiny_bundle, directory=tmp_path / "mine", force=force)
        with pytest.raises(errors.EngineError, match="is a file or a link"):
            ort.build(tiny_bundle, directory=tmp_path / "file", force=force)
    assert listing(tmp_path) == {"mine", "file"}
    with pytest.raises(errors.EngineError, match="cannot be written"):
        ort.build(tiny_bundle, directory=tmp_path / "file" / "engine")


# --- builders that fail


def test_an_engine_that_computes_something_else_is_thrown_away(
    tiny_bundle: Bundle, engine_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimise = ort._Part._optimise

    def break_weights(part: ort._Part, out: Path) -> None:
        optimise(part, out)
        data = np.fromfile(out / "model.onnx.data", np.float32)
        data[: len(data) // 2] *= 1.02
        data.tofile(out / "model.onnx.data")

    monkeypatch.setattr(ort._Part, "_optimise", break_weights)
    with pytest.raises(errors.ParityError, match=r"(other tokens|other logits) than its bundle's graph: dense"):
        ort.build(tiny_bundle)
    assert listing(engine_cache) == set()


def test_a_failed_rebuild_leaves_the_old_engine(
    tiny_bundle: Bundle, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise errors.EngineError("the disk is full")

    before = stamps(engine)
    monkeypatch.setattr(ort._Part, "_optimise", fail)
    with pytest.raises(errors.EngineError, match="the disk is full"):
        ort.build(tiny_bundle, directory=engine, force=True)
    assert stamps(engine) == before and listing(tmp_path) == {"engine"}


def outputs(kept: Any, logits: Any) -> list[parity.Output]:
    return [parity.Output(tuple(np.array(x, np.float32) for x in logits), tuple(np.array(x) for x in kept))]


@pytest.mark.parametrize(
    ("kept", "logits", "match"),
    [
        ([[[0, 2]]], [[[1.0, 2.0]], [[1.0, 2.0]]], r"other tokens .*: dense, stage 1, 1 of 2 indices differ"),
        ([[[0, 1, 2]]], [[[1.0, 2.0]], [[1.0, 2.0]]], "other tokens"),
        ([[[0, 1]]], [[[1.0, 2.0]], [[1.0, 2.002]]], r"other logits .*: dense, decode step 1: difference 0\.002"),
        ([[[0, 1]]], [[[1.0, float("nan")]], [[1.0, 2.0]]], "dense, prefill: difference nan"),
    ],
)
def test_what_parity_refuses(kept: Any, logits: Any, match: str) -> None:
    case = parity.Case("dense", (np.arange(6),), np.array([[2]]))
    expected = outputs([[[0, 1]]], [[[1.0, 2.0]], [[1.0, 2.0]]])
    assert parity.compare([case], expected, expected, "float32").difference == 0
    with pytest.raises(errors.ParityError, match=match):
        parity.compare([case], expected, outputs(kept, logits), "float32")


def test_parity_runs_little_on_a_large_model(tiny_bundle: Bundle) -> None:
    model = replace(tiny_bundle.manifest.model, parameters=500_000_000)
    made = parity.cases(model, ())
    assert [case.name for case in made] == ["dense", "padded batch"]
    assert max(len(row) for case in made for row in case.rows) == 32 + parity.DECODE_STEPS
    short = parity.cases(replace(model, max_positions=6), tiny_bundle.manifest.stages)
    assert max(len(row) for case in short for row in case.rows) == 6


def test_too_little_memory(
    tiny_bundle: Bundle, engine_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal: 8000000 kB\nMemAvailable: 204800 kB\n")
    with pytest.raises(errors.EngineError, match=r"needs about 25\d MiB of memory, but 200 MiB are available"):
        ort.build(tiny_bundle)
    assert listing(engine_cache) == set()
    (tmp_path / "meminfo").write_text("something else")
    ort.build(tiny_bundle)


def test_too_little_disk(tiny_bundle: Bundle, engine_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1 << 20))  # type: ignore[attr-defined]
    with pytest.raises(errors.EngineError, match=r"needs about 6\d MiB of disk space, but .* has 1 MiB"):
        ort.build(tiny_bundle)
    assert listing(engine_cache) == set()


def test_a_damaged_bundle_gets_no_engine(tiny_graph: Path, tmp_path: Path, engine_cache: Path) -> None:
    bundle = write_bundle(tmp_path / "b", tiny_graph)
    flip(bundle.path)
    with pytest.raises(errors.BundleChecksumError):
        ort.build(bundle)
    shutil.rmtree(bundle.path)
    write_bundle(tmp_path / "b", tiny_graph, parameters=1)
    with pytest.raises(errors.EngineError, match="has changed since it was opened"):
        ort.build(bundle)
    assert listing(engine_cache) == set()


# --- builders that are killed, and several at once

BUILD = """
import os, signal, sys
from fstq_infer.bundle import Bundle
from fstq_engines import ort
def say(step):
    print(step.split()[0], file=sys.stderr)
    if step.startswith(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
print(ort.build(Bundle.open(sys.argv[1]), progress=say, force="force" in sys.argv))
"""


def start(bundle: Bundle, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(bundle.path), *arguments], stdout=-1, stderr=-1, text=True
    )


@posix
@pytest.mark.parametrize("step", ["optimising", "comparing"])
def test_kill_9_leaves_no_half_engine(tiny_bundle: Bundle, engine_cache: Path, step: str) -> None:
    killed = start(tiny_bundle, step)
    assert killed.communicate()[0] == "" and killed.returncode == -9
    key = ort.identity(tiny_bundle).key
    assert listing(engine_cache) == {f".{key}.partial-{killed.pid}"}
    engine = ort.build(tiny_bundle)
    assert listing(engine_cache) == {key}
    before = stamps(engine)
    assert start(tiny_bundle, step, "force").wait() == -9  # a rebuild that is killed
    assert stamps(engine) == before
    Sidecar.read(engine).verify(engine, checksums=True)


@posix
def test_kill_9_at_any_time(tiny_bundle: Bundle, engine_cache: Path) -> None:
    key = ort.identity(tiny_bundle).key
    for delay in (0.0, 0.02, 0.05):
        builder = start(tiny_bundle, "never")
        for _ in range(2000):
            if any(".partial-" in name for name in listing(engine_cache)) or builder.poll() is not None:
                break
            time.sleep(0.005)
        time.sleep(delay)
        builder.kill()
        builder.communicate()
        if key in listing(engine_cache):
            Sidecar.read(engine_cache / key).verify(engine_cache / key, checksums=True)
            shutil.rmtree(engine_cache / key)


@posix
def test_what_killed_builders_of_other_engines_left_goes_too(tiny_bundle: Bundle, engine_cache: Path) -> None:
    (engine_cache / f".{'a' * 20}.partial-1").mkdir(parents=True)
    (engine_cache / ".my.partial-1").mkdir()
    engine = ort.build(tiny_bundle)
    assert listing(engine_cache) == {engine.name, ".my.partial-1"}


@posix
def test_two_builders_at_once_build_one_engine(tiny_bundle: Bundle, engine_cache: Path) -> None:
    builders = [start(tiny_bundle, "never") for _ in range(2)]
    done = [builder.communicate() for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0]
    assert done[0][0] == done[1][0]
    assert sorted(said.count("optimising") for _, said in done) == [0, 1]
    assert {str(engine_cache / name) for name in listing(engine_cache)} == {done[0][0].strip()}


# --- graphs that name files of the machine


def external_tensor(onnx: Any, location: str, kind: int = 1) -> Any:
    tensor = onnx.TensorProto(name="w", data_type=kind, dims=[4], data_location=1)
    for key, value in (("offset", "0"), ("length", "16"), ("location", location)):
        tensor.external_data.add(key=key, value=value)
    return tensor


def graph_with(onnx: Any, place: str, location: str) -> bytes:
    """A model that reads one tensor from ``location``, somewhere in its structure."""
    helper, tensor = onnx.helper, external_tensor(onnx, location)
    constant = onnx.NodeProto(op_type="Constant", output=["y"])
    constant.attribute.add(name="value", type=4).t.CopyFrom(tensor)
    value = [helper.make_tensor_value_info("y", 1, [4])]
    inner = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "inner", [], value, [tensor])
    graph, functions = helper.make_graph([], "g", [], value), []
    if place == "initializer":
        graph.initializer.append(tensor)
    elif place == "sparse":
        indices = helper.make_tensor("i", 7, [4], [0, 1, 2, 3])
        graph.sparse_initializer.add(values=tensor, indices=indices, dims=[9])
    elif place == "sparse indices":
        graph.sparse_initializer.add(
            values=helper.make_tensor("v", 1, [4], [0.0] * 4), indices=external_tensor(onnx, location, 7), dims=[9]
        )
    elif place == "constant":
        graph.node.append(constant)
    elif place == "subgraph":
        graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner))
    elif place == "list of tensors":
        graph.node.add(op_type="X").attribute.add(name="t", type=9).tensors.append(tensor)
    elif place == "list of graphs":
        graph.node.add(op_type="X").attribute.add(name="g", type=10).graphs.append(inner)
    elif place == "function":
        functions.append(helper.make_function("d", "F", [], ["y"], [constant], [helper.make_opsetid("", 20)]))
    model = helper.make_model(graph, functions=functions, opset_imports=[helper.make_opsetid("", 20)])
    if place == "training":
        model.training_info.add().algorithm.CopyFrom(inner)
    data: bytes = model.SerializeToString()
    return data


PLACES = (
    *("initializer", "sparse", "sparse indices", "constant", "subgraph"),
    *("list of tensors", "list of graphs", "function", "training"),
)


@pytest.mark.parametrize("place", PLACES)
def test_the_scanner_sees_external_data_everywhere(place: str) -> None:
    onnx = pytest.importorskip("onnx", reason="needs the 'export' extra")
    assert external.locations(graph_with(onnx, place, "../../etc/passwd")) == {b"../../etc/passwd"}


def test_a_location_without_a_value_is_seen_too() -> None:
    tensor = bytes([13 << 3 | 2, 10, 10, 8]) + b"location"  # external_data: key, no value
    graph = bytes([5 << 3 | 2, len(tensor)]) + tensor
    assert external.locations(bytes([7 << 3 | 2, len(graph)]) + graph) == {b""}


@pytest.mark.parametrize(
    ("place", "location"),
    [
        ("initializer", "/etc/passwd"),
        ("initializer", "../secret"),
        ("sparse", "../secret"),
        ("constant", "sub/../../secret"),
        ("function", "link"),
        ("subgraph", "tokenizer.json"),
        ("initializer", ""),
        ("initializer", "*/_ORT_MEM_ADDR_/*"),
    ],
)
def test_external_data_outside_the_weights_file_is_refused(
    tmp_path: Path, engine_cache: Path, monkeypatch: pytest.MonkeyPatch, place: str, location: str
) -> None:
    onnx = pytest.importorskip("onnx", reason="needs the 'export' extra")
    (tmp_path / "secret").write_bytes(b"secret" * 10)
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "model.onnx").write_bytes(graph_with(onnx, place, location))
    (tmp_path / "graph" / "model.onnx.data").write_bytes(b"\0" * 16)
    bundle = write_bundle(tmp_path / "b", tmp_path / "graph", (), layers=1)
    (bundle.path / "link").symlink_to("../secret")
    monkeypatch.setattr(ort, "OrtEngine", None)  # no session may be made
    with pytest.raises(errors.BundlePathError, match=r"reads weights from b'.*expected only model\.onnx\.data"):
        ort.build(bundle)
    assert listing(engine_cache) == set()


def test_the_tiny_graph_reads_its_weights_file_only(tiny_bundle: Bundle, built: Path) -> None:
    for folder in (tiny_bundle.path, built):
        assert external.locations((folder / "model.onnx").read_bytes()) == {b"model.onnx.data"}
    with pytest.raises(errors.BundlePathError, match="expected only no file"):
        external.check_external_data(built / "model.onnx", [])


def nested(depth: int) -> bytes:
    """Graphs in attributes of nodes in graphs, without a tensor."""
    message = b""
    for number in [7, *[1, 5, 6] * depth][::-1]:
        size, length = len(message), b""
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        message = bytes([number << 3 | 2]) + length + bytes([size]) + message
    return message


def test_deep_nesting_does_not_exhaust_the_stack() -> None:
    assert external.locations(nested(3000)) == set()


@pytest.mark.parametrize("data", [b"\x3a\x05ab", b"\x3a", b"\x3b", b"\xff" * 20, b"\x0d\x00", b"\x08"])
def test_what_is_no_protobuf(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(errors.EngineError, match="is no ONNX graph"):
        external.check_external_data(tmp_path / "model.onnx", ["model.onnx.data"])


@given(st.binary(max_size=200))
def test_the_scanner_ends_on_any_bytes(data: bytes) -> None:
    try:
        found = external.locations(data)
    except ValueError:
        return
    assert isinstance(found, set)
