"""How long the rows are that a stage packs: what was asked for, else what the model reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

from minnow.config import UserError

ROW_LENGTH = 1024
"""Tokens of a row where none are asked for and the model reads as many."""


@dataclass(frozen=True, kw_only=True)
class RowsConfig:
    """What all commands that pack rows share."""

    sequence_length: int | None = None
    """Tokens in a packed row: the longest text, or episode, that is seen at once. null: 1024, or what the model reads
    where that is less."""

    @property
    def row_length(self) -> int:
        """`sequence_length` after `with_row_length`."""
        assert self.sequence_length is not None, "a stage calls with_row_length first"
        return self.sequence_length


RowsConfigT = TypeVar("RowsConfigT", bound=RowsConfig)


def with_row_length(config: RowsConfigT, *limits: int | None) -> RowsConfigT:
    """Put a number in the place of a `sequence_length` that was not given: what the shortest of the models reads.

    limits: longest sequence of each model, in tokens; None has no limit. UserError for rows of no token.
    """
    if config.sequence_length is not None:
        if config.sequence_length < 1:
            raise UserError(f"sequence_length is {config.sequence_length}: it must be at least 1")
        return config
    length = min([ROW_LENGTH, *(limit for limit in limits if limit is not None)])
    return dataclasses.replace(config, sequence_length=length)
