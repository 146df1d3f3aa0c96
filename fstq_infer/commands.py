"""What the runtime's commands do: build, run, chat, bench. Prints for people, or JSON for programs."""

from __future__ import annotations

import itertools
import json as jsonlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fstq_infer.atomic import replace_file
from fstq_infer.bundle import Bundle
from fstq_infer.errors import BundleNotFoundError, OptionError
from fstq_infer.lazy import load
from fstq_infer.runtime.bench import BenchReport, measure
from fstq_infer.runtime.generate import Generator
from fstq_infer.runtime.load import build_engine
from fstq_infer.runtime.result import Result
from fstq_infer.runtime.text import TextStream
from fstq_infer.strict_json import MANIFEST
from fstq_infer.terminal import argument, notes, out, standard_input

NAME = 1024  # letters of a prompt that may be a path


def build(
    path: Path,
    *,
    backend: str,
    force: bool,
    threads: int | None,
    json: bool,
    options: Mapping[str, Any],
    profile: Path | None = None,
    profile_tokens: int = 256,
) -> None:
    """``fstq build``."""
    bundle = Bundle.open(path)
    if profile is not None:
        load("fstq_engines.profile:check", "fstq build --profile", "ort")(profile, profile_tokens)
    with notes.status("building and checking the engine") as status:
        engine = build_engine(
            bundle, backend=backend, force=force, threads=threads, options=options, progress=status.update
        )
    if profile is not None:
        measure_device = load("fstq_engines.profile:write", "fstq build --profile", "ort")
        with notes.status("measuring kernels"):
            measure_device(bundle, profile, profile_tokens, threads)
    sidecar = jsonlib.loads((engine / "engine.json").read_text(encoding="utf-8"))
    if json:
        out.data({"engine": str(engine), **sidecar})
        return
    out.print(f"engine: {engine}")
    made = f"{sidecar['build_seconds']:.1f} s with {sidecar['backend']} {sidecar['version']}"
    unchecked = sidecar["parity"].get("why")
    out.print(f"built in {made}; {f'not compared: {unchecked}' if unchecked else 'agrees with its bundle'}")
    if profile is not None:
        out.print(f"profile: {profile}")


def is_bundle(path: Path | str) -> bool:
    """Whether a bundle lies there; a text that cannot be a path is none."""
    try:
        return (Path(path) / MANIFEST).is_file()
    except (OSError, ValueError):
        return False


def run(
    path: Path,
    prompt: str,
    *,
    adapter: str | None,
    show_kept: bool,
    chat: bool,
    threads: int | None,
    json: bool,
    options: Mapping[str, Any],
    backend: str = "ort",
) -> None:
    """``fstq run``."""
    text = standard_input() if prompt == "-" else argument(prompt)
    if is_bundle(prompt[:NAME]) and not is_bundle(path):
        raise BundleNotFoundError(f"{str(path)!a} is no bundle, {prompt!a} is: the bundle comes first, then the prompt")
    generator = Generator.load(path, backend=backend, threads=threads, adapter=adapter)
    given = {name: value for name, value in options.items() if value is not None}
    given["stop"] = tuple(argument(end) for end in given.get("stop", ()))
    if json:
        result = (
            generator.chat([{"role": "user", "content": text}], **given) if chat else generator.generate(text, **given)
        )
        out.data(as_json(result))
        return
    stream = (
        generator.chat([{"role": "user", "content": text}], stream=True, **given)
        if chat
        else generator.generate(text, stream=True, **given)
    )
    for piece in stream:
        out.out(piece, end="")
    out.print()
    result = stream.result
    if show_kept:
        out.print()
        out.print(kept(generator, result))
    t = result.timings
    notes.print(
        f"{len(result.kept)} of {len(result.prompt_tokens)} prompt tokens kept, "
        f"first token after {t.time_to_first_token_s:.3f} s, "
        f"{t.tokens_per_s:.1f} tokens/s, ended by {result.finish}",
        style="dim",
    )


def as_json(result: Result) -> dict[str, Any]:
    """A result for programs."""
    return {
        "text": result.text,
        "tokens": list(result.tokens),
        "prompt_tokens": list(result.prompt_tokens),
        "kept": list(result.kept),
        "finish": result.finish,
        "timings": asdict(result.timings),
    }


