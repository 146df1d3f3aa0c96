"""The generation loop against a simulation without cache, batch or padding; options and their errors."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import pytest

from fstq_infer.errors import OptionError, PromptError
from fstq_infer.runtime.chat import ChatTemplate
from fstq_infer.runtime.engine import Stage
from fstq_infer.runtime.generate import Generator
from fstq_infer.runtime.options import Auto, Defaults, keep_counts, keep_ratios
from fstq_infer.runtime.result import Stream
from fstq_infer.runtime.sampling import Sampler, Sampling

from .mock import EOS, TEMPLATE, Toy, ToyEngine, simulate, small_tokenizer, token_id

TOKENIZER = small_tokenizer()
END = TOKENIZER.special_id(EOS)
ONE = (Stage(2, sink=2, window=3),)
TWO = (Stage(2, sink=1, window=2), Stage(4, sink=2, window=3))
PROMPT = "the prompt that matters: to stay, or to leave the others behind?"
PROMPTS = [PROMPT, "a", "the tokens of the others", PROMPT[::-1]]


def generator(stages: Sequence[Stage] = (), toy: Toy | None = None, **options: object) -> Generator:
    toy = toy or Toy(vocab=TOKENIZER.vocab_size)
    engine = ToyEngine(toy, tuple(stages), **{k: options.pop(k) for k in ("max_positions",) if k in options})
    template = options.pop("template", None)
    return Generator(engine, TOKENIZER, Defaults(eos_ids=(END,), **options), template)


def simulated(
    toy: Toy, prompt: list[int], keep: Sequence[int], stages: Sequence[Stage], steps: int, sampling: Sampling
) -> list[int]:
    sampler, calls, history = Sampler(sampling), [(prompt, keep)], list(prompt)
    for _ in range(steps):
        history.append(sampler(simulate(toy, calls, stages), history))
        calls.append((history[-1:], [1] * len(stages)))
        if history[-1] == END:
            break
    return history[len(prompt) :]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, 20, 0.9, 1.2, seed=5)], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("stages", "keep"), [((), 1.0), (ONE, 1.0), (ONE, 0.5), (ONE, 0.01), (TWO, 0.3), (TWO, (0.8, 0.2))]
)
def test_equals_the_simulation(stages: tuple[Stage, ...], keep: float, sampling: Sampling) -> None:
    runtime = generator(stages, keep=keep, sampling=sampling)
    result = runtime.generate(PROMPT, max_tokens=12)
    ids = TOKENIZER.encode(PROMPT)
    counts = keep_counts(len(ids), keep_ratios(keep, stages), stages)
    assert list(result.tokens) == simulated(runtime.engine.toy, ids, counts, stages, 12, sampling)
    assert result.prompt_tokens == tuple(ids)
    assert len(result.kept) == (counts[-1] if stages else len(ids))
    assert result.text == TOKENIZER.decode(result.tokens)
    assert result.finish == "length"
    assert result.cached_tokens == 0
    assert runtime.engine.calls == [(1, len(ids))] + [(1, 1)] * 11


def test_pruning_changes_what_is_seen() -> None:
    runtime = generator(ONE)
    assert runtime.generate(PROMPT, keep=0.5).tokens != runtime.generate(PROMPT).tokens
    kept = runtime.generate(PROMPT, keep=0.3).kept
    count = len(TOKENIZER.encode(PROMPT))
    assert len(kept) == math.ceil(0.3 * count)
    assert kept[:2] == (0, 1)
    assert kept[-3:] == (count - 3, count - 2, count - 1)
    assert list(kept) == sorted(set(kept))


@pytest.mark.parametrize("stages", [(), ONE, TWO], ids=["dense", "one", "two"])
@pytest.mark.parametrize("seed", [None, 3])
def test_batches_equal_single_runs(stages: tuple[Stage, ...], seed: int | None) -> None:
    toy = Toy(vocab=TOKENIZER.vocab_size, eos=END, eos_rate=0.1)
    runtime = generator(stages, toy, keep=0.4 if stages else 1.0)
    options = {"max_tokens": 20, "temperature": 0.0 if seed is None else 1.0, "seed": seed, "stop": ["0", "Q"]}
    singles = [runtime.generate(prompt, **options) for prompt in PROMPTS]
    batch = runtime.generate(PROMPTS, **options)
    for single, row in zip(singles, batch, strict=True):
        for name in ("text", "tokens", "prompt_tokens", "kept", "finish", "cached_tokens"):
            assert getattr(single, name) == getattr(row, name)
    assert len({len(row.tokens) for row in batch}) > 1
    assert "eos" in {row.finish for row in batch}


@pytest.mark.parametrize("stages", [ONE, TWO], ids=["one", "two"])
def test_adaptive_keep_asks_for_a_share_of_the_mass_and_leaves_short_prompts_whole(stages: tuple[Stage, ...]) -> None:
    """The toy's tokens all weigh the same, so the share of the mass is a keep ratio of every stage."""
    lengths = [len(TOKENIZER.encode(prompt)) for prompt in PROMPTS]
    floor = sorted(lengths)[1]
    runtime = generator(stages, auto=Auto(0.6, floor))
    batch = runtime.generate(PROMPTS, keep="auto", max_tokens=6)
    for prompt, length, row in zip(PROMPTS, lengths, batch, strict=True):
        single = runtime.generate(prompt, keep="auto", max_tokens=6)
        assert (single.tokens, single.kept) == (row.tokens, row.kept)
        same = runtime.generate(prompt, keep=1.0 if length <= floor else (0.6,) * len(stages), max_tokens=6)
        assert (same.tokens, same.kept) == (row.tokens, row.kept)
    assert any(len(row.kept) < length for row, length in zip(batch, lengths, strict=True))
    by_default = generator(stages, keep="auto", auto=Auto(0.6, floor)).generate(PROMPTS, max_tokens=6)
    assert [row.kept for row in by_default] == [row.kept for row in batch]


