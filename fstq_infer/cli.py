"""The command line, ``fstq``. A command checks nothing itself: it hands over to its module, imported when it runs."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fstq_infer import __version__
from fstq_infer.errors import FstqError, OptionError
from fstq_infer.lazy import load

app = typer.Typer(
    name="fstq",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Export, build and run language models with Fisher-guided token pruning.",
    epilog="Exit codes: 0 done, 1 an error that the message explains, 2 wrong usage, 130 interrupted.",
)
errors = Console(stderr=True, highlight=False)

CALIB_HELP = (
    "Calibration data: JSON lines with prompt/answer or context/question/answer, or plain text lines. "
    "Without it nothing is known of quality, and the bundle is dense unless --prune-layer is given."
)
Bundle = Annotated[Path, typer.Argument(help="The bundle's directory.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: all that this process may use.")]
Keep = Annotated[
    str | None,
    typer.Option(
        help="Share of prompt tokens that stay (after the last stage, or after each: 0.5,0.25), or 'auto': as many as "
        "each prompt needs; default: the bundle's."
    ),
]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; default: the bundle's.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the sampler.")]
Backend = Annotated[str, typer.Option(help="ort, tensorrt or tensorrt-rtx; see 'fstq build'.")]
# Settings of a TensorRT engine.
Context = Annotated[
    int | None, typer.Option(help="TensorRT: most tokens of prompt and answer together; default: 4096, or the model's.")
]
Prompt = Annotated[int | None, typer.Option(help="TensorRT: most tokens of one call; default: the context.")]
Batch = Annotated[int | None, typer.Option(help="TensorRT: most rows; default: 1.")]
LayerType = Annotated[
    str | None, typer.Option("--dtype", help="TensorRT: float16, bfloat16 or float32; default: float16.")
]
Rank = Annotated[int | None, typer.Option(help="TensorRT: largest rank of an adapter; default: 64.")]
Adapter = Annotated[str | None, typer.Option(help="Name of one of the bundle's adapters; default: none.")]
adapters = typer.Typer(no_args_is_help=True, help="Adapters (LoRA) of a bundle: add, list, remove.")
app.add_typer(adapters, name="adapter")


def _ratios(text: str) -> list[float] | None:
    if text == "auto":
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"--keep is '{text}'; expected 'auto' or numbers, such as 0.5,0.25") from None


def _keep(text: str | None) -> float | list[float] | str | None:
    """A keep ratio, one for each stage, 'auto' or None as it was given."""
    ratios = None if text is None else _ratios(text)
    return text if ratios is None else ratios if len(ratios) > 1 else ratios[0]


def _layers(text: str) -> list[int] | None:
    if text == "auto":
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(
            f"--prune-layer is '{text}'; expected 'auto', or a whole number for each stage, such as 2,4"
        ) from None


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fstq-infer {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more on standard error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")


@app.command(epilog="Example: fstq export ./my-model --out my.bundle --calib questions.jsonl --max-quality-drop 0.01")
def export(
    model: Annotated[
        str, typer.Argument(help="A Hugging Face model folder, or a hub id; safetensors only.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The bundle to write.", show_default=False)],
    calib: Annotated[
        Path | None,
        typer.Option(help=CALIB_HELP),
    ] = None,
    prune_layer: Annotated[
        str, typer.Option(help="Prune before this decoder layer, or before several (2,4), or 'auto' (needs --calib).")
    ] = "auto",
    keep: Annotated[
        str,
        typer.Option(
            help="Default keep ratio, or 'auto': the smallest that meets --max-quality-drop. With several prune layers "
            "the last one's, or the share of the prompt that is left after each (0.5,0.25)."
        ),
    ] = "auto",
    max_quality_drop: Annotated[
        float, typer.Option(help="Quality that may be lost, as a fraction of the dense model's.")
    ] = 0.01,
    max_prompt: Annotated[
        int | None, typer.Option(help="Leave out calibration prompts longer than this many tokens.")
    ] = None,
    calib_items: Annotated[
        int | None,
        typer.Option(
            help="Use at most so many calibration items; default: 1800, or 256 for models over 50 M parameters."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    precision: Annotated[
        str | None,
        typer.Option(
            help="Formats of the weights: auto (least predicted damage within --bits or --bytes; needs --calib), fp32, "
            "fp16, bf16, int8, int8-dynamic, int4, int4-64, int4-128, or a plan's file, PLAN.toml; default: as --dtype."
        ),
    ] = None,
    bits: Annotated[
        float | None, typer.Option(help="Budget of --precision auto: bits per weight, scales counted; default: 5.")
    ] = None,
    bytes: Annotated[int | None, typer.Option(help="Budget of --precision auto: bytes of all weights.")] = None,
    target_latency: Annotated[
        str | None,
        typer.Option(
            metavar="SECONDS[@PROMPT]",
            help="Budget of --precision auto: seconds in all matrices for a decoded token, or for a prompt of so many "
            "tokens, on the device of --profile.",
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            help="The device: a board (orin-nano, orin-nano@15W; see 'fstq plan'), or a file from 'fstq build "
            "--profile'; default: a roofline of this machine."
        ),
    ] = None,
    tune_codes: Annotated[
        int | None,
        typer.Option(
            help="Steps that train integer codes towards the unquantized model, on --calib; 0: none; default: 1000 up "
            "to 1 M weights, 200 up to 8 M, then none."
        ),
    ] = None,
    score: Annotated[
        str, typer.Option(help="Sensitivity that the probe learns: gate, embedding, or auto: what measures best.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of everything that draws.")] = 0,
    sink: Annotated[int, typer.Option(help="So many first prompt tokens always stay.")] = 1,
    window: Annotated[
        int | None,
        typer.Option(help="So many last prompt tokens always stay; default: 4 with calibration data, else 16."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="A LoRA adapter's folder (PEFT), or NAME=FOLDER, to choose at run time; may be repeated."),
    ] = None,
    adapter_targets: Annotated[
        str | None,
        typer.Option(
            help="Layers that adapters may change, such as q_proj,v_proj, or 'all', for adapters that are added later; "
            "default: what the given ones change."
        ),
    ] = None,
    adapter_rank: Annotated[int | None, typer.Option(help="Largest rank of an adapter; default: 64 or more.")] = None,
    merge_adapter: Annotated[
        Path | None, typer.Option(help="A LoRA adapter's folder (PEFT) that becomes part of the model for good.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    json: Json = False,
) -> None:
    """Turn a checkpoint into a calibrated, token-pruning, verified bundle."""
    load("fstq_export.command:export", "fstq export", "export")(
        model=model,
        out=out,
        calib=calib,
        prune_layer=_layers(prune_layer),
        keep=_ratios(keep),
        max_quality_drop=max_quality_drop,
        max_prompt=max_prompt,
        calib_items=calib_items,
        dtype=dtype,
        score=score,
        seed=seed,
        sink=sink,
        window=window,
        revision=revision,
        force=force,
        json=json,
        precision=precision,
        bits=bits,
        bytes=bytes,
        target_latency=target_latency,
        profile=profile,
        tune_codes=tune_codes,
        adapter=adapter or [],
        adapter_targets=adapter_targets,
        adapter_rank=adapter_rank,
        merge_adapter=merge_adapter,
    )


@app.command(epilog="Example: fstq build my.bundle")
def build(
    bundle: Bundle,
    backend: Annotated[str, typer.Option(help="The backend to build for.")] = "ort",
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
        str | None, typer.Option(help="tensorrt-rtx: build for this device (sm86, sm120), not for this machine's GPU.")
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


@app.command(epilog="Example: fstq lint my.bundle --target orin-nano")
def lint(
    bundle: Bundle,
    target: Annotated[str, typer.Option(help="orin-nano, orin-nx, agx-orin, thor, sm86 or sm120.")] = "orin-nano",
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


@app.command(epilog="Example: fstq run my.bundle 'Where does Mora live? ...' --keep 0.5 --show-kept")
def run(
    bundle: Bundle,
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads standard input.", show_default=False)],
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
            "keep": _keep(keep),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            "stop": tuple(stop or ()),
        },
    )


@app.command(epilog="Example: fstq chat my.bundle --system 'Answer in one sentence.'")
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
        options={"keep": _keep(keep), "max_tokens": max_tokens, "temperature": temperature, "seed": seed},
    )


@app.command(
    epilog="Example: fstq bench my.bundle --prompt-tokens 1024 --new-tokens 64 --keep 1.0,0.5,0.25 --json bench.json"
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
    json: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
) -> None:
    """Measure dense against pruned, interleaved; medians."""
    load("fstq_infer.commands:bench", "fstq bench", "ort")(
        bundle,
        adapter=adapter,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        keeps=_ratios(keep),
        repeats=repeats,
        threads=threads,
        backend=backend,
        json_file=json,
    )


@app.command(epilog="Example: fstq plan my.bundle --device orin-nano --prompt-tokens 2048 --precision int4-128")
def plan(
    bundle: Annotated[Path | None, typer.Argument(help="The bundle's directory.", show_default=False)] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(help="A device's name, 'all', or a profile's file; several times for several; default: this one."),
    ] = None,
    mode: Annotated[str | None, typer.Option(help="Power mode, such as 15W; default: the profile's.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 1024,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    keep: Annotated[
        str | None, typer.Option(help="Keep ratios beside dense, with commas; default: the bundle's.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="As if all matrices were stored in this format; default: as they are.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Compare the model with published speeds instead.")] = False,
    json: Json = False,
) -> None:
    """Predict memory, time to first token and tokens/s on a Jetson, dense and pruned, from a roofline."""
    code = load("fstq_infer.forecast:plan", "fstq plan", "ort")(
        bundle,
        devices=device or [],
        mode=mode,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        keeps=None if keep is None else _ratios(keep),
        precision=precision,
        check=check,
        json=json,
    )
    raise typer.Exit(code)


@app.command(epilog="Example: fstq doctor")
def doctor(
    json: Json = False,
    record: Annotated[
        Path | None,
        typer.Option(help="Also write what was read (files, commands, packages) to this file, for a report."),
    ] = None,
    replay: Annotated[Path | None, typer.Option(help="Judge such a record instead of this machine.")] = None,
) -> None:
    """Look for what would make inference fail or slow here, and say what to do. Exit code 1: something is broken."""
    raise typer.Exit(
        load("fstq_infer.doctor.command:doctor", "fstq doctor", "ort")(json=json, record=record, replay=replay)
    )


@adapters.command("add", epilog="Example: fstq adapter add my.bundle ./medical")
def adapter_add(
    bundle: Bundle,
    folder: Annotated[str, typer.Argument(help="A LoRA adapter's folder (PEFT), or NAME=FOLDER.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Its name in the bundle; default: the folder's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter of that name.")] = False,
    json: Json = False,
) -> None:
    """Check an adapter and put it into a bundle; engines that are built stay valid."""
    load("fstq_infer.commands:adapter_add", "fstq adapter", "ort")(bundle, folder, name=name, force=force, json=json)


@adapters.command("list", epilog="Example: fstq adapter list my.bundle")
def adapter_list(bundle: Bundle, json: Json = False) -> None:
    """Show a bundle's adapters."""
    load("fstq_infer.commands:adapter_list", "fstq adapter", "ort")(bundle, json=json)


