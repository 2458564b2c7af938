"""`minnow report RUN`: draw a run's curves and write its report again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from minnow.config import UserError
from minnow.report.lineage import read_records, read_rollouts
from minnow.report.plots import comparison_figure, figures_of, save_figure
from minnow.report.run_report import write_report


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write RUN/report.html from the run's metrics; works while the run is still going."""

    run: str = field(metadata={"positional": True})
    """Run folder."""
    plot: str | None = None
    """File (.svg or .png) for the run's curves, or with --beside for the held-out ones of all runs."""
    beside: tuple[str, ...] = ()
    """Runs to compare with, in the same axes; it needs --plot."""


def run(config: Config) -> None:
    """Write the report and say where it is."""
    if config.beside and config.plot is None:
        raise UserError("--beside draws runs together: say where to, with --plot FILE.svg")
    records = {Path(each): _records(Path(each)) for each in (config.run, *config.beside)} if config.plot else {}
    print(write_report(Path(config.run)))
    if config.plot is not None:
        first = Path(config.run)
        if config.beside:
            figure = comparison_figure(records)
        else:
            figure = figures_of(records[first], read_rollouts(first), first.name)[0]
        save_figure(figure, Path(config.plot))
        print(config.plot)


def _records(run: Path) -> list[dict[str, object]]:
    if not (run / "metrics.jsonl").is_file():
        raise UserError(f"{run} holds no metrics.jsonl: --plot draws single runs, such as a stage of a quickstart")
    return read_records(run / "metrics.jsonl")
