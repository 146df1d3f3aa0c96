"""The front door of the runtime: prompts in, texts out. Knows an engine by its protocol, and no backend."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, Literal, overload

from fstq_infer.adapters.library import Library
from fstq_infer.adapters.store import Adapter
from fstq_infer.bundle import Bundle
from fstq_infer.errors import AdapterNameError, OptionError, PromptError
from fstq_infer.runtime.chat import ChatTemplate, Message
from fstq_infer.runtime.engine import Engine
from fstq_infer.runtime.load import open_engine
from fstq_infer.runtime.loop import Row, Run
from fstq_infer.runtime.options import CURRENT, Defaults, Keep, Options, parse_options
from fstq_infer.runtime.result import Clock, Result, Stream
from fstq_infer.runtime.sampling import Sampling
from fstq_infer.runtime.session import Session
from fstq_infer.runtime.text import Tokenizer

_log = logging.getLogger(__name__)


class Generator:
    """Generates text from one engine. Holds no state between calls, so an interrupted call leaves it usable.

    Calls are not concurrent, and neither are streams read in turns from several threads.
    """

    __slots__ = ("_adapter", "_eos", "_library", "defaults", "engine", "template", "tokenizer")

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        defaults: Defaults | None = None,
        template: ChatTemplate | None = None,
        library: Library | None = None,
        adapter: str | None = None,
    ) -> None:
        """library: the adapters that there are; adapter: the one that is used where a call names none.

        Raises OptionError when the defaults do not fit the engine, AdapterError subclasses for the adapter.
        """
        self.engine = engine
        self.tokenizer = tokenizer
        self.defaults = defaults or Defaults()
        self.template = template
        self._eos = frozenset(self.defaults.eos_ids)
        parse_options({}, self.defaults, engine.stages)
        self._library = library
        self._adapter: Adapter | None = None
        self.set_adapter(adapter)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        backend: str = "ort",
        threads: int | None = None,
        provider: str = "cpu",
        checksums: bool = False,
        adapter: str | None = None,
    ) -> Generator:
        """Open a bundle and its engine, which is built first where there is none for this device yet.

        threads: CPU threads, default all that this process may use. checksums: also read every file of the bundle
        and compare its checksum; an engine's build always does. adapter: one of the bundle's, see :meth:`set_adapter`.
        Raises BundleError, EngineError and AdapterError subclasses.
        """
        bundle = Bundle.open(path, checksums=checksums)
        engine = open_engine(bundle, backend=backend, threads=threads, provider=provider)
        tokenizer = Tokenizer.from_file(bundle.file("tokenizer.json"))
        manifest = bundle.manifest
        given = manifest.generation
        sampling = Sampling(given.temperature, given.top_k, given.top_p, given.repetition_penalty)
        template = None
        if "chat_template.jinja" in manifest.files:
            source = bundle.file("chat_template.jinja")
            named = {"bos_token": given.bos_token_id, "eos_token": next(iter(given.eos_token_ids), None)}
            tokens = {name: text for name, i in named.items() if i is not None and (text := tokenizer.token(i))}
            try:
                template = ChatTemplate(source.read_text(encoding="utf-8"), tokens)
            except (UnicodeDecodeError, PromptError, OptionError) as error:
                _log.warning("%s cannot be used, so chat is off: %s", source, error)
        keep = manifest.pruning.keep if manifest.stages else 1.0
        auto = manifest.pruning.auto if manifest.stages else None
        defaults = Defaults(keep, sampling, given.eos_token_ids, auto=auto)
        return cls(engine, tokenizer, defaults, template, Library(bundle), adapter)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the bundle's adapters."""
        return self._library.names if self._library is not None else ()

    @property
    def adapter(self) -> str | None:
        """The adapter that is used where a call names none."""
        return None if self._adapter is None else self._adapter.name

    def set_adapter(self, name: str | None) -> None:
        """Use an adapter from now on where a call names none; None: the model as it is.

        Nothing is built or loaded again but the adapter's own matrices, once. Raises AdapterNameError for an unknown
        name, EngineError for an engine without inputs for adapters.
        """
        chosen = self._get(name)
        if chosen is not None:
            self.engine.adapted([chosen])  # whatever it needs is made ready, or fails, now
        self._adapter = chosen

    @property
    def adapted_engine(self) -> Engine:
        """The engine with the adapter that is used where a call names none."""
        return self.engine if self._adapter is None else self.engine.adapted([self._adapter])

    def _get(self, name: Any) -> Adapter | None:
        if name == CURRENT:
            return self._adapter
        if self._library is None:
            if name is None:
                return None
            raise AdapterNameError(f"there is no adapter {name!r}: this generator was made without a bundle's adapters")
        return self._library.get(name)

    @overload
    def generate(self, prompt: str | Sequence[int], *, stream: Literal[False] = False, **options: Any) -> Result: ...

    @overload
    def generate(self, prompt: str | Sequence[int], *, stream: Literal[True], **options: Any) -> Stream: ...

    @overload
    def generate(self, prompt: list[str] | list[list[int]], **options: Any) -> list[Result]: ...

    def generate(
        self,
        prompt: str | Sequence[int] | list[str] | list[list[int]],
        *,
        keep: Keep | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        stream: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        adapter: str | Sequence[str | None] | None = CURRENT,
        **unknown: Any,
    ) -> Result | list[Result] | Stream:
        """Continue one prompt (text, or token ids), or a batch of them (a list of texts or of id lists).

        keep: ratio of the prompt's tokens that stays, for the last pruning stage; or one ratio per stage; or "auto":
        per prompt, as many as calibration found to be needed.
        max_tokens: most tokens to generate (128), fewer where the context ends. stop: texts that end the generation.
        stream: give pieces of text as they come (one prompt only). The others are those of ``Sampling``; each row of
        a batch has its own random generator from the same seed, so that it equals a single run.

        adapter: name of one of the bundle's adapters, None for none, in a batch also a list with one for each row;
        default: what :meth:`set_adapter` chose. Rows whose adapters bring probes of their own run apart from others.

        Raises PromptError for an empty prompt or one that leaves no room in the context, OptionError for an option,
        AdapterNameError for an unknown adapter.
        """
        clock = Clock()
        batch = _is_batch(prompt)
        prompts: Any = prompt if batch else [prompt]
        adapters = self._adapters(adapter, len(prompts), batch)
        given = {
            "keep": keep,
            "max_tokens": max_tokens,
            "stop": stop,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            **unknown,
        }
        options = [self.options(given, one) for one in adapters]
        if batch and stream:
            raise OptionError("stream=True takes one prompt, not a list of them; stream them one after the other")
        ids = [self._ids(item) for item in prompts]
        if not batch:
            return self.finish(self.run(ids, options[0], clock, adapters=adapters), clock, stream=stream)
        results: list[Result] = [None] * len(ids)  # type: ignore[list-item]
        for rows in _together(adapters):
            run = self.run(
                [ids[row] for row in rows],
                [options[row] for row in rows],
                clock,
                adapters=[adapters[row] for row in rows],
            )
            for _ in run.pieces():
                pass
            for place, row in enumerate(rows):
                results[row] = run.result(place)
            clock = Clock()
        return results

    @overload
    def chat(self, messages: Sequence[Message], *, stream: Literal[False] = False, **options: Any) -> Result: ...

    @overload
    def chat(self, messages: Sequence[Message], *, stream: Literal[True], **options: Any) -> Stream: ...

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        stream: bool = False,
        adapter: str | None = CURRENT,
        **options: Any,
    ) -> Result | Stream:
        """Answer a conversation once. Options as in :meth:`generate`.

        tools, variables: for the template. Raises OptionError when the bundle has no chat template.
        """
        clock = Clock()
        if self.template is None:
            raise OptionError(
                "this bundle has no chat template; use generate() with plain text, or export the model again from a "
                "checkpoint that has one"
            )
        adapters = self._adapters(adapter, 1, False)
        checked = self.options(options, adapters[0])
        text = self.template.render(messages, tools=tools, variables=variables)
        run = self.run([self._ids(self.tokenizer.encode(text, special=False))], checked, clock, adapters=adapters)
        return self.finish(run, clock, stream=stream)

    def session(
        self,
        *,
        system: str | None = None,
        messages: Sequence[Message] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> Session:
        """A conversation that keeps its cache from turn to turn; it may begin with a system text and messages."""
        first = [] if system is None else [{"role": "system", "content": system}]
        return Session(self, [*first, *messages], tools=tools, variables=variables)

    # What follows is for Session and for benchmarks.

    def options(self, given: Mapping[str, Any], adapter: Adapter | None = None) -> Options:
        """Check options, all but ``stream`` and ``adapter``; an adapter may have other defaults than the bundle."""
        defaults = self.defaults
        if adapter is not None and adapter.pruning is not None and self.engine.stages:
            defaults = replace(defaults, keep=adapter.pruning.keep, auto=adapter.pruning.auto)
        return parse_options(given, defaults, self.engine.stages)

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        options: Options | Sequence[Options],
        clock: Clock,
        *,
        adapters: Sequence[Adapter | None] = (None,),
        **state: Any,
    ) -> Run:
        """Get prompts of token ids ready to run; ``state`` continues a cache, see :class:`Run`.

        options, adapters: of each row, or one for all.
        """
        each = [options] * len(prompts) if isinstance(options, Options) else options
        rows = [
            Row(ids, min(own.max_tokens, self._room(ids)), own, self.tokenizer, self._eos)
            for ids, own in zip(prompts, each, strict=True)
        ]
        engine = self.engine.adapted(adapters) if any(adapters) else self.engine
        return Run(engine, rows, clock, **state)

    def _adapters(self, given: Any, rows: int, batch: bool) -> list[Adapter | None]:
        """The adapter of each row."""
        if isinstance(given, str) or not isinstance(given, Sequence):
            return [self._get(given)] * rows
        if not batch or len(given) != rows:
            raise OptionError(
                f"adapter={list(given)!r} has {len(given)} names; expected one name, or one for each of {rows} prompts "
                "in a list"
            )
        return [self._get(name) for name in given]

    def finish(
        self, run: Run, clock: Clock, *, stream: bool, done: Callable[[Run], None] | None = None
    ) -> Result | Stream:
        """Run one row to its end, or hand out the stream that does; calls ``done`` at the regular end."""

        def finish() -> Result:
            if done is not None:
                done(run)
            return run.result(0)

        clock.pause()  # until the first piece is asked for
        reply = Stream((text for (text,) in run.pieces() if text), finish)
        if stream:
            return reply
        for _ in reply:
            pass
        return reply.result

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of one prompt. Raises PromptError when it is empty or holds an unknown id."""
        _check_kind(prompt)
        if not isinstance(prompt, str):
            ids = [int(item) if _is_id(item) else -1 for item in prompt]
            wrong = [place for place, item in enumerate(ids) if not 0 <= item < self.engine.vocab_size]
            if wrong:
                raise PromptError(
                    f"token {wrong[0]} of the prompt is {prompt[wrong[0]]!r}; expected ids from 0 to "
                    f"{self.engine.vocab_size - 1}"
                )
        else:
            ids = self.tokenizer.encode(prompt) if prompt else []
        if not ids:
            raise PromptError("the prompt is empty; expected a text, or a list with at least one token id")
        return ids

    def _room(self, ids: Sequence[int]) -> int:
        """How many tokens may follow; raises PromptError when none."""
        most = self.engine.max_positions
        if len(ids) >= most:
            raise PromptError(
                f"the prompt has {len(ids)} tokens, but this engine's context holds {most}, generated ones included. "
                f"Shorten the prompt by at least {len(ids) - most + 1} tokens, start a new session, or build the "
                "engine for a longer context"
            )
        return most - len(ids)


def _together(adapters: Sequence[Adapter | None]) -> list[list[int]]:
    """Rows that can share a batch: those whose adapters bring the same probes."""
    groups: dict[int, list[int]] = {}
    for row, adapter in enumerate(adapters):
        groups.setdefault(id(adapter) if adapter is not None and adapter.probe else 0, []).append(row)
    return list(groups.values())


def _is_id(item: object) -> bool:
    return isinstance(item, Integral) and not isinstance(item, bool)


def _is_batch(prompt: Any) -> bool:
    """Whether a prompt is a list of prompts."""
    _check_kind(prompt)
    return not isinstance(prompt, str) and len(prompt) > 0 and not isinstance(prompt[0], Integral)


def _check_kind(prompt: object) -> None:
    listed = isinstance(prompt, Sequence) or getattr(prompt, "ndim", 0) > 0  # NumPy arrays are no Sequence
    if isinstance(prompt, bytes) or not listed:
        raise PromptError(
            f"a prompt is a {type(prompt).__name__}; expected a text, a list of token ids, or a list of prompts"
        )
