"""The runs that made a model, the first first, as their folders tell it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


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

    def last(self, key: str) -> Any:
        """The newest figure of that name; None if it was never logged."""
        return next((r[key] for r in reversed(self.records) if r.get(key) is not None), None)


def stage_folders(run: Path) -> list[Path]:
    """The runs inside a run of several stages, in the order they were made."""
    return sorted((f for f in run.iterdir() if (f / "config.yaml").exists()), key=lambda f: f.stat().st_ctime)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_rollouts(run: Path) -> list[dict[str, Any]]:
    """Lines of a run's rollouts.jsonl; none where it did not practise."""
    path = run / "rollouts.jsonl"
    return read_records(path) if path.is_file() else []


def lineage(run: Path) -> list[Run]:
    """`run` and the local runs that it started from; of a run of several stages, its last one. Empty for no run."""
    if not (run / "metrics.jsonl").is_file():
        stages = stage_folders(run) if run.is_dir() else []
        return lineage(stages[-1]) if stages else []
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    found = Run(run, config, read_records(run / "metrics.jsonl"))
    start = Path(found.init_from) if found.init_from else None
    if start is not None and start.name == "model":
        start = start.parent
    # The second place serves a run that was moved as a whole, its stages beside each other.
    places = [] if start is None else [start, run.parent / start.name]
    for place in places:
        if place.resolve() != run.resolve() and (place / "config.yaml").is_file():
            return [*lineage(place), found]
    return [found]
