"""Tracking: the figures of a run shown in TensorBoard, Weights & Biases, SwanLab or trackio as well.

The run folder is the truth, a tracker a mirror of its logs. Line n of the logs is line n of every tracker, so what one
has not got yet (the end, after a SIGKILL; all of it, where it joined late) is simply the lines it lacks. A resumed run
writes the lines after its checkpoint again, the same to the bit: those that a tracker has are not told twice.
"""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml

from minnow.config import UserError
from minnow.disk import atomic_write
from minnow.training.metrics_log import METRICS, ROLLOUTS, LogFollower, Record

TrackerName = Literal["tensorboard", "wandb", "swanlab", "trackio"]

ID_FILE = "tracking.id"


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told about the run as a whole."""

    folder: Path
    name: str
    """For people: the last two parts of the folder's path, as in runs/sft."""
    id: str
    """Kept in the folder, so that a resumed run is the same run."""
    config: dict[str, Any]
    """config.yaml."""
    num_lines: int
    """Lines in the logs when the run starts or goes on."""


class Tracker(Protocol):
    """One place that shows figures. It is made with the TrackedRun; what goes wrong raises whatever it raises."""

    where: str
    """How to look at it, for people."""
    num_known: int
    """Lines that it has already, or that it must not be told again."""

    def log(self, line: int, step: int, figures: Mapping[str, float]) -> None:
        """Show one line: its number in the logs from 0, the updates done, numbers by name."""

    def finish(self, exit_code: int) -> None:
        """Write what is pending. exit_code: as the process's, 0 for a run that came to its end."""


class Tracking:
    """All trackers of a run. Without any it does nothing."""

    def __init__(self, names: Sequence[TrackerName], folder: Path, say: Callable[[str], None]) -> None:
        """Open the trackers and tell them the lines they lack. UserError when one cannot be opened.

        say: tells a person where the figures are, and when a tracker is given up.
        """
        self.say = say
        self.logs = (LogFollower(folder / METRICS), LogFollower(folder / ROLLOUTS))
        self.num_lines = 0
        self.trackers: dict[str, Tracker] = {}
        if not names:
            return
        require_trackers(names)
        lines = self._new_lines()
        run = TrackedRun(folder, _name(folder), _kept_id(folder), _config(folder), len(lines))
        for name in dict.fromkeys(names):
            self.trackers[name] = _open(name, run)
            say(f"{name}: {self.trackers[name].where}")
        self._tell(lines)

    def update(self) -> None:
        """Tell the lines that were added to the logs."""
        if self.trackers:
            self._tell(self._new_lines())

    def finish(self, exit_code: int) -> None:
        """Tell the last lines and close every tracker."""
        self.update()
        for name, tracker in self.trackers.items():
            try:
                tracker.finish(exit_code)
            except Exception as error:
                self.say(f"{name}: its last figures may be missing ({_one_line(error)})")
        self.trackers = {}

    def _new_lines(self) -> list[tuple[int, dict[str, float]]]:
        """(updates done, figures) of both logs in the order in which they came about.

        Rollouts that were played after update s stand between the lines of s and those of s + 1.
        """
        updates, phases = (log.read() for log in self.logs)
        lines = [(record["step"], _numbers(record)) for record in updates]
        lines += [(record["updates"], _numbers(record, "rollouts/")) for record in phases]
        return sorted(lines, key=lambda line: line[0])

    def _tell(self, lines: Sequence[tuple[int, dict[str, float]]]) -> None:
        for step, figures in lines:
            for name, tracker in list(self.trackers.items()):
                if self.num_lines >= tracker.num_known:
                    self._log(name, tracker, step, figures)
            self.num_lines += 1

    def _log(self, name: str, tracker: Tracker, step: int, figures: Mapping[str, float]) -> None:
        # A run of days must not end because a dashboard did. Nothing is lost: the next start tells what is missing.
        try:
            tracker.log(self.num_lines, step, figures)
        except Exception as error:
            del self.trackers[name]
            self.say(f"{name}: given up until the run is started again ({_one_line(error)}); {METRICS} goes on")


def require_trackers(names: Sequence[TrackerName]) -> None:
    """UserError where the package of one of `names` is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"training.track: {', '.join(missing)} is not installed; pip install 'minnow[track]' brings it")


def _open(name: str, run: TrackedRun) -> Tracker:
    from minnow.training import trackers

    try:
        return trackers.TRACKERS[name](run)
    except Exception as error:
        raise UserError(f"training.track: {name} could not be started: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _numbers(record: Record, prefix: str = "") -> dict[str, float]:
    """The figures among a line's values: neither the counters it is placed by, nor texts, nor what was not finite."""
    placed_by = ("step", "updates")
    return {prefix + k: v for k, v in record.items() if isinstance(v, int | float) and k not in placed_by}


def _name(folder: Path) -> str:
    return "/".join(folder.resolve().parts[-2:])


def _kept_id(folder: Path) -> str:
    file = folder / ID_FILE
    if not file.exists():
        with atomic_write(file) as temporary:
            temporary.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
