"""What a model folder says of itself: its name and its chat template."""

from __future__ import annotations

import json
from pathlib import Path


def model_name(folder: Path) -> str:
    """A model's name: its folder's, or its run's where the folder is a run's `model/`."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" else folder.name


def chat_template(folder: Path) -> str | None:
    """The chat template (Jinja) of a model folder; None for a model without one."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    template = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    return template if isinstance(template, str) else None


def without_thinking(template: str) -> str:
    """The template with `enable_thinking` fixed to false: what a reader that asks for reasoning by default gets.

    A model that was never taught to reason would write its answer into the think block.
    """
    return "{%- set enable_thinking = false %}\n" + template
