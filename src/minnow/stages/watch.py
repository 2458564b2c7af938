"""`minnow watch RUN`: how a run is going, on one screen that keeps up with it."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.live import Live

from minnow.config import UserError
from minnow.console import plain_console
from minnow.report.dashboard import Record, RunView, dashboard, state_of
from minnow.report.lineage import stage_folders
from minnow.training.heartbeat import HEARTBEAT
from minnow.training.metrics_log import METRICS, ROLLOUTS, LogFollower

# Of a run whose stall detector is off.
STALLED_AFTER_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """Show how a run is going: progress, curves, speed, last validation, and whether it is alive. Ends with the run.

    It only reads; Ctrl-C leaves it.
    """

    run: str = field(metadata={"positional": True})
    """Run folder; of a run of several stages (a quickstart) all of them are shown."""
    once: bool = False
    """Print the present state and end; so it does too where the output is no terminal."""
    interval: float = 1.0
    """Seconds between two looks at the run's files."""

    def __post_init__(self) -> None:
        if not self.interval > 0:
            raise UserError(f"--interval is {self.interval}, but must be above 0")


def run(config: Config) -> None:
    """Draw until the run is finished, or once."""
    folder = Path(config.run)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such run")
    console, watch = plain_console(), Watch(folder)
    if config.once or not console.is_terminal:
        console.print(dashboard(watch.look()))
        return
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(dashboard(watch.look()), refresh=True)
                if has_model(folder):
                    return
                time.sleep(config.interval)
    except KeyboardInterrupt:
        pass


class Watch:
    """Follows the files of a run, or of the stages inside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.followed: dict[Path, Followed] = {}

    def look(self) -> list[RunView]:
        """Read what is new; the runs in the order in which they were made."""
        is_run = any((self.folder / name).exists() for name in (METRICS, HEARTBEAT))
        folders = [self.folder] if is_run else stage_folders(self.folder)
        return [self.followed.setdefault(folder, Followed(folder)).look() for folder in folders]


class Followed:
    """One run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.view = folder, RunView(str(folder))
        self.logs = (
            (LogFollower(folder / METRICS), self.view.updates),
            (LogFollower(folder / ROLLOUTS), self.view.phases),
        )

    def look(self) -> RunView:
        """Read what is new."""
        for log, records in self.logs:
            new = log.read()
            if log.from_start:
                records.clear()
            records += new
        view = self.view
        view.beat = _read_beat(self.folder / HEARTBEAT)
        # A clock that was put back, or another machine's that is ahead, makes no heartbeat of the future.
        view.age = max(0.0, time.time() - view.beat["time"]) if view.beat else 0.0
        view.state = state_of(
            view.beat,
            has_model=has_model(self.folder),
            age=view.age,
            is_alive=_is_alive(view.beat),
            default_stall=STALLED_AFTER_SECONDS,
        )
        return view


def has_model(folder: Path) -> bool:
    """Whether the final model is there: it is the last thing that a run writes."""
    return any((folder / "model" / name).is_file() for name in ("config.json", "adapter_config.json"))


def _read_beat(file: Path) -> Record | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _is_alive(beat: Record | None) -> bool:
    """False where the process that wrote `beat` is known to be gone: it ran on this machine."""
    if beat is None or beat["host"] != socket.gethostname() or os.name == "nt":
        return True  # on Windows the signal 0 would be Ctrl-C
    try:
        os.kill(beat["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
