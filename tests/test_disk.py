"""Files whole or not there; a full disk in words, whoever notices it first."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from minnow import disk
from minnow.data.shard_writer import ShardWriter
from minnow.data.shards import file_sha256
from minnow.disk import DiskFull, atomic_write, new_folder_beside, opened_to_others, replace_folder, told_when_full
from minnow.model.config import ModelConfig
from minnow.model.pretrained import save_pretrained
from minnow.model.transformer import CausalLM
from minnow.training.metrics_log import MetricsLog

from .full_disk import full_disk


def test_atomic_write_gives_the_whole_file_or_none(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.txt"
    with atomic_write(target) as temporary:
        temporary.write_text("one")
        assert not target.exists()
    assert target.read_text() == "one"
    with pytest.raises(ZeroDivisionError), atomic_write(target) as temporary:  # noqa: PT012
        temporary.write_text("two")
        _ = 1 / 0
    assert target.read_text() == "one"
    assert [path.name for path in target.parent.iterdir()] == ["file.txt"]


def test_two_machines_that_share_a_folder_choose_other_temporary_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes of one number wrote into one another's files: the name held nothing but that number."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with atomic_write(tmp_path / "file") as one, atomic_write(tmp_path / "file") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "file").read_text() == "one", "whole, and the last one to be done counts"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


KILLED = """
import os, signal, sys
from pathlib import Path
from minnow import disk
folder = Path(sys.argv[1])
with disk.new_folder_beside(folder) as temporary:
    (temporary / "weights").write_text("new")
    if sys.argv[2] == "between the renames":
        os.rename(folder, temporary.with_suffix(".old"))
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no locks: what a killed process left stays there")
@pytest.mark.parametrize("when", ["while it wrote", "between the renames"])
def test_what_a_killed_process_left_beside_a_folder_is_taken_away(tmp_path: Path, when: str) -> None:
    """Gigabytes of a model each, and nobody ever removed them."""
    folder = tmp_path / "model [1]"
    folder.mkdir()
    (folder / "weights").write_text("old")
    assert subprocess.run([sys.executable, "-c", KILLED, str(folder), when]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 3
    with new_folder_beside(folder) as temporary:
        assert (folder / "weights").read_text() == "old", "and the only model there is comes back"
        (temporary / "weights").write_text("newer")
        replace_folder(temporary, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model [1]"]
    assert (folder / "weights").read_text() == "newer"


def test_what_another_process_is_writing_beside_a_folder_stays(tmp_path: Path) -> None:
    with new_folder_beside(tmp_path / "model") as one:
        (one / "weights").write_text("one")
        with new_folder_beside(tmp_path / "model") as other:
            assert other != one
        assert (one / "weights").read_text() == "one"
    assert not list(tmp_path.iterdir())


def test_a_lock_that_another_process_is_looking_at_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had found the file before this process locked it: that ended in a BlockingIOError."""
    monkeypatch.setattr(disk, "temporary_beside", lambda folder: tmp_path / ".model.12345678.tmp")
    another = open(tmp_path / ".model.12345678.lock", "w")  # noqa: SIM115 - closed by the timer
    assert disk.lock(another)
    done = threading.Timer(0.2, another.close)
    done.start()
    with new_folder_beside(tmp_path / "model") as temporary:
        assert another.closed
        assert temporary.is_dir()


def test_two_writers_of_a_shard_do_not_meet(tmp_path: Path) -> None:
    writers = [ShardWriter(tmp_path, "shard", vocab_size=100, has_weights=False) for _ in range(2)]
    for writer in writers:
        for piece in (np.arange(50), np.arange(30)):
            writer.append(piece, np.array([len(piece)]), np.array([len(piece)]))
    entries = [writer.finish() for writer in writers]
    assert entries[0] == entries[1]
    assert file_sha256(tmp_path / "shard.tokens") == entries[0]["files"]["shard.tokens"]["sha256"]


def test_files_are_flushed_as_windows_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It flushes no file that is open for reading only: nothing could be written there."""
    flushed = []

    def fsync(descriptor: int) -> None:
        flushed.append(os.write(descriptor, b""))  # EBADF where it is open for reading only, as fsync gives it there

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("one")
    save_pretrained(CausalLM(ModelConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1)), tmp_path / "model")
    assert len(flushed) >= 3, "the file, and the model's"


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_what_is_opened_to_others_has_the_rights_of_any_file_or_folder(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        for made in (tmp_path / "made", tmp_path / "made" / "file"):
            if made.name == "file":
                made.touch(0o600)
            else:
                made.mkdir(0o700)
            opened_to_others(made)
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "made", tmp_path / "made" / "file")]
    assert modes == [0o777 & ~mask, 0o666 & ~mask]


def test_a_file_system_without_rights_takes_a_model_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAT refuses a chmod: a run would have failed over it after its last step."""

    def refused(path: object, mode: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refused)
    model = CausalLM(ModelConfig(vocab_size=500, hidden_size=32, num_hidden_layers=1))
    save_pretrained(model, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()


def _plain(path: Path) -> None:
    path.write_bytes(bytes(40_000))


def _numpy(path: Path) -> None:
    with open(path, "wb") as file:
        np.zeros(5_000).tofile(file)


def _safetensors(path: Path) -> None:
    save_file({"weight": torch.zeros(10_000)}, path)


def _torch(path: Path) -> None:
    torch.save({"weight": torch.zeros(10_000)}, path)


@pytest.mark.parametrize("write", [_plain, _numpy, _safetensors, _torch])
def test_whoever_writes_a_full_disk_is_told_in_words(tmp_path: Path, write: Callable[[Path], None]) -> None:
    with (
        pytest.raises(DiskFull, match=r"target: could not be written: the disk is full. Make room"),
        full_disk(20_000),
        atomic_write(tmp_path / "target") as temporary,
    ):
        write(temporary)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EACCES, os.strerror(errno.EACCES)),
        RuntimeError("CUDA error"),
        ValueError("3 requested and 2 written"),
        OSError("3 rows requested and 2 found"),
    ],
)
def test_other_errors_pass_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, told_when_full("target"):
        raise error
    assert raised.value is error


def test_a_model_that_finds_no_room_leaves_the_older_one(tmp_path: Path) -> None:
    model = CausalLM(ModelConfig(vocab_size=500, hidden_size=32, num_hidden_layers=1))
    save_pretrained(model, tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with pytest.raises(DiskFull, match=r"model: could not be written: the disk is full"), full_disk(20_000):
        save_pretrained(model, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_a_log_that_finds_no_room_is_named(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "rollouts.jsonl")
    log.append({"step": 1})
    with pytest.raises(DiskFull, match=r"rollouts.jsonl: could not be written"), full_disk(20):
        log.append({"step": 2})
    assert log.read() == [{"step": 1}], "a line that was cut short is left out"


def test_a_shard_that_finds_no_room_is_named(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "00000", 1000, has_weights=False)
    tokens, one = np.zeros(30_000, np.int64), np.array([30_000])
    with pytest.raises(DiskFull, match=r"00000.tokens: could not be written"), full_disk(20_000):  # noqa: PT012
        writer.append(tokens, one, one)
        writer.finish()  # a buffer may have held it back
    assert not (tmp_path / "00000.tokens").exists()