@adapters.command("remove", epilog="Example: fstq adapter remove my.bundle medical")
def adapter_remove(
    bundle: Bundle,
    name: Annotated[str, typer.Argument(help="The adapter's name.", show_default=False)],
    json: Json = False,
) -> None:
    """Take an adapter out of a bundle."""
    load("fstq_infer.commands:adapter_remove", "fstq adapter", "ort")(bundle, name, json=json)


@app.command(epilog="Example: fstq demo --out demo-out")
def demo(
    out: Annotated[Path, typer.Option(help="Where bundle and report go.")] = Path("demo-out"),
    model: Annotated[str | None, typer.Option(help="Another model: a folder or hub id; needs --calib.")] = None,
    calib: Annotated[Path | None, typer.Option(help="Calibration data for --model.")] = None,
    questions: Annotated[int, typer.Option(help="Test questions to answer, dense and pruned.")] = 60,
    threads: Threads = None,
) -> None:
    """The main job on a small model of ours: calibrate, export, build, and answer dense and pruned side by side."""
    load("fstq_export.demo.run:demo", "fstq demo", "export")(
        out=out, model=model, calib=calib, questions=questions, threads=threads
    )


fed = typer.Typer(no_args_is_help=True, help="Federated fine-tuning: train an adapter where the data are.")
app.add_typer(fed, name="fed")


