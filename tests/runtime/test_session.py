"""Sessions: the same text as one long prompt, with only the new tokens fed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fstq_infer.errors import OptionError, PromptError
from fstq_infer.runtime.chat import ChatTemplate
from fstq_infer.runtime.engine import Stage
from fstq_infer.runtime.generate import Generator
from fstq_infer.runtime.options import Defaults, keep_counts
from fstq_infer.runtime.sampling import Sampling

from .mock import EOS, TEMPLATE, Toy, ToyEngine, simulate, small_tokenizer, token_id

TOKENIZER = small_tokenizer()
END = TOKENIZER.special_id(EOS)
DIGITS = tuple(token_id(c) for c in "0123456789")  # no merges: what is generated is tokenised the same again
STAGE = (Stage(1, sink=1, window=2),)
TURNS = ["the prompt?", "or the others", "stay"]


def generator(
    stages: Sequence[Stage] = (), *, template: str | None = TEMPLATE, eos_rate: float = 0.0, **options: object
) -> Generator:
    toy = Toy(TOKENIZER.vocab_size, allowed=DIGITS, eos=END, eos_rate=eos_rate)
    engine = ToyEngine(toy, tuple(stages), **{k: options.pop(k) for k in ("max_positions",) if k in options})
    chat = None if template is None else ChatTemplate(template, {"bos_token": "<s>"})
    return Generator(engine, TOKENIZER, Defaults(eos_ids=(END,), **options), chat)


@pytest.mark.parametrize("eos_rate", [0.0, 0.2])
@pytest.mark.parametrize("stages", [(), STAGE], ids=["dense", "staged"])
def test_a_session_equals_one_off_chats(stages: tuple[Stage, ...], eos_rate: float) -> None:
    runtime = generator(stages, eos_rate=eos_rate, sampling=Sampling(1.0, repetition_penalty=1.2, seed=2))
    session = runtime.session(system="be brief")
    messages = [{"role": "system", "content": "be brief"}]
    for number, turn in enumerate(TURNS):
        messages.append({"role": "user", "content": turn})
        before = session.cached_tokens
        runtime.engine.calls.clear()
        result = session.send(turn, max_tokens=12)
        assert result.cached_tokens == before
        assert (before > 0) == (number > 0)
        assert runtime.engine.calls[0] == (1, len(result.prompt_tokens) - before)
        expected = runtime.chat(messages, max_tokens=12)
        assert (result.text, result.tokens, result.finish) == (expected.text, expected.tokens, expected.finish)
        assert result.prompt_tokens == expected.prompt_tokens
        assert result.kept == expected.kept == tuple(range(len(result.prompt_tokens)))
        assert session.cached_tokens == len(result.prompt_tokens) + len(result.tokens) - 1
        messages.append({"role": "assistant", "content": result.text})
        assert session.messages == messages


def test_pruning_applies_to_each_turns_new_tokens() -> None:
    runtime = generator(STAGE, keep=0.4)
    session = runtime.session()
    calls: list[tuple[list[int], list[int]]] = []
    fed: list[int] = []
    kept = 0
    for turn in TURNS:
        result = session.send(turn, max_tokens=6)
        new = list(result.prompt_tokens[len(fed) :])
        count = keep_counts(len(new), (0.4,), STAGE)
        assert len(result.kept) == kept + count[0]
        assert len(fed) == result.cached_tokens
        calls.append((new, count))
        for token in result.tokens:
            assert token == int(simulate(runtime.engine.toy, calls, STAGE).argmax())
            calls.append(([token], [1]))
        calls.pop()  # the last token was not fed
        fed = [token for ids, _ in calls for token in ids]
        kept = len(result.kept) + len(result.tokens) - 1


def test_a_rewritten_history_starts_over() -> None:
    rewriting = TEMPLATE.replace("{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else '...' }}")
    runtime = generator(template=rewriting)
    session = runtime.session()
    messages = []
    for turn in TURNS:
        messages.append({"role": "user", "content": turn})
        result = session.send(turn, max_tokens=8)
        assert result.cached_tokens == 0
        assert result.tokens == runtime.chat(messages, max_tokens=8).tokens
        messages.append({"role": "assistant", "content": result.text})


def test_a_stop_string_is_not_part_of_the_conversation() -> None:
    for template in (TEMPLATE, None):
        runtime = generator(template=template)
        probe = runtime.session().send(TURNS[0], max_tokens=8)
        stop = probe.text[3:5]  # spans two tokens
        session = runtime.session()
        first = session.send(TURNS[0], max_tokens=8, stop=[stop])
        assert first.finish == "stop"
        assert first.text == probe.text[: probe.text.find(stop)]
        second = session.send(TURNS[1], max_tokens=8)
        assert second.cached_tokens == 0  # the cache holds a part of the stop string
        assert runtime.generate(second.prompt_tokens, max_tokens=8).tokens == second.tokens
        assert TOKENIZER.decode(second.prompt_tokens).count(first.text + stop) == 0


@pytest.mark.parametrize("finish", ["length", "eos"])
def test_without_a_template_texts_follow_one_another(finish: str) -> None:
    runtime = generator(template=None, eos_rate=0.3 if finish == "eos" else 0.0)
    session = runtime.session()
    ids: list[int] = []
    for number, turn in enumerate(TURNS):
        ids += TOKENIZER.encode(turn, special=number == 0)
        result = session.send(turn, max_tokens=30 if finish == "eos" else 5)
        assert result.finish == finish
        assert result.prompt_tokens == tuple(ids)
        assert (result.cached_tokens > 0) == (number > 0)
        assert result.tokens == runtime.generate(ids, max_tokens=30 if finish == "eos" else 5).tokens
        ids += [token for token in result.tokens if token != END]
    assert [m["content"] for m in session.messages[::2]] == TURNS


def test_a_first_system_text_without_a_template() -> None:
    runtime = generator(template=None)
    result = runtime.session(system="be brief. ").send("Hi", max_tokens=3)
    assert result.prompt_tokens == tuple(TOKENIZER.encode("be brief. Hi"))


def test_streams_equal_results() -> None:
    runtime = generator()
    plain, streamed = runtime.session(), runtime.session()
    for turn in TURNS:
        expected = plain.send(turn, max_tokens=9)
        stream = streamed.send(turn, max_tokens=9, stream=True)
        assert "".join(stream) == expected.text
        assert stream.result.tokens == expected.tokens
        assert streamed.messages == plain.messages


def test_a_broken_turn_leaves_the_session_as_it_was() -> None:
    runtime = generator()
    session, other = runtime.session(), runtime.session()
    for each in (session, other):
        each.send(TURNS[0], max_tokens=9)
    before = session.messages
    runtime.engine.fail_at = len(runtime.engine.calls) + 3
    with pytest.raises(KeyboardInterrupt):
        list(session.send("lost", stream=True))
    runtime.engine.fail_at = len(runtime.engine.calls) + 3
    with pytest.raises(KeyboardInterrupt):
        session.send("lost")
    runtime.engine.fail_at = None
    abandoned = session.send("lost, too", stream=True)
    next(abandoned)
    assert session.messages == before
    assert session.send(TURNS[1], max_tokens=9).tokens == other.send(TURNS[1], max_tokens=9).tokens
    assert list(abandoned) == []
    assert session.messages == other.messages


def test_errors() -> None:
    session = generator(max_positions=40).session()
    with pytest.raises(PromptError, match="turn needs a text"):
        session.send("")
    with pytest.raises(PromptError, match="turn needs a text"):
        session.send(None)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="did you mean 'stop'"):
        session.send("a", stopp=["x"])
    session.send("the prompt", max_tokens=20)
    before = session.messages
    with pytest.raises(PromptError, match="start a new session"):
        session.send("the others of the tokens that matter stay behind", max_tokens=20)
    assert session.messages == before
    with pytest.raises(PromptError, match="message 0"):
        generator().session(messages=[{"content": "x"}])
    with pytest.raises(OptionError, match="no pruning stage"):
        session.send("a", keep=0.5)


def test_messages_are_a_copy() -> None:
    session = generator().session(messages=[{"role": "user", "content": "a"}])
    session.messages[0]["content"] = "b"
    session.messages.append({})
    assert session.messages == [{"role": "user", "content": "a"}]
