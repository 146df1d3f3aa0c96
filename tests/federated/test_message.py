"""Messages: round trips of any mix of tensors, codes and layers, and their size beside the entropy bound."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("constriction", reason="messages need the 'federated' extra")

from fstq_infer.errors import OptionError
from fstq_infer.federated import ans, rice
from fstq_infer.federated import message as messages
from fstq_infer.federated.bits import pack_planes, plane_bytes, unpack_planes
from fstq_infer.federated.layer import Layer
from fstq_infer.federated.message import Message
from fstq_infer.federated.quantize import QUANTIZERS
from fstq_infer.federated.tensors import TensorManifest

from . import reference
from .samples import BASE, entropy, layer, manifest

LIGHT = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@LIGHT
@given(st.data())
def test_round_trip(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 600), min_size=1, max_size=6))
    shapes, rng = manifest(sizes), np.random.default_rng(data.draw(st.integers(0, 2**32)))
    left, layers = shapes.sizes, list[Layer]()
    wanted, free = np.zeros(shapes.parameters, np.float32), np.arange(shapes.parameters)
    densities = st.sampled_from([0.0, 0.01, 0.05, 0.3, 0.6, 0.99, 1.0])
    for _ in range(data.draw(st.integers(0, 4))):
        names = data.draw(st.lists(st.sampled_from(sorted(QUANTIZERS)), min_size=1, max_size=4, unique=True))
        codes = {QUANTIZERS[name].code.id: name for name in names}  # one quantizer for each code of a layer
        density = [data.draw(densities) for _ in sizes]
        if not any(size and p for size, p in zip(left.tolist(), density, strict=True)):
            continue
        made, at, values = layer(rng, left, density, list(codes.values()))
        if not len(values):
            continue
        layers.append(made)
        wanted[free[at]] = made.values()
        free, left = np.delete(free, at), left - made.counts
    message = Message.of(tuple(layers), shapes, BASE, 3)
    blob = messages.encode(message, shapes)
    found = messages.decode(blob, shapes, BASE, 3)
    assert found.header == message.header
    assert np.array_equal(messages.dense(found, shapes), wanted)
    assert messages.encode(found, shapes) == blob
    if shapes.parameters < 200:
        assert reference.read(blob, shapes.tensors) == wanted.tolist()


@pytest.mark.parametrize("shape", [(1_000_000,), tuple([62_500] * 16), tuple([8 * 896, 4864 * 8] * 22)], ids=len)
@pytest.mark.parametrize("density", [0.005, 0.01, 0.02, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("name", ["lloyd1", "lloyd2", "lloyd3"])
def test_size_is_near_entropy(shape: tuple[int, ...], density: float, name: str) -> None:
    """A whole message, header and tables included, against the entropy of its supports, signs and levels."""
    shapes = manifest(shape)
    made, _, _ = layer(np.random.default_rng(0), shapes.sizes, [density] * len(shape), [name])
    blob = messages.encode(Message.of((made,), shapes, BASE, 0), shapes)
    (block,) = made.blocks.values()
    kept = len(made.positions)
    bound = entropy([kept, shapes.parameters - kept]) + kept + entropy(np.bincount(block.symbols))
    few = 1.03 if min(made.counts) > 60 else 1.045  # 36 kept in a tensor cost 11 bits each, its scale and count 30
    assert 8 * len(blob) <= few * bound


@pytest.mark.parametrize("density", [0.4, 0.5, 0.7, 0.9, 0.99])
def test_dense_supports_become_bitmaps(density: float) -> None:
    shapes = manifest([300_000])
    made, _, _ = layer(np.random.default_rng(0), shapes.sizes, [density], ["lloyd1"])
    kept = len(made.positions)
    bound = entropy([kept, shapes.parameters - kept]) + kept
    assert 8 * len(messages.encode(Message.of((made,), shapes, BASE, 0), shapes)) <= 1.005 * bound + 8 * 80


# ---- the parts ---------------------------------------------------------------------------------------------------


@LIGHT
@given(st.lists(st.integers(0, 2**17 - 1), max_size=40), st.integers(17, 30))
def test_planes(numbers: list[int], width: int) -> None:
    packed = pack_planes(np.array(numbers, np.int64), width)
    assert packed == reference.planes(numbers, width) and len(packed) == plane_bytes(len(numbers), width)
    assert unpack_planes(np.frombuffer(packed, np.uint8), len(numbers), width, "test").tolist() == numbers


@LIGHT
@given(st.lists(st.lists(st.integers(0, 3000), min_size=1, max_size=30), min_size=1, max_size=6))
def test_rice(tensors: list[list[int]]) -> None:
    """gaps of several tensors -> streams -> positions."""
    counts = np.array([len(gaps) for gaps in tensors])
    positions = np.concatenate([np.array(list(accumulate(gap + 1 for gap in gaps))) - 1 for gaps in tensors])
    gap = rice.gaps(positions, counts)
    assert gap.tolist() == [value for gaps in tensors for value in gaps]
    k, cost = rice.parameters(gap, counts)
    for parameter, bits, gaps in zip(k.tolist(), cost.tolist(), tensors, strict=True):
        assert bits == sum((value >> parameter) + parameter + 1 for value in gaps)
    order = np.argsort(k, kind="stable")
    gap = np.concatenate([np.array(tensors[t]) for t in order])
    length, stream, remainders = rice.encode(gap, k[order], counts[order])
    assert length + sum(width * len(numbers) for width, numbers in remainders) == cost.sum()
    sizes = np.array([sum(tensors[t]) + len(tensors[t]) for t in order])
    ends = rice.ends(np.frombuffer(stream, np.uint8), length, len(gap))
    found = rice.positions(ends, dict(remainders), k[order], counts[order], sizes)
    starts = np.cumsum(counts) - counts
    assert found.tolist() == [p for t in order for p in positions[starts[t] : starts[t] + counts[t]].tolist()]


def test_rice_parameter_is_the_best_for_geometric_gaps() -> None:
    rng = np.random.default_rng(0)
    for density in (0.003, 0.02, 0.1, 0.25, 0.45):
        gap = rng.geometric(density, 5000) - 1
        k, cost = rice.parameters(gap, np.array([5000]))
        assert cost[0] == min(int((gap >> other).sum()) + 5000 * (other + 1) for other in range(20))
        assert 0 <= k[0] < 12


@pytest.mark.parametrize("alphabet", [2, 3, 4, 8, 15, 16, 128, 255])
def test_ans_equals_the_reference(alphabet: int) -> None:
    rng = np.random.default_rng(alphabet)
    first = (rng.integers(0, alphabet, 301) * rng.random(301)).astype(np.uint8)
    second = (rng.random(53) < 0.2).astype(np.uint8)
    parts = [(first, ans.frequencies(first, alphabet)), (second, ans.share(int(second.sum()), 53))]
    encoder = ans.Encoder()
    for digits, frequency in parts:
        encoder.push(digits, frequency)
    words = encoder.words()
    assert words.tolist() == reference.ans_write([(digits.tolist(), freq.tolist()) for digits, freq in parts])
    decoder = ans.Decoder(words)
    assert [decoder.pop(len(digits), freq).tolist() for digits, freq in parts] == [first.tolist(), second.tolist()]
    decoder.finish()


@LIGHT
@given(st.lists(st.integers(0, 254), min_size=1, max_size=300))
def test_frequencies(symbols: list[int]) -> None:
    found = ans.frequencies(np.array(symbols, np.uint8), 255)
    assert found.sum() == 4096 and all(found[symbol] > 0 for symbol in symbols) and found.min() >= 0


@LIGHT
@given(st.integers(0, 2**32), st.sampled_from([2, 4, 128, 255]), st.floats(0, 12))
def test_frequencies_of_long_inputs(seed: int, alphabet: int, skew: float) -> None:
    """Rare symbols have at least 1, and the others make room for them."""
    counts = (10_000 * np.random.default_rng(seed).random(alphabet) ** skew).astype(int) + 1
    found = ans.frequencies(np.repeat(np.arange(alphabet), counts).astype(np.uint8), alphabet)
    assert found.sum() == 4096 and found.min() > 0
    assert entropy(counts) <= -(counts * np.log2(found / 4096)).sum() <= 1.03 * entropy(counts) + 16


def test_frequencies_when_every_share_rounds_up() -> None:
    counts = np.full(255, 2 * 10**4)
    counts[127:] = 4
    counts[:127] += 300
    found = ans.frequencies(np.repeat(np.arange(255), counts).astype(np.uint8), 255)
    assert found.sum() == 4096 and found.min() == 1 and found.max() < 40


@pytest.mark.parametrize(
    "tensors",
    [
        (),
        (("a", (2,)), ("a", (3,))),
        (("", (2,)),),
        (("x" * 1025, (2,)),),
        (("a", ()),),
        (("a", (2, 0)),),
        (("a", (1,) * 9),),
        (("a", (2**31,)),),
    ],
)
def test_manifest_refuses(tensors: tuple[tuple[str, tuple[int, ...]], ...]) -> None:
    with pytest.raises(OptionError):
        TensorManifest(tensors)


def test_manifest_hash_sees_names_shapes_and_order() -> None:
    first, second = ("a", (2, 3)), ("b", (6,))
    all_ = [(first, second), (second, first), (first,), (("a", (3, 2)), second), (("c", (2, 3)), second)]
    assert len({TensorManifest(tensors).digest for tensors in all_}) == len(all_)
    assert TensorManifest((first, second)).digest == reference.manifest_hash((first, second))