@fed.command("run", epilog="Example: fstq fed run federation.toml --set server.rounds=20 --resume")
def fed_run(
    config: Annotated[
        Path, typer.Argument(help="A TOML file, or a pyproject.toml with [tool.flwr.app.config].", show_default=False)
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last round that was finished.")] = False,
    set: Annotated[
        list[str] | None, typer.Option(help="SECTION.KEY=VALUE in place of the file's; may be given several times.")
    ] = None,
    supernodes: Annotated[
        bool,
        typer.Option(
            "--supernodes",
            help="As across machines: a SuperLink and a SuperNode for each client, with TLS, on loopback.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Run a federation on this machine and save its adapter in PEFT's format."""
    load("fstq_infer.federated.app.command:run", "fstq fed", "federated")(
        config, resume=resume, changes=set or [], json=json, supernodes=supernodes
    )


@fed.command("new", epilog="Example: fstq fed new my-federation --model ./my-model --data questions.jsonl")
def fed_new(
    folder: Annotated[Path, typer.Argument(help="The folder to write.", show_default=False)],
    model: Annotated[str, typer.Option(help="Folder of the base model.")] = "model",
    data: Annotated[str, typer.Option(help="File of the data.")] = "data.jsonl",
) -> None:
    """Write a Flower app, for 'fstq fed run' and 'flwr run'."""
    load("fstq_infer.federated.app.command:new", "fstq fed", "federated")(folder, model=model, data=data)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: turns errors into one line and an exit code."""
    try:
        app(arguments, standalone_mode=True)
    except FstqError as error:
        errors.print(f"[bold red]error[/]: {_escaped(error)}")
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(130)


def _escaped(error: Any) -> str:
    from rich.markup import escape

    return escape(str(error))
