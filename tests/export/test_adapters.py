"""Adapters through export and engine against Transformers with PEFT: families, kinds of LoRA, quantized bases."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .adapters import adapter, family, greedy, logits, with_adapter  # isort: skip - skips with a reason
from .families import FAMILIES, MORE, Runner, batch, ids  # isort: skip

import onnx_ir as ir
from fstq_engines import ort as backend
from fstq_engines.lora import WithoutAdapters
from fstq_engines.lower import Lowering
from fstq_export import decoder, linears, source
from fstq_export.adapters import Wanted, adapt_in_place, empty, inputs, merged
from fstq_export.command import adapter_verdict
from fstq_export.passes.lora import LoraInputs, linear_nodes
from fstq_export.pipeline import Request, export
from fstq_export.recipe import Recipe
from fstq_export.reference import reference
from fstq_export.wanted import Precision
from onnx_ir.passes import PreconditionError

from fstq_infer import Generator
from fstq_infer.adapters import peft, store
from fstq_infer.bundle import Bundle
from fstq_infer.errors import (
    AdapterMismatchError,
    AdapterNameError,
    EngineError,
    OptionError,
    ParityError,
    VerificationError,
)
from fstq_infer.runtime.load import build_engine, open_engine
from fstq_infer.runtime.ort import ADAPTED, MODEL
from fstq_infer.runtime.ort_caches import SharedCache

TOLERANCE = 1e-3
CASES = ["dense", "pruned", "adaptive", "padded batch"]
DEMO = Path(decoder.__file__).parent / "demo" / "model"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 7},
    "patterns": {
        "rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.up_proj": 9},
        "alpha_pattern": {"v_proj": 16, r"layers\.3\..*": 1},
    },
    "two layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 2]},
    "pattern": {"target_modules": r".*\.[012]\.mlp\.(up|gate)_proj"},
}


def graph_of(model: Path, folders: dict[str, Path], out: Path, targets: str | None = None) -> tuple[Runner, Any, Any]:
    """(the dense graph with inputs for adapters, its ports, the model's source)."""
    wanted = Wanted(folders, () if targets is None else tuple(targets.split(",")))
    found, ports = source.resolve(str(model)), []

    def given(graph: ir.Graph) -> Any:
        ports.append(wanted.ports(found, graph, "float32", wanted.read()))
        return ports[0]

    built = decoder.build_graph(found, "float32", [], None, None, given)
    out.mkdir(exist_ok=True)
    return Runner(built, out), ports[0], found


def check(model: Path, folder: Path, tmp_path: Path) -> None:
    """Logits with and without the adapter, in a padded batch of a row with it and a row without."""
    run, ports, found = graph_of(model, {"one": folder}, tmp_path / "graph")
    prompts = [ids(23), ids(17, 1)]
    given, positions = batch(prompts)
    none = empty(ports, "float32")
    one = inputs(peft.read(folder), ports, "float32", found.sha256)
    mixed = {name: np.concatenate([array, np.zeros_like(array)]) for name, array in one.items()}
    plain, adapted = with_adapter(model, None), with_adapter(model, folder)
    base, changed = [[logits(m, p) for p in prompts] for m in (plain, adapted)]
    assert np.abs(changed[0] - base[0]).max() > 0.1 * base[0].std()
    for more, wanted in ((none, base), (one, changed), (mixed, [changed[0], base[1]])):
        got = run.fresh(input_ids=given, position_ids=positions, **more)["logits"][:, 0]
        for row, expected in zip(got, wanted, strict=True):
            assert np.abs(row - expected).max() < TOLERANCE * max(1.0, float(expected.std()))


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gemma2", "qwen2", "gpt_neox"])
def test_families(name: str, tmp_path: Path) -> None:
    model = family(name, tmp_path / "model")
    check(model, adapter(model, tmp_path / "lora"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*FAMILIES, *MORE} - {"llama", "phi3", "gpt2", "gemma2", "qwen2", "gpt_neox"}))
