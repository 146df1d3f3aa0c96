"""``fstq build``, ``lint``, ``run``, ``chat`` and ``bench``: what makes and uses an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fstq_infer.cli import complete
from fstq_infer.cli.options import (
    Adapter,
    Backend,
    Batch,
    Bundle,
    Context,
    Json,
    Keep,
    LayerType,
    MaxTokens,
    Prompt,
    Rank,
    Seed,
    Temperature,
    Threads,
    examples,
    keep_of,
    ratios_of,
)
from fstq_infer.cli.root import app
from fstq_infer.lazy import load


@app.command(epilog=examples("fstq build my.bundle", "fstq build my.bundle --threads 2 --profile here.toml"))
def build(
    bundle: Bundle,
    backend: Annotated[
        str, typer.Option(help="ort, tensorrt or tensorrt-rtx.", autocompletion=complete.backends)
    ] = "ort",
    force: Annotated[bool, typer.Option("--force", help="Build again even when an engine is there.")] = False,
    threads: Threads = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="Also measure every format's kernels for the bundle's matrices, and write them to this file."
        ),
    ] = None,
    profile_tokens: Annotated[int, typer.Option(help="Length of a prompt that --profile measures with.")] = 256,
    context: Context = None,
    prompt: Prompt = None,
    batch: Batch = None,
    dtype: LayerType = None,
    rank: Rank = None,
    workspace: Annotated[int | None, typer.Option(help="TensorRT: largest scratch memory in MiB.")] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="tensorrt-rtx: build for this device (sm86, sm120), not for this machine's GPU.",
            autocompletion=complete.own_targets,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Build the engine of a bundle for this device and check it against the bundle."""
    given = {"context": context, "prompt": prompt, "batch": batch, "dtype": dtype, "rank": rank}
    load("fstq_infer.commands:build", "fstq build", "ort")(
        bundle,
        backend=backend,
        force=force,
        threads=threads,
        json=json,
        profile=profile,
        profile_tokens=profile_tokens,
        options=given | {"workspace": workspace, "target": target},
    )


@app.command(epilog=examples("fstq lint my.bundle --target orin-nano"))
def lint(
    bundle: Bundle,
    target: Annotated[
        str, typer.Option(help="orin-nano, orin-nx, agx-orin, thor, sm86 or sm120.", autocompletion=complete.targets)
    ] = "orin-nano",
    tensorrt: Annotated[
        str | None, typer.Option(help="The device's TensorRT, such as 10.3; default: that of its JetPack.")
    ] = None,
    context: Context = None,
    prompt: Prompt = None,
    batch: Batch = None,
    dtype: LayerType = None,
    rank: Rank = None,
    json: Json = False,
) -> None:
    """Would TensorRT build this bundle on that device? Builds with tensorrt-rtx, needs no GPU."""
    load("fstq_engines.tensorrt.lint:command", "fstq lint", "tensorrt-rtx")(
        bundle,
        target=target,
        version=tensorrt,
        options={"context": context, "prompt": prompt, "batch": batch, "dtype": dtype, "rank": rank},
        json=json,
    )


@app.command(
    epilog=examples(
        "fstq run my.bundle 'Where does Mora live? ...' --keep 0.5 --show-kept",
        "fstq run my.bundle - --json < prompt.txt",
    )
)
def run(
    bundle: Bundle,
    prompt: Annotated[
        str, typer.Argument(help="The prompt; '-' reads standard input, all of it as it is.", show_default=False)
    ],
    keep: Keep = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest tokens; 0: all.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the likeliest tokens of this total probability.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: repeat less.")] = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    show_kept: Annotated[bool, typer.Option("--show-kept", help="Show the prompt, dropped tokens struck out.")] = False,
    chat_template: Annotated[bool, typer.Option("--chat", help="Put the prompt through the chat template.")] = False,
    adapter: Adapter = None,
    threads: Threads = None,
    backend: Backend = "ort",
    json: Json = False,
) -> None:
    """Continue a prompt."""
    load("fstq_infer.commands:run", "fstq run", "ort")(
        bundle,
        prompt,
        adapter=adapter,
        show_kept=show_kept,
        chat=chat_template,
        threads=threads,
        backend=backend,
        json=json,
        options={
            "keep": keep_of(keep),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            "stop": tuple(stop or ()),
        },
    )


@app.command(epilog=examples("fstq chat my.bundle --system 'Answer in one sentence.'"))
def chat(
    bundle: Bundle,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    keep: Keep = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = None,
    seed: Seed = None,
    adapter: Adapter = None,
    threads: Threads = None,
    backend: Backend = "ort",
) -> None:
    """Talk to a bundle; the cache is kept between turns. An empty line or Ctrl-D ends."""
    load("fstq_infer.commands:chat", "fstq chat", "ort")(
        bundle,
        adapter=adapter,
        system=system,
        threads=threads,
        backend=backend,
        options={"keep": keep_of(keep), "max_tokens": max_tokens, "temperature": temperature, "seed": seed},
    )


@app.command(
    epilog=examples(
        "fstq bench my.bundle --prompt-tokens 1024 --new-tokens 64 --keep 1.0,0.5,0.25 --json bench.json",
        "fstq bench my.bundle --json - | jq '.rows[].ttft_s'",
    )
)
def bench(
    bundle: Bundle,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt (random tokens).")] = 1024,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    keep: Annotated[str, typer.Option(help="Keep ratios to compare, with commas; 1.0 is dense.")] = "1.0,0.5,0.25",
    repeats: Annotated[int, typer.Option(help="Measured rounds; each runs every ratio in turn.")] = 5,
    adapter: Adapter = None,
    threads: Threads = None,
    backend: Backend = "ort",
    json: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Write the numbers to this file; '-': print them instead of the table."
        ),
    ] = None,
) -> None:
    """Measure dense against pruned, interleaved; medians."""
    load("fstq_infer.commands:bench", "fstq bench", "ort")(
        bundle,
        adapter=adapter,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        keeps=ratios_of(keep),
        repeats=repeats,
        threads=threads,
        backend=backend,
        json_file=json,
    )
