"""Tokenizer and text stream: any tokens in, the same text as a full decode, cut where a stop string ends first."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from fstq_infer.errors import BundleError
from fstq_infer.runtime.text import TextStream, Tokenizer

from .mock import BOS, EOS, SPECIALS, small_tokenizer, token_id

TOKENIZER = small_tokenizer()
PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {byte: chr(byte) for byte in PLAIN} | {  # GPT-2's printable names of all bytes
    byte: chr(256 + place) for place, byte in enumerate(byte for byte in range(256) if byte not in PLAIN)
}
TEXTS = st.text(st.sampled_from("the tok,\n é€😀\u0301\ufffd"), max_size=30)


def streamed(ids: list[int], stop: tuple[str, ...] = (), tokenizer: Tokenizer = TOKENIZER) -> str:
    stream = TextStream(tokenizer, stop)
    text = ""
    for token in ids:
        text += stream.push(token)
        if stream.stopped:
            return text
    return text + stream.flush()


def cut(text: str, stop: tuple[str, ...]) -> str:
    """Character by character: the first end of a stop string, then its earliest beginning."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


def test_encode_adds_bos_and_ignores_the_files_truncation_and_padding() -> None:
    ids = TOKENIZER.encode("the tokens of the prompt leave one by one")
    assert ids[0] == TOKENIZER.special_id(BOS)
    assert len(ids) > 9
    assert TOKENIZER.encode("the", special=False) == ids[1:2]
    assert TOKENIZER.decode(ids) == "the tokens of the prompt leave one by one"
    assert TOKENIZER.token(ids[0]) == BOS
    assert TOKENIZER.token(10**6) is None
    assert TOKENIZER.special_id("the") is None
    assert TOKENIZER.special_id("no such token") is None
    assert TOKENIZER.vocab_size >= 256 + len(SPECIALS)


def test_a_bad_file_is_a_bundle_error(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Tokenizer.from_file(path)
    path.write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Tokenizer.from_file(path)


def test_from_file(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(models.BPE({"a": 0}, [])).save(str(path))
    assert Tokenizer.from_file(path).encode("aa") == [0, 0]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size + 3), max_size=40))
def test_any_tokens_give_the_full_decode(ids: list[int]) -> None:
    assert streamed(ids) == TOKENIZER.decode(ids)


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_a_character_never_comes_out_by_halves(text: str) -> None:
    by_token = {TOKENIZER.token(i): i for i in range(TOKENIZER.vocab_size)}
    stream = TextStream(TOKENIZER)
    seen = ""
    for byte in text.encode():
        seen += stream.push(by_token[BYTES[byte]])
        assert text.startswith(seen)
    assert seen + stream.flush() == text


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.sampled_from("aabbc€"), max_size=40),
    stop=st.lists(st.text(st.sampled_from("abc€"), min_size=1, max_size=4), max_size=4).map(tuple),
)
def test_stop_strings_do_not_depend_on_the_split(text: str, stop: tuple[str, ...]) -> None:
    assert streamed(TOKENIZER.encode(text, special=False), stop) == cut(text, stop)
    stream = TextStream(TOKENIZER, stop)
    pieces = [stream._stops.push(text), stream.flush()]  # all at once
    assert "".join(pieces) == cut(text, stop)


def test_text_is_held_only_while_it_may_become_a_stop_string() -> None:
    stream = TextStream(TOKENIZER, ["\n\nUser:"])
    released = [stream.push(token_id(c)) for c in "a\nb\n\nUse\n\nUser:x"]
    assert released == ["a", "", "\nb", "", "", "", "", "", "\n\nUse", *[""] * 7]
    assert stream.stopped
    assert stream.flush() == ""


def test_a_held_beginning_comes_out_at_the_end() -> None:
    stream = TextStream(TOKENIZER, ["STOP"])
    assert "".join(stream.push(token_id(c)) for c in "xSTO") == "x"
    assert stream.flush() == "STO"
    assert not stream.stopped


def test_special_tokens_have_no_text() -> None:
    ids = TOKENIZER.encode("a" + EOS + "<|end|>b")
    assert streamed(ids) == "ab"


def test_an_unfinished_character_comes_out_at_the_end_only() -> None:
    ids = TOKENIZER.encode("x😀", special=False)[:-1]
    stream = TextStream(TOKENIZER)
    assert "".join(stream.push(token) for token in ids) == "x"
    assert stream.flush() == "\ufffd"


def test_bytes_that_never_become_text_are_released_on_the_way() -> None:
    stream = TextStream(TOKENIZER)
    bad = [token for token in range(TOKENIZER.vocab_size) if TOKENIZER.token(token) == "ÿ"] * 50
    released = [stream.push(token) for token in bad]
    assert sum(map(len, released)) > 30
    assert len(stream._pieces._pending) < 20
    assert "".join(released) + stream.flush() == "\ufffd" * 50


def test_sentencepiece_style_spaces_and_byte_fallback() -> None:
    vocab = {"▁the": 0, "▁cat": 1, "s": 2, "<0xE2>": 3, "<0x82>": 4, "<0xAC>": 5, "<0x41>": 6}
    core = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer(core)
    for ids in ([0, 1, 2, 3, 4, 5, 1], [3, 4, 5, 0], [1, 3, 4, 2]):
        assert streamed(ids, (), tokenizer) == tokenizer.decode(ids)
    # 'A' was out before the next byte turned both into nonsense: it is not taken back, and nothing raises
    assert streamed([6, 3, 2], (), tokenizer).startswith("A")