def test_adaptive_keep_without_a_stage_is_dense() -> None:
    runtime = generator()
    assert runtime.generate(PROMPT, keep="auto", max_tokens=4).tokens == runtime.generate(PROMPT, max_tokens=4).tokens


def test_a_row_at_the_end_of_the_context_does_not_stop_the_others() -> None:
    runtime = generator(ONE, max_positions=40, keep=0.5)
    prompts = [TOKENIZER.encode(PROMPT)[:38], TOKENIZER.encode("to")]
    results = runtime.generate(prompts, max_tokens=30)
    assert [len(row.tokens) for row in results] == [2, 30]
    assert [row.finish for row in results] == ["length", "length"]
    for prompt, row in zip(prompts, results, strict=True):
        assert runtime.generate(prompt, max_tokens=30).tokens == row.tokens


def test_token_ids_are_a_prompt() -> None:
    runtime = generator()
    ids = TOKENIZER.encode(PROMPT)
    expected = runtime.generate(PROMPT)
    for prompt in (ids, tuple(ids), np.array(ids), np.array(ids, np.int32)):
        assert runtime.generate(prompt).tokens == expected.tokens
    rows = runtime.generate([ids, ids])
    assert [row.tokens for row in rows] == [expected.tokens] * 2
    assert [row.tokens for row in runtime.generate(np.array([ids]))] == [expected.tokens]


@pytest.mark.parametrize("options", [{}, {"stop": ["e"]}, {"temperature": 1.0, "seed": 1}, {"keep": 0.5}])
def test_a_stream_equals_one_piece(options: dict[str, object]) -> None:
    toy = Toy(vocab=TOKENIZER.vocab_size, eos=END, eos_rate=0.02)
    runtime = generator(ONE, toy)
    expected = runtime.generate(PROMPT, max_tokens=60, **options)
    stream = runtime.generate(PROMPT, max_tokens=60, stream=True, **options)
    assert isinstance(stream, Stream)
    with pytest.raises(OptionError, match="read to its end"):
        _ = stream.result
    pieces = list(stream)
    assert "".join(pieces) == expected.text == stream.result.text
    assert all(pieces)
    assert stream.result.tokens == expected.tokens
    assert stream.result.finish == expected.finish
    assert list(stream) == []


def test_streams_check_their_prompt_and_options_at_once() -> None:
    runtime = generator()
    with pytest.raises(PromptError):
        runtime.generate("", stream=True)
    with pytest.raises(OptionError, match="one prompt"):
        runtime.generate(["a", "b"], stream=True)


def test_an_interrupted_or_closed_stream_leaves_the_generator_usable() -> None:
    runtime = generator()
    expected = runtime.generate(PROMPT)
    stream = runtime.generate(PROMPT, stream=True)
    next(stream)
    stream.close()
    assert list(stream) == []
    runtime.engine.calls.clear()
    runtime.engine.fail_at = 4
    stream = runtime.generate(PROMPT, stream=True)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert list(stream) == []
    with pytest.raises(OptionError, match="read to its end"):
        _ = stream.result
    runtime.engine.fail_at = None
    assert runtime.generate(PROMPT).tokens == expected.tokens


