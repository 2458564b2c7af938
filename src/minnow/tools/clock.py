"""What day and time it is."""

from __future__ import annotations

from datetime import datetime

from minnow.tools.tool import Tool


def now() -> str:
    """Local date and time, such as Saturday 2026-11-21 09:30."""
    return datetime.now().astimezone().strftime("%A %Y-%m-%d %H:%M")


CLOCK = Tool("clock", "Tell the current local date and time.", {"type": "object", "properties": {}}, now)
