"""Files that are whole or not there, and a full disk told in words."""

from __future__ import annotations

import errno
import glob
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import IO, Any

from safetensors import SafetensorError

from minnow.config import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What libraries say that write by themselves and raise no OSError, or one without its number: safetensors (Rust's
# words), torch.save (a zip file shorter than what went into it), numpy's tofile.
_SIGNS = re.compile(
    rf"\(os error ({'|'.join(map(str, _FULL))})\)|inline_container.*unexpected pos|^\d+ requested and \d+ written"
)
_reading_umask = Lock()  # the umask is the process's: a second thread would take the first one's for the usual


class DiskFull(UserError):  # noqa: N818 (it is a state of the world, as OutOfMemory)
    """A file could not be written for want of room."""


def is_full(error: BaseException) -> bool:
    """Whether `error` says that the disk is full, or the user's share of it, or the largest file that may be."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return isinstance(error, OSError | RuntimeError | SafetensorError) and bool(_SIGNS.search(str(error)))


@contextmanager
def told_when_full(path: str | Path) -> Iterator[None]:
    """Raise `DiskFull` where what is done inside finds no room for `path`; any other error passes."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_full(error):
            raise
        raise DiskFull(
            f"{path}: could not be written: the disk is full. Make room, and run the same command again"
        ) from error


def opened_to_others(path: str | Path) -> None:
    """Give what a library closed to all but its owner (safetensors its files, mkdtemp its folders) the usual rights.

    A file system that has no such rights (a FAT stick, some network drives) is left as it is: what was written is good.
    """
    with _reading_umask:
        mask = os.umask(0o077)  # it can only be read by setting it
        os.umask(mask)
    usual = 0o777 if os.path.isdir(path) else 0o666
    with suppress(OSError):
        os.chmod(path, usual & ~mask)


def temporary_beside(path: Path, ending: str = "tmp") -> Path:
    """A hidden path beside `path` that no other process chooses, not even on another machine that shares the folder."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{ending}")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it is flushed and renamed, on failure removed.

    A reader therefore sees the whole file or none of it. DiskFull when there is no room for it.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    with told_when_full(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb+") as file:  # Windows flushes only what may be written
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def lock(file: IO[Any], *, wait: bool = False) -> bool:
    """Lock an open file until it is closed or the process ends; False where there are no locks (Windows, some file
    systems of clusters). BlockingIOError when another process has it, unless that is waited for (`wait`)."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


@contextmanager
def new_folder_beside(folder: Path) -> Iterator[Path]:
    """Give a new hidden folder beside `folder`, to be filled and renamed; what is still there at the end is removed.

    So is, before, what processes left there that were killed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    clear_left_overs(folder)
    temporary = temporary_beside(folder)
    held = temporary.with_suffix(".lock")
    try:
        with open(held, "w") as file:
            lock(file, wait=True)  # another may have found the file before it was locked, and taken it for a dead one's
            temporary.mkdir()
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        held.unlink(missing_ok=True)


def clear_left_overs(folder: Path) -> None:
    """Remove what killed processes left beside `folder`: each locks a file beside its own while it lives."""
    for held in folder.parent.glob(f".{glob.escape(folder.name)}.????????.lock"):
        _take_away(held, folder)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Put `temporary`, of `new_folder_beside`, in the place of `folder`: the old one stands aside meanwhile."""
    if not folder.exists():
        os.rename(temporary, folder)
        return
    aside = temporary.with_suffix(".old")
    os.rename(folder, aside)
    try:
        os.rename(temporary, folder)
    except OSError:
        os.rename(aside, folder)
        raise
    shutil.rmtree(aside)


def _take_away(held: Path, folder: Path) -> None:
    """Remove what the maker of the lock file `held` left, if it is dead; an old `folder` set aside comes back."""
    try:
        with open(held) as file:
            if not lock(file):
                return
            aside = held.with_suffix(".old")
            if aside.exists() and not folder.exists():  # killed between the two renames
                os.rename(aside, folder)
            for left_over in (aside, held.with_suffix(".tmp")):
                shutil.rmtree(left_over, ignore_errors=True)
            held.unlink(missing_ok=True)
    except OSError:  # alive, done just now, or another user's
        return
