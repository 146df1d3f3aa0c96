"""fstq_engines.tensorrt.build: what an engine is built for, what is refused beforehand, what lies in its directory."""

from __future__ import annotations

import _thread
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the ONNX Runtime backend needs the 'ort' extra")
ir = pytest.importorskip("onnx_ir", reason="lowering needs onnx-ir")

from fstq_engines import cache  # noqa: E402
from fstq_engines.tensorrt import build, gpu, lint, lowering, memory, module, parse, settings  # noqa: E402
from fstq_engines.tensorrt.capabilities import CONSERVATIVE, TABLE, capabilities  # noqa: E402

from fstq_infer.adapters import tensors  # noqa: E402
from fstq_infer.bundle import Bundle  # noqa: E402
from fstq_infer.errors import EngineError, EngineMismatchError, OptionError  # noqa: E402
from fstq_infer.runtime.load import build_engine  # noqa: E402
from fstq_infer.runtime.trt_adapters import PROBES, REMEMBERED  # noqa: E402
from tests.conftest import write_bundle  # noqa: E402
from tests.engines.tensorrt.lowered import ROWS, lowered, session  # noqa: E402

ORIN = gpu.Gpu("Orin", 87, "12.6")
SMALL = {"context": 64, "prompt": 32}


@pytest.fixture(scope="module")
def dense(tiny_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle without pruning stages, which builds in a moment."""
    from fstq_export import decoder, source

    folder = tmp_path_factory.mktemp("dense")
    decoder.save(decoder.build_graph(source.resolve(str(tiny_graph / "hf")), "float32", []), folder)
    return write_bundle(folder / "dense.bundle", folder, ())


@pytest.fixture(scope="module")
def rtx() -> module.TensorRT:
    try:
        return module.find("tensorrt-rtx")
    except EngineError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("product", "version", "row"),
    [
        ("tensorrt", "10.3.0", "decomposed"),
        ("tensorrt", "10.13.3.9", "decomposed"),
        ("tensorrt", "10.14.1", "nodes"),
        ("tensorrt", "10.16.0.72", "nodes and cache update"),
        ("tensorrt", "11.1.0", "nodes and cache update"),
        ("tensorrt", "12.0.0", "decomposed"),
        ("tensorrt", "9.9", "decomposed"),
        ("tensorrt", "who knows", "decomposed"),
        ("tensorrt_rtx", "1.7.1.116", "nodes and cache update"),
        ("tensorrt_rtx", "1.0.0", "decomposed"),
        ("something", "10.16", "decomposed"),
    ],
)
def test_unknown_versions_get_the_most_conservative_row(product: str, version: str, row: str) -> None:
    assert capabilities(product, version, 87).name == row


@pytest.mark.parametrize(
    ("sm", "fp8", "nvfp4"), [(87, 0, 0), (86, 0, 0), (89, 1, 0), (110, 1, 1), (120, 1, 1), (999, 0, 0)]
)
def test_formats_follow_the_architecture(sm: int, fp8: int, nvfp4: int) -> None:
    found = capabilities("tensorrt", "10.16", sm)
    assert (found.fp8, found.nvfp4) == (bool(fp8), bool(nvfp4))


def test_attention_kernels_are_for_half_precision_and_wide_heads() -> None:
    row = TABLE["tensorrt"][1][1]
    assert row.attends("float16", 64) and row.attends("bfloat16", 16)
    assert not (row.attends("float32", 64) or row.attends("float16", 8) or CONSERVATIVE.attends("float16", 64))


@pytest.mark.parametrize(
    ("backend", "says"), [("tensorrt", "JetPack"), ("tensorrt-rtx", r"fstq-infer\[tensorrt-rtx\]")]
)
def test_a_missing_module_names_how_to_get_it(
    backend: str, says: str, dense: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module.BACKENDS[backend], None)
    with pytest.raises(EngineError, match=says):
        build_engine(dense, backend)


def test_without_a_gpu_lint_is_named(dense: Bundle, rtx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "this_gpu", lambda: None)
    with pytest.raises(EngineError, match=r"no GPU here.*fstq lint .*dense\.bundle --target orin-nano"):
        build_engine(dense, "tensorrt-rtx")


def test_bad_settings_are_refused(dense: Bundle) -> None:
    for options, says in (
        ({"context": 0}, "context is 0"),
        ({"dtype": "floot16"}, "did you mean 'float16'"),
        ({"context": 64, "prompt": 65}, "longer than the context"),
        ({"context": 10_000}, "the model has 160 positions"),
        ({"batch": True}, "batch is True"),
    ):
        with pytest.raises(OptionError, match=says):
            settings.default_settings(160, **options)
    with pytest.raises(OptionError, match=r"'context' is an option of the backends tensorrt"):
        build_engine(dense, "ort", options={"context": 64})
    with pytest.raises(OptionError, match="did you mean 'orin-nano'"):
        lint.lint(dense, "orin-nanno")


def test_profiles_cover_prefill_and_decoding(tiny_bundle: Bundle) -> None:
    asked = settings.Settings(1000, 400, 2)
    for row, past in ((CONSERVATIVE, (0, 50, 1000)), (ROWS["cache update"], (1, 50, 1000))):
        prefill, decode = settings.profiles(asked, tiny_bundle.manifest.stages, row)
        assert prefill["sequence"] == (1, 200, 400) and decode["sequence"] == (1, 1, 1)
        assert prefill["columns_2"] == (1, 50, 400) and decode["columns_2"] == (1, 1, 1)
        assert prefill["batch"] == (1, 1, 2) and decode["past_2"] == past
        assert prefill["past_0"][2] == 1000 and prefill["past_0"][0] == past[0]


def test_adapters_have_a_range_of_ranks_and_other_dimensions_are_refused() -> None:
    asked = settings.Settings(1000, 400, 2)
    assert "rank" not in settings.profiles(asked, (), CONSERVATIVE)[0]
    profile = settings.profiles(asked, (), CONSERVATIVE, adapters=True)[1]
    a = ir.Value(name="lora.0.a", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape(["adapters", 32, "rank"]))
    assert settings.shapes(a, profile) == ([1, 32, 0], [1, 32, 16], [2, 32, 64])
    fixed = ir.Value(name="lora.0.scale", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape([1]))
    assert settings.shapes(fixed, profile) is None
    odd = ir.Value(name="odd", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape(["batch", "z"]))
    with pytest.raises(EngineError, match="dimension 'z'"):
        settings.shapes(odd, profile)


def with_adapter(path: Path) -> ir.Model:
    """The graph with an adapter on the first projection: x A B, A (width, rank) and B (rank, outputs) inputs."""
    model = ir.load(path)
    node = next(n for n in model.graph if n.op_type == "MatMul" and "q_proj" in (n.name or ""))
    width, outputs = node.inputs[1].shape
    a, b = (
        ir.Value(name=f"lora.0.{name}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        for name, shape in (("a", [width, "rank"]), ("b", ["rank", outputs]))
    )
    model.graph.inputs.extend([a, b])
    tape = ir.tape.Tape()
    delta = tape.op("MatMul", [tape.op("MatMul", [node.inputs[0], a]), b])
    total = tape.op("Add", [node.outputs[0], delta])
    for new, name in zip(tape.nodes, ("down", "up", "add"), strict=True):
        new.name = f"model/layers.0/lora/{name}"
    for value in (tape.nodes[0].outputs[0], delta, total):
        value.type = ir.TensorType(ir.DataType.FLOAT)
    uses = list(node.outputs[0].uses())
    for user, index in uses:
        user.replace_input_with(index, total)
    total.producer().replace_input_with(0, node.outputs[0])
    model.graph.insert_after(node, tape.nodes)
    return model


@pytest.mark.parametrize("rank", [0, 3])
def test_inputs_of_adapters_are_carried_through(rank: int, dense: Bundle, tmp_path: Path) -> None:
    path, rng = dense.file("model.onnx"), np.random.default_rng(0)
    plain = with_adapter(path)
    feeds: dict[str, Any] = {"input_ids": np.arange(9)[None] + 3, "position_ids": np.arange(9)[None]}
    feeds["lora.0.a"] = rng.normal(size=(32, rank)).astype(np.float32)
    feeds["lora.0.b"] = rng.normal(size=(rank, 32)).astype(np.float32)
    results = []
    for model in (plain, lowering.lower(with_adapter(path), ROWS["nodes"], [], "float32", "float32", 64)):
        run = session(model, tmp_path)
        given = dict(feeds)
        for port in run.get_inputs():
            if port.name.startswith("past_"):
                shape = [1 if i == 0 else d if isinstance(d, int) else 0 for i, d in enumerate(port.shape)]
                given[port.name] = np.zeros(shape, np.int64 if "positions" in port.name else np.float32)
        results.append(run.run(["logits"], given)[0])
    np.testing.assert_allclose(results[0], results[1], atol=1e-4)
    half = lowering.lower(with_adapter(path), ROWS["nodes"], [], "float32", "float16", 64)
    kinds = {value.name: value.dtype for value in half.graph.inputs}
    assert kinds["lora.0.a"] == kinds["lora.0.b"] == ir.DataType.FLOAT16


def test_too_little_memory_names_the_smallest_setting_that_fits(tiny_bundle: Bundle) -> None:
    model = lowered(tiny_bundle.file("model.onnx"), "decomposed", [1, 3], "float16")
    info = replace(tiny_bundle.manifest.model, hidden_size=4096)
    asked = settings.Settings(8192, 8192, 4)
    free = memory.BASE + (400 << 20)
    with pytest.raises(
        EngineError, match=r"building and running needs about .* but 1,100 MiB are free\. This would fit: "
    ) as caught:
        memory.require(model, info, asked, free)
    words = str(caught.value).split("This would fit: ")[1].split(";")[0].split()
    fits = settings.Settings(int(words[1]), int(words[3]), int(words[5]))
    assert fits.context < 8192 and memory.require(model, info, fits, free).build <= free
    with pytest.raises(EngineError, match="export with fewer bits"):
        memory.require(model, info, asked, memory.BASE)
    assert memory.require(model, info, asked, None).build > free  # nothing known: tried


def test_adapters_that_stay_on_the_device_are_counted(dense: Bundle) -> None:
    model = lowering.lower(with_adapter(dense.file("model.onnx")), CONSERVATIVE, [], "float32", "float16", 64)
    info, asked = dense.manifest.model, settings.Settings(64, 32, 1, rank=1 << 20)
    found = memory.estimate(model, info, asked)
    assert found.adapters == (32 + 32) * 2 << 20 and found.most == found.run > found.build
    assert found.run - memory.estimate(model, info, replace(asked, rank=1)).run == REMEMBERED * (
        (64 * 2 << 20) - 64 * 2
    )
    with pytest.raises(EngineError, match=r"512 MiB for 4 combinations of adapters.*--rank 262144"):
        memory.require(model, info, asked, found.build)
    assert memory.require(model, info, asked, found.run) == found


def test_what_would_fit_counts_the_rows_that_profiles_need(tiny_bundle: Bundle) -> None:
    model = lowered(tiny_bundle.file("model.onnx"), "decomposed", [1, 3], "float16")
    info = replace(tiny_bundle.manifest.model, hidden_size=4096)
    one, two = (memory.require(model, info, settings.Settings(2048, 2048), None, least) for least in (1, 2))
    assert two.caches == 2 * one.caches and two.scratch == 2 * one.scratch
    with pytest.raises(EngineError, match=r"2 x 2048 cached tokens.*--context \d+ --prompt \d+ --batch 2;"):
        memory.require(model, info, settings.Settings(2048, 2048), (one.build + two.build) // 2, 2)


def test_a_weight_that_half_precision_cannot_hold_is_named(dense: Bundle) -> None:
    model = ir.load(dense.file("model.onnx"))
    value = next(v for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT and len(v.shape) == 2)
    value.const_value = ir.tensor(np.full([int(d) for d in value.shape], 1e5, np.float32), name=value.name)
    with pytest.raises(EngineError, match=r"holds 1e\+05, float16 ends at 65504; build with --dtype bfloat16"):
        lowering.lower(model, CONSERVATIVE, [], "float32", "float16", 64)


def test_a_foreign_graph_is_refused_by_name(dense: Bundle) -> None:
    model = ir.load(dense.file("model.onnx"))
    node = next(n for n in model.graph if n.op_type == "Attention")
    node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
    with pytest.raises(EngineError, match=r"cannot be lowered.*is_causal.*upper-left.*Export it again"):
        lowering.lower(model, CONSERVATIVE, [], "float32", "float32", 64)


def test_an_engine_for_another_machine(dense: Bundle, rtx: Any, engine_cache: Path, tmp_path: Path) -> None:
    options = SMALL | {"target": "sm86", "dtype": "float32", "workspace": 256}
    said: list[str] = []
    path = build_engine(dense, "tensorrt-rtx", options=options, progress=said.append)
    assert path.parent == engine_cache and {p.name for p in path.iterdir()} == {"engine.json", "model.plan"}
    sidecar = json.loads((path / "engine.json").read_text())
    details = sidecar["details"]
    assert sidecar["backend"] == "tensorrt_rtx" and details["tensorrt"] == rtx.version and details["sm"] == 86
    assert details["profiles"][0]["sequence"] == [1, 16, 32] and len(details["graph_sha256"]) == 64
    assert sidecar["build_seconds"] > 0 < sidecar["peak_rss_bytes"] and sidecar["parity"]["checked"] is False
    assert any("parsing" in text for text in said) and any("Building" in text for text in said)
    stamp = (path / "model.plan").stat().st_mtime_ns
    assert build_engine(dense, "tensorrt-rtx", options=options) == path  # found, not built
    assert (path / "model.plan").stat().st_mtime_ns == stamp
    with pytest.raises(EngineMismatchError, match=r"its settings was|settings was") as caught:
        build_engine(dense, "tensorrt-rtx", directory=path, options=options | {"context": 96})
    assert "--context 64" in str(caught.value) and "--context 96" in str(caught.value)
    assert "fstq build" in str(caught.value) and "--backend tensorrt-rtx" in str(caught.value)


def test_a_bundle_with_adapters_builds(
    tiny_graph: Path, rtx: Any, engine_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One stage; every linear layer takes an adapter of rank 0 to the bundle's, and adapters bring probes."""
    from fstq_export.passes.pruning import PruneStage

    from fstq_infer.fisher.probe import Probe
    from fstq_infer.runtime.engine import Stage
    from tests.conftest import HEADS, WIDTH
    from tests.engines.tensorrt.adapted import adapted_bundle

    stages = [PruneStage(Stage(2, 1, 4), Probe(WIDTH, HEADS).arrays())]
    made = adapted_bundle(tiny_graph / "hf", tmp_path / "adapted", stages)
    path = build_engine(made, "tensorrt-rtx", options=SMALL | {"target": "sm86", "batch": 2})
    assert {p.name for p in path.iterdir()} == {"engine.json", "model.plan", PROBES}
    details = json.loads((path / "engine.json").read_text())["details"]
    assert all(p["rank"] == [0, 2, 8] and p["adapters"] == [1, 1, 2] for p in details["profiles"])
    found, lora = tensors.read(path / PROBES), made.manifest.lora
    assert lora is not None and {name: one.shape for name, one in found.items()} == lora.probes
    lint.command(made.path, target="orin-nano", version=None, options=SMALL, json=False)
    assert "it was not run" in capsys.readouterr().out.replace("\n", " ")


def test_tensorrt_itself_builds_for_the_gpu_it_runs_on(dense: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find", lambda _: module.TensorRT(None, "tensorrt", "10.3.0"))
    here = build.plan(dense, "tensorrt", {"target": "orin-nano"}, ORIN)
    assert here.gpu is ORIN and here.build_sm is None and not here.gpu.elsewhere
    with pytest.raises(
        EngineError, match=r"runs on, SM 87 \(Orin\), not for thor \(SM 110\).*fstq lint .*--target thor"
    ):
        build.plan(dense, "tensorrt", {"target": "thor"}, ORIN)


def test_without_options_the_engine_built_last_will_do(
    dense: Bundle, rtx: Any, engine_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = gpu.Gpu("RTX", 86, "13.0")
    monkeypatch.setattr(gpu, "this_gpu", lambda: here)
    monkeypatch.setattr(build, "_compare", lambda *_: {"checked": False, "why": "a test"})
    compile_plan = parse.compile_plan

    def for_86(trt: Any, job: parse.Job, out: Path, say: Any) -> Any:  # there is no GPU to ask what it is
        return compile_plan(trt, replace(job, sm=86), out, say)

    monkeypatch.setattr(parse, "compile_plan", for_86)
    first = build_engine(dense, "tensorrt-rtx", options=SMALL)
    assert build_engine(dense, "tensorrt-rtx") == first
    sidecar = json.loads((first / "engine.json").read_text())
    assert sidecar["device"] == "GPU" and "RTX, SM 86, CUDA 13.0" in sidecar["machine"]
    here = gpu.Gpu("RTX", 89, "13.0")
    assert build._last_built(build.plan(dense, "tensorrt-rtx").identity) is None


def test_ctrl_c_ends_a_build_and_leaves_nothing(dense: Bundle, rtx: Any, engine_cache: Path) -> None:
    def say(text: str) -> None:
        if "Building" in text:
            _thread.interrupt_main()

    with pytest.raises(KeyboardInterrupt):
        build.build(dense, backend="tensorrt-rtx", options=SMALL | {"target": "sm86"}, progress=say)
    assert list(engine_cache.iterdir()) == []


def test_a_build_that_leaves_no_file_is_an_error(
    dense: Bundle, rtx: Any, engine_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parse, "_serialize", lambda *_: None)
    with pytest.raises(EngineError, match="left no engine"):
        build.build(dense, backend="tensorrt-rtx", options=SMALL | {"target": "sm86"})
    assert list(engine_cache.iterdir()) == []


def test_a_full_disk_is_told(dense: Bundle, rtx: Any, tmp_path: Path) -> None:
    made = build.plan(dense, "tensorrt-rtx", SMALL | {"target": "sm86"})
    (tmp_path / "model.plan").symlink_to("/dev/full")
    with pytest.raises(EngineError, match=r"model\.plan cannot be written: .*No space left.*Free some space"):
        build.compile_into(made, tmp_path, lambda _: None)


def test_scratch_memory_is_a_number_above_zero(dense: Bundle, rtx: Any) -> None:
    with pytest.raises(OptionError, match="workspace is -5; expected MiB above 0"):
        build.plan(dense, "tensorrt-rtx", {"workspace": -5, "target": "sm86"})


def test_an_engine_that_no_device_could_load_is_not_built(dense: Bundle, rtx: Any, engine_cache: Path) -> None:
    with pytest.raises(EngineError, match=r"does not build for orin-nano \(SM 87\).*fstq lint .* --target orin-nano"):
        build_engine(dense, "tensorrt-rtx", options=SMALL | {"target": "orin-nano"})


def test_a_timing_cache_of_another_gpu_is_measured_anew(tmp_path: Path) -> None:
    class Config:
        def create_timing_cache(self, data: bytes) -> bytes:
            return data

        def set_timing_cache(self, timing: bytes, ignore: bool) -> bool:
            self.kept = timing
            return timing != b"other"

    config, path = Config(), tmp_path / "timing"
    job = parse.Job(tmp_path, None, [], timing_cache=path)  # type: ignore[arg-type]
    assert parse._timing(None, job, config) == b""
    path.write_bytes(b"mine")
    assert parse._timing(None, job, config) == b"mine" == config.kept
    path.write_bytes(b"other")
    assert parse._timing(None, job, config) == b"" == config.kept


def test_lint_reports_seconds_and_memory(dense: Bundle, rtx: Any) -> None:
    report = lint.lint(dense, "orin-nano", options=SMALL)
    assert report.row == "decomposed" and report.tensorrt == "10.3" and "SM 86" in report.built_with
    assert report.plan_bytes > 0 < report.peak_rss_bytes and report.seconds > 0
    newer = lint.lint(dense, "orin-nano", "10.16", SMALL)
    assert newer.row == "nodes and cache update"


def test_an_identity_without_arguments_has_the_key_of_before() -> None:
    cpu = cache.Cpu("x", "0" * 64)
    one = cache.Identity("a", "onnxruntime", "1.23", cpu)
    assert one.key == cache.Identity("a", "onnxruntime", "1.23", cpu, "").key
    assert one.key != cache.Identity("a", "onnxruntime", "1.23", cpu, "--context 1").key


def test_the_commands(dense: Bundle, rtx: Any, engine_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fstq_infer import cli

    small = ["--context", "64", "--prompt", "32"]
    for arguments, says in (
        (
            ["build", str(dense.path), "--backend", "tensorrt-rtx", "--target", "sm86", *small],
            "not compared: built for sm86",
        ),
        (["lint", str(dense.path), "--target", "sm86", *small], "it was not run"),
        (["lint", str(dense.path), "--target", "orin", *small], "did you mean"),
        (["build", str(dense.path), "--context", "64"], "is an option of the backends tensorrt"),
        (["build", str(dense.path), "--backend", "tensorr"], "did you mean 'tensorrt'"),
    ):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        said = capsys.readouterr()
        assert says in (said.out + said.err).replace("\n", " ")
