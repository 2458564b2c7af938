"""The values of a row, as what they should be; or what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class RowError(ValueError):
    """What is wrong with one row, without its location."""


def from_json(value: Any, what: str) -> Any:
    """Return what a text of JSON stands for; anything else as it is. Raises RowError."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is no JSONDecodeError
        raise RowError(f"{what} is not valid JSON: {error}") from None


def require_json(value: Any, what: str) -> None:
    """Raise RowError for what the template could not write: parquet has dates and the like."""
    try:
        json.dumps(value)
    except TypeError as error:
        raise RowError(f"{what} hold what JSON cannot: {error}") from None


def checked_text(value: Any, what: str) -> str:
    """Return `value` if it is text that UTF-8 can write. Raises RowError."""
    if not isinstance(value, str):
        raise RowError(f"{what} must be text, it is {kind_of(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise RowError(f"{what} is not valid Unicode: {half} at character {error.start} is half a pair") from None
    return value


def kind_of(value: Any) -> str:
    """Name the JSON type of a value."""
    names = {"NoneType": "null", "dict": "an object", "list": "a list", "str": "text", "bool": "true or false"}
    return names.get(type(value).__name__, "a number" if isinstance(value, int | float) else type(value).__name__)


def keys_of(row: Mapping[str, Any]) -> str:
    """Name the row's keys."""
    return ", ".join(f"`{key}`" for key in row) or "nothing"
