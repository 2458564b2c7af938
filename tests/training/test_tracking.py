"""Trackers show the lines of a run's logs: all of them, once, in one run, whatever happened between."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from minnow import cli
from minnow.config import UserError
from minnow.data.batches import Share
from minnow.training import trackers, tracking
from minnow.training.metrics_log import MetricsLog
from minnow.training.signals import Interrupted
from minnow.training.tracking import TrackedRun, Tracking, require_trackers

from .helpers import RandomSource, make_trainer

ROOT = Path(__file__).parents[2]
Line = tuple[int, dict[str, float]]

# Killed after 9 updates, when the newest checkpoint is that of step 8, which was saved before its validation: the
# resumed run writes that validation and update 9 again.
PROGRAM = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.training.helpers import RandomSource, make_trainer
class Killed(RandomSource):
    def micro_batches(self, step, share):
        if step == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().micro_batches(step, share)
trainer = make_trainer(
    Path(sys.argv[1]),
    track=("tensorboard", "wandb", "swanlab", "trackio"),
    validate_every=4,
    source=Killed() if sys.argv[2] == "killed" else None,
)
trainer.resume()
trainer.fit()
"""


@pytest.fixture(scope="module")
def nobody_answers() -> Iterator[socket.socket]:
    """A proxy that whoever wants to leave the machine must go through."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield server


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory: pytest.TempPathFactory, nobody_answers: socket.socket) -> Path:
    """A run with every tracker that was killed and then resumed; its log is run/metrics.jsonl."""
    folder = tmp_path_factory.mktemp("tracked")
    proxy = f"http://127.0.0.1:{nobody_answers.getsockname()[1]}"
    own = {"HOME": str(folder), "TRACKIO_DIR": str(folder / "trackio"), "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    own |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), proxy)
    for how, code in (("killed", -signal.SIGKILL), ("resumed", 0)):
        words = [sys.executable, "-c", PROGRAM, str(folder / "run"), how]
        done = subprocess.run(words, cwd=ROOT, env=without_keys() | own, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        (folder / f"id-{how}").write_text((folder / "run" / "tracking.id").read_text())
    assert "given up" not in done.stderr
    return folder


def without_keys() -> dict[str, str]:
    """The environment without what a developer may have configured."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "SWANLAB", "TRACKIO", "NETRC"))}


