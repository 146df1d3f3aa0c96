"""fstq_infer.manifest: every check of docs/bundle-format.md that concerns the text of manifest.json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fstq_infer import errors
from fstq_infer.manifest import (
    DTYPES,
    FILE_CAPS,
    REQUIRED_FILES,
    Contract,
    FileEntry,
    GenerationDefaults,
    Manifest,
    ModelInfo,
    Provenance,
    Pruning,
)
from fstq_infer.runtime.engine import Stage
from fstq_infer.runtime.options import Auto

from .bundles import BARE, fails, make, name_of, write

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
    auto = st.none() | st.builds(Auto, st.floats(1e-6, 0.999999), small)
    names = st.sets(st.sampled_from([name for name in FILE_CAPS if name not in REQUIRED_FILES]))
    return Manifest(
        model=model,
        stages=tuple(Stage(layer, draw(small), draw(small)) for layer in sorted(layers)),
        pruning=Pruning(draw(ratio), draw(texts), draw(st.booleans()), draw(st.none() | measured), draw(auto)),
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


def test_unknown_keys_are_ignored() -> None:
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
    assert Manifest.from_json(make.encode(data)) == Manifest.from_json(make.encode(make.manifest()))


def test_to_json_refuses_nan() -> None:
    with pytest.raises(errors.ManifestError, match="finite"):
        replace(BARE, pruning=replace(BARE.pruning, keep=float("nan"))).to_json()


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


ALL = places(make.manifest())
OPTIONAL = {("files", name) for name in FILE_CAPS if name not in REQUIRED_FILES} | {("provenance", "libraries", "onnx")}
NULLABLE = {("pruning", "contract"), ("pruning", "auto"), ("generation", "bos_token_id")}
REAL = {"keep", "mass", "max_drop", "drop", "temperature", "top_p", "repetition_penalty"}


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
    ("pruning auto mass", [0, -0.5, 1, 1.001]),
    ("pruning auto floor", [-1, HUGE]),
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


def test_one_keep_ratio_for_each_of_several_stages() -> None:
    stages = [{"layer": layer, "sink": 1, "window": 4} for layer in (1, 2)]

    def read(keep: Any, stages: list[Any] = stages) -> Manifest:
        data = json.loads(put(("graph", "stages"), stages))
        return Manifest.from_json(json.dumps(data | {"pruning": data["pruning"] | {"keep": keep}}))

    for keep in ((0.5, 0.25), (1.0, 1.0)):
        manifest = read(list(keep))
        assert manifest.pruning.keep == keep
        assert Manifest.from_json(manifest.to_json()) == manifest
    assert read(0.25).pruning.keep == 0.25
    for bad in ([], [0.5], [0.5] * 3, [0.25, 0.5], [0.5, 0], [1.5, 0.5], [0.5, "0.25"], [True, 0.5], [0.5, [0.25]]):
        with pytest.raises(errors.ManifestError, match=r"'keep' in 'pruning' is .*expected a number"):
            read(bad)
    with pytest.raises(errors.ManifestError, match="expected a number"):
        read([0.5], stages[:1])


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
