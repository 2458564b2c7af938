"""The runs that made a model, the first first, as their folders tell it."""

from __future__ import annotations

import filecmp
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

MERGED_FROM = "merged-from.txt"
"""In a merged model's folder: the path of its adapter. A path is this machine's own, so it is never published."""


@dataclass(frozen=True)
class Run:
    """One training run, read from its folder."""

    folder: Path
    config: dict[str, Any]
    """config.yaml."""
    records: list[dict[str, Any]]
    """metrics.jsonl."""

    @property
    def init_from(self) -> str | None:
        """The model that it started from."""
        return self.config.get("init_from")

    @property
    def kept_step(self) -> float:
        """Updates after which the weights were those of its final model: under `patience` those of the best validation;
        infinity where the last ones were kept."""
        held_out = [record for record in self.records if record.get("validation_loss") is not None]
        if not held_out or not (self.config.get("training") or {}).get("patience"):
            return math.inf
        return float(min(held_out, key=lambda record: record["validation_loss"])["step"])

    def last(self, key: str) -> Any:
        """The newest figure of that name, up to the update whose weights were kept; None if it was never logged."""
        kept = self.kept_step
        of_model = (record for record in reversed(self.records) if record["step"] <= kept)
        return next((record[key] for record in of_model if record.get(key) is not None), None)


def seconds_in_updates(records: Sequence[Mapping[str, Any]]) -> float:
    """Seconds that the updates of a run took. One without a line (`log_every`) counts as the next one that has one."""
    total, before = 0.0, 0
    for record in records:
        if record.get("seconds") is not None:
            total += record["seconds"] * (record["step"] - before)
            before = record["step"]
    return total


def stage_folders(run: Path) -> list[Path]:
    """The runs inside a run of several stages, in the order they were made.

    By their config.yaml, which is written as a stage begins: a folder changes with whatever is written into it later.
    """
    folders = [folder for folder in run.iterdir() if (folder / "config.yaml").exists()]
    return sorted(folders, key=lambda folder: (folder / "config.yaml").stat().st_mtime_ns)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl; a last one that a kill cut short, or that is just being written, is left out.

    Split as bytes: what a model said may hold signs that end a line of text, such as U+2028.
    """
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return [json.loads(line) for line in whole.splitlines()]


def read_rollouts(run: Path) -> list[dict[str, Any]]:
    """Lines of a run's rollouts.jsonl; none where it did not practise."""
    path = run / "rollouts.jsonl"
    return read_records(path) if path.is_file() else []


def origin(model: Path) -> Path:
    """The folder that training wrote: of a merged model its adapter's, else the model's own."""
    note = model / MERGED_FROM
    return Path(note.read_text(encoding="utf-8").strip()) if note.is_file() else model


def run_of(model: Path) -> Path | None:
    """The run that wrote the model in the resolved folder `model`; None where it is not known to be a run's.

    That is the folder around it, if it is a run, or the stage whose model a run of several stages took for its own.
    A folder that only lies beside runs, or among them, belongs to none of them.
    """
    around = model.parent
    if model.name not in ("model", "model-before-collapse"):
        return None
    if _is_run(around):
        return around
    weights = model / "model.safetensors"
    copied = [stage / "model" / weights.name for stage in stage_folders(around) if _is_run(stage)]
    same = (w for w in copied if w.is_file() and weights.is_file() and filecmp.cmp(w, weights, shallow=False))
    return next((found.parent.parent for found in same), None)


def lineage(run: Path, later: frozenset[Path] = frozenset()) -> list[Run]:
    """`run` and the local runs that it started from; empty for a folder that is no run.

    later: runs that started from this one. Where one of them has overwritten what it came from, no more is known.
    """
    if not _is_run(run):
        return []
    found = Run(run, _read_config(run), read_records(run / "metrics.jsonl"))
    if not found.init_from:
        return [found]
    start = origin(Path(found.init_from))
    if start.name == "model":
        start = start.parent
    # A run may have been moved as a whole, its stages beside each other: the one that was made at `start` says so.
    moved = run.parent / start.name
    if _is_run(start):
        before = start
    elif _is_run(moved) and Path(_read_config(moved).get("run") or "").resolve() == start.resolve():
        before = moved
    elif (start / "model").is_dir() and (stage := run_of(start / "model")) is not None:
        before = stage  # of a run of several stages, as the quickstart's
    else:
        return [found]
    later |= {run.resolve()}
    return [found] if before.resolve() in later else [*lineage(before, later), found]


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file()


def _read_config(run: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
