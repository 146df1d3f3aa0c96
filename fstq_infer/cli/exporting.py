"""``fstq export`` and ``fstq demo``: what makes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fstq_infer.cli import complete
from fstq_infer.cli.options import CALIB_HELP, Json, Threads, examples, layers_of, ratios_of
from fstq_infer.cli.root import app
from fstq_infer.lazy import load


@app.command(
    epilog=examples(
        "fstq export ./my-model --out my.bundle --calib questions.jsonl --max-quality-drop 0.01",
        "fstq export ./my-model --out my.bundle --calib questions.jsonl --precision auto --bits 5",
        "fstq export ./my-model --out my.bundle --calib questions.jsonl --adapter medical=./lora",
    )
)
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
            "fp16, bf16, int8, int8-dynamic, int4, int4-64, int4-128, int4-128-dynamic, fp8 and nvfp4 (for TensorRT "
            "where the GPU has them), or a plan's file, PLAN.toml; default: as --dtype.",
            autocompletion=complete.precisions,
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
            "--profile'; default: a roofline of this machine.",
            autocompletion=complete.devices,
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
        prune_layer=layers_of(prune_layer),
        keep=ratios_of(keep),
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


@app.command(
    epilog=examples("fstq demo --out demo-out", "fstq demo --model ./my-model --calib questions.jsonl --out my-demo")
)
def demo(
    out: Annotated[Path, typer.Option(help="Where bundle and report go.")] = Path("demo-out"),
    model: Annotated[str | None, typer.Option(help="Another model: a folder or hub id; needs --calib.")] = None,
    calib: Annotated[Path | None, typer.Option(help="Calibration data for --model.")] = None,
    questions: Annotated[int, typer.Option(help="Test questions to answer, dense and pruned.")] = 60,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """The main job on a small model of ours: calibrate, export, build, and answer dense and pruned side by side."""
    load("fstq_export.demo.run:demo", "fstq demo", "export")(
        out=out, model=model, calib=calib, questions=questions, threads=threads, json=json
    )
