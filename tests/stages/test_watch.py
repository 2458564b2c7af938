"""`minnow watch` on folders as runs leave them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from minnow import cli
from minnow.stages.watch import Watch
from minnow.training.metrics_log import MetricsLog

FIGURES = {
    "loss": 2.0,
    "lr": 0.1,
    "grad_norm": 1.0,
    "tokens": 9,
    "tokens_per_second": 5.0,
    "mfu": 0.5,
    "memory_gb": 1.0,
}


def write_run(folder: Path, steps: int, *, state: str = "training", pid: int | None = None) -> MetricsLog:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("run: x\n")
    log = MetricsLog(folder / "metrics.jsonl")
    for step in range(1, steps + 1):
        log.append({"step": step, **FIGURES, "eta_seconds": 10.0 - step, "seconds": 1.0})
    beat = {"step": steps, "total_steps": 10, "state": state, "time": time.time(), "stall_seconds": 300.0}
    beat |= {"pid": pid or os.getpid(), "host": socket.gethostname()}
    (folder / "heartbeat.json").write_text(json.dumps(beat))
    return log


def finish(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")


def test_one_frame_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", 4)
    assert cli.main(["watch", str(tmp_path / "run"), "--once"]) == 0
    text = capsys.readouterr().out
    assert "running" in text
    assert "4/10  40%" in text


def test_stages_inside_a_run_and_one_that_was_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "pretrain", 10, state="trained")
    finish(tmp_path / "pretrain")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write_run(tmp_path / "sft", 3, pid=gone.pid)
    (first, second) = Watch(tmp_path).look()
    assert (Path(first.name).name, first.state) == ("pretrain", "finished")
    assert (Path(second.name).name, second.state) == ("sft", "killed")


def test_a_heartbeat_is_never_of_the_future(tmp_path: Path) -> None:
    """The clock was put back, or that of another machine, which trains, is ahead."""
    write_run(tmp_path / "run", 3)
    beat = json.loads((tmp_path / "run" / "heartbeat.json").read_text())
    (tmp_path / "run" / "heartbeat.json").write_text(json.dumps(beat | {"time": time.time() + 3600}))
    (view,) = Watch(tmp_path / "run").look()
    assert (view.state, view.age) == ("running", 0.0)


def test_only_a_process_of_this_machine_is_known_to_be_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same number on another machine is another process; one that may not be signalled is somebody's."""
    write_run(tmp_path / "run", 3)
    gone: list[type[OSError]] = [ProcessLookupError]

    def kill(pid: int, signal: int) -> None:
        raise gone[0]

    monkeypatch.setattr(os, "kill", kill)
    assert Watch(tmp_path / "run").look()[0].state == "killed"
    gone[0] = PermissionError
    assert Watch(tmp_path / "run").look()[0].state == "running"
    gone[0] = ProcessLookupError
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    assert Watch(tmp_path / "run").look()[0].state == "running"


def test_a_run_of_adapters_is_finished_with_its_adapter(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 10, state="trained")
    assert Watch(tmp_path / "run").look()[0].state == "trained"
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "model" / "adapter_config.json").write_text("{}")
    assert Watch(tmp_path / "run").look()[0].state == "finished"


def test_a_run_that_plays_its_first_rollouts_is_a_run(tmp_path: Path) -> None:
    log = write_run(tmp_path / "rl", 0)
    assert not log.path.exists()
    MetricsLog(tmp_path / "rl" / "rollouts.jsonl").append({"step": 0, "updates": 0, "reward": 0.5})
    (view,) = Watch(tmp_path / "rl").look()
    assert (view.state, view.updates, [phase["reward"] for phase in view.phases]) == ("running", [], [0.5])


def test_it_follows_a_run_that_is_resumed(tmp_path: Path) -> None:
    log = write_run(tmp_path / "run", 4)
    watch = Watch(tmp_path / "run")
    assert len(watch.look()[0].updates) == 4
    log.rewind(2)
    assert [record["step"] for record in watch.look()[0].updates] == [1, 2]
    log.append({"step": 3, "loss": 0.5})
    assert [record["step"] for record in watch.look()[0].updates] == [1, 2, 3]


def test_it_ends_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    write_run(folder, 4)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes that for a terminal
    monkeypatch.setenv("TERM", "xterm")
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        finish(folder)

    monkeypatch.setattr("minnow.stages.watch.time", SimpleNamespace(sleep=sleep, time=time.time))
    assert cli.main(["watch", str(folder), "--interval", "0.5"]) == 0
    assert looks == [0.5]
    assert "finished" in capsys.readouterr().out


def test_without_a_terminal_one_look_is_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A log or a pipe would be filled with frames, for as long as the run lasts."""
    write_run(tmp_path / "run", 4)

    def sleep(seconds: float) -> None:
        raise AssertionError("it looks again")

    monkeypatch.setattr("minnow.stages.watch.time", SimpleNamespace(sleep=sleep, time=time.time))
    assert cli.main(["watch", str(tmp_path / "run")]) == 0
    assert "running" in capsys.readouterr().out


def test_ctrl_c_leaves_it_without_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run", 4)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")

    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("minnow.stages.watch.time", SimpleNamespace(sleep=sleep, time=time.time))
    assert cli.main(["watch", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(("age", "state"), [(250, "running"), (350, "stalled")])
def test_a_run_without_a_stall_detector_stands_still_after_five_minutes(age: int, state: str, tmp_path: Path) -> None:
    write_run(tmp_path / "run", 4)
    file = tmp_path / "run" / "heartbeat.json"
    beat = json.loads(file.read_text()) | {"stall_seconds": 0.0, "time": time.time() - age}
    file.write_text(json.dumps(beat))
    (view,) = Watch(tmp_path / "run").look()
    assert view.state == state
    assert view.age >= age


def test_no_such_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["watch", str(tmp_path / "none"), "--once"]) == 2
    assert "there is no such run" in capsys.readouterr().err


def test_an_interval_is_above_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Below it the second look ended in a traceback."""
    assert cli.main(["watch", str(tmp_path), "--interval", "-1"]) == 2
    assert "--interval is -1.0, but must be above 0" in capsys.readouterr().err
