"""``fstq plan``: predicted memory, time to first token and tokens/s of a bundle on devices that need not be at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fstq_infer import device
from fstq_infer.bundle import Bundle
from fstq_infer.device import Profile
from fstq_infer.doctor.environment import Environment, Machine
from fstq_infer.doctor.facts import memory_of, power_of
from fstq_infer.errors import OptionError
from fstq_infer.roofline import Decoder, Linear, Prediction, predict
from fstq_infer.runtime.options import keep_counts, keep_ratios
from fstq_infer.shape import decoder_of
from fstq_infer.terminal import out

NOTE = "A roofline, not a measurement: expect within a factor of two (fstq plan --check; docs/jetson.md)."
WITHIN = 2.0  # factor between prediction and published speed


@dataclass(frozen=True, slots=True)
class Row:
    """One device, mode and keep ratio."""

    device: str
    mode: str
    keep: float | tuple[float, ...]
    prediction: Prediction


def plan(
    path: Path | None,
    *,
    devices: Sequence[str],
    mode: str | None,
    prompt_tokens: int,
    new_tokens: int,
    keeps: Sequence[float] | None,
    precision: str | None,
    check: bool,
    json: bool,
) -> int:
    """The command; its exit code: 1 where --check finds a speed that is not within a factor of two, else 0."""
    if check:
        return _check(json)
    if path is None:
        raise OptionError("no bundle is given; expected one to predict, or --check")
    if prompt_tokens < 1 or new_tokens < 1:
        raise OptionError("--prompt-tokens and --new-tokens must be at least 1")
    profiles = [device.find(name) for name in (device.names() if list(devices) == ["all"] else devices)]
    if not profiles:
        profiles = [_here(Machine())]
    if mode is not None:
        profiles = [profile.in_mode(mode) for profile in profiles]
    bundle = Bundle.open(path, checksums=False)
    limit = bundle.manifest.model.max_positions
    if prompt_tokens + new_tokens > limit:
        raise OptionError(f"{prompt_tokens} + {new_tokens} tokens do not fit the context of {limit}; use fewer")
    decoder = decoder_of(bundle)
    if precision is not None:
        decoder = decoder.stored_as(precision)
    rows = [
        row for profile in profiles for row in predict_rows(profile, decoder, bundle, prompt_tokens, new_tokens, keeps)
    ]
    formats = sorted({linear.format for linear in decoder.linears})
    if json:
        out.data({"note": NOTE, "weights": formats, "rows": [as_json(row) for row in rows]})
    else:
        out.print(table(rows, f"{path.name}, {prompt_tokens} + {new_tokens} tokens, weights {', '.join(formats)}"))
        out.print(NOTE)
        if "fp32" in formats:
            out.print("The weights are fp32, as the bundle stores them; --precision fp16 or int4-128 shows others.")
    return 0


def _here(env: Environment) -> Profile:
    """The device that this is, in its power mode. Raises OptionError where it is none."""
    found, memory = None, memory_of(env)
    if memory is not None:
        found = device.matching(env.read("/proc/device-tree/model") or "", memory.total)
    if found is None:
        raise OptionError(
            f"no --device is given, and this is none; expected 'all' or one of {', '.join(device.names())}"
        )
    power = power_of(env)
    known = {name.casefold() for name in found.modes}
    return found.in_mode(power.mode) if power and power.mode and power.mode.casefold() in known else found


def predict_rows(
    profile: Profile, decoder: Decoder, bundle: Bundle, prompt: int, new: int, keeps: Sequence[float] | None
) -> list[Row]:
    """Dense first, then the ratios asked for, or the bundle's own."""
    stages = bundle.manifest.stages
    wanted: list[Any] = [1.0, *(keeps if keeps is not None else [bundle.manifest.pruning.keep] if stages else [])]
    rows = []
    for keep in dict.fromkeys(wanted):
        counts = keep_counts(prompt, keep_ratios(keep, stages), stages)
        found = predict(profile, decoder, prompt, new, [stage.layer for stage in stages], counts)
        rows.append(Row(profile.name, profile.mode.name, keep, found))
    return rows