def kept(generator: Generator, result: Result) -> Text | str:
    """The prompt with what was dropped marked as standard output can show it."""
    return kept_text(generator, result) if out.styled else marked_text(generator, result)


def kept_text(generator: Generator, result: Result) -> Text:
    """The prompt with kept tokens in green and dropped ones dim and struck out."""
    stays, stream, text = set(result.kept), TextStream(generator.tokenizer), Text()
    for index, token in enumerate(result.prompt_tokens):
        text.append(stream.push(token), style="green" if index in stays else "strike dim")
    return text


def marked_text(generator: Generator, result: Result) -> str:
    """The prompt with runs of dropped tokens in [- and -], for where nothing can be struck out."""
    stays, stream, pieces = set(result.kept), TextStream(generator.tokenizer), []
    for dropped, run in itertools.groupby(enumerate(result.prompt_tokens), lambda item: item[0] not in stays):
        text = "".join(stream.push(token) for _, token in run)
        pieces.append(f"[-{text}-]" if dropped else text)
    return "".join(pieces)


def chat(
    path: Path,
    *,
    adapter: str | None,
    system: str | None,
    threads: int | None,
    options: Mapping[str, Any],
    backend: str = "ort",
) -> None:
    """``fstq chat``."""
    generator = Generator.load(path, backend=backend, threads=threads, adapter=adapter)
    session = generator.session(system=argument(system)) if system else generator.session()
    given = {name: value for name, value in options.items() if value is not None}
    generator.options(given)
    while True:
        try:
            line = out.input("you: " if sys.stdin.isatty() else "")
        except EOFError:
            break
        if not line.strip():
            break
        stream = session.send(line, stream=True, **given)
        try:
            for piece in stream:
                out.out(piece, end="")
            out.print()
        except KeyboardInterrupt:
            stream.close()
            out.print("\n(stopped; this turn is forgotten)")


def bench(
    path: Path,
    *,
    adapter: str | None,
    prompt_tokens: int,
    new_tokens: int,
    keeps: Sequence[float] | None,
    repeats: int,
    threads: int | None,
    json_file: Path | None,
    backend: str = "ort",
) -> None:
    """``fstq bench``."""
    if keeps is None:
        raise OptionError("--keep takes numbers here, such as 1.0,0.5,0.25")
    printed = str(json_file) == "-"
    if json_file is not None and not printed and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise OptionError(f"--json {json_file} cannot be written: it is a folder, or its folder does not exist")
    generator = Generator.load(path, backend=backend, threads=threads, adapter=adapter)
    with notes.status("measuring"):
        report = measure(generator.adapted_engine, prompt_tokens, new_tokens, keeps, repeats)
    if printed:
        out.data(report.to_json())
        return
    out.print(bench_table(report))
    if json_file is not None:
        try:
            replace_file(json_file, jsonlib.dumps(report.to_json(), indent=1).encode())
        except OSError as error:
            raise OptionError(
                f"--json {json_file} cannot be written: {error}; '--json -' prints the numbers"
            ) from error


def bench_table(report: BenchReport) -> Table:
    """Dense and pruned side by side; speed-ups are over the first row."""
    rows = report.rows
    memory = f"peak memory {report.peak_rss / 2**20:.0f} MiB"
    table = Table(title=f"medians of {report.repeats} interleaved rounds, {report.prompt_tokens} tokens; {memory}")
    for name in (
        "keep",
        "kept",
        "TTFT s",
        "prefill tok/s",
        "decode tok/s",
        "end to end s",
        "speed-up",
        "prefill x",
        "KV MiB",
    ):
        table.add_column(name, justify="right")
    first = rows[0]
    for row in rows:
        table.add_row(
            f"{row.keep:g}",
            str(row.kept),
            f"{row.ttft_s:.3f}",
            f"{row.prefill_tokens_per_s:.0f}",
            f"{row.decode_tokens_per_s:.1f}",
            f"{row.total_s:.3f}",
            f"{first.total_s / row.total_s:.2f}x",
            f"{first.prefill_s / row.prefill_s:.2f}x",
            f"{row.kv_bytes / 2**20:.1f}",
        )
    return table
