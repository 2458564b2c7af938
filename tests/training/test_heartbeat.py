"""Signs of life: the heartbeat file, the stall detector, and that none of those who look on changes what is learnt."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from minnow.data.batches import Share
from minnow.training import heartbeat
from minnow.training.heartbeat import Heartbeat, StallDetector
from minnow.training.signals import Interrupted

from .helpers import RandomSource, make_trainer
from .test_trainer import assert_equal_weights, metrics

PATIENCE = 60.0
"""Seconds after which a test gives up waiting for another thread."""


def beat_of(folder: Path) -> dict:
    return json.loads((folder / "heartbeat.json").read_text())


class Watching(RandomSource):
    """Keeps the state that the heartbeat tells at each step; ends the run with `error` at a step."""

    def __init__(self, folder: Path, error: BaseException | None = None) -> None:
        super().__init__()
        self.folder, self.error = folder, error
        self.seen: list[tuple[int, str]] = []

    def micro_batches(self, step: int, share: Share) -> list:
        if step == 2 and self.error is not None:
            raise self.error
        self.seen.append((beat_of(self.folder)["step"], beat_of(self.folder)["state"]))
        return super().micro_batches(step, share)


def test_the_heartbeat_says_how_far_the_run_is_and_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "SECONDS_BETWEEN_BEATS", 0.0)
    source = Watching(tmp_path)
    make_trainer(tmp_path, steps=3, source=source).fit()
    assert source.seen == [(0, "training"), (1, "training"), (2, "training")]
    beat = beat_of(tmp_path)
    assert (beat["step"], beat["total_steps"], beat["state"], beat["pid"]) == (3, 3, "trained", os.getpid())


@pytest.mark.parametrize(
    ("error", "state"), [(Interrupted(15, "asked"), "stopped"), (KeyboardInterrupt(), "stopped"), (OSError(), "failed")]
)
def test_the_heartbeat_tells_a_stop_from_a_failure(tmp_path: Path, error: BaseException, state: str) -> None:
    with pytest.raises(type(error)):
        make_trainer(tmp_path, steps=3, source=Watching(tmp_path, error)).fit()
    assert (beat_of(tmp_path)["step"], beat_of(tmp_path)["state"]) == (2, state)


def test_a_heartbeat_is_written_once_a_second_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    # Not of the module `time` itself: the loops of servers that other tests share live by its clock.
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: now, time=time.time))
    beats = Heartbeat(tmp_path, total_steps=9, stall_seconds=0)
    for at, step, written in ((100.0, 1, 1), (100.9, 2, 1), (101.0, 3, 3), (101.5, 4, 3)):
        now = at
        beats.beat(step)
        assert beat_of(tmp_path)["step"] == written
    beats.beat(5, "trained")
    assert beat_of(tmp_path)["step"] == 5


def test_a_heartbeat_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    Heartbeat(tmp_path / "file", total_steps=9, stall_seconds=0).beat(1)


class HangsOnce(RandomSource):
    """Hangs at a step until the stall has been reported."""

    def __init__(self, step: int, folder: Path) -> None:
        super().__init__()
        self.step, self.file = step, folder / "stalls" / "process-00000.txt"

    def micro_batches(self, step: int, share: Share) -> list:
        if step == self.step:
            self.hang_here()
        return super().micro_batches(step, share)

    def hang_here(self) -> None:
        waited = threading.Event()
        for _ in range(int(PATIENCE / 0.02)):
            if self.file.exists() and "in hang_here" in self.file.read_text():
                break
            waited.wait(0.02)


def test_a_stall_prints_the_stacks_and_the_run_goes_on_to_the_same_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = make_trainer(tmp_path / "plain", stall_seconds=0)
    plain.fit()
    assert not (tmp_path / "plain" / "stalls").exists()
    source = HangsOnce(5, tmp_path / "stalled")
    # Long enough that none of the tiny steps is taken for a stall: what follows would only be more reports.
    stalled = make_trainer(tmp_path / "stalled", stall_seconds=2.0, source=source)
    stalled.fit()
    report = source.file.read_text()
    assert "has not moved on from step 5 for 2 s" in report
    assert "in hang_here" in report
    assert "in train_step" in report
    assert report.strip() in capsys.readouterr().err
    assert_equal_weights(plain, stalled)
    assert metrics(plain) == metrics(stalled)


def test_a_stall_is_reported_once_and_the_next_one_again(tmp_path: Path) -> None:
    told: list[int] = []
    reported, looked = threading.Semaphore(0), threading.Semaphore(0)

    class Counting(StallDetector):
        def _tell(self) -> None:
            told.append(self._step)
            reported.release()

    detector = Counting(0.02, tmp_path, process=0)
    waits = detector._over.wait

    def counted(timeout: float | None = None) -> bool:
        looked.release()
        return waits(timeout)

    detector._over.wait = counted  # type: ignore[method-assign]
    with detector:
        for step in (3, 4):
            detector.beat(step)
            assert reported.acquire(timeout=PATIENCE)
            while looked.acquire(blocking=False):
                pass
            for _ in range(5):  # it goes on looking, and says nothing more
                assert looked.acquire(timeout=PATIENCE)
            assert told[-1] == step
    assert told in ([3, 4], [0, 3, 4])  # the thread may have looked before the first beat


def test_those_who_look_on_change_nothing(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path / "plain")
    plain.fit()
    watched = make_trainer(tmp_path / "watched", track=("tensorboard",), profile=True, stall_seconds=0.001)
    watched.fit()
    assert_equal_weights(plain, watched)
    assert metrics(plain) == metrics(watched)
