"""Worker processes that check and tokenise batches, in order and with little in flight.

Processes, because parsing, hashing and building lists of ids hold Python's lock. Plain child processes over pipes,
because a fork of a process with torch's and tokenizers' threads can hang, and a spawn runs the user's script again.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from minnow.config import UserError
from minnow.data import encoding
from minnow.data.encoding import Checked, EncodeOptions, RawBatch
from minnow.tokenizer.tokenizer import Tokenizer

Task = Literal["check", "encode"]


class Workers:
    """`num_workers` processes, or this one for 0. Use as a context manager."""

    def __init__(self, num_workers: int, tokenizer: Tokenizer) -> None:
        self.num_workers, self.tokenizer = num_workers, tokenizer
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Workers:
        if self.num_workers:
            self._folder = tempfile.TemporaryDirectory(prefix="minnow-")
            self.tokenizer.save_pretrained(Path(self._folder.name))
            paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
            self._processes = [
                subprocess.Popen(
                    [sys.executable, "-m", "minnow.data.workers", self._folder.name],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env={**os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"},
                    start_new_session=True,  # Ctrl-C is ours to handle; a worker ends when its pipe does
                )
                for _ in range(self.num_workers)
            ]
            self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
            for process in self._processes:
                self._idle.put(process)
            self._threads = ThreadPoolExecutor(self.num_workers)
        return self

    def __exit__(self, *_: object) -> None:
        if self._processes:
            for process in self._processes:
                process.kill()
            self._threads.shutdown(cancel_futures=True)
            for process in self._processes:
                process.communicate()  # reaps it and closes its pipes
            self._folder.cleanup()

    def map(self, task: Task, batches: Iterable[RawBatch], options: EncodeOptions) -> Iterator[tuple[RawBatch, Any]]:
        """Yield every batch and the result of `task` on it, in order; at most two per worker are read ahead."""
        if not self.num_workers:
            for batch in batches:
                yield batch, _perform(task, batch, options, self.tokenizer, num_threads=2)
            return
        pending: deque[tuple[RawBatch, Future[Checked]]] = deque()
        for batch in batches:
            pending.append((batch, self._threads.submit(self._ask, task, batch, options)))
            if len(pending) >= 2 * self.num_workers:
                done, result = pending.popleft()
                yield done, result.result()
        while pending:
            done, result = pending.popleft()
            yield done, result.result()

    def _ask(self, task: Task, batch: RawBatch, options: EncodeOptions) -> Checked:
        process = self._idle.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump((task, batch, options), process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            result = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise UserError(
                f"a tokenising process ended (exit code {process.wait()}), perhaps for lack of memory; run again to "
                "continue, with fewer --data.workers"
            ) from None
        finally:
            self._idle.put(process)  # a dead one too: whoever takes it next fails at once instead of waiting
        if isinstance(result, BaseException):
            raise result
        return result


def _perform(task: Task, batch: RawBatch, options: EncodeOptions, tokenizer: Tokenizer, num_threads: int) -> Checked:
    if task == "check":
        return encoding.check(batch, options)
    return encoding.encode(batch, options, tokenizer, num_threads=num_threads)


def _serve(tokenizer_folder: str) -> None:
    """Answer pickled tasks on stdin with pickled results on stdout until stdin ends."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not fall between the replies
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    while True:
        try:
            task, batch, options = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            reply: object = _perform(task, batch, options, tokenizer, num_threads=1)
        except Exception as error:
            reply = error
        try:
            pickle.dump(reply, replies, pickle.HIGHEST_PROTOCOL)
            replies.flush()
        except BrokenPipeError:
            os._exit(1)  # whoever asked is gone, and nobody else wants the rest of the buffer


if __name__ == "__main__":
    _serve(sys.argv[1])
