"""How bodies are checked: strictly, and so that a body full of mistakes costs no more than one with a single mistake.

Pydantic collects every error, one for each item and each member of a union, and it does so in the event loop: half
a MiB of nulls would keep everybody waiting for seconds. So a list ends at its first wrong item (`Items`), and an
object with more keys than anybody means is not looked into.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

_T = TypeVar("_T")

Items = Annotated[list[_T], Field(fail_fast=True)]
"""A list that is read up to its first wrong item."""

MAX_KEYS = 100
"""Most keys of a body, and of each object in it that refuses unknown ones; twice what a chat request knows."""


def at_most(count: int) -> BeforeValidator:
    """An object or list of at most so many members, counted before they are looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, Sized) and len(value) > count:
            raise ValueError(f"{len(value)} entries; at most {count} are allowed")
        return value

    return BeforeValidator(check)


def refused(reason: str, *but: str | bool) -> BeforeValidator:
    """What this server cannot do, said by name; null asks for nothing, and so do the values of `but`."""

    def check(value: Any) -> Any:
        if value is not None and value not in but:
            raise ValueError(reason)
        return value

    return BeforeValidator(check)


AT_FAULT = "at_fault"
"""The type of the errors that `at_fault` makes; `errors.validation_error` reads them."""


def at_fault(where: str, reason: str) -> PydanticCustomError:
    """The error of fields that do not go together, told of the one at `where` (`messages.2.tool_call_id`)."""
    return PydanticCustomError(AT_FAULT, "{reason}", {"where": where, "reason": reason})


class Strict(BaseModel):
    """What knows all of its fields: others are errors."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _not_too_many_keys(cls, given: Any) -> Any:
        if isinstance(given, dict) and len(given) > MAX_KEYS:
            raise ValueError(f"an object has {len(given)} keys; at most {MAX_KEYS} are read")
        return given


class Part(BaseModel):
    """Structures inside a body; clients send back what servers sent them, so unknown fields are left out."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
