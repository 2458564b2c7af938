"""`minnow eval`: score a model on tasks, with error bars."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from minnow.config import UserError
from minnow.evaluation import TaskOptions, evaluate, make_task
from minnow.evaluation.evaluate import show, write_results, write_rows
from minnow.model.pretrained import load_pretrained, resolve_model_folder
from minnow.tokenizer.tokenizer import Tokenizer
from minnow.training.hardware import DeviceName, choose_device


@dataclass(frozen=True, kw_only=True)
class Config:
    """Score a model on tasks and print each figure with its 95% interval."""

    model: str = field(metadata={"positional": True})
    """Model folder, run folder or Hub id."""
    tasks: tuple[str, ...] = ("pond", "bpb")
    """What to examine: pond (held-out questions, exact match), bpb (bits per byte)."""
    pond: str | None = None
    """Pond folder that the model was trained on; by default the one beside the model or in its run folder."""
    text: tuple[str, ...] = ()
    """Texts for bpb, one figure per file or folder: jsonl, parquet, txt; by default the pond's validation documents."""
    max_rows: int | None = None
    """Examine at most this many rows of each task."""
    device: DeviceName = "auto"
    """Where to run; auto takes a GPU where there is one."""
    json: str | None = None
    """File for the figures as JSON."""
    rows: str | None = None
    """File for every row with the model's answer and its score, as JSON lines."""


def run(config: Config) -> None:
    """Examine, print a table, write the files asked for."""
    folder = resolve_model_folder(config.model)
    options = TaskOptions(
        model_folder=folder,
        pond=None if config.pond is None else Path(config.pond),
        texts=config.text,
    )
    if not config.tasks:
        raise UserError("--tasks is empty: name at least one task")
    tasks = [make_task(name, options) for name in config.tasks]
    model = load_pretrained(folder, device=choose_device(config.device))
    results = evaluate(model, Tokenizer.from_pretrained(folder), tasks, max_rows=config.max_rows)
    show(results, Console())
    if config.json is not None:
        write_results(config.json, config.model, results)
    if config.rows is not None:
        write_rows(config.rows, results)
