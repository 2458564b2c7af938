"""Looking something up in a given table."""

from __future__ import annotations

from collections.abc import Mapping

from minnow.tools.tool import Tool, ToolError


def lookup_tool(
    table: Mapping[str, Mapping[str, str]], *, name: str = "look_up", description: str = "Look up a fact."
) -> Tool:
    """A tool over `table`: of whom or what -> which property -> its value. Names are compared without case."""
    folded = {key.casefold(): (key, row) for key, row in table.items()}

    def look_up(subject: str, property: str) -> str:
        found = folded.get(subject.strip().casefold())
        if found is None:
            raise ToolError(f"nothing is known about {subject!r}")
        key, row = found
        if property not in row:
            raise ToolError(f"of {key} these are known: {', '.join(row)}")
        return row[property]

    parameters = {
        "type": "object",
        "properties": {
            "subject": {"type": "string"},
            "property": {"type": "string"},
        },
        "required": ["subject", "property"],
    }
    return Tool(name, description, parameters, look_up)
