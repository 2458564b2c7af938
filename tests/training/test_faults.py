"""What can go wrong around a run: each fault is named, and nothing that was finished is lost."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minnow import disk
from minnow.config import UserError
from minnow.data.batches import Share
from minnow.disk import DiskFull
from minnow.training import metrics_log
from minnow.training.checkpoint import list_checkpoints
from minnow.training.lock import FolderLock
from minnow.training.trainer import Trainer

from ..full_disk import full_disk
from .helpers import RandomSource, make_trainer


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = make_trainer(tmp_path_factory.mktemp("straight"))
    trainer.fit()
    return trainer


def stopped_run(folder: Path) -> Path:
    """A run of 12 steps that was stopped in step 9, with checkpoints of steps 6, 8 and 9; the folder of the newest."""
    trainer = make_trainer(folder, keep_last=3)
    trainer.source = DoAt(9, stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert [checkpoint.step for checkpoint in list_checkpoints(trainer.checkpoints)][-3:] == [6, 8, 9]
    return folder / "checkpoints" / "step-00000009"


class DoAt(RandomSource):
    """Does something when the batch of a step is asked for."""

    def __init__(self, step: int, act) -> None:
        super().__init__()
        self.step, self.act = step, act

    def micro_batches(self, step: int, share: Share) -> list:
        if step == self.step:
            self.act()
        return super().micro_batches(step, share)


def stop() -> None:
    raise KeyboardInterrupt


def assert_ends_the_same(folder: Path, straight: Trainer) -> Trainer:
    again = make_trainer(folder)
    again.resume()
    again.fit()
    for left, right in zip(again.parameters, straight.parameters, strict=True):
        assert torch.equal(left, right)
    return again


def cut_off(folder: Path) -> None:
    shard = next(folder.glob("shard-*"))
    os.truncate(shard, shard.stat().st_size - 100)


def flip_a_bit(folder: Path, pattern: str = "shard-*") -> None:
    shard = next(folder.glob(pattern))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)


def change_state(folder: Path) -> None:
    text = (folder / "state.json").read_text()
    (folder / "state.json").write_text(text.replace('"step": 9', '"step": 8'))


def lose_a_file(folder: Path) -> None:
    next(folder.glob("shard-*")).unlink()


def leave_unfinished(folder: Path) -> None:
    (folder / "complete.json").unlink()


def flip_a_bit_of_the_seal(folder: Path) -> None:
    content = bytearray((folder / "complete.json").read_bytes())
    content[3] ^= 128
    (folder / "complete.json").write_bytes(content)


def empty_the_seal(folder: Path) -> None:
    (folder / "complete.json").write_text("")


def seal_something_else(folder: Path) -> None:
    (folder / "complete.json").write_text('{"step": 9}')


DAMAGE = {
    cut_off: r"step-00000009: shard-\S+ has \d+ bytes, \d+ were written",
    flip_a_bit: r"step-00000009: shard-\S+ is not what was written",
    change_state: "step-00000009: state.json is not what was written",
    lose_a_file: r"step-00000009: shard-\S+ is missing",
    leave_unfinished: "step-00000009: unfinished",
    flip_a_bit_of_the_seal: r"step-00000009: complete\.json is damaged",
    empty_the_seal: r"step-00000009: complete\.json is damaged",
    seal_something_else: r"step-00000009: complete\.json is damaged",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path: Path, damage, straight: Trainer) -> None:
    damage(stopped_run(tmp_path))
    trainer = make_trainer(tmp_path)
    assert trainer.resume()
    assert trainer.state.step == 8
    assert len(trainer.passed_over) == 1
    assert re.search(DAMAGE[damage], trainer.passed_over[0])
    assert_ends_the_same(tmp_path, straight)


def test_where_none_is_whole_any_more_nothing_is_deleted(tmp_path: Path) -> None:
    """A disk that is not all there at the start must not cost the run."""
    newest = stopped_run(tmp_path)
    for checkpoint in list_checkpoints(newest.parent):
        cut_off(checkpoint.folder)
    kept = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    with pytest.raises(UserError, match="no checkpoint is whole any more.*step-00000006.*restore one, or"):
        make_trainer(tmp_path).resume()
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == kept


def test_a_run_that_never_finished_a_checkpoint_starts_anew(tmp_path: Path) -> None:
    newest = stopped_run(tmp_path)
    for checkpoint in list_checkpoints(newest.parent):
        leave_unfinished(checkpoint.folder)
    assert not make_trainer(tmp_path).resume()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_copy_beside_the_checkpoints_is_not_one(tmp_path: Path, straight: Trainer) -> None:
    newest = stopped_run(tmp_path)
    shutil.copytree(newest, newest.with_name("step-00000012.bak"))
    assert_ends_the_same(tmp_path, straight)
    assert newest.with_name("step-00000012.bak").exists()


def test_the_best_and_the_one_before_are_verified_too(tmp_path: Path) -> None:
    newest = stopped_run(tmp_path)
    trainer = make_trainer(tmp_path)
    trainer.resume()
    trainer.state.best_step = 8
    before = [parameter.clone() for parameter in trainer.parameters]
    flip_a_bit(newest.with_name("step-00000008"))
    with pytest.raises(UserError, match=r"step-00000008: shard-\S+ is not what was written"):
        trainer.load_best()
    assert all(map(torch.equal, trainer.parameters, before))
    assert trainer.load_before(9) == 6, "the damaged one is passed over"
    shutil.rmtree(newest.with_name("step-00000008"))
    with pytest.raises(UserError, match="no such checkpoint"):
        trainer.load_best()


def test_a_step_can_be_asked_for(tmp_path: Path, straight: Trainer) -> None:
    stopped_run(tmp_path)
    with pytest.raises(UserError, match="step 7: .*no such checkpoint"):
        make_trainer(tmp_path, resume=7).resume()
    trainer = make_trainer(tmp_path, resume=6)
    assert trainer.resume()
    assert trainer.state.step == 6
    assert list_checkpoints(trainer.checkpoints)[-1].step == 6, "later ones belong to another future"
    assert_ends_the_same(tmp_path, straight)


def test_a_full_disk_stops_the_run_in_words_and_spares_the_last_checkpoint(tmp_path: Path, straight: Trainer) -> None:
    """From step 7 on; a shard is larger than 20 kB."""
    trainer = make_trainer(tmp_path)
    with full_disk() as limit:

        def fill_the_disk() -> None:
            trainer.writer.wait()  # step 6 is written beside step 7
            limit(20_000)

        trainer.source = DoAt(7, fill_the_disk)
        with pytest.raises(UserError, match=r"step-00000008: .*the disk is full.*step-00000006 before it is whole"):
            trainer.fit()
    assert list_checkpoints(trainer.checkpoints)[-1].step == 6
    again = assert_ends_the_same(tmp_path, straight)
    assert "unfinished" in again.passed_over[0]


def test_a_full_disk_while_logging(tmp_path: Path, straight: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **settings: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer = make_trainer(tmp_path)
    trainer.source = DoAt(7, lambda: monkeypatch.setattr(metrics_log, "open", full, raising=False))
    with pytest.raises(DiskFull, match=r"metrics.jsonl: could not be written: the disk is full"):
        trainer.fit()
    monkeypatch.undo()
    assert_ends_the_same(tmp_path, straight)


def test_a_full_disk_at_what_the_source_keeps(tmp_path: Path, straight: Trainer) -> None:
    """torch.save tells of a short write as a RuntimeError about positions."""

    class Keeping(DoAt):
        def state_dict(self) -> dict:
            return {"kept": torch.zeros(10_000)}

        def load_state_dict(self, state: dict) -> None:
            pass

    trainer = make_trainer(tmp_path)
    with full_disk() as limit:

        def fill_the_disk() -> None:
            trainer.writer.wait()
            limit(20_000)

        trainer.source = Keeping(7, fill_the_disk)
        with pytest.raises(UserError, match=r"step-00000008: .*the disk is full.*step-00000006 before it is whole"):
            trainer.fit()
    assert_ends_the_same(tmp_path, straight)


def test_a_full_disk_at_the_mark_of_completeness(
    tmp_path: Path, straight: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path)

    def full(source: str, target: str | Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill_the_disk() -> None:
        trainer.writer.wait()
        monkeypatch.setattr(disk.os, "replace", full)

    trainer.source = DoAt(7, fill_the_disk)
    with pytest.raises(UserError, match=r"step-00000008: .*the disk is full.*step-00000006 before it is whole"):
        trainer.fit()
    monkeypatch.undo()
    assert_ends_the_same(tmp_path, straight)


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, straight: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**9, 0, -86_400))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: float(next(clock)))
        trainer = make_trainer(tmp_path)
        trainer.fit()
    for left, right in zip(trainer.parameters, straight.parameters, strict=True):
        assert torch.equal(left, right)
    assert all(record["tokens_per_second"] > 0 for record in trainer.metrics.read() if "loss" in record)


def test_a_clock_that_jumped_back_does_not_make_an_old_checkpoint_the_newest(tmp_path: Path, straight: Trainer) -> None:
    """The times of files are those of the clock: here each checkpoint looks a day older than the one before it."""
    stopped_run(tmp_path)
    for age, checkpoint in enumerate(list_checkpoints(tmp_path / "checkpoints")):
        for path in (*checkpoint.folder.rglob("*"), checkpoint.folder):
            os.utime(path, (1e9 - age * 86_400,) * 2)
    trainer = make_trainer(tmp_path)
    trainer.resume()
    assert trainer.state.step == 9
    assert_ends_the_same(tmp_path, straight)


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    program = """
import sys, time
from pathlib import Path
from minnow.training import metrics_log
from minnow.training.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.take()
"""
    other = [sys.executable, "-c", program + "print('taken', flush=True); time.sleep(60)", str(tmp_path)]
    with subprocess.Popen(other, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"taken\n"
        with pytest.raises(UserError, match=f"in use by process {holder.pid} on .*another --run"):
            FolderLock(tmp_path).take()
        holder.kill()
    lock = FolderLock(tmp_path)
    lock.take()  # the dead hold nothing
    lock.release()