def test_two_streams_at_once() -> None:
    runtime = generator()
    expected = [runtime.generate(p).text for p in PROMPTS[:2]]
    streams = [runtime.generate(p, stream=True) for p in PROMPTS[:2]]
    texts = ["", ""]
    for _ in range(200):
        for i, stream in enumerate(streams):
            texts[i] += next(stream, "")
    assert texts == expected


class Script:
    """A model that writes the given ids, whatever the prompt."""

    vocab = TOKENIZER.vocab_size

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.prompt: int | None = None

    def logits(self, groups: Sequence[Sequence[tuple[int, int]]]) -> np.ndarray:
        self.prompt = self.prompt or len(groups[0])
        row = np.zeros(self.vocab, np.float32)
        row[self.ids[len(groups[0]) - self.prompt]] = 1
        return row


def scripted(text: str) -> Generator:
    engine = ToyEngine(Script(TOKENIZER.encode(text, special=False)))  # type: ignore[arg-type]
    return Generator(engine, TOKENIZER, Defaults(eos_ids=(END,)))


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_that_span_tokens(stream: bool) -> None:
    text = "one; END of the prompt\n\nUser: x"
    for stop, expected in [
        (["\n\nUser:"], "one; END of the prompt"),
        (["e prom", "ENDx"], "one; END of th"),
        ("END", "one; "),
        (["one"], ""),
        (["absent"], text),
    ]:
        runtime = scripted(text)
        count = len(TOKENIZER.encode(text, special=False))
        answer = runtime.generate("go", stop=stop, max_tokens=count, stream=stream)
        if isinstance(answer, Stream):
            pieces = "".join(answer)
            answer = answer.result
            assert pieces == answer.text
        assert answer.text == expected
        assert answer.finish == ("length" if expected == text else "stop")
        assert len(answer.tokens) <= count
        assert len(runtime.engine.calls) == len(answer.tokens)  # nothing is computed after the stop


def test_a_special_token_stops_by_its_id() -> None:
    answer = scripted("well<|end|>more").generate("go", stop=["<|end|>"])
    assert (answer.text, answer.finish) == ("well", "stop")


def test_eos_ends_and_is_no_text() -> None:
    answer = scripted("well" + EOS + "more").generate("go", stop=["x"])
    assert (answer.text, answer.finish) == ("well", "eos")
    assert answer.tokens[-1] == END


def test_seeds() -> None:
    runtime = generator(sampling=Sampling(1.0))
    texts = [runtime.generate(PROMPT, seed=seed).text for seed in (1, 1, 2, None, None)]
    assert texts[0] == texts[1]
    assert len(set(texts[1:])) == 4


def test_defaults_hold_unless_a_call_says_otherwise() -> None:
    runtime = generator(ONE, keep=0.3, sampling=Sampling(1.0, seed=4), max_tokens=9)
    assert runtime.generate(PROMPT).tokens == runtime.generate(PROMPT, keep=0.3, seed=4, temperature=1.0).tokens
    assert len(runtime.generate(PROMPT).tokens) == 9
    assert len(runtime.generate(PROMPT, keep=1.0).kept) == len(TOKENIZER.encode(PROMPT))
    assert runtime.generate(PROMPT, temperature=0).tokens != runtime.generate(PROMPT).tokens


def test_max_tokens_is_clipped_to_the_context() -> None:
    ids = TOKENIZER.encode(PROMPT)
    runtime = generator(max_positions=len(ids) + 3)
    result = runtime.generate(PROMPT, max_tokens=50)
    assert (len(result.tokens), result.finish) == (3, "length")
    assert len(generator(max_positions=len(ids) + 1).generate(PROMPT).tokens) == 1


@pytest.mark.parametrize("excess", [0, 5])
def test_a_prompt_that_leaves_no_room(excess: int) -> None:
    ids = TOKENIZER.encode(PROMPT)
    most = len(ids) - excess
    with pytest.raises(PromptError, match=rf"has {len(ids)} tokens.* holds {most},.* at least {excess + 1} tokens"):
        generator(max_positions=most).generate(PROMPT)


@pytest.mark.parametrize("prompt", ["", [], (), [[]], ["a", ""], np.array([], np.int64)])
def test_empty_prompts(prompt: object) -> None:
    with pytest.raises(PromptError, match="empty"):
        generator().generate(prompt)


