"""A process that prepares data while another trains on it, and ends with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from minnow.config import UserError
from minnow.data.encoding import Kind
from minnow.data.job import DataConfig, find_job
from minnow.data.preparation import prepare_streaming
from minnow.data.prepare_report import PrepareReport
from minnow.host import num_cores
from minnow.tokenizer.tokenizer import Tokenizer


class Background:
    """The process: started here, watched by `check`, ended by `close` or with this process."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, kind: Kind, sequence_length: int) -> None:
        if config.workers is None:  # a core is left to the training
            config = replace(config, workers=max(1, num_cores() - 1))
        self._folder = tempfile.TemporaryDirectory(prefix="minnow-")
        tokenizer.save_pretrained(Path(self._folder.name))
        task = {"data": asdict(config), "kind": kind, "sequence_length": sequence_length}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "minnow.data.background", self._folder.name],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            start_new_session=True,  # Ctrl-C is ours to handle; it ends when its pipe does
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task).encode() + b"\n")
        self._process.stdin.flush()

    def ended_badly(self) -> str | None:
        """Say so if the process has ended without having done its work."""
        code = self._process.poll()
        if not code:
            return None
        return (
            f"the process that prepares the data ended (exit code {code}), perhaps for lack of memory; run again to "
            "go on, with fewer --data.workers"
        )

    def close(self) -> None:
        """End the process, whatever it does; what it has finished stays."""
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()


def _serve(tokenizer_folder: str) -> int:
    task = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    data: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in task["data"].items()
    }
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    job = find_job(DataConfig(**data), tokenizer, task["kind"], task["sequence_length"])
    try:
        prepare_streaming(job)
    except UserError:
        return 2  # the journal tells it to whoever reads along
    for warning in PrepareReport.read(job.folder).warnings():
        print(f"note: {warning}", file=sys.stderr)
    return 0


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # not by way of sys.stdin, whose lock it would hold when the process ends
    os._exit(1)


if __name__ == "__main__":
    sys.exit(_serve(sys.argv[1]))
