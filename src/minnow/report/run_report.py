"""`report.html`: what a run did, on one page that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from minnow.config import UserError
from minnow.disk import atomic_write
from minnow.report.lineage import Run, read_records, read_rollouts, seconds_in_updates, stage_folders
from minnow.report.model_card import write_model_card
from minnow.report.plots import figures_of, learns_from_pairs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT = "report.html"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c2b33; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; }
td, th { padding: .25rem .9rem .25rem 0; text-align: left; border-bottom: 1px solid #dde5e8; }
img { width: 100%; } pre { background: #f3f7f8; padding: 1rem; overflow-x: auto; font-size: .85rem; }
.turn { margin: .4rem 0; padding: .5rem .8rem; border-radius: .6rem; background: #f3f7f8; }
.assistant { background: #dff0f5; margin-left: 2rem; }
"""


def write_report(
    run: Path,
    *,
    title: str | None = None,
    figures: Mapping[str, str] | None = None,
    conversations: Sequence[Sequence[Mapping[str, str]]] = (),
) -> Path:
    """Write `run/report.html` from the run's metrics and configuration, and the card of a finished model.

    figures: further rows of the table of results. conversations: samples, unedited, as lists of {role, content}.
    Raises UserError when `run` holds no metrics.
    """
    runs = (
        [run] if (run / "metrics.jsonl").exists() else [f for f in stage_folders(run) if (f / "metrics.jsonl").exists()]
    )
    if not runs:
        raise UserError(f"{run} holds no metrics.jsonl: give the folder of a training run")
    body = [f"<h1>{html.escape(title or run.name)}</h1>"]
    if figures:
        body.append(_table(figures))
    if conversations:
        body.append("<h2>Samples</h2>")
        body += [_conversation(messages) for messages in conversations]
    for folder in runs:
        config = (folder / "config.yaml").read_text(encoding="utf-8")
        records = read_records(folder / "metrics.jsonl")
        body.append(f"<h2>{html.escape(folder.name)}</h2>")
        body.append(_table(_summary(Run(folder, yaml.safe_load(config), records))))
        body += [_picture(figure, "curves") for figure in figures_of(records, read_rollouts(folder), folder.name)]
        body.append(f"<details><summary>configuration</summary><pre>{html.escape(config)}</pre></details>")
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title or run.name)}</title>'
    page += f"<style>{STYLE}</style>{''.join(body)}</html>"
    with atomic_write(run / REPORT) as temporary:
        temporary.write_text(page, encoding="utf-8")
    if (run / "model").is_dir():
        write_model_card(run / "model")
    return run / REPORT


def _summary(run: Run) -> dict[str, str]:
    training = [r for r in run.records if "loss" in r]
    held_out = [r for r in run.records if "validation_loss" in r]
    unit = "pair" if learns_from_pairs(run.records) else "token"
    rows: dict[str, str] = {}
    if training:
        last = training[-1]
        speed = statistics.median(r["tokens_per_second"] for r in training)
        utilisation = statistics.median(r["mfu"] for r in training)
        rows |= {
            "updates": f"{last['step']:,}",
            "tokens": f"{last['tokens']:,}",
            "training loss": f"{last['loss']:.4f} nats per {unit}",
            "time in updates": f"{seconds_in_updates(training) / 60:.1f} minutes",
            "speed (median)": f"{speed:,.0f} tokens/s",
            "model FLOP utilisation (median)": f"{utilisation:.0%} of the measured matmul peak",
            "peak memory": f"{last['memory_gb']:.2f} GB",
        }
    if held_out:
        last = next((r for r in held_out if r["step"] == run.kept_step), held_out[-1])
        if last is not held_out[-1]:
            rows["model kept"] = f"after update {last['step']:,}, the best one held out (training.patience)"
        loss = last["validation_loss"]  # null in the log where it was not finite
        rows["held-out loss"] = "not finite" if loss is None else f"{loss:.4f} nats per {unit}"
        if last.get("bits_per_byte") is not None:
            rows["held-out bits per byte"] = f"{last['bits_per_byte']:.4f}"
        if "validation_accuracy" in last:
            rows["held-out pairs judged right"] = f"{last['validation_accuracy']:.1%}"
    return rows


def _table(rows: Mapping[str, str]) -> str:
    cells = (f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
    return f"<table>{''.join(cells)}</table>"


def _conversation(messages: Sequence[Mapping[str, str]]) -> str:
    turns = (f'<div class="turn {html.escape(m["role"])}">{html.escape(m["content"])}</div>' for m in messages)
    return "".join(turns)


def _picture(figure: Figure, name: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode("ascii")}">'
