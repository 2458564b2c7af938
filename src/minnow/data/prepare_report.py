"""What became of the rows of a preparation, in numbers and in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PrepareReport:
    """What became of the rows."""

    rows: int
    """Rows read."""
    skipped_rows: int
    """Bad rows left out (only with on_bad_row: skip)."""
    documents: int
    """Documents or conversations used, repeats not counted."""
    cut_conversations: int
    """Conversations longer than a row, cut at turn borders."""
    cut_pieces: int
    """Pieces they gave."""
    long_turns: int
    """Single turns longer than a row, cut inside."""
    long_systems: int
    """Conversations whose system message, with its tools, fills a row alone: their turns are learnt without it."""
    bad_rows: tuple[str, ...]
    """FILE:LINE and what is wrong, of the first 20 rows left out."""
    long_pairs: int = 0
    """Preference pairs left out because both answers, each with the prompt, do not fit a row together."""
    long_shown: int = 0
    """Conversations with pictures left out because they do not fit a row."""

    @classmethod
    def of(cls, counts: Mapping[str, int], bad_rows: Sequence[str]) -> PrepareReport:
        """From what was counted (a Counter: what is not there is 0)."""
        return cls(
            rows=counts["rows"],
            skipped_rows=counts["bad_rows"],
            documents=counts["documents"],
            cut_conversations=counts["cut_conversations"],
            cut_pieces=counts["cut_pieces"],
            long_turns=counts["long_turns"],
            long_systems=counts["long_systems"],
            bad_rows=tuple(bad_rows),
            long_pairs=counts["long_pairs"],
            long_shown=counts["long_shown"],
        )

    @classmethod
    def read(cls, folder: Path) -> PrepareReport:
        """Of a folder that is whole."""
        report = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["report"]
        return cls(**{**report, "bad_rows": tuple(report["bad_rows"])})

    def warnings(self) -> list[str]:
        """Sentences for what the user should know."""
        found = []
        if self.skipped_rows:
            found.append(f"{self.skipped_rows} of {self.rows} rows are bad and were left out")
        if self.cut_conversations:
            found.append(
                f"{self.cut_conversations} of {self.documents} conversations are longer than a row and were cut at "
                f"turn borders into {self.cut_pieces} pieces"
            )
        if self.long_turns:
            found.append(f"{self.long_turns} single turns are longer than a row and were cut inside")
        if self.long_systems:
            found.append(
                f"{self.long_systems} conversations have a system message, tools included, longer than a row and are "
                "learnt without it: a longer sequence_length would keep it"
            )
        if self.long_pairs:
            found.append(
                f"{self.long_pairs} of {self.documents} pairs do not fit a row (both answers, each with the prompt) "
                "and were left out: a longer sequence_length would keep them"
            )
        if self.long_shown:
            found.append(
                f"{self.long_shown} conversations with pictures are longer than a row and were left out, as a cut "
                "could part an answer from the picture it speaks of: a longer sequence_length would keep them"
            )
        return found