def logged(folder: Path) -> list[Line]:
    """What must be shown: the log's lines as (updates done, figures)."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 12]
    return [(line.pop("step"), line) for line in lines]


def curves(lines: list[Line]) -> dict[str, list[tuple[int, float]]]:
    """The same, a figure at a time."""
    found: dict[str, list[tuple[int, float]]] = {}
    for step, figures in lines:
        for name, value in figures.items():
            found.setdefault(name, []).append((step, value))
    return found


def test_the_run_keeps_its_id_over_a_sigkill(killed_and_resumed: Path) -> None:
    run_id = (killed_and_resumed / "id-resumed").read_text()
    assert run_id == (killed_and_resumed / "id-killed").read_text()
    run = killed_and_resumed / "run"
    assert [path.name.rpartition("-")[2] for path in run.glob("wandb/offline-run-*")] == [run_id.strip()]
    assert [path.name.rpartition("-")[2] for path in run.glob("swanlab/run-*")] == [run_id.strip()]


def test_nothing_left_the_machine(killed_and_resumed: Path, nobody_answers: socket.socket) -> None:
    with pytest.raises(BlockingIOError):
        nobody_answers.accept()


def test_tensorboard_shows_every_line_once(killed_and_resumed: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(killed_and_resumed / "run" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    expected = curves(logged(killed_and_resumed))
    assert set(events.Tags()["scalars"]) == set(expected)
    for name, points in expected.items():
        shown = events.Scalars(name)
        assert [point.step for point in shown] == [step for step, _ in points], name
        assert [point.value for point in shown] == pytest.approx([value for _, value in points], rel=1e-6), name


def test_wandb_has_every_line_once(killed_and_resumed: Path) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = (killed_and_resumed / "run" / "wandb").glob("offline-run-*/*.wandb")
    rows = []
    for record in map(Record.FromString, leveldb_records(file)):
        if record.WhichOneof("record_type") == "history":
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            rows.append((row.pop("step"), {k: v for k, v in row.items() if not k.startswith("_")}))
    assert rows == logged(killed_and_resumed)


def test_swanlab_has_every_line_once(killed_and_resumed: Path) -> None:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    (file,) = (killed_and_resumed / "run" / "swanlab").glob("*/*.swanlab")
    found: dict[str, list[tuple[int, float]]] = {}
    for record in map(Record.FromString, leveldb_records(file)):
        # The hardware's figures begin with two underscores.
        if record.WhichOneof("record_type") == "scalar" and not record.scalar.key.startswith("__"):
            found.setdefault(record.scalar.key, []).append((record.scalar.step, record.scalar.value.number))
    assert found == curves(logged(killed_and_resumed))


def test_trackio_has_every_line_once_in_one_run(killed_and_resumed: Path) -> None:
    with sqlite3.connect(killed_and_resumed / "trackio" / "minnow.db") as database:
        rows = database.execute("SELECT run_id, step, metrics FROM metrics ORDER BY id").fetchall()
    assert [(step, json.loads(figures)) for _, step, figures in rows] == logged(killed_and_resumed)
    assert len({run for run, _, _ in rows}) == 1


def leveldb_records(file: Path) -> Iterator[bytes]:
    """Records of LevelDB's log format: 7 bytes of file header, blocks of 32 KiB, (crc 4, length 2, kind 1) a piece."""
    data, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield parts
            parts = b""


# --- The order of lines, what goes wrong --------------------------------------------------------------


class Board:
    """A tracker that remembers what it was told."""

    where = "nowhere"
    num_known = 0
    made: list[Board]

    def __init__(self, run: TrackedRun) -> None:
        self.run, self.lines, self.exit_code = run, [], None
        self.made.append(self)

    def log(self, line: int, step: int, figures: Mapping[str, float]) -> None:
        self.lines.append((line, step, dict(figures)))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> type[Board]:
    """`--track wandb` opens a new Board; the ones that were opened are in `made`."""
    kind = type("FreshBoard", (Board,), {"made": []})
    monkeypatch.setitem(trackers.TRACKERS, "wandb", kind)
    return kind


def test_rollouts_stand_between_the_updates_before_and_after_them(tmp_path: Path, board: type[Board]) -> None:
    updates, phases = MetricsLog(tmp_path / "metrics.jsonl"), MetricsLog(tmp_path / "rollouts.jsonl")
    told = Tracking(["wandb"], tmp_path, lambda text: None)
    phases.append({"step": 0, "updates": 0, "reward": 0.5, "sample": {"text": "a"}})
    updates.append({"step": 1, "loss": 3.0, "grad_norm": float("nan")})
    told.update()
    updates.append({"step": 2, "loss": 2.0})
    told.update()
    updates.append({"step": 2, "held_out/reward": 0.1})
    told.update()
    phases.append({"step": 1, "updates": 2, "reward": 0.75})
    updates.append({"step": 3, "loss": 1.0})
    told.finish(0)
    expected = [
        (0, 0, {"rollouts/reward": 0.5}),
        (1, 1, {"loss": 3.0}),
        (2, 2, {"loss": 2.0}),
        (3, 2, {"held_out/reward": 0.1}),
        (4, 2, {"rollouts/reward": 0.75}),
        (5, 3, {"loss": 1.0}),
    ]
    assert board.made[0].lines == expected
    assert board.made[0].exit_code == 0
    # One that joins late, or whose files are written anew, is told the same at once.
    Tracking(["wandb"], tmp_path, lambda text: None)
    assert board.made[1].lines == expected
    assert board.made[1].run.id == board.made[0].run.id
    assert board.made[1].run.num_lines == 6


