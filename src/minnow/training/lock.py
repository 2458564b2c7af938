"""One run a folder: a lock that the operating system takes back from whoever dies."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import IO

from minnow.config import UserError
from minnow.disk import lock

FILE = ".lock"


class FolderLock:
    """Held from `take` to `release`, or to the end of the process, however it ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Take the lock. UserError naming its holder when another process has it."""
        if self._file is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = open(self.folder / FILE, "a+", encoding="utf-8")  # noqa: SIM115 - open as long as it is held
        try:
            locked = lock(file)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"{self.folder} is in use by {holder}: wait for it, stop it, or give another --run"
            ) from None
        if not locked:
            file.close()
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._file = file

    def release(self) -> None:
        """Let others have it."""
        if self._file is not None:
            self._file.close()
            self._file = None