@pytest.mark.parametrize(
    "prompt", [None, 3, b"text", {"a": 1}, np.array(3), [None], [1.5], [["a"]], [3, "a"], [3, True], [-1], [10**6]]
)
def test_prompts_that_are_none(prompt: object) -> None:
    with pytest.raises(PromptError, match="expected"):
        generator().generate(prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_token": 3}, "no option 'max_token'; did you mean 'max_tokens'"),
        ({"max_new_tokens": 3}, "did you mean 'max_tokens'"),
        ({"temprature": 3}, "did you mean 'temperature'"),
        ({"xyz": 3}, "the options are keep, max_tokens"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": 1.0}, "max_tokens=1.0"),
        ({"max_tokens": True}, "max_tokens=True"),
        ({"stop": [""]}, "stop="),
        ({"stop": [3]}, "stop="),
        ({"stop": 3}, "stop=3"),
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 2}, "top_p=2"),
        ({"keep": "auto"}, "keep='auto' needs a share of the score mass"),
        ({"keep": "0.5"}, "keep='0.5' is text"),
        ({"keep": 0}, "keep=0"),
        ({"keep": 1.1}, "keep=1.1"),
        ({"keep": True}, "keep=True"),
        ({"keep": float("nan")}, "keep=nan"),
        ({"keep": (0.5,)}, "has 1 ratios.*2 pruning stages"),
        ({"keep": (0.2, 0.5)}, "rises"),
    ],
)
def test_option_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        generator(TWO).generate("a", **options)


def test_keep_needs_a_stage() -> None:
    for keep in (None, 1, 1.0, ()):
        generator().generate("a", keep=keep, max_tokens=1)
    with pytest.raises(OptionError, match=r"no pruning stage.*export"):
        generator().generate("a", keep=0.5)
    with pytest.raises(OptionError, match="no pruning stage"):
        generator(keep=0.5)


def test_keep_counts() -> None:
    assert keep_ratios(0.25, TWO) == (0.5, 0.25)
    assert keep_ratios((0.5, 0.5), TWO) == (0.5, 0.5)
    assert keep_counts(100, (0.5, 0.25), TWO) == [50, 25]
    assert keep_counts(100, (0.07,), ONE) == [7]
    assert keep_counts(100, (0.071,), ONE) == [8]
    assert keep_counts(100, (0.001,), ONE) == [5]
    assert keep_counts(3, (0.001,), ONE) == [3]
    assert keep_counts(100, (0.01, 0.01), TWO) == [5, 5]  # what the second stage must keep has to pass the first
    assert keep_counts(10, (0.01,), (Stage(1, 0, 0),)) == [1]
    assert keep_counts(10, (), ()) == []


def test_timings() -> None:
    runtime = generator()
    timings = runtime.generate(PROMPT, max_tokens=30).timings
    assert timings.tokens == 30
    assert 0 < timings.prefill_s < timings.time_to_first_token_s < timings.total_s
    assert timings.total_s == pytest.approx(timings.time_to_first_token_s + timings.decode_s)
    assert timings.prefill_s < timings.backend_s < timings.total_s
    assert timings.tokens_per_s == pytest.approx(29 / timings.decode_s)
    assert 0 < timings.overhead_per_token_s < 1e-3
    one = runtime.generate(PROMPT, max_tokens=1).timings
    assert (one.tokens_per_s, one.overhead_per_token_s, one.decode_s) == (0, 0, pytest.approx(0, abs=1e-3))


def test_a_slow_reader_does_not_count() -> None:
    stream = generator().generate(PROMPT, max_tokens=5, stream=True)
    time.sleep(0.2)
    for _ in stream:
        time.sleep(0.1)
    assert stream.result.timings.total_s < 0.1


def test_chat_goes_through_the_template() -> None:
    runtime = generator(template=ChatTemplate(TEMPLATE, {"bos_token": "<s>"}))
    messages = [{"role": "user", "content": "Hi"}]
    answer = runtime.chat(messages, max_tokens=9)
    ids = TOKENIZER.encode("<s><|user|>Hi<|end|><|assistant|>", special=False)
    assert answer.prompt_tokens == tuple(ids)
    assert ids.count(token_id("<s>")) == 1
    assert answer.tokens == runtime.generate(ids, max_tokens=9).tokens
    stream = runtime.chat(messages, max_tokens=9, stream=True)
    assert "".join(stream) == answer.text
    with pytest.raises(OptionError, match="did you mean 'keep'"):
        runtime.chat(messages, kep=1)
    with pytest.raises(PromptError, match="no messages"):
        runtime.chat([])
    with pytest.raises(OptionError, match="no chat template"):
        generator().chat(messages)
