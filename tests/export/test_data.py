"""fstq_export.data: calibration files of every kind, bad lines named, and the tokens of prompts and answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed; it comes with the 'export' extra")

from fstq_export import data
from fstq_export.data import Example, encode, read
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from fstq_infer.errors import CalibrationDataError
from fstq_infer.fisher.items import Item

QUESTION = {"context": "Ann has a cat.", "question": "What has Ann?", "answer": "a cat"}
PROMPT = {"prompt": "The sky is", "answer": "blue"}


def put(folder: Path, content: bytes | str, name: str = "calib") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ---- files that are read -----------------------------------------------------------------------------------------


def test_questions_and_prompts(tmp_path: Path) -> None:
    rows = [QUESTION, PROMPT, QUESTION | PROMPT | {"id": 7, "answer": " ein Kätzchen \n"}]
    found = read(put(tmp_path, lines(*rows)))
    assert found == [
        Example("Ann has a cat. What has Ann?", "a cat"),
        Example("The sky is", "blue"),
        Example("Ann has a cat. What has Ann?", "ein Kätzchen"),
    ]


def test_plain_text(tmp_path: Path) -> None:
    found = read(put(tmp_path, "\n  Once upon a time \n\n\t\nzwölf {x}\n[1] a note\nno newline at the end"))
    assert found == [
        Example(text, None) for text in ("Once upon a time", "zwölf {x}", "[1] a note", "no newline at the end")
    ]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n\n", "\ufeff\n \n"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n  \n"])
def test_byte_order_marks_line_ends_and_blank_lines(tmp_path: Path, start: str, newline: str, end: str) -> None:
    """A file from Windows: with a BOM before its '{' it is JSON lines all the same."""
    text = (start + lines(QUESTION, PROMPT).strip() + end).replace("\n", newline)
    assert [example.answer for example in read(put(tmp_path, text))] == ["a cat", "blue"]
    plain = (start + "one\ntwo" + end).replace("\n", newline)
    assert read(put(tmp_path, plain)) == [Example("one", None), Example("two", None)]


def test_a_line_of_the_largest_size(tmp_path: Path) -> None:
    text = "x" * (data.LONGEST_LINE - 1)
    assert read(put(tmp_path, f"{text}\nsecond\n"))[0].prompt == text


# ---- files that are refused --------------------------------------------------------------------------------------


def refused(path: Path, *said: str) -> None:
    with pytest.raises(CalibrationDataError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message and len(message) < 1500
    for part in said:
        assert part in message


BAD_LINES = {
    "cut off": ('{"prompt": "a", "answer"', "not JSON"),
    "plain text": ("Once upon a time", "not JSON"),
    "two objects": (lines(PROMPT).strip() * 2, "not JSON"),
    "a list": ('["a", "b"]', "found list"),
    "a number": ("3", "found int"),
    "null": ("null", "found NoneType"),
    "no answer": ('{"prompt": "a"}', "found fields ['prompt']"),
    "no context": ('{"question": "a", "answer": "b"}', "context/question/answer or prompt/answer"),
    "nothing": ("{}", "found fields []"),
    "empty answer": ('{"prompt": "a", "answer": ""}', "'answer' must be text"),
    "blank prompt": ('{"prompt": " \\n ", "answer": "b"}', "'prompt' must be text"),
    "number for text": ('{"prompt": "a", "answer": 12}', "found 12"),
    "null for text": ('{"context": null, "question": "a", "answer": "b"}', "'context' must be text"),
    "list for text": ('{"prompt": ["a"], "answer": "b"}', "'prompt' must be text"),
    "lone surrogate": ('{"prompt": "a\\ud800", "answer": "b"}', "'prompt' must be text"),
    "deep": ("[" * 100_000, "not JSON"),
    "long integer": ('{"prompt": "a", "answer": "b", "id": ' + "9" * 5000, "not JSON"),
    "many fields": (json.dumps({f"field {i}": 1 for i in range(5000)}), "found fields"),
    "long value": (json.dumps({"prompt": "a", "answer": ["x" * 10_000]}), "'answer' must be text"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_line_is_named(tmp_path: Path, case: str) -> None:
    line, said = BAD_LINES[case]
    refused(put(tmp_path, lines(PROMPT) + "\n" + line + "\n" + lines(PROMPT)), "line 3", said)


@pytest.mark.parametrize("name", ["calib.jsonl", "calib.JSON", "calib.ndjson"])
def test_a_file_that_calls_itself_json_is_not_plain_text(tmp_path: Path, name: str) -> None:
    refused(put(tmp_path, json.dumps([PROMPT, PROMPT], indent=1), name), "line 1", "not JSON")
    refused(put(tmp_path, json.dumps([PROMPT]), name), "line 1", "one object a line")
    refused(put(tmp_path, f"Hello\n{lines(PROMPT)}", name), "line 1")
    assert read(put(tmp_path, lines(PROMPT), name)) == [Example("The sky is", "blue")]


@pytest.mark.parametrize("content", [b"", b"\n \n\t\r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_empty_file(tmp_path: Path, content: bytes) -> None:
    refused(put(tmp_path, content), "is empty", "plain text")


def test_no_utf8(tmp_path: Path) -> None:
    refused(put(tmp_path, "first\nzwölf\n".encode("latin-1")), "line 2", "not UTF-8")
    refused(put(tmp_path, lines(QUESTION).encode("utf-16")), "line 1", "not UTF-8")


def test_absent_file(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "does not exist")
    refused(tmp_path, "is no file")


def test_long_line(tmp_path: Path) -> None:
    for content in ("x" * (data.LONGEST_LINE + 1), lines(PROMPT | {"prompt": "x" * data.LONGEST_LINE})):
        refused(put(tmp_path, f"{content}\n"), "line 1", str(data.LONGEST_LINE))


def test_huge_line_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path, b"first\n")
    with path.open("r+b") as file:
        file.truncate(data.LARGEST_FILE)  # sparse: a line of a gigabyte of NUL
    refused(path, "line 2", "more than")
    monkeypatch.setattr(data, "LARGEST_FILE", 10)
    refused(path, "at most 10 are read")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = put(tmp_path, "text\n")
    monkeypatch.setattr(Path, "open", refuse)
    refused(path, "Permission denied")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(["prompt", "context", "question", "answer", "id"]) | st.text(max_size=4)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=st.dictionaries(keys, json_values, max_size=5), ascii_only=st.booleans())
def test_any_object_is_parsed_or_refused(tmp_path: Path, row: dict[str, Any], ascii_only: bool) -> None:
    try:
        (found,) = read(put(tmp_path, json.dumps(row, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")))
    except CalibrationDataError as error:
        assert "line 1" in str(error)
    else:
        assert found.answer == row["answer"].strip() != "" and found.prompt
        assert found.prompt.startswith(
            (row["context"] if "question" in row and "context" in row else row["prompt"]).strip()
        )
        (found.prompt + found.answer).encode()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=60) | st.binary(max_size=60).map(lambda end: b'{"prompt": "a", "answer": "b"}\n' + end)
)
def test_any_bytes_are_parsed_or_refused(tmp_path: Path, content: bytes) -> None:
    try:
        found = read(put(tmp_path, content))
    except CalibrationDataError as error:
        assert str(tmp_path) in str(error)
    else:
        assert found and all(example.prompt == example.prompt.strip() != "" for example in found)


# ---- tokens ------------------------------------------------------------------------------------------------------

TEXTS = ["the sky is blue", "Ann has a cat", "what has Ann", "a cat is in the sky", "12 blue cats", "Ann: 12"] * 20
BOS, EOS = "<s>", "</s>"


def tokenizer(kind: str, special: str = BOS) -> Any:
    """A small fast tokenizer; special: what its post-processor puts around a text, as '<s>' or '<s> </s>'."""
    fast = pytest.importorskip("transformers", reason="transformers is not installed").PreTrainedTokenizerFast
    options: dict[str, Any] = {"special_tokens": [BOS, EOS, "<unk>"], "show_progress": False, "vocab_size": 400}
    if kind == "byte-level BPE":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    else:
        core = Tokenizer(models.Unigram() if "unigram" in kind else models.BPE(unk_token="<unk>"))
        scheme = "first" if "first" in kind else "always"
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split="unsplit" not in kind)
        core.decoder = decoders.Metaspace(prepend_scheme=scheme)
        trainer = (
            trainers.UnigramTrainer(unk_token="<unk>", **options)
            if "unigram" in kind
            else trainers.BpeTrainer(**options)
        )
    core.train_from_iterator(TEXTS, trainer)
    single = f"{BOS} $A {EOS}" if EOS in special else f"{BOS} $A"
    core.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(token, core.token_to_id(token)) for token in (BOS, EOS)]
    )
    return fast(tokenizer_object=core, bos_token=BOS, eos_token=EOS, unk_token="<unk>")


KINDS = ["byte-level BPE", "metaspace BPE", "metaspace BPE, first", "metaspace unigram"]


@pytest.mark.parametrize("special", [BOS, f"{BOS} {EOS}"])
@pytest.mark.parametrize("kind", KINDS)
def test_answer_tokens_follow_the_prompt(kind: str, special: str) -> None:
    """Prompt as the runtime encodes it; prompt and answer together spell the text, and no special token is a label."""
    tokens = tokenizer(kind, special)
    for prompt, answer in (("the sky is", "blue"), ("what has Ann", "a cat"), ("Ann:", "12"), ("a", "cat is in")):
        item = encode(tokens, Example(prompt, answer))
        assert list(item.prompt) == tokens.encode(prompt)
        assert not set(item.answer) & set(tokens.all_special_ids)
        assert (
            list(item.answer)
            == tokens.encode(f"{prompt} {answer}", add_special_tokens=False)[
                len(tokens.encode(prompt, add_special_tokens=False)) :
            ]
        )
        body = [token for token in item.prompt if token not in tokens.all_special_ids]
        assert tokens.decode([*body, *item.answer]) == f"{prompt} {answer}"
        assert encode(tokens, Example(prompt, None)) == Item(item.prompt, ())


def test_prompt_and_answer_that_share_a_token() -> None:
    """Without word boundaries 'sky' and ' is' may be one token: the answer is encoded on its own then."""
    tokens = tokenizer("metaspace BPE, unsplit")
    prompt, answer = "the sk", "y is blue"
    joined = tokens.encode("the sky is blue", add_special_tokens=False)
    alone = tokens.encode("the sky is", add_special_tokens=False)
    assert joined[: len(alone)] != alone, "pick other texts"
    item = encode(tokens, Example("the sky is", "blue"))
    assert list(item.answer) == tokens.encode("blue", add_special_tokens=False)
    assert encode(tokens, Example(prompt, answer)).answer


def test_answer_without_tokens() -> None:
    class Deaf:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [5] if add_special_tokens or text.startswith("a") else []

    with pytest.raises(CalibrationDataError, match="no tokens"):
        encode(Deaf(), Example("a", "\u200b"))
