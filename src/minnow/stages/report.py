"""`minnow report RUN`: draw a run's curves and write its report again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from minnow.report.run_report import write_report


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write RUN/report.html from the run's metrics; works while the run is still going."""

    run: str = field(metadata={"positional": True})
    """Run folder."""


def run(config: Config) -> None:
    """Write the report and say where it is."""
    print(write_report(Path(config.run)))
