"""A run as one screen of a terminal: state, progress, curves, speed, last validation. Drawn from its logs alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

Record = Mapping[str, Any]
State = Literal["no heartbeat", "running", "stalled", "stopped", "killed", "failed", "trained", "finished"]

COLOURS: dict[State, str] = {
    "no heartbeat": "yellow",
    "running": "green",
    "stalled": "bold red",
    "stopped": "yellow",
    "killed": "bold red",
    "failed": "bold red",
    "trained": "green",
    "finished": "bold green",
}

MARGIN = 9
"""Columns of a chart's labels."""

RECENT = 50
"""Lines whose mean pace the time left is reckoned from."""


@dataclass
class RunView:
    """What is known of one run at one moment."""

    name: str
    """Its folder as the user names it."""
    updates: list[Record] = field(default_factory=list)
    """Lines of metrics.jsonl."""
    phases: list[Record] = field(default_factory=list)
    """Lines of rollouts.jsonl."""
    state: State = "no heartbeat"
    beat: Record | None = None
    """heartbeat.json."""
    age: float = 0.0
    """Seconds since the heartbeat."""

    @property
    def training(self) -> list[Record]:
        """The lines of updates."""
        return [record for record in self.updates if record.get("loss") is not None]

    @property
    def validations(self) -> list[Record]:
        """The lines of validations."""
        return [record for record in self.updates if "loss" not in record]


def state_of(beat: Record | None, *, has_model: bool, age: float, is_alive: bool, default_stall: float) -> State:
    """What a run is doing, from its heartbeat. `is_alive`: False only where its process is known to be gone."""
    if has_model:
        return "finished"
    if beat is None:
        return "no heartbeat"
    if beat["state"] != "training":
        state: State = beat["state"]
        return state
    if not is_alive:
        return "killed"
    return "stalled" if age > (beat["stall_seconds"] or default_stall) else "running"


def dashboard(views: Sequence[RunView]) -> RenderableType:
    """The screen: a line for each run that came before, and the last one at length."""
    if not views:
        return Text("nothing is trained here yet", "yellow")
    return Group(*map(_line, views[:-1]), _panel(views[-1]))


def _line(view: RunView) -> Text:
    text = Text.assemble(
        (f"{view.name}  ", "bold"), (view.state, COLOURS[view.state]), no_wrap=True, overflow="ellipsis"
    )
    if view.training:
        last = view.training[-1]
        text.append(f"  {last['step']:,} updates  loss {last['loss']:.4f}")
    if view.validations:
        text.append(f"  {_figures(view.validations[-1])}")
    return text


def _panel(view: RunView) -> Panel:
    heading = Text(view.state, COLOURS[view.state])  # first, so that a long name does not cut it off
    if view.beat is not None and view.state not in ("finished", "trained"):
        heading.append(f", heartbeat {_duration(round(view.age))} ago", "default")
    heading.append(f"  {view.name}", "bold default")
    if not view.training:
        return Panel(Text("no update yet"), title=heading, title_align="left")
    parts = Group(_progress(view), Text(), _charts(view), Text(), _table(view))
    return Panel(parts, title=heading, title_align="left")


def _progress(view: RunView) -> Table:
    last = view.training[-1]
    total = last["step"] + round(last["eta_seconds"] / last["seconds"])
    step = max(last["step"], view.beat["step"] if view.beat else 0)
    pace = [record["seconds"] for record in view.training[-RECENT:]]
    left = (total - step) * sum(pace) / len(pace)
    row = Table.grid(padding=(0, 2, 0, 0), expand=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    done = f"{step:,}/{total:,}  {step / total:.0%}"
    ending = f"  {_duration(left)} left" if step < total and view.state in ("running", "stalled") else ""
    row.add_row(ProgressBar(total=total, completed=step), done + ending)
    return row


def _charts(view: RunView) -> Table:
    charts = [Chart("loss", [r["loss"] for r in view.training])]
    rewards = [r["reward"] for r in view.phases if r.get("reward") is not None]
    if rewards:
        charts.append(Chart("reward of the rollouts", rewards))
    for key, name in (("bits_per_byte", "held-out bits per byte"), ("validation_loss", "held-out loss")):
        values = [r[key] for r in view.validations if r.get(key) is not None]
        if values and len(charts) < 2:
            charts.append(Chart(name, values))
    row = Table.grid(padding=(0, 2, 0, 0), expand=True)
    for _ in charts:
        row.add_column(ratio=1)
    row.add_row(*charts)
    return row


def _table(view: RunView) -> Table:
    last = view.training[-1]
    rows = {
        "update": f"loss {last['loss']:.4f}  lr {last['lr']:.3g}  gradient norm {_or_nan(last['grad_norm']):.3g}",
        "speed": f"{last['tokens_per_second']:,.0f} tokens/s  {last['mfu']:.1%} of the matmul peak  "
        f"{_duration(last['seconds'])} an update",
        "so far": f"{last['tokens']:,} tokens  peak memory {last['memory_gb']:.2f} GB",
    }
    if view.validations:
        rows["validation"] = f"update {view.validations[-1]['step']:,}  {_figures(view.validations[-1])}"
    if view.phases:
        shown = ("reward", "pass@", "length", "truncated", "equal_groups", "entropy", "repetition", "kl_to_reference")
        phase = {key: value for key, value in view.phases[-1].items() if key.startswith(shown) and "/" not in key}
        rows["rollouts"] = f"phase {view.phases[-1]['step']:,}  {_figures(phase)}"
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _figures(record: Record) -> str:
    numbers = {k: v for k, v in record.items() if k != "step" and isinstance(v, int | float)}
    return "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def _duration(seconds: float) -> str:
    """0.25 s, 12 s, 3:05, 1:02:03, 2 days, 3:00:00."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    text = str(timedelta(seconds=round(seconds)))
    return text.removeprefix("0:").removeprefix("0")


@dataclass(frozen=True)
class Chart:
    """Values over time as columns of block characters, as wide as there is room; its range stands beside it."""

    name: str
    values: Sequence[float]
    height: int = 6
    """Rows of the terminal."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        means = column_means(self.values, max(1, options.max_width - MARGIN - 2))
        low, high = value_range(means)
        labels = [f"{high:.4g}", *[""] * (self.height - 2), f"{low:.4g}"]
        yield Text(f"{self.name}  {self.values[-1]:.4g}", "bold")
        for label, row in zip(labels, bars(means, self.height), strict=True):
            yield Segment(f"{label:>{MARGIN}} ", Style(dim=True))
            yield Segment(row, Style(color="cyan"))
            yield Segment.line()


def column_means(values: Sequence[float], width: int) -> list[float]:
    """The mean of each column's share of `values`; where there are fewer than columns, each fills several."""
    edges = [(column * len(values) // width, -(-(column + 1) * len(values) // width)) for column in range(width)]
    return [sum(values[start:stop]) / (stop - start) for start, stop in edges]


def value_range(values: Sequence[float]) -> tuple[float, float]:
    """The least value, and the greatest one after the first tenth: a loss falls so far at first that nothing else would
    be seen."""
    return min(values), max(values[len(values) // 10 :])


def bars(values: Sequence[float], height: int) -> list[str]:
    """Rows of block characters, the top one first: a column for each value, in eighths of a row."""
    low, high = value_range(values)
    shares = [min(1.0, (value - low) / (high - low)) if high > low else 0.5 for value in values]
    eighths = [max(1, round(share * 8 * height)) for share in shares]
    blocks = " ▁▂▃▄▅▆▇█"
    return ["".join(blocks[min(8, max(0, count - 8 * row))] for count in eighths) for row in reversed(range(height))]
