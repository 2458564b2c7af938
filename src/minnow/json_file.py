"""JSON files: read where others wrote them or a disk has damaged them, written whatever a text holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minnow.config import UserError


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. UserError naming the file where it holds none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or brackets without end
        raise UserError(f"{file}: not valid JSON ({error}); restore the file") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a JSON object, {type(content).__name__}; restore the file")
    return content


def json_text(value: Any, indent: int | None = None) -> str:
    """`value` as JSON whose characters stand as they are, and which UTF-8 can hold.

    Half of a surrogate pair, which data may hold and UTF-8 cannot, becomes its escape (`\\ud83d`), as it came.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