def test_a_tracker_is_not_told_what_it_knows(tmp_path: Path, board: type[Board]) -> None:
    board.num_known = 2
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "loss": 3.0})
    told = Tracking(["wandb"], tmp_path, lambda text: None)
    for step in (2, 3):
        log.append({"step": step, "loss": 3.0})
        told.update()
    assert [line for line, _, _ in board.made[0].lines] == [2]


def test_a_tracker_that_fails_is_given_up_and_the_run_goes_on(tmp_path: Path, board: type[Board]) -> None:
    def fail(self: Board, line: int, step: int, figures: Mapping[str, float]) -> None:
        raise ConnectionError("no\nroute")

    board.log = fail  # type: ignore[method-assign]
    said: list[str] = []
    told = Tracking(["wandb"], tmp_path, said.append)
    MetricsLog(tmp_path / "metrics.jsonl").append({"step": 1, "loss": 3.0})
    told.update()
    told.update()
    told.finish(0)
    assert len(said) == 2  # where to look, and that it is over
    assert said[1].startswith("wandb: given up")
    assert "no route" in said[1]


@pytest.mark.parametrize(("error", "code"), [(Interrupted(signal.SIGTERM, "asked"), 143), (OSError(), 1)])
def test_a_tracker_is_told_how_the_run_ended(
    tmp_path: Path, board: type[Board], error: BaseException, code: int
) -> None:
    class Ends(RandomSource):
        def micro_batches(self, step: int, share: Share) -> list:
            raise error

    with pytest.raises(type(error)):
        make_trainer(tmp_path, track=("wandb",), source=Ends()).fit()
    assert board.made[0].exit_code == code


def test_a_tracker_that_cannot_be_opened_ends_the_run_in_one_line(tmp_path: Path, board: type[Board]) -> None:
    def refuse(self: Board, run: TrackedRun) -> None:
        raise PermissionError("key\nrefused")

    board.__init__ = refuse  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"training\.track: wandb could not be started: key refused"):
        Tracking(["wandb"], tmp_path, lambda text: None)


def test_a_missing_package_is_told_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    run = tmp_path / "run"
    words = ["pretrain", "--run", str(run), "--track", "wandb,trackio", "--tokenizer", "t", "--data.paths", "d"]
    assert cli.main(words) == 2
    assert "wandb, trackio is not installed; pip install 'minnow[track]'" in capsys.readouterr().err
    assert not run.exists()
    monkeypatch.undo()
    require_trackers(["tensorboard", "wandb", "swanlab", "trackio"])


MODES = """
import os, sys
from pathlib import Path
import wandb
from minnow.training.trackers import WandB
from minnow.training.tracking import TrackedRun

asked = []
class Opened(Exception): ...
def init(**settings):
    asked.append((settings["mode"], settings["resume"]))
    raise Opened
wandb.init = init
for environment in ({}, {"WANDB_MODE": "disabled"}, {"WANDB_MODE": "", "WANDB_API_KEY": "k" * 40}):
    os.environ |= environment
    try:
        WandB(TrackedRun(Path(sys.argv[1]), "runs/a", "1a2b", {}, 0))
    except Opened:
        pass
print(asked)
"""


def test_wandb_goes_online_where_there_is_a_key_and_resumes_there(tmp_path: Path) -> None:
    own = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT / "src")}
    words = [sys.executable, "-c", MODES, str(tmp_path)]
    done = subprocess.run(words, cwd=tmp_path, env=without_keys() | own, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[('offline', None), ('disabled', None), ('online', 'allow')]"


def test_names_of_trackers_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    words: list[Any] = ["pretrain", "--track", "wandbb", "--tokenizer", "t", "--data.paths", "d"]
    assert cli.main(words) == 2
    assert "tensorboard, wandb, swanlab, trackio" in capsys.readouterr().err