def as_json(row: Row) -> dict[str, Any]:
    """For programs."""
    return {
        "device": row.device,
        "mode": row.mode,
        "keep": row.keep,
        **asdict(row.prediction),
        "fits": row.prediction.fits,
    }


def table(rows: Sequence[Row], title: str) -> Table:
    """For people."""
    made = Table(title=title)
    made.add_column("device", no_wrap=True)
    for name in ("keep", "TTFT ms", "tok/s", "total s", "KV MiB", "GiB", "free"):
        made.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        found = row.prediction
        made.add_row(
            f"{row.device} {row.mode}",
            ",".join(f"{k:g}" for k in row.keep) if isinstance(row.keep, tuple) else f"{row.keep:g}",
            f"{1e3 * found.ttft_s:.1f}",
            f"{found.decode_tokens_per_s:.4g}",
            f"{found.end_to_end_s:.2f}",
            f"{found.kv_bytes / 2**20:.1f}",
            f"{found.total_bytes / 2**30:.2f}",
            f"{found.free_bytes / 2**30:.1f}" if found.fits else f"{-found.free_bytes / 2**30:.1f} short",
        )
    return made


def published_decoder(model: dict[str, int], weights: str) -> Decoder:
    """A decoder with grouped heads and a gated MLP; embedding and head in half precision, as the published one."""
    hidden, width, inner = model["hidden"], model["head_dim"], model["intermediate"]
    queries, keys = model["heads"] * width, model["kv_heads"] * width
    shapes = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    linears = [
        Linear(n, k, weights, layer, f"{layer}.{place}")
        for layer in range(model["layers"])
        for place, (n, k) in enumerate(shapes)
    ]
    head = Linear(model["vocabulary"], hidden, "fp16", None, "head")
    heads = (model["heads"], model["kv_heads"], width)
    made = Decoder((*linears, head), (heads,) * model["layers"], 0, hidden, model["vocabulary"])
    return Decoder(made.linears, made.attention, made.matrix_bytes, hidden, made.vocabulary)


def compare() -> list[dict[str, Any]]:
    """Published prefill times and decode speeds beside predicted ones, in every power mode of the device."""
    data, rows = device.published(), []
    for row in data["rows"]:
        profile = device.find(row["device"])
        decoder = published_decoder(data["models"][row["model"]], row["weights"])
        for mode in profile.modes:
            found = predict(profile.in_mode(mode), decoder, row["prompt"], 1)
            figures = {
                "prefill_ms": (float(row["prefill_ms"]), 1e3 * found.ttft_s),
                "decode_tokens_per_s": (float(row["decode_tokens_per_s"]), found.decode_tokens_per_s),
            }
            for figure, (measured, predicted) in figures.items():
                rows.append(
                    {
                        "model": row["model"],
                        "device": profile.name,
                        "mode": mode,
                        "default": mode == profile.mode.name,
                        "weights": row["weights"],
                        "prompt": row["prompt"],
                        "figure": figure,
                        "published": measured,
                        "predicted": round(predicted, 1),
                        "ratio": round(predicted / measured, 2),
                        "within": 1 / WITHIN <= predicted / measured <= WITHIN,
                    }
                )
    return rows


def _check(json: bool) -> int:
    rows = compare()
    failed = [row for row in rows if row["default"] and not row["within"]]
    if json:
        out.data({"within": WITHIN, "rows": rows, "met": not failed})
        return bool(failed)
    made = Table(title="published by NVIDIA (TensorRT Edge-LLM 0.9) and predicted")
    for name in ("model", "device", "mode"):
        made.add_column(name, no_wrap=True)
    for name in ("prompt", "", "NVIDIA", "plan", "ratio"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column(f"{WITHIN:g}x", no_wrap=True)
    for row in rows:
        made.add_row(
            row["model"],
            row["device"],
            row["mode"] + ("*" if row["default"] else ""),
            str(row["prompt"]),
            "ms" if row["figure"] == "prefill_ms" else "tok/s",
            f"{row['published']:g}",
            f"{row['predicted']:g}",
            f"{row['ratio']:.2f}",
            "yes" if row["within"] else "NO",
        )
    out.print(made)
    out.print("* the profile's default, which decides the exit code: the published table names no power mode.")
    return bool(failed)
