"""Are two mathematical expressions equal? By the library math-verify, in processes of its own, each for so long."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import queue
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from threading import Thread

from minnow.config import UserError

_log = logging.getLogger(__name__)
_PROGRAM = str(Path(__file__).with_name("maths_worker.py"))
MOST_WORKERS = 4
"""Processes at most; each holds sympy, some 100 MB."""


class MathsJudge:
    """Compares answers with references, in as many processes as there are cores and answers (at most MOST_WORKERS).

    Works on any thread: math-verify's own time limit is a signal, which only a main thread can have.
    """

    def __init__(self, seconds: float) -> None:
        """`seconds`: longest time for one comparison. UserError where math-verify is missing."""
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("rewards.answer_kind maths needs math-verify: pip install 'minnow[rl]'")
        self.seconds = seconds
        self._workers: list[_Worker] = []

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        """Whether each (answer, reference) is equal, in order; None where nobody can say within the time or memory.

        The same pair is compared once. UserError for a reference that is no mathematical expression.
        """
        waiting: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        for pair in dict.fromkeys(pairs):
            waiting.put(pair)
        wanted = min(MOST_WORKERS, os.cpu_count() or 1, waiting.qsize())
        self._workers += [_Worker() for _ in range(wanted - len(self._workers))]
        words: dict[tuple[str, str], str] = {}

        def work(worker: _Worker) -> None:
            while True:
                try:
                    pair = waiting.get_nowait()
                except queue.Empty:
                    return
                words[pair] = worker.ask(*pair, self.seconds)

        threads = [Thread(target=work, args=(worker,), daemon=True) for worker in self._workers[:wanted]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [self._read(words[pair], *pair) for pair in pairs]

    def _read(self, word: str, answer: str, reference: str) -> bool | None:
        if word == "unreadable":
            raise UserError(f"the reference {reference!r} is no mathematical expression: use answer_kind text")
        if word == "broken":
            raise UserError("math-verify cannot be loaded: try `python -c 'import math_verify'`")
        if word == "":
            _log.warning(
                "an answer was left out: it could not be compared with %r within rewards.maths_seconds (%g): %r",
                reference[:60], self.seconds, answer[-60:],
            )  # fmt: skip
            return None
        return word == "equal"


class _Worker:
    """One process, started again after it has died of a question."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, answer: str, reference: str, seconds: float) -> str:
        """The process's word: equal, different, unreadable; "" if it died, "broken" if it cannot live."""
        if self._process is None and not self._start():
            return "broken"
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        question = json.dumps({"answer": answer, "reference": reference, "seconds": seconds})
        try:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
            word = self._process.stdout.readline().strip()
        except BrokenPipeError:
            word = ""
        if not word:
            self._process.wait()
            self._process = None
        return word

    def _start(self) -> bool:
        # -P: the program's own folder, which has an http.py, is no place to import from
        process = subprocess.Popen(
            [sys.executable, "-P", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        weakref.finalize(self, _end, process)
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            process.wait()
            return False
        self._process = process
        return True


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
