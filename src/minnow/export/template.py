"""What exported files say of a model: its name and its chat template."""

from __future__ import annotations

from pathlib import Path


def model_name(folder: Path) -> str:
    """A model's name: its folder's, its run's where the folder is a run's `model/`, or the Hub's name of it."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":  # as the Hub's client keeps it: models--OWNER--NAME/snapshots/COMMIT
        return folder.parents[1].name.rpartition("--")[2]
    return folder.parent.name if folder.name == "model" else folder.name


def without_thinking(template: str) -> str:
    """The template with `enable_thinking` fixed to false: what a reader that asks for reasoning by default gets.

    A model that was never taught to reason would write its answer into the think block.
    """
    return "{%- set enable_thinking = false %}\n" + template
