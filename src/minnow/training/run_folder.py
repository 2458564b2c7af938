"""The run folder: config.yaml, metrics.jsonl, checkpoints/, model/. Everything about a run is in it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from minnow.config import atomic_write


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, written as it happens.

    A training line has `loss`; a validation line has `validation_loss`. Both carry `step`, the number of updates done.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        """Add one line and hand it to the operating system at once. Non-finite numbers become null (JSON has none)."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(clean, ensure_ascii=False) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Return all whole lines; a last line that a kill cut short is left out."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def rewind(self, step: int) -> None:
        """Forget what a run wrote after the checkpoint of `step`, which the resumed run will write again.

        The checkpoint was saved after the step's training line and before its validation.
        """
        kept = [r for r in self.read() if r["step"] < step or (r["step"] == step and "loss" in r)]
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept), encoding="utf-8")