def test_further_families(name: str, tmp_path: Path) -> None:
    model = family(name, tmp_path / "model")
    check(model, adapter(model, tmp_path / "lora"), tmp_path)


def test_the_demo_model(tmp_path: Path) -> None:
    check(DEMO, adapter(DEMO, tmp_path / "lora", gain=0.5), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("formats", [None, "int8"])
def test_the_demo_models_engine(formats: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSTQ_CACHE", str(tmp_path / "cache"))
    folder = adapter(DEMO, tmp_path / "lora", gain=0.5)
    request = Request(
        str(DEMO),
        tmp_path / "b",
        Recipe(prune_layer=2, keep=0.5),
        precision=Precision.parse(formats, None, None),
        adapters=Wanted.parse([f"one={folder}"]),
    )
    done = export(request)
    assert done.report["adapters"]["one"]["verification"]["dense"]["logits"] < TOLERANCE
    generator, text = Generator.load(tmp_path / "b", threads=1), "Mora lives in Lisbon. Where does Mora live?"
    prompt = generator.tokenizer.encode(text)
    found = list(generator.generate(text, keep=1.0, max_tokens=24, adapter="one").tokens)
    if formats is None:
        wanted = greedy(with_adapter(DEMO, folder), prompt, 24)
        assert found == wanted[: len(found)]
    assert found != list(generator.generate(text, keep=1.0, max_tokens=24).tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_lora(kind: str, tmp_path: Path) -> None:
    model = family("llama", tmp_path / "model")
    check(model, adapter(model, tmp_path / "lora", **KINDS[kind]), tmp_path)


def test_conv1d_with_and_without_fan_in_fan_out(tmp_path: Path) -> None:
    model = family("gpt2", tmp_path / "model")
    check(model, adapter(model, tmp_path / "lora", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merging_gives_pefts_model(name: str, tmp_path: Path) -> None:
    model = family(name, tmp_path / "model")
    folder = adapter(model, tmp_path / "lora", use_rslora=True)
    wanted = logits(with_adapter(model, folder), ids(20))
    before = source.resolve(str(model))
    with merged(before, folder, tmp_path / "merged") as found:
        assert found.sha256 != before.sha256
        with reference(found) as frozen:
            assert np.abs(logits(frozen.model, ids(20)) - wanted).max() < 1e-4
        run = Runner(decoder.build_graph(found, "float32", []), tmp_path / "lora")
        got = run.fresh(input_ids=np.array([ids(20)]), position_ids=np.arange(20)[None])["logits"][0, 0]
    assert np.abs(got - wanted).max() < 1e-3 and not (tmp_path / "merged").exists()
    with reference(before) as frozen:
        adapt_in_place(frozen, peft.read(folder))
        assert np.abs(logits(frozen.model, ids(20)) - wanted).max() < 1e-4


def test_a_merged_adapter_is_in_the_bundle_for_good(
    built: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSTQ_CACHE", str(tmp_path / "cache"))
    wanted = Wanted.parse([f"more={built['law']}"], merge=built["med"])
    export(Request(str(built["model"]), tmp_path / "b", adapters=wanted))
    manifest = Bundle.open(tmp_path / "b").manifest
    assert manifest.provenance.source == "model with adapter med" and list(manifest.adapters) == ["more"]
    generator = Generator.load(tmp_path / "b", threads=1)
    expected = greedy(with_adapter(built["model"], built["med"]), ids(30), 8)
    assert list(generator.generate(ids(30), max_tokens=8).tokens) == expected
    assert list(generator.generate(ids(30), max_tokens=8, adapter="more").tokens) != expected
    assert {path.name for path in tmp_path.iterdir()} == {"b", "cache"}


def test_targets_decide_which_layers_get_inputs(tmp_path: Path) -> None:
    model = family("llama", tmp_path / "model")
    folder = adapter(model, tmp_path / "lora", target_modules=["q_proj"])
    assert len(graph_of(model, {"x": folder}, tmp_path / "1")[1].linears) == 4
    assert len(graph_of(model, {"x": folder}, tmp_path / "2", "v_proj,mlp.up_proj")[1].linears) == 12
    assert len(graph_of(model, {}, tmp_path / "3", "all")[1].linears) == 28
    with pytest.raises(OptionError, match="no linear layer is named 'q_prj'; did you mean 'q_proj'"):
        graph_of(model, {}, tmp_path / "4", "q_prj")


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"adapters": ["a=x", "A=y"]}, "two adapters are named 'A'"),
        ({"rank": 0, "targets": "all"}, "adapter-rank is 0"),
        ({"rank": 8}, "no meaning without"),
    ],
)
def test_options_that_make_no_sense(given: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        Wanted.parse(**given)


def test_the_pass_keeps_to_its_preconditions(tmp_path: Path) -> None:
    model = family("llama", tmp_path / "model")
    found = source.resolve(str(model))
    graph = decoder.build_graph(found, "float32", [])
    every = list(linears.find(found, graph.graph, "float32").values())
    assert [one.name for one in every] == list(linear_nodes(graph.graph))
    before = [(node.op_type, node.name) for node in graph.graph]
    LoraInputs(every)(graph)
    assert sum((v.name or "").startswith("lora.") for v in graph.graph.inputs) == 56
    WithoutAdapters()(graph)  # an engine for requests without adapters is what it would be without this pass
    assert [(node.op_type, node.name) for node in graph.graph] == before
    assert not any((v.name or "").startswith("lora.") for v in graph.graph.inputs)
    with pytest.raises(Exception, match=r"no linear layer") as caught:
        LoraInputs([one for one in every if one.name == "0.mlp.up_proj"])(
            ir.Model(ir.Graph([], [], nodes=[]), ir_version=10)
        )
    assert isinstance(caught.value, PreconditionError) or isinstance(caught.value.__cause__, PreconditionError)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pruning bundle of a tiny Llama with two adapters, one of which changes two kinds of layers only."""
    folder = tmp_path_factory.mktemp("built")
    model = family("llama", folder / "model")
    med = adapter(model, folder / "med", seed=1)
    law = adapter(model, folder / "law", seed=2, target_modules=["q_proj", "v_proj"], r=3)
    wanted = Wanted.parse([str(med), str(law)])
    done = export(Request(str(model), folder / "b", Recipe(prune_layer=2, keep=0.5), adapters=wanted))
    assert max(one["verification"]["pruned"]["logits"] for one in done.report["adapters"].values()) < 1e-4
    return {"model": model, "med": med, "law": law, "bundle": folder / "b", "cache": folder / "cache"}


@pytest.fixture
def generator(built: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Generator:
    monkeypatch.setenv("FSTQ_CACHE", str(built["cache"]))
    return Generator.load(built["bundle"], threads=1)


def test_greedy_texts_equal_those_of_peft(built: dict[str, Path], generator: Generator) -> None:
    prompt = ids(60)
    assert generator.adapters == ("law", "med") and generator.adapter is None
    for name in ("med", None, "law", "med"):
        wanted = greedy(with_adapter(built["model"], built[name] if name else None), prompt, 12)
        assert list(generator.generate(prompt, keep=1.0, max_tokens=12, adapter=name).tokens) == wanted
        generator.set_adapter(name)
        assert generator.adapter == name
        assert list(generator.generate(prompt, keep=1.0, max_tokens=12).tokens) == wanted
    generator.set_adapter("med")
    assert (
        generator.generate(prompt, max_tokens=4, adapter=None).tokens
        == Generator.load(built["bundle"], threads=1).generate(prompt, max_tokens=4).tokens
    )


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_rows_of_a_batch_have_adapters_of_their_own(keep: float, generator: Generator) -> None:
    prompts = [ids(60), ids(41, 1), ids(50, 2), ids(60)]
    names = ["med", None, "law", "law"]
    options = {"keep": keep, "max_tokens": 8}
    single = [generator.generate(p, adapter=name, **options) for p, name in zip(prompts, names, strict=True)]
    batched = generator.generate(prompts, adapter=names, **options)
    assert [r.tokens for r in batched] == [r.tokens for r in single]
    assert [r.kept for r in batched] == [r.kept for r in single]
    assert len({r.tokens for r in batched}) == 4
    together = generator.generate(prompts, adapter="med", **options)
    assert together[0].tokens == single[0].tokens


def test_sessions_read_the_conversation_again_with_another_adapter(generator: Generator) -> None:
    session, fresh = generator.session(), generator.session()
    options = {"max_tokens": 4, "keep": 1.0}
    session.send("hello there", adapter="med", **options)
    assert session.send(" and on", adapter="med", **options).cached_tokens > 0
    changed = session.send(" with another", adapter="law", **options)
    assert changed.cached_tokens == 0
    for text, name in (("hello there", "med"), (" and on", "med")):
        fresh.send(text, adapter=name, **options)
    assert fresh.send(" with another", adapter="law", **options).tokens == changed.tokens


def test_unknown_adapters(generator: Generator) -> None:
    with pytest.raises(AdapterNameError, match="no adapter 'mad'; did you mean 'med'"):
        generator.generate("x", adapter="mad")
    with pytest.raises(AdapterNameError, match="no adapter 'x'"):
        generator.set_adapter("x")
    with pytest.raises(OptionError, match="2 names; expected one name, or one for each of 1"):
        generator.generate([[5, 6]], adapter=["med", None])
    with pytest.raises(OptionError, match="one for each of 1"):
        generator.generate([5, 6], adapter=["med"])


def test_an_adapter_comes_and_goes_beside_a_built_engine(
    built: dict[str, Path], generator: Generator, tmp_path: Path
) -> None:
    bundle = Bundle.open(built["bundle"])
    engine = build_engine(bundle)
    sidecar = (engine / "engine.json").read_bytes()
    third = adapter(built["model"], tmp_path / "third", seed=5, r=64)
    store.add(built["bundle"], "third", third)
    try:
        assert build_engine(Bundle.open(built["bundle"])) == engine and (engine / "engine.json").read_bytes() == sidecar
        prompt = ids(30)
        wanted = greedy(with_adapter(built["model"], third), prompt, 8)
        assert list(generator.generate(prompt, keep=1.0, max_tokens=8, adapter="third").tokens) == wanted
    finally:
        store.remove(built["bundle"], "third")
    large = adapter(built["model"], tmp_path / "large", r=65)
    with pytest.raises(AdapterMismatchError, match="--adapter-rank 65"):
        store.add(built["bundle"], "large", large)


def test_the_engine_has_one_copy_of_the_weights(built: dict[str, Path], generator: Generator) -> None:
    engine = build_engine(Bundle.open(built["bundle"]))
    sizes = {path.name: path.stat().st_size for path in engine.iterdir()}
    assert {MODEL, ADAPTED, f"{MODEL}.data"} <= sizes.keys()
    assert sizes.get(f"{ADAPTED}.data", 0) < sizes[f"{MODEL}.data"] / 50
    parity = json.loads((engine / "engine.json").read_text())["parity"]
    assert parity["cases"] == CASES and parity["adapted"]["cases"] == [f"{case}, adapter" for case in CASES]


def test_a_quantized_base(built: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSTQ_CACHE", str(tmp_path / "cache"))
    wanted, formats = Wanted.parse([str(built["law"])]), Precision.parse("int8", None, None)
    recipe = Recipe(prune_layer=2, keep=0.5)
    done = export(Request(str(built["model"]), tmp_path / "b", recipe, precision=formats, adapters=wanted))
    assert done.report["adapters"]["law"]["verification"]["dense"]["logits"] < 1e-4  # codes, then the adapter
    generator = Generator.load(tmp_path / "b", threads=1)
    plain, adapted = (generator.generate(ids(40), adapter=name, max_tokens=6).tokens for name in (None, "law"))
    assert plain != adapted
    parity = json.loads((build_engine(Bundle.open(tmp_path / "b")) / "engine.json").read_text())["parity"]
    for found, ending in ((parity, ""), (parity["adapted"], ", adapter")):
        assert found["layers"]["lowered"] and not found["layers"]["refused"]
        assert found["in_place"]["cases"] == found["cases"] == [f"{case}{ending}" for case in CASES]
        assert found["in_place"]["difference"] <= found["in_place"]["tolerance"] == 1e-3 < found["tolerance"]


@pytest.mark.parametrize("name", [MODEL, ADAPTED])
def test_either_graph_that_computes_something_else_is_thrown_away(
    name: str, built: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimise = backend._Part._optimise

    def break_weights(part: backend._Part, out: Path) -> None:
        optimise(part, out)
        if part.name == name:
            data = np.fromfile(out / f"{name}.data", np.float32)
            data[: len(data) // 2] *= 1.02
            data.tofile(out / f"{name}.data")

    monkeypatch.setattr(backend._Part, "_optimise", break_weights)
    ending = "dense, adapter" if name == ADAPTED else "dense,"
    with pytest.raises(ParityError, match=f"(other tokens|other logits) than its bundle's graph: {ending}"):
        backend.build(Bundle.open(built["bundle"]), directory=tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


def test_both_graphs_write_in_place_and_pick_the_largest_logits(
    built: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fstq_engines.shortlist.SMALLEST", 1)
    monkeypatch.setattr("fstq_engines.shortlist.COUNT", 8)
    bundle = Bundle.open(built["bundle"])
    engine = open_engine(bundle, directory=tmp_path / "engine", threads=1)
    given = (np.array([ids(20)]), np.arange(20)[None], np.full((1, len(engine.stages)), 20))
    for one in (engine, engine.adapted([store.load(bundle, "med")])):
        step = one.forward(*given, one.empty_cache(1))
        assert isinstance(step.cache, SharedCache) and step.shortlist is not None
        largest = np.argsort(-step.logits[0], kind="stable")[:8]
        assert step.shortlist[0][0].tolist() == largest.tolist()
        assert step.shortlist[1][0].tolist() == step.logits[0][largest].tolist()


def test_room_for_both_graphs_is_asked_for(
    built: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, asked = Bundle.open(built["bundle"]), []
    monkeypatch.setattr("fstq_engines.cache.require_disk", lambda _target, room: asked.append(room))
    seen, optimise = [], backend._Part._optimise

    def measured(part: backend._Part, out: Path) -> None:
        optimise(part, out)
        seen.append(sum(path.stat().st_size for path in out.rglob("*") if path.is_file()))

    monkeypatch.setattr(backend._Part, "_optimise", measured)
    backend.build(bundle, directory=tmp_path / "engine")
    one = Lowering(bundle).disk
    assert len(seen) == 2 and asked == [one * 3 // 2 + backend.BUILD_DISK] and max(seen) <= asked[0]


def test_nothing_is_written_where_an_adapter_is_not_what_peft_computes(
    built: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fstq_export.adapters.adapt_in_place", lambda decoder, adapter: None)
    with pytest.raises(VerificationError, match="with the adapter 'med': the exported graph differs"):
        export(Request(str(built["model"]), tmp_path / "b", adapters=Wanted.parse([str(built["med"])])))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def calib(tmp_path: Path) -> Path:
    rng = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "while", "two", "dogs", "ran", "over", "old", "hills"]
    rows = [
        {"prompt": " ".join(rng.choices(words, k=rng.randint(8, 12))), "answer": " ".join(rng.choices(words, k=2))}
        for _ in range(32)
    ]
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("broken", [False, True], ids=["holds", "breaks"])
def test_the_contract_is_measured_again(
    broken: bool, built: dict[str, Path], calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSTQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fstq_export.calibrate.EPOCHS", 1)
    monkeypatch.setattr("fstq_export.calibrate.STEPS", 2)
    # Random weights say nothing of quality: the judge is told what to find, all else is as it would be.
    monkeypatch.setattr("fstq_export.recheck.within", lambda lost, possible, allowed: not broken)
    recipe = Recipe(prune_layer=2, keep=0.5, max_quality_drop=0.9)
    wanted = Wanted.parse([str(built["med"]), str(built["law"])])
    done = export(Request(str(built["model"]), tmp_path / "b", recipe, calib, adapters=wanted))
    bundle = Bundle.open(tmp_path / "b")
    for name, info in bundle.manifest.adapters.items():
        found = done.report["adapters"][name]["calibration"]
        assert info.probe == broken == (found["own_probe"] is not None)
        assert info.pruning is not None and info.pruning.contract is not None
        assert done.report["adapters"][name]["verification"]["pruned"]["kept_equal"]
        assert "contract" in adapter_verdict(name, done.report["adapters"][name]).lower()
    assert bundle.manifest.lora is not None and bool(bundle.manifest.lora.probes) == broken
    generator = Generator.load(tmp_path / "b", threads=1)
    prompts, names = [ids(60), ids(41, 1), ids(50, 2)], ["med", None, "law"]
    options: dict[str, Any] = {"keep": 0.5, "max_tokens": 5}
    single = [generator.generate(p, adapter=name, **options) for p, name in zip(prompts, names, strict=True)]
    assert [r.tokens for r in generator.generate(prompts, adapter=names, **options)] == [r.tokens for r in single]
    if broken:
        med = store.load(bundle, "med")
        own, shared = (
            generator.engine.adapted([a]) for a in (med, replace(med, probe=False))
        )  # the same matrices with the bundle's probe
        given = (np.array([prompts[0]]), np.arange(60)[None], np.array([[30]]))
        kept = [engine.forward(*given, engine.empty_cache(1)).kept[0].tolist() for engine in (own, shared)]
        assert kept[0] != kept[1]
        with pytest.raises(EngineError, match="bring different probes"):
            generator.engine.adapted([med, None])


def test_with_formats_the_contract_is_of_the_rounded_model_with_the_adapter(
    built: dict[str, Path], calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fstq_export.calibrate.EPOCHS", 1)
    monkeypatch.setattr("fstq_export.calibrate.STEPS", 2)
    recipe, formats = Recipe(prune_layer=2, keep=1.0, max_quality_drop=0.9), Precision.parse("int4", None, None)
    wanted = Wanted.parse([str(built["med"])])
    done = export(Request(str(built["model"]), tmp_path / "b", recipe, calib, precision=formats, adapters=wanted))
    found, bundle = (r["calibration"] for r in (done.report["adapters"]["med"], done.report))
    # No token is dropped, so whatever is lost is lost by formats, against the adapted model without them.
    assert found["bundle_probe"]["keeps"] == (1.0,) and found["bundle_probe"]["drop"] != 0
    assert found["dense"]["nll"] != bundle["dense"]["nll"] and bundle["formats"] is not None


def test_an_adapter_of_another_model_ends_the_export_at_once(built: dict[str, Path], tmp_path: Path) -> None:
    other = family("llama", tmp_path / "model", hidden_size=32)
    with pytest.raises(AdapterMismatchError, match="inputs and"):
        export(Request(str(other), tmp_path / "b", adapters=Wanted.parse([str(built["med"])])))


def test_an_engine_without_inputs_says_what_to_do(
    built: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSTQ_CACHE", str(tmp_path / "cache"))
    export(Request(str(built["model"]), tmp_path / "b"))
    plain = Generator.load(tmp_path / "b", threads=1)
    assert plain.adapters == ()
    loaded = store.load(Bundle.open(built["bundle"]), "med")
    with pytest.raises(EngineError, match="has no inputs for adapters"):
        plain.engine.adapted([loaded])
    with pytest.raises(AdapterMismatchError, match="--adapter-targets all"):
        store.add(tmp_path / "b", "med", built["med"])
